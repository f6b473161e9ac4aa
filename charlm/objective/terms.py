"""The objective as a table: one row per prediction task, with its weight over training."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from charlm.config import AuxConfig, ConfigError, LayersConfig, TargetsConfig, count_of
from charlm.objective.schedules import DECAYS, SWITCHES, Schedule, constant, intervals, rotational, staged
from charlm.text import visible

WEIGHTINGS: dict[str, Callable[[int, int, float], float]] = {
    "uniform": lambda i, n, gamma: 1.0,
    "linear": lambda i, n, gamma: i / n,
    "quadratic": lambda i, n, gamma: i * (i + 1) / (n * (n + 1)),
    "power": lambda i, n, gamma: max(0.01, (i / n) ** gamma),
}
"""The weight of layer i of n relative to the last layer's, by `aux.layers.weighting`."""


class TermName(NamedTuple):
    """The parts of a term's name; the later ones may be missing."""

    layer: int
    offset: int | None
    positions: str | None
    task: str | None


@dataclass(frozen=True)
class Term:
    """Predict the character `offset` steps ahead from the hidden states of `layer`, from 1.

    The loss is the mean cross-entropy over "all" positions of a window, or that of the "last".
    """

    layer: int
    offset: int
    """1 is the next character; 0 for the user's own task."""
    positions: Literal["all", "last"]
    weight: Schedule
    hinge: float = 0.0
    """In nats: only the loss above it counts."""
    task: str | None = None
    """Name of the user's own task."""

    @property
    def name(self) -> str:
        """Unique in a table; a path for trackers that group by slashes."""
        what = f"offset{self.offset}/{self.positions}" if self.task is None else f"task/{self.task}"
        return f"layer{self.layer}/{what}"

    @staticmethod
    def parse(name: str) -> TermName | None:
        """The parts of a name, or of its beginning such as "layer3/offset2"; else None."""
        found = re.fullmatch(r"layer(\d{1,9})(?:/offset(\d{1,9})(?:/(all|last))?|/task/(.+))?", name)
        if found is None:
            return None
        layer, offset, positions, task = found.groups()
        return TermName(int(layer), offset and int(offset), positions, task and visible(task))


Rows = list[tuple[Term, float]]  # with weights


def build_terms(aux: AuxConfig, num_layers: int, steps: int | None = None) -> tuple[Term, ...]:
    """The table of a config, by layer, offset and positions; the user's own tasks come last.

    A weight is the product of the layer's, the offset's and the positions': w of `aux.positions`
    for "all", 1 - w for the "last". Terms that are always zero are left out. Only a rotational
    schedule needs `steps`.

    Raises ConfigError if every term has weight zero at some point of training.
    """
    layer_weights = _layer_weights(aux, num_layers, steps)
    offset_weights = _offset_weights(aux.targets)
    positions = aux.positions
    all_positions = constant(0.0)
    if positions.enabled:
        all_positions = DECAYS[positions.schedule](positions.start, positions.end)
    hinges = dict.fromkeys(layer_weights, aux.layers.hinge) | {num_layers: 0.0}
    rows = [
        Term(layer, offset, kind, layer_weight * offset_weight * position_weight, hinges[layer])
        for layer, layer_weight in layer_weights.items()
        for offset, offset_weight in offset_weights.items()
        if offset == 1 or layer == num_layers or aux.targets.layers == "all"
        for kind, position_weight in (("all", all_positions), ("last", all_positions.complement()))
    ]
    rows += _task_rows(aux, num_layers)
    terms = tuple(row for row in rows if row.weight.stops_at != 0.0)
    for left, right in intervals(*(term.weight for term in terms)):
        if not any(active(terms, (left + right) / 2)):
            silent = "aux.main_weight=0.0" if aux.main_weight == 0 else "aux.targets.schedule=stages"
            text = f"all losses are zero from progress {left:g} on; enable one for that time"
            raise ConfigError(f"{silent}: {text}", silent.partition("=")[0])
    return terms


