"""Options of the auxiliary losses."""

import re
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    WithJsonSchema,
    model_validator,
)

from charlm.config.types import BelowOne, Count, NonNegative, Positive, Section, Share, Unit, Whole

Decay = Literal["constant", "linear", "cosine", "cutoff"]


def _count_or_share(value: Any) -> int | float | str:
    """The number or fraction in a text. That a number is small enough is checked later."""
    text = str(value)
    if re.fullmatch(r"[1-9][0-9]{0,8}", text):
        return int(text)
    with suppress(ValueError, ZeroDivisionError):
        if re.fullmatch(r"[0-9]{1,9}/[0-9]{1,9}", text) and 0 < Fraction(text) <= 1:
            return text
        if 0 < float(text) <= 1:
            return float(text)
    raise ValueError("is neither a whole number from 1 on nor a fraction in (0, 1], such as 1/3 or 0.5")


_CountOrShare = Annotated[int | float | str, PlainValidator(_count_or_share)]
Depth = Annotated[_CountOrShare, WithJsonSchema({"type": "string", "format": "layer"})]
"""A layer: its number (1 is the lowest), or a fraction of the depth, 0.5 or "1/3" (1.0 is the last)."""
Width = Annotated[_CountOrShare, WithJsonSchema({"type": "string", "format": "width"})]
"""A number of columns, or a fraction of d_model."""


def count_of(share: Depth | Width, whole: int) -> int:
    """A whole number as it is; for a fraction f of n, floor(f * n + 1/2), at least 1."""
    if isinstance(share, int):
        return share
    fraction = Fraction(str(share))  # exact decimals, so that 0.7 of 5 layers rounds up
    return max(1, int(fraction * whole + Fraction(1, 2)))


LayerWeights = Annotated[
    Annotated[tuple[NonNegative, ...], Tag("list")] | Annotated[dict[Depth, NonNegative], Tag("mapping")],
    Discriminator(lambda weights: "mapping" if isinstance(weights, dict) else "list"),
]


class Clock(Section):
    """The part of training in which a schedule runs: its clock goes from 0 at `start` to 1 at `end`."""

    start: Unit = 0.0
    """Progress at which the schedule starts; before, it has its first value."""
    end: Unit = 1.0
    """Progress at which the schedule ends; after, it has its last value."""

    @model_validator(mode="after")
    def _check_clock(self) -> Self:
        if self.start > self.end:
            raise self.mistake("start", f"must not exceed end={self.end}", "end")
        return self


class Switch(Section):
    """Whether an auxiliary loss is used."""

    enabled: bool = True
    """false removes the terms of this loss, and no others."""


class PositionsConfig(Clock, Switch):
    """Prediction at all positions of a window, not only the last (Al-Rfou et al. 2018, "Multiple
    Positions")."""

    schedule: Decay = "constant"
    """Share w of the loss over all positions; the share 1 - w is the loss of the last position alone.
    constant: w stays 1. linear, cosine: w falls to 0. cutoff: w is 1 until the clock ends, then 0."""


