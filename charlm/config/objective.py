"""Options of the auxiliary losses."""

import re
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
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
    text = str(value)
    if re.fullmatch(r"[1-9][0-9]{0,8}", text):
        return int(text)
    with suppress(ValueError, ZeroDivisionError):
        if re.fullmatch(r"[0-9]{1,9}/[0-9]{1,9}", text) and 0 < Fraction(text) <= 1:
            return text
        if 0 < float(text) <= 1:
            return float(text)
    raise ValueError("should be a whole number from 1 on, or a fraction such as 1/3 or 0.5")


_CountOrShare = Annotated[int | float | str, PlainValidator(_count_or_share)]
Depth = Annotated[_CountOrShare, WithJsonSchema({"type": "string", "format": "layer"})]
"""The number of a layer (1 is the lowest), or a fraction of the depth (1.0 is the last)."""
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
    """A schedule's clock, which goes from 0 at `start` to 1 at `end`."""

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
    """Prediction at all positions of a window (Al-Rfou et al. 2018, "Multiple Positions")."""

    schedule: Decay = "constant"
    """Share w of the loss over all positions; the rest is the loss of the last position alone.
    constant: w stays 1. linear, cosine: w falls to 0. cutoff: w is 1 until the clock ends, then 0."""


class Stage(Section):
    """A part of training with its own weights, for schedule=stages."""

    weights: tuple[NonNegative, ...]
    """One for each target; or one for each intermediate layer with a head, lowest first, or for all."""
    until: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Clock value (0 to 1) at the end of the stage. The last stage ends at 1."""


class StagedLossConfig(Clock, Switch):
    """An auxiliary loss whose weights may be a table of stages."""

    stages: tuple[Stage, ...] = ()
    """For schedule=stages, in YAML: [{until: 0.4, weights: [1, 0.5]}, {weights: [1]}]."""
    passage: Literal["step", "linear"] = "step"
    """step: weights change at the end of a stage. linear: they change within a stage, in a straight
    line to those of the next (Jordan et al. 2024, modded-nanogpt)."""

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        if self.schedule == "stages" and not self.stages:
            raise self.mistake("schedule", "needs stages", "stages")
        if not all(stage.weights for stage in self.stages):
            raise self.mistake("stages", "every stage should have at least one weight")
        ends = [stage.until for stage in self.stages]
        if ends and (ends != sorted(set(ends)) or ends[-1] != 1):
            raise self.mistake("stages", "until must rise to 1 at the end")
        return self


class LayersConfig(StagedLossConfig):
    """A prediction head on intermediate layers (Al-Rfou et al. 2018, "Intermediate Layer Losses")."""

    schedule: Literal[Decay, "staggered", "staggered_linear", "rotational", "gradual", "stages"] = "staggered"
    """staggered: layer l of n stops when the clock reads l/(2n) (the paper). staggered_linear: its
    weight falls in a line to zero there. gradual: layer l starts at (n - l)/(2n). rotational: one of R
    groups of heads is on at each step (both Elhoushi et al. 2024, LayerSkip, section 4.1.2). stages:
    the table of `stages`. The others treat all layers alike."""
    rotation: Count | None = None
    """R of schedule=rotational. null: the number of heads."""
    every: Count = 1
    """Heads on every k-th intermediate layer: k, 2k, ... The last layer always has one."""
    at: tuple[Depth, ...] | None = None
    """Layers with a head, in place of `every`: numbers (1 is the lowest) or fractions of the depth,
    [3, 6, 9] or [1/3, 0.5]. A fraction f of L layers is layer floor(f * L + 1/2), at least 1."""
    weighting: Literal["uniform", "linear", "quadratic", "power"] = "uniform"
    """Weight of intermediate layer l of L. uniform: 1. linear: l/L. quadratic: l(l+1)/(L(L+1))
    (LayerSkip). power: max(0.01, (l/L)^gamma) (AuxNet, arXiv 1611.01773)."""
    gamma: NonNegative = 2.0
    """Exponent of weighting=power."""
    weights: LayerWeights | None = None
    """Weights in place of `weighting`: a list, with one for each intermediate layer with a head, lowest
    first; or a mapping, {4: 0.3, 8: 0.3} or {1/3: 0.3}, which also chooses the layers."""
    weight: NonNegative = 1.0
    """Factor on the loss of every intermediate layer; aux.main_weight is the last layer's."""
    total: Positive | None = None
    """Scale the weights of intermediate layers, before their schedules, to this sum."""
    head: Literal["linear", "shared", "shared_frozen", "tower"] = "linear"
    """linear: a classifier each (the paper). shared: the final norm and the last layer's classifiers
    (LayerSkip). shared_frozen: the same, not trained by these losses. tower: norm, hidden layer,
    activation, dropout and classifier (Szegedy et al. 2015, GoogLeNet; Zhao et al. 2017, PSPNet)."""
    tower_width: Width | None = None
    """Width of a tower's hidden layer, or a fraction of d_model, such as 1/4; null is d_model."""
    tower_dropout: BelowOne = 0.0
    """Dropout after a tower's activation."""
    hinge: NonNegative = 0.0
    """Count only what an intermediate loss has above so many nats per character (Lee et al. 2015, DSN)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.weights is not None and self.weighting != "uniform":
            text = f"conflicts with weighting={self.weighting}; set only one"
            raise self.mistake("weights", text, "weighting")
        if isinstance(self.weights, dict) and self.at is not None:
            text = "a mapping chooses the layers itself; leave out aux.layers.at, or give a list"
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
        """Options that do not fit so many layers, each with the reason."""
        heads = self.intermediate(num_layers)
        if not heads:
            fractions = [depth for depth in self.at or () if not isinstance(depth, int)]
            asking = {"at": fractions, "schedule": self.schedule == "rotational", "hinge": self.hinge}
            for option in filter(asking.get, asking):
                text = f"none of model.num_layers={num_layers} layers below the last has a head"
                yield option, f"{text}; use more layers, or name lower ones (aux.layers.at)"
        wanted = f"{len(heads)} intermediate layers have a head: {', '.join(map(str, heads))}"
        weights = self.weights.values() if isinstance(self.weights, dict) else self.weights
        if weights is not None and len(weights) != len(heads):
            yield "weights", f"has {len(weights)} weights, and {wanted}"
        for stage in self.stages if self.schedule == "stages" else ():
            if len(stage.weights) not in (1, len(heads)):
                yield "stages", f"a stage has {len(stage.weights)} weights, and {wanted}"
        if self.total is not None and heads and weights is not None and not any(weights):
            yield "total", "cannot be the sum of aux.layers.weights that are all zero"


class TargetsConfig(StagedLossConfig):
    """Prediction of characters several steps ahead (Al-Rfou et al. 2018, "Multiple Targets")."""

    schedule: Literal[Decay, "growing", "shrinking", "stages"] = "constant"
    """growing, shrinking: the number of targets rises from 1 to num_targets K, or falls from K to 1, in
    K equal parts of the clock (Aynetdinov and Akbik 2025, curricula for multi-token prediction).
    stages: the table of `stages`, whose first weight is the next character's, replaces `weight`."""
    num_targets: Annotated[int, Field(ge=1, le=100), Whole] = 2
    """Characters predicted at each position, the next one included."""
    weight: NonNegative = 0.5
    """Weight of each extra target, a factor on the weight of its layer."""
    layers: Literal["all", "last"] = "all"
    """Layers that predict extra targets: all with a head (the paper), or the last."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        longest = max((len(stage.weights) for stage in self.stages), default=0)
        if longest > self.num_targets:
            text = f"a stage has {longest} weights for num_targets={self.num_targets} targets"
            raise self.mistake("stages", text, "num_targets")
        return self


class HedgeConfig(Section):
    """Hedge backpropagation: learns the weights of the layers' losses (Sahoo et al. 2018)."""

    enabled: bool = False
    """Multiply the loss of each of the L' layers with a head by alpha, at first 1/L'. After each update
    alpha becomes max(alpha * beta^loss, smoothing / L'), and all are normalised to sum to 1."""
    beta: Share = 0.99
    """Discount. The lower it is, the faster a layer with a high loss loses weight."""
    smoothing: BelowOne = 0.2
    """Share of the weight that is spread evenly."""


