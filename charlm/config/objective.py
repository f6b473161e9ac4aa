"""The auxiliary losses."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import Literal

from charlm.config.errors import require

Decay = Literal["constant", "linear", "cosine", "cutoff"]
Depth = int | float | str
"""A layer: its number (1 is the lowest), or a fraction of the depth, 0.5 or "1/3" (1.0 or "1/1" is the last)."""


def layer_at(depth: Depth, num_layers: int) -> int:
    """The layer that `depth` names: a number itself, of a fraction f of L layers floor(f * L + 1/2), at least 1."""
    return depth if isinstance(depth, int) else max(1, int(_fraction(depth) * num_layers + Fraction(1, 2)))


def _fraction(depth: float | str) -> Fraction:
    return Fraction(depth) if isinstance(depth, str) else Fraction(repr(depth))  # as decimals: 0.7 * 5 rounds up


def _require_depth(name: str, value: object, depth: Depth) -> None:
    """A number is held against the model's layers later, by `Config`."""
    if isinstance(depth, str):
        valid = re.fullmatch(r"\d{1,9}/[1-9]\d{0,8}", depth) and 0 < Fraction(depth) <= 1
    else:
        valid = isinstance(depth, int) or 0 < depth <= 1
    require(valid, name, value, f"{depth} is no fraction of the depth in (0, 1], such as 1/3 or 0.5")


def _require_weight(name: str, value: float) -> None:
    require(0 <= value < float("inf"), name, value, "must be finite and at least 0")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of training with weights of its own, under schedule=stages."""

    weights: tuple[float, ...]
    """Of targets: the weight of each offset from 1 on, none of those left out. Of layers: of each intermediate layer
    with a head in rising order, or one for all."""
    until: float = 1.0
    """What the schedule's clock reads when the stage ends. The last stage ends at 1."""


@dataclass(frozen=True, kw_only=True)
class AuxLossConfig:
    """What every auxiliary loss has: a switch and a schedule, whose clock runs from 0 at `start` to 1 at `end`."""

    enabled: bool = True
    """false removes exactly this loss's rows from the table of terms."""
    start: float = 0.0
    """Progress at which the schedule's clock starts; before it the schedule stands at its beginning."""
    end: float = 1.0
    """Progress at which the schedule's clock has run out."""

    _section = "aux"

    def __post_init__(self):
        require(0 <= self.start <= 1, f"{self._section}.start", self.start, "must lie in [0, 1]")
        require(0 <= self.end <= 1, f"{self._section}.end", self.end, "must lie in [0, 1]")
        require(self.start <= self.end, f"{self._section}.start", self.start, f"must not exceed end={self.end}")


@dataclass(frozen=True, kw_only=True)
class PositionsConfig(AuxLossConfig):
    """Prediction at all positions of a window, not only at the last (Al-Rfou et al. 2018, "Multiple Positions")."""

    schedule: Decay = "constant"
    """The share w of the loss that all positions carry; the last position alone carries the rest, 1 - w.
    constant: w stays 1; linear, cosine: w falls to 0; cutoff: w is 1 until the clock runs out, then 0."""

    _section = "aux.positions"


@dataclass(frozen=True, kw_only=True)
class StagedLossConfig(AuxLossConfig):
    """An auxiliary loss whose weights may be a table of stages."""

    stages: tuple[Stage, ...] = ()
    """Of schedule=stages, as a YAML list: [{until: 0.4, weights: [1, 0.5, 0.25]}, {weights: [1]}]."""
    passage: Literal["step", "linear"] = "step"
    """From stage to stage: step holds a stage's weights until it ends; linear moves them within each stage on a
    straight line to those of the next (Jordan et al. 2024, modded-nanogpt). The last stage holds its own."""

    def __post_init__(self):
        super().__post_init__()
        is_staged, name = self.schedule == "stages", f"{self._section}.stages"
        require(bool(self.stages) or not is_staged, f"{self._section}.schedule", "stages", f"needs {name}")
        ends = [0.0, *(stage.until for stage in self.stages)]
        rise = all(earlier < later for earlier, later in pairwise(ends))
        require(
            not self.stages or (rise and ends[-1] == 1), name, _shown(self.stages), "until must rise to 1 at the end"
        )
        for stage in self.stages:
            require(len(stage.weights) > 0, name, _shown(self.stages), "a stage has no weights")
            for weight in stage.weights:
                _require_weight(f"{name}.weights", weight)