class Stage(Section):
    """A part of training with its own weights, for schedule=stages."""

    weights: tuple[NonNegative, ...]
    """For targets: the weight of each offset from 1 on. For layers: the weight of each intermediate layer
    with a head, lowest first, or one weight for all."""
    until: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Clock value (0 to 1) at the end of the stage. The last stage ends at 1."""


class StagedLossConfig(Clock, Switch):
    """An auxiliary loss whose weights may be a table of stages."""

    stages: tuple[Stage, ...] = ()
    """The stages of schedule=stages, as a YAML list: [{until: 0.4, weights: [1, 0.5]}, {weights: [1]}]."""
    passage: Literal["step", "linear"] = "step"
    """How weights change between stages. step: at once, at the end of a stage. linear: within a stage, in a
    straight line to the weights of the next (Jordan et al. 2024, modded-nanogpt)."""

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        if self.schedule == "stages" and not self.stages:
            raise self.mistake("schedule", "needs stages", "stages")
        if not all(stage.weights for stage in self.stages):
            raise self.mistake("stages", "every stage should have at least one weight")
        ends = [0.0, *(stage.until for stage in self.stages)]
        rises = all(earlier < later for earlier, later in pairwise(ends))
        if self.stages and not (rises and ends[-1] == 1):
            raise self.mistake("stages", "until must rise to 1 at the end")
        return self


class LayersConfig(StagedLossConfig):
    """A prediction head on intermediate layers (Al-Rfou et al. 2018, "Intermediate Layer Losses")."""

    schedule: Literal[Decay, "staggered", "staggered_linear", "rotational", "gradual", "stages"] = "staggered"
    """staggered: layer l of n stops when the clock reads l/(2n) (the paper). staggered_linear: its weight
    falls in a straight line to zero there, the other reading of the paper. gradual: layer l starts when
    the clock reads (n - l)/(2n), the highest first. rotational: at each step one of R groups of heads is
    on, in turn (both Elhoushi et al. 2024, LayerSkip, section 4.1.2). stages: the table of `stages`. The
    others treat all layers alike."""
    rotation: Count | None = None
    """R of schedule=rotational. null: the number of heads, so that one is on at each step."""
    every: Count = 1
    """Heads on every k-th intermediate layer: k, 2k, ... The last layer always has one."""
    at: tuple[Depth, ...] | None = None
    """Layers with a head, in place of `every`: a YAML list of numbers (1 is the lowest) or fractions of the
    depth, [3, 6, 9] or [1/3, 0.5]. A fraction f of L layers is layer floor(f * L + 1/2), at least 1.
    Fractions of the same layer make one head."""
    weighting: Literal["uniform", "linear", "quadratic", "power"] = "uniform"
    """How the weight of an intermediate layer grows with its number l of L. uniform: 1. linear: l/L.
    quadratic: l(l+1)/(L(L+1)) (LayerSkip). power: max(0.01, (l/L)^gamma) (AuxNet, arXiv 1611.01773)."""
    gamma: NonNegative = 2.0
    """Exponent of weighting=power."""
    weights: LayerWeights | None = None
    """Explicit weights in place of `weighting`, as YAML: a list with one for each intermediate layer with a
    head, lowest first; or a mapping, {4: 0.3, 8: 0.3} or {1/3: 0.3}, which also chooses these layers."""
    weight: NonNegative = 1.0
    """Factor on the loss of every intermediate layer; aux.main_weight is that of the last layer."""
    total: Positive | None = None
    """Scale the weights of intermediate layers, before their schedules, to this sum."""
    head: Literal["linear", "shared", "shared_frozen", "tower"] = "linear"
    """The heads of intermediate layers. linear: a classifier each (the paper). shared: the final norm and
    the last layer's classifiers (LayerSkip). shared_frozen: the same, but these losses do not train them.
    tower: norm, hidden layer, activation, dropout and classifier (Szegedy et al. 2015, GoogLeNet; Zhao et
    al. 2017, PSPNet)."""
    tower_width: Width | None = None
    """Width of a tower's hidden layer: a number, or a fraction of d_model such as 1/4; null is d_model."""
    tower_dropout: BelowOne = 0.0
    """Dropout after a tower's activation."""
    hinge: NonNegative = 0.0
    """Count only the part of an intermediate layer's loss above so many nats per character (Lee et al. 2015,
    DSN)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.at is not None and len(set(map(str, self.at))) < len(self.at):
            raise self.mistake("at", "contains a layer twice")
        if self.weights is not None and self.weighting != "uniform":
            text = f"conflicts with weighting={self.weighting}; set only one"
            raise self.mistake("weights", text, "weighting")
        if isinstance(self.weights, dict) and self.at is not None:
            text = "a mapping chooses the layers itself; leave aux.layers.at=null, or give a list"
            raise self.mistake("weights", text, "at")
        return self

    def intermediate(self, num_layers: int) -> tuple[int, ...]:
        """The layers below the last with a head, in rising order."""
        if not self.enabled:
            return ()
        depths = self.weights if isinstance(self.weights, dict) else self.at
        if depths is None:
            depths = range(self.every, num_layers, self.every)
        layers = {count_of(depth, num_layers) for depth in depths}
        return tuple(sorted(layer for layer in layers if layer < num_layers))

    def errors_for_depth(self, num_layers: int) -> Iterator[tuple[str, str]]:
        """Options that do not fit a model of `num_layers` layers, each with the reason."""
        heads = self.intermediate(num_layers)
        if not heads:
            fractions = [depth for depth in self.at or () if not isinstance(depth, int)]
            asking = {"at": fractions, "schedule": self.schedule == "rotational", "hinge": self.hinge}
            for option in filter(asking.get, asking):
                text = f"needs a head below the last of model.num_layers={num_layers} layers, and none has one"
                yield option, f"{text}; use more layers, or name lower ones (aux.layers.at)"
        wanted = f"{len(heads)} intermediate layers have a head: {', '.join(map(str, heads)) or 'none'}"
        weights = self.weights
        if isinstance(weights, dict):
            layers = {count_of(depth, num_layers) for depth in weights}
            if num_layers in layers:
                yield "weights", "contains the last layer, whose weight is aux.main_weight"
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
            yield "total", "cannot be the sum of aux.layers.weights that are all zero"


class TargetsConfig(StagedLossConfig):
    """Prediction of characters several steps ahead (Al-Rfou et al. 2018, "Multiple Targets")."""

    schedule: Literal[Decay, "growing", "shrinking", "stages"] = "constant"
    """How the weight of the extra targets changes. growing, shrinking: the number of targets rises from 1 to
    num_targets K, or falls from K to 1, in K equal parts of the clock (Aynetdinov and Akbik 2025,
    curricula for multi-token prediction). stages: the table of `stages`, with a weight for each target,
    also the next character, in place of `weight`."""
    num_targets: Annotated[int, Field(ge=1, le=1000), Whole] = 2
    """Characters predicted at each position: the next one and num_targets - 1 after it."""
    weight: NonNegative = 0.5
    """Weight of each extra target, a factor on the weight of its layer."""
    layers: Literal["all", "last"] = "all"
    """Layers that predict the extra targets: all with a head (the paper), or only the last."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        longest = max((len(stage.weights) for stage in self.stages), default=0)
        if longest > self.num_targets:
            text = f"a stage has {longest} weights for num_targets={self.num_targets} targets"
            raise self.mistake("stages", text, "num_targets")
        return self