class TaskConfig(Clock):
    """An auxiliary task of your own, registered with `charlm.auxiliary_task`."""

    weight: NonNegative
    """Weight of the task's loss."""
    layer: Depth | None = None
    """Layer whose hidden states it reads: a number or a fraction of the depth; null is the last."""
    schedule: Decay = "constant"
    """How the weight decays."""


def _weight_alone(value: Any) -> Any:
    return value if isinstance(value, (dict, TaskConfig)) else {"weight": value}


class AuxConfig(Section):
    """The auxiliary losses. `scripts/explain.py` prints their table of terms."""

    positions: PositionsConfig = PositionsConfig()
    layers: LayersConfig = LayersConfig()
    targets: TargetsConfig = TargetsConfig()
    hedge: HedgeConfig = HedgeConfig()
    tasks: dict[str, Annotated[TaskConfig, BeforeValidator(_weight_alone)]] = Field(default_factory=dict)
    """Your own tasks (docs/tasks.md): {order: 0.1}, or {order: {weight: 0.1, layer: 4}}."""
    reduction: Literal["sum", "mean", "weighted_mean"] = "sum"
    """Divide the sum of the active layers' losses by their number (mean) or by the sum of their weights
    (weighted_mean, LayerSkip). The paper does not say which."""
    main_weight: NonNegative = 1.0
    """Weight of the last layer's loss."""
    route: Literal["joint", "relay", "pairwise", "multiway"] = "joint"
    """How losses train the layers below them. joint: one backward pass of their weighted sum. relay: an
    intermediate loss trains only the relay_layers nearest to its head. pairwise: forward, backward and
    update for one loss after another. multiway: one forward pass, a backward pass per loss, then an
    update per loss with its own optimizer state and step size (both AuxNet, arXiv 1611.01773)."""
    relay_layers: Count = 1
    """Layers that each intermediate loss trains with route=relay."""
    step_sizes: Literal["auxnet", "weighted", "common"] = "auxnet"
    """weighted: AuxNet's, for every route but relay. The layers under a loss divide its step by the sum
    of the weights of this loss and those above, and heads learn from unweighted losses. With multiway a
    loss's weight scales its learning rate. auxnet: the same for multiway alone, but the weight scales
    the gradient, whose size AdamW and Muon ignore. common: one learning rate for all losses."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        rotates = self.layers.enabled and self.layers.schedule == "rotational"
        if rotates and self.main_weight == 0:
            text = "aux.layers.schedule=rotational has steps with only this loss; raise its weight"
            raise self.mistake("main_weight", text)
        return self