def _shown(stages: tuple[Stage, ...]) -> str:
    return "[" + ", ".join(f"{{until: {stage.until}, weights: {list(stage.weights)}}}" for stage in stages) + "]"


@dataclass(frozen=True, kw_only=True)
class LayersConfig(StagedLossConfig):
    """A prediction head on intermediate layers (Al-Rfou et al. 2018, "Intermediate Layer Losses")."""

    schedule: Literal["staggered", "linear", "cosine", "constant", "cutoff", "rotational", "gradual", "stages"] = (
        "staggered"
    )
    """staggered: layer l of n stops when the clock reads l/(2n) (the paper). gradual: layer l starts when the clock
    reads (n - l)/(2n), the highest first; rotational: at each step every R-th head is on, at the next step the heads
    after those (both Elhoushi et al. 2024, LayerSkip, section 4.1.2). stages: see there; the others act on all
    layers alike."""
    rotation: int | None = None
    """R of schedule=rotational: each head is on at one of R steps. null: as many as there are heads, so one a step."""
    every: int = 1
    """Heads on every k-th intermediate layer: k, 2k, ... The last layer always has one."""
    at: tuple[Depth, ...] | None = None
    """Heads on these layers in place of every k-th, as a YAML list of numbers (1 = the lowest) or fractions of the
    depth: [3, 6, 9] or [1/3, 0.5]. A fraction f of L layers is layer floor(f * L + 1/2), at least 1; 1.0 is the last.
    Fractions that meet on one layer make one head."""
    weighting: Literal["uniform", "linear", "quadratic", "power"] = "uniform"
    """How an intermediate layer's weight grows with its number l of L: uniform 1; linear l/L; quadratic
    l(l+1)/(L(L+1)) (LayerSkip's sum of 1..l); power max(0.01, (l/L)^gamma) (AuxNet, arXiv 1611.01773)."""
    gamma: float = 2.0
    """The exponent of weighting=power."""
    weights: tuple[float, ...] | dict[Depth, float] | None = None
    """Explicit weights in place of a weighting, as YAML: a list, one for each intermediate layer with a head in rising
    order, or a mapping, {4: 0.3, 8: 0.3} or {1/3: 0.3}, which also says which layers have a head."""
    weight: float = 1.0
    """Factor on the weight of every intermediate layer's loss; the last layer's is main_weight."""
    total: float | None = None
    """Scale the intermediate layers' weights, before their schedules, so that they sum to this."""
    head: Literal["linear", "shared", "shared_frozen", "tower"] = "linear"
    """Of intermediate layers. linear: each its own classifier (the paper); shared: the final norm and the last layer's
    classifiers (LayerSkip); shared_frozen: the same, and these losses teach the layers below but not them; tower: norm,
    hidden layer, activation, dropout and classifier (Szegedy et al. 2015, GoogLeNet; Zhao et al. 2017, PSPNet)."""
    tower_width: int | None = None
    """Width of a tower's hidden layer; null is d_model."""
    tower_dropout: float = 0.0
    """Dropout after a tower's activation."""
    hinge: float = 0.0
    """An intermediate layer's loss counts only above so many nats per character (Lee et al. 2015, DSN)."""

    _section = "aux.layers"

    def __post_init__(self):
        super().__post_init__()
        require(self.every >= 1, "aux.layers.every", self.every, "must be at least 1")
        for name in ("rotation", "tower_width"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"aux.layers.{name}", value, "must be at least 1, or null")
        for name in ("weight", "gamma", "hinge"):
            _require_weight(f"aux.layers.{name}", getattr(self, name))
        require(0 <= self.tower_dropout < 1, "aux.layers.tower_dropout", self.tower_dropout, "must lie in [0, 1)")
        total_works = self.total is None or 0 < self.total < float("inf")
        require(total_works, "aux.layers.total", self.total, "must be positive and finite, or null")
        at = None if self.at is None else list(self.at)
        for depth in at or ():
            _require_depth("aux.layers.at", at, depth)
        require(at is None or len({str(depth) for depth in at}) == len(at), "aux.layers.at", at, "names a layer twice")
        if self.weights is not None:
            self._check_weights()

    def _check_weights(self) -> None:
        shown = self.weights if isinstance(self.weights, dict) else list(self.weights)
        for weight in self.weights.values() if isinstance(self.weights, dict) else self.weights:
            require(0 <= weight < float("inf"), "aux.layers.weights", shown, "must be finite and at least 0")
        for depth in self.weights if isinstance(self.weights, dict) else ():
            _require_depth("aux.layers.weights", shown, depth)
        require(
            self.weighting == "uniform",
            "aux.layers.weights",
            shown,
            f"would stand in place of weighting={self.weighting}; set one of the two",
        )
        require(
            not isinstance(self.weights, dict) or self.at is None,
            "aux.layers.weights",
            shown,
            "a mapping names its layers itself; leave aux.layers.at=null, or give a list",
        )

    def intermediate(self, num_layers: int) -> tuple[int, ...]:
        """The layers below the last that have a head, in rising order."""
        if not self.enabled:
            return ()
        if isinstance(self.weights, dict):
            layers = {layer_at(depth, num_layers) for depth in self.weights}
        elif self.at is not None:
            layers = {layer_at(depth, num_layers) for depth in self.at}
        else:
            layers = set(range(self.every, num_layers, self.every))
        return tuple(sorted(layer for layer in layers if layer < num_layers))


