"""The auxiliary losses."""

import re
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, PlainValidator, Tag, WithJsonSchema, model_validator

from charlm.config.types import BelowOne, Count, NonNegative, Positive, Section, Share, Unit, Whole

Decay = Literal["constant", "linear", "cosine", "cutoff"]


def _depth(value: Any) -> int | float | str:
    """The number or fraction that a text spells; a number's upper limit, the model's depth, is checked later."""
    text = str(value)
    if re.fullmatch(r"[0-9]{1,9}", text):
        return int(text)
    with suppress(ValueError, ZeroDivisionError):
        if re.fullmatch(r"[0-9]{1,9}/[0-9]{1,9}", text) and 0 < Fraction(text) <= 1:
            return text
        if 0 < float(text) <= 1:
            return float(text)
    raise ValueError("is neither a layer's number nor a fraction of the depth in (0, 1], such as 1/3 or 0.5")


Depth = Annotated[
    int | float | str, PlainValidator(_depth), WithJsonSchema({"title": "layer", "type": ["number", "string"]})
]
"""A layer: its number (1 is the lowest), or a fraction of the depth, 0.5 or "1/3" (1.0 or "1/1" is the last)."""


def layer_at(depth: Depth, num_layers: int) -> int:
    """The layer that `depth` names: a number itself, of a fraction f of L layers floor(f * L + 1/2), at least 1."""
    if isinstance(depth, int):
        return depth
    return max(1, int(Fraction(str(depth)) * num_layers + Fraction(1, 2)))  # a float as decimals: 0.7 * 5 rounds up


class Clock(Section):
    """The part of training that a schedule spans: its clock runs from 0 at `start` to 1 at `end`."""

    start: Unit = 0.0
    """Progress at which the schedule's clock starts; before that the schedule keeps its first value."""
    end: Unit = 1.0
    """Progress at which the schedule's clock ends; after that the schedule keeps its last value."""

    @model_validator(mode="after")
    def _check_clock(self) -> Self:
        if self.start > self.end:
            raise self.mistake("start", f"must not exceed end={self.end}", "end")
        return self


class Switch(Section):
    """Whether an auxiliary loss is there."""

    enabled: bool = True
    """false removes this loss's rows from the table of terms, and no others."""


class PositionsConfig(Clock, Switch):
    """Prediction at all positions of a window, not only at the last (Al-Rfou et al. 2018, "Multiple Positions")."""

    schedule: Decay = "constant"
    """Share w of the loss over all positions; the rest, 1 - w, is the loss of the last position alone. constant: w
    stays 1. linear, cosine: w falls to 0. cutoff: w is 1 until the clock ends, then 0."""


class Stage(Section):
    """A part of training with its own weights, for schedule=stages."""

    weights: tuple[NonNegative, ...]
    """For targets: the weight of each offset from 1 on. For layers: the weight of each intermediate layer with a head,
    lowest first, or one weight for all."""
    until: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Reading of the schedule's clock at the end of the stage. The last stage ends at 1."""


class StagedLossConfig(Clock, Switch):
    """An auxiliary loss whose weights may be a table of stages."""

    stages: tuple[Stage, ...] = ()
    """The stages of schedule=stages, as a YAML list: [{until: 0.4, weights: [1, 0.5, 0.25]}, {weights: [1]}]."""
    passage: Literal["step", "linear"] = "step"
    """How weights move from stage to stage. step: a stage's weights hold until it ends. linear: within each stage they
    move in a straight line to the next stage's (Jordan et al. 2024, modded-nanogpt); the last stage's hold."""

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        if self.schedule == "stages" and not self.stages:
            raise self.mistake("schedule", "needs stages", "stages")
        if not all(stage.weights for stage in self.stages):
            raise self.mistake("stages", "every stage should have at least one weight")
        ends = [0.0, *(stage.until for stage in self.stages)]
        if self.stages and not (ends[-1] == 1 and all(earlier < later for earlier, later in pairwise(ends))):
            raise self.mistake("stages", "until must rise to 1 at the end")
        return self