class HedgeConfig(Section):
    """Hedge backpropagation: learns the weights of the layers' losses online (Sahoo et al. 2018)."""

    enabled: bool = False
    """Multiply the loss of each of the L' layers with a head by a weight alpha, at first 1/L'. After each
    update alpha becomes max(alpha * beta^loss, smoothing / L'), and all are normalised to sum to 1."""
    beta: Share = 0.99
    """Discount. The lower it is, the faster a layer with a high loss loses weight."""
    smoothing: BelowOne = 0.2
    """Share of the weight that is spread evenly, so that no alpha falls below smoothing / L'."""


class TaskConfig(Clock):
    """An auxiliary task of your own, registered with `charlm.auxiliary_task`."""

    weight: NonNegative
    """Weight of the task's loss."""
    layer: Depth | None = None
    """Layer whose hidden states the task reads: a number or a fraction of the depth; null is the last."""
    schedule: Decay = "constant"
    """How the weight decays."""


def _weight_alone(value: Any) -> Any:
    return value if isinstance(value, (dict, TaskConfig)) else {"weight": value}


class AuxConfig(Section):
    """The auxiliary losses. `scripts/explain.py` prints the resulting table of terms."""

    positions: PositionsConfig = PositionsConfig()
    layers: LayersConfig = LayersConfig()
    targets: TargetsConfig = TargetsConfig()
    hedge: HedgeConfig = HedgeConfig()
    tasks: dict[str, Annotated[TaskConfig, BeforeValidator(_weight_alone)]] = Field(default_factory=dict)
    """Your own tasks (see docs/tasks.md), as a YAML mapping from names to weights, {order: 0.1}, or to all
    options of a task, {order: {weight: 0.1, layer: 4}}."""
    reduction: Literal["sum", "mean", "weighted_mean"] = "sum"
    """Add the losses of the active layers, or divide the sum by their number (mean) or by the sum of their
    weights (weighted_mean, LayerSkip). The paper does not say which."""
    main_weight: NonNegative = 1.0
    """Weight of the last layer's loss."""
    route: Literal["joint", "relay", "pairwise", "multiway"] = "joint"
    """How the gradients of several layers' losses reach the layers below. joint: one backward pass of their
    weighted sum. relay: the loss of an intermediate layer trains only the relay_layers nearest to its head.
    pairwise: forward, backward and update for one loss after another. multiway: one forward pass, a
    backward pass per loss, then an update per loss with its own optimizer state and step size (both
    AuxNet, arXiv 1611.01773)."""
    relay_layers: Count = 1
    """Layers that each intermediate loss trains with route=relay: with 2, layer 6's loss trains 5 and 6."""
    step_sizes: Literal["auxnet", "weighted", "common"] = "auxnet"
    """weighted: AuxNet's, for route=joint, pairwise and multiway. The layers under a loss divide its step by
    the sum of the weights of this loss and those above, and heads learn from unweighted losses. With
    multiway a loss's own weight scales its learning rate, so that it counts under every optimizer. auxnet:
    the same for multiway alone, but the weight scales the gradient, whose size AdamW and Muon ignore.
    common: one learning rate for all losses."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        is_rotational = self.layers.enabled and self.layers.schedule == "rotational"
        if is_rotational and self.main_weight == 0:
            text = "schedule=rotational has steps with only the last layer's loss; raise its weight"
            raise self.mistake("main_weight", text)
        return self