@dataclass(frozen=True, kw_only=True)
class TargetsConfig(StagedLossConfig):
    """Prediction of characters several steps ahead (Al-Rfou et al. 2018, "Multiple Targets")."""

    schedule: Literal["constant", "linear", "cosine", "cutoff", "growing", "shrinking", "stages"] = "constant"
    """How the extra targets' weight decays. growing, shrinking: the number of targets rises from 1 to num_targets K, or
    falls from K to 1, in K equal parts of the clock (Aynetdinov and Akbik 2025, curricula for multi-token prediction).
    stages: see there; their weights are those of all targets, the next character included, and `weight` is not used."""
    num_targets: int = 2
    """Characters predicted at each position: the next one and num_targets - 1 after it."""
    weight: float = 0.5
    """Weight of each extra target, multiplied into its layer's loss."""
    layers: Literal["all", "last"] = "all"
    """Which layers predict the extra targets: all with a head (the paper), or the last alone, so that the others
    predict the next character only."""

    _section = "aux.targets"

    def __post_init__(self):
        super().__post_init__()
        require(1 <= self.num_targets <= 1000, "aux.targets.num_targets", self.num_targets, "must lie in [1, 1000]")
        _require_weight("aux.targets.weight", self.weight)
        longest = max((len(stage.weights) for stage in self.stages), default=0)
        require(
            longest <= self.num_targets,
            "aux.targets.stages",
            _shown(self.stages),
            f"a stage has {longest} weights, and there are num_targets={self.num_targets} targets",
        )