def _layer_weights(aux: AuxConfig, num_layers: int, steps: int | None) -> dict[int, Schedule]:
    base = _base_weights(aux.layers, num_layers)
    stages = [stage.weights for stage in aux.layers.stages]
    by_stage = [weights if len(weights) > 1 else weights * len(base) for weights in stages]
    schedules = _schedules(aux.layers, tuple(base), num_layers, by_stage, steps)
    weights = {layer: constant(base[layer]) * schedule for layer, schedule in schedules.items()}
    weights[num_layers] = constant(aux.main_weight)
    if aux.reduction == "sum":
        return weights
    return _averaged(weights, weighted=aux.reduction == "weighted_mean")


def _base_weights(layers: LayersConfig, num_layers: int) -> dict[int, float]:
    heads = layers.intermediate(num_layers)
    if isinstance(layers.weights, dict):
        by_layer = {count_of(depth, num_layers): weight for depth, weight in layers.weights.items()}
        weights = {layer: by_layer[layer] for layer in heads}
    elif layers.weights is not None:
        weights = dict(zip(heads, layers.weights, strict=True))
    else:
        weights = {layer: WEIGHTINGS[layers.weighting](layer, num_layers, layers.gamma) for layer in heads}
    factor = layers.weight if layers.total is None else layers.total / (sum(weights.values()) or 1.0)
    return {layer: factor * weight for layer, weight in weights.items()}


def _offset_weights(targets: TargetsConfig) -> dict[int, Schedule]:
    if not targets.enabled:
        return {1: constant(1.0)}
    count = targets.num_targets
    by_stage = [stage.weights + (0.0,) * (count - len(stage.weights)) for stage in targets.stages]
    schedules = _schedules(targets, range(1, count + 1), count, by_stage)
    if targets.schedule == "stages":
        return schedules
    weights = {offset: constant(targets.weight) * schedule for offset, schedule in schedules.items()}
    return weights | {1: constant(1.0)}


def _schedules(
    config: LayersConfig | TargetsConfig,
    numbers: Sequence[int],
    count: int,
    by_stage: Sequence[tuple[float, ...]],
    steps: int | None = None,
) -> dict[int, Schedule]:
    """By layer or offset of `numbers`; `by_stage` are their weights in each stage."""
    span = config.start, config.end
    if config.schedule in SWITCHES:
        return {number: SWITCHES[config.schedule](number, count, *span) for number in numbers}
    if config.schedule == "rotational":
        turns = config.rotation or len(numbers)
        return {number: rotational(index, turns, steps) for index, number in enumerate(numbers)}
    if config.schedule == "stages":
        ends = [stage.until for stage in config.stages]
        weights = {number: [stage[index] for stage in by_stage] for index, number in enumerate(numbers)}
        return {number: staged(own, ends, *span, config.passage) for number, own in weights.items()}
    return dict.fromkeys(numbers, DECAYS[config.schedule](*span))


def _task_rows(aux: AuxConfig, num_layers: int) -> list[Term]:
    rows = []
    for name, task in aux.tasks.items():
        layer = num_layers if task.layer is None else count_of(task.layer, num_layers)
        weight = constant(task.weight) * DECAYS[task.schedule](task.start, task.end)
        rows.append(Term(layer, 0, "all", weight, task=name))
    return sorted(rows, key=lambda row: (row.layer, row.task))


def _averaged(weights: dict[int, Schedule], weighted: bool) -> dict[int, Schedule]:
    schedules = tuple(weights.values())

    def share(p: float) -> float:
        active_weights = [weight for schedule in schedules if (weight := schedule(p)) > 0.0]
        divisor = sum(active_weights) if weighted else len(active_weights)
        return 1.0 / (divisor or 1)

    breakpoints = frozenset().union(*(schedule.breakpoints for schedule in schedules))
    factor = Schedule(share, breakpoints)
    return {layer: weight * factor for layer, weight in weights.items()}


def active(terms: Sequence[Term], progress: float) -> Iterator[tuple[Term, float]]:
    """The terms of nonzero weight, with their weights."""
    for term in terms:
        if weight := term.weight(progress):
            yield term, weight


def active_by_layer(terms: Sequence[Term], progress: float) -> dict[int, Rows]:
    """The same by layer, from the lowest on."""
    rows: dict[int, Rows] = {}
    for term, weight in active(terms, progress):
        rows.setdefault(term.layer, []).append((term, weight))
    return dict(sorted(rows.items()))