class LayersConfig(StagedLossConfig):
    """A prediction head on intermediate layers (Al-Rfou et al. 2018, "Intermediate Layer Losses")."""

    schedule: Literal["staggered", "linear", "cosine", "constant", "cutoff", "rotational", "gradual", "stages"] = (
        "staggered"
    )
    """staggered: layer l of n stops when the clock reads l/(2n) (the paper). gradual: layer l starts when the clock
    reads (n - l)/(2n), the highest first. rotational: every R-th head is on, the next ones at the next step (both
    Elhoushi et al. 2024, LayerSkip, section 4.1.2). stages: the table of `stages`. The others treat all layers
    alike."""
    rotation: Count | None = None
    """R of schedule=rotational: each head is on at one of R steps. null: R is the number of heads, one at each step."""
    every: Count = 1
    """Heads on every k-th intermediate layer: k, 2k, ... The last layer always has one."""
    at: tuple[Depth, ...] | None = None
    """Layers with a head, in place of every k-th: a YAML list of numbers (1 is the lowest) or fractions of the depth,
    [3, 6, 9] or [1/3, 0.5]. A fraction f of L layers is layer floor(f * L + 1/2), at least 1; 1.0 is the last.
    Fractions that fall on the same layer make one head."""
    weighting: Literal["uniform", "linear", "quadratic", "power"] = "uniform"
    """How the weight of an intermediate layer grows with its number l of L. uniform: 1. linear: l/L. quadratic:
    l(l+1)/(L(L+1)) (LayerSkip's sum of 1..l). power: max(0.01, (l/L)^gamma) (AuxNet, arXiv 1611.01773)."""
    gamma: NonNegative = 2.0
    """Exponent of weighting=power."""
    weights: (
        Annotated[
            Annotated[tuple[NonNegative, ...], Tag("list")] | Annotated[dict[Depth, NonNegative], Tag("mapping")],
            Discriminator(lambda weights: "mapping" if isinstance(weights, dict) else "list"),
        ]
        | None
    ) = None
    """Explicit weights in place of a weighting, as YAML: a list with one for each intermediate layer with a head,
    lowest first; or a mapping, {4: 0.3, 8: 0.3} or {1/3: 0.3}, which also chooses the layers with a head."""
    weight: NonNegative = 1.0
    """Factor on the weight of every intermediate layer's loss; main_weight is the last layer's."""
    total: Positive | None = None
    """Scale the weights of the intermediate layers, before their schedules, so that they sum to this."""
    head: Literal["linear", "shared", "shared_frozen", "tower"] = "linear"
    """The heads of intermediate layers. linear: a classifier each (the paper). shared: the final norm and the last
    layer's classifiers (LayerSkip). shared_frozen: the same, but these losses train only the layers below. tower: norm,
    hidden layer, activation, dropout and classifier (Szegedy et al. 2015, GoogLeNet; Zhao et al. 2017, PSPNet)."""
    tower_width: Count | None = None
    """Width of a tower's hidden layer; null is d_model."""
    tower_dropout: BelowOne = 0.0
    """Dropout after a tower's activation."""
    hinge: NonNegative = 0.0
    """Only the part of an intermediate layer's loss above this many nats per character counts (Lee et al. 2015,
    DSN)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.at is not None and len(set(map(str, self.at))) < len(self.at):
            raise self.mistake("at", "names a layer twice")
        if self.weights is not None and self.weighting != "uniform":
            text = f"would stand in place of weighting={self.weighting}; set one of the two"
            raise self.mistake("weights", text, "weighting")
        if isinstance(self.weights, dict) and self.at is not None:
            text = "a mapping chooses the layers itself; leave aux.layers.at=null, or give a list"
            raise self.mistake("weights", text, "at")
        return self

    def intermediate(self, num_layers: int) -> tuple[int, ...]:
        """The layers below the last that have a head, in rising order."""
        if not self.enabled:
            return ()
        depths = self.weights if isinstance(self.weights, dict) else self.at
        if depths is None:
            depths = range(self.every, num_layers, self.every)
        layers = {layer_at(depth, num_layers) for depth in depths}
        return tuple(sorted(layer for layer in layers if layer < num_layers))

    def misfits(self, num_layers: int) -> Iterator[tuple[str, str]]:
        """The options that do not fit a model of `num_layers` layers, each with what is wrong with it."""
        heads = self.intermediate(num_layers)
        wanted = f"{len(heads)} intermediate layers have a head: {', '.join(map(str, heads)) or 'none'}"
        weights = self.weights
        if isinstance(weights, dict):
            layers = {layer_at(depth, num_layers) for depth in weights}
            if num_layers in layers:
                yield "weights", "has the last layer, whose weight is aux.main_weight"
            if len(layers) < len(weights):
                yield "weights", "gives a layer two weights"
            weights = tuple(weights.values())
        elif weights is not None and len(weights) != len(heads):
            yield "weights", f"has {len(weights)} weights, and {wanted}"
        if self.schedule == "stages":
            for stage in self.stages:
                if len(stage.weights) not in (1, len(heads)):
                    yield "stages", f"a stage has {len(stage.weights)} weights, and {wanted}"
        if self.total is not None and heads and weights is not None and not any(weights):
            yield "total", "aux.layers.weights that are all zero cannot be scaled to it"


class TargetsConfig(StagedLossConfig):
    """Prediction of characters several steps ahead (Al-Rfou et al. 2018, "Multiple Targets")."""

    schedule: Literal["constant", "linear", "cosine", "cutoff", "growing", "shrinking", "stages"] = "constant"
    """How the extra targets' weight decays. growing, shrinking: the number of targets rises from 1 to num_targets K, or
    falls from K to 1, in K equal parts of the clock (Aynetdinov and Akbik 2025, curricula for multi-token prediction).
    stages: the table of `stages`, with a weight for each target, the next character included; `weight` is unused."""
    num_targets: Annotated[int, Field(ge=1, le=1000), Whole] = 2
    """Characters predicted at each position: the next one and num_targets - 1 after it."""
    weight: NonNegative = 0.5
    """Weight of each extra target, multiplied into its layer's loss."""
    layers: Literal["all", "last"] = "all"
    """Layers that predict the extra targets: all with a head (the paper), or only the last one."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        longest = max((len(stage.weights) for stage in self.stages), default=0)
        if longest > self.num_targets:
            text = f"a stage has {longest} weights, and there are num_targets={self.num_targets} targets"
            raise self.mistake("stages", text, "num_targets")
        return self


class HedgeConfig(Section):
    """Hedge backpropagation: the weights of the layers' losses are learned online (Sahoo et al. 2018)."""

    enabled: bool = False
    """Multiply each layer's rows by a weight alpha. At first alpha is the same for all L' layers with a head; after
    each update it becomes max(alpha * beta^loss, smoothing / L'), and all are normalised to sum to 1."""
    beta: Share = 0.99
    """The discount. The lower it is, the faster a layer with a high loss loses weight."""
    smoothing: BelowOne = 0.2
    """Share of the weight that is spread evenly as a floor: no alpha falls below smoothing / L'."""