@dataclass(frozen=True, kw_only=True)
class HedgeConfig:
    """Hedge backpropagation: the weights of the layers' losses are learned online (Sahoo et al. 2018)."""

    enabled: bool = False
    """Each layer's rows are multiplied by a weight alpha, at first the same for all L' layers with a head; after each
    update it becomes max(alpha * beta^loss, smoothing / L'), and all are normalised to sum to 1."""
    beta: float = 0.99
    """The discount: the lower, the faster a layer with a high loss loses weight."""
    smoothing: float = 0.2
    """What all layers together keep at least."""

    def __post_init__(self):
        require(0 < self.beta < 1, "aux.hedge.beta", self.beta, "must lie between 0 and 1")
        require(0 <= self.smoothing < 1, "aux.hedge.smoothing", self.smoothing, "must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """An auxiliary task of your own, registered with `charlm.auxiliary_task`."""

    weight: float
    """Of its loss."""
    layer: Depth | None = None
    """The layer whose hidden states it reads, a number or a fraction of the depth; null is the last."""
    schedule: Decay = "constant"
    """How its weight decays."""
    start: float = 0.0
    """As for the other losses."""
    end: float = 1.0
    """As for the other losses."""

    def __post_init__(self):
        _require_weight("aux.tasks: weight", self.weight)
        require(0 <= self.start <= self.end <= 1, "aux.tasks: start", self.start, f"0 <= start <= end={self.end} <= 1")
        if self.layer is not None:
            _require_depth("aux.tasks: layer", self.layer, self.layer)


@dataclass(frozen=True, kw_only=True)
class AuxConfig:
    """The auxiliary losses; `scripts/explain.py` prints the table of terms that they make."""

    positions: PositionsConfig = field(default_factory=PositionsConfig)
    layers: LayersConfig = field(default_factory=LayersConfig)
    targets: TargetsConfig = field(default_factory=TargetsConfig)
    hedge: HedgeConfig = field(default_factory=HedgeConfig)
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    """Tasks of your own by name, as a YAML mapping to a weight or to all options: {order: 0.1} or
    {order: {weight: 0.1, layer: 4}}. docs/tasks.md shows how one is written."""
    reduction: Literal["sum", "mean", "weighted_mean"] = "sum"
    """Add the losses of the active layers, or average them: divide by their number, or by the sum of their weights
    (LayerSkip). The paper does not say."""
    main_weight: float = 1.0
    """Weight of the last layer's loss."""
    route: Literal["joint", "relay", "pairwise", "multiway"] = "joint"
    """How the gradients of several layers' losses reach the trunk. joint: one backward pass of their weighted sum;
    relay: an intermediate layer's gradient is blocked relay_layers below its head; pairwise: layer after layer,
    forward, backward and update of what lies below; multiway: one forward pass, a backward pass per layer, then an
    update per layer with optimizer state and a step size of its own (both AuxNet, arXiv 1611.01773)."""
    relay_layers: int = 1
    """Layers that an intermediate gradient of route=relay reaches, the one under its head included."""
    step_sizes: Literal["auxnet", "common"] = "auxnet"
    """Of route=multiway. auxnet: the learning rate of the layers under a loss is divided by the sum of the weights of
    this loss and those above, and heads learn from their loss unweighted; common: one learning rate for all."""

    def __post_init__(self):
        _require_weight("aux.main_weight", self.main_weight)
        require(self.relay_layers >= 1, "aux.relay_layers", self.relay_layers, "must be at least 1")
        require(
            self.layers.schedule != "rotational" or not self.layers.enabled or self.main_weight > 0,
            "aux.main_weight",
            self.main_weight,
            "schedule=rotational leaves steps on which the last layer's loss is the only one; raise it",
        )
        for name in self.tasks:
            valid = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]{0,63}", name)
            require(valid, "aux.tasks", name, "a task's name has letters, digits, _ and -, at most 64")

    def problems(self, num_layers: int) -> Iterator[tuple[str, object, str]]:
        """What cannot work in a model of `num_layers`: option, value and way out."""
        layers = self.layers
        bounds = f"layers run from 1 to model.num_layers={num_layers}"
        named = {"aux.layers.at": layers.at or (), "aux.layers.weights": layers.weights or ()}
        named["aux.layers.weights"] = layers.weights if isinstance(layers.weights, dict) else ()
        for option, depths in named.items():
            for depth in depths:
                if isinstance(depth, int) and not 1 <= depth <= num_layers:
                    value = layers.weights if option.endswith("weights") else list(depths)
                    yield option, value, f"names layer {depth}; {bounds}"
        for name, task in self.tasks.items():
            if isinstance(task.layer, int) and not 1 <= task.layer <= num_layers:
                yield f"aux.tasks: {name}: layer", task.layer, bounds
        yield from self._wrong_lengths(num_layers)

    def _wrong_lengths(self, num_layers: int) -> Iterator[tuple[str, object, str]]:
        layers, heads = self.layers, self.layers.intermediate(num_layers)
        if not layers.enabled:
            return
        wanted = f"{len(heads)} intermediate layers have a head: {', '.join(map(str, heads)) or 'none'}"
        if isinstance(layers.weights, tuple) and len(layers.weights) != len(heads):
            yield "aux.layers.weights", list(layers.weights), f"has {len(layers.weights)} weights, and {wanted}"
        if isinstance(layers.weights, dict):
            below = [layer for depth in layers.weights if (layer := layer_at(depth, num_layers)) < num_layers]
            if len(below) != len(heads):
                yield "aux.layers.weights", layers.weights, "gives a layer two weights"
            if len(below) != len(layers.weights):
                yield "aux.layers.weights", layers.weights, "weighs the last layer; its weight is aux.main_weight"
        for stage in layers.stages if layers.schedule == "stages" else ():
            if len(stage.weights) not in (1, len(heads)):
                yield (
                    "aux.layers.stages",
                    _shown(layers.stages),
                    f"a stage has {len(stage.weights)} weights, and {wanted}",
                )
        explicit = layers.weights.values() if isinstance(layers.weights, dict) else layers.weights
        if layers.total is not None and heads and explicit is not None and not any(explicit):
            yield "aux.layers.total", layers.total, "weights that are all zero cannot be scaled to it"