class TaskConfig(Clock):
    """An auxiliary task of your own, registered with `charlm.auxiliary_task`."""

    weight: NonNegative
    """Weight of the task's loss."""
    layer: Depth | None = None
    """The layer whose hidden states the task reads: a number or a fraction of the depth; null is the last."""
    schedule: Decay = "constant"
    """How the weight decays."""


def _weight_alone(value: Any) -> Any:
    return value if isinstance(value, (dict, TaskConfig)) else {"weight": value}


class AuxConfig(Section):
    """The auxiliary losses; `scripts/explain.py` prints the table of terms that they make."""

    positions: PositionsConfig = PositionsConfig()
    layers: LayersConfig = LayersConfig()
    targets: TargetsConfig = TargetsConfig()
    hedge: HedgeConfig = HedgeConfig()
    tasks: dict[str, Annotated[TaskConfig, BeforeValidator(_weight_alone)]] = Field(default_factory=dict)
    """Your own tasks by name: a YAML mapping to a weight or to all options, {order: 0.1} or
    {order: {weight: 0.1, layer: 4}}. docs/tasks.md shows how to write one."""
    reduction: Literal["sum", "mean", "weighted_mean"] = "sum"
    """Add the losses of the active layers, or divide the sum by their number (mean) or by the sum of their weights
    (weighted_mean, LayerSkip). The paper does not say."""
    main_weight: NonNegative = 1.0
    """Weight of the last layer's loss."""
    route: Literal["joint", "relay", "pairwise", "multiway"] = "joint"
    """How the gradients of several layers' losses reach the trunk. joint: one backward pass of their weighted sum.
    relay: an intermediate layer's gradient stops relay_layers below its head. pairwise: for one layer after another,
    forward, backward, and update of the layers below. multiway: one forward pass, a backward pass per layer, then an
    update per layer with its own optimizer state and step size (both AuxNet, arXiv 1611.01773)."""
    relay_layers: Count = 1
    """Number of layers that an intermediate gradient reaches under route=relay, including the one under its head."""
    step_sizes: Literal["auxnet", "common"] = "auxnet"
    """Step sizes of route=multiway. auxnet: the layers under a loss divide the learning rate by the sum of the weights
    of this loss and those above, and heads learn from their unweighted loss. common: one learning rate for all."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.layers.enabled and self.layers.schedule == "rotational" and self.main_weight == 0:
            text = "schedule=rotational has steps on which the last layer's loss is the only one; raise its weight"
            raise self.mistake("main_weight", text)
        return self
