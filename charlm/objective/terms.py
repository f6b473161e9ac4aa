"""The objective as a table: one row per prediction task, with its weight over training."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from charlm.config import AuxConfig, ConfigError
from charlm.objective.schedules import DECAYS, Schedule, constant, staggered


@dataclass(frozen=True)
class Term:
    """Predict the character `offset` steps ahead from the hidden states of `layer`.

    `layer` is 1-based and offset 1 is the next character. The loss is the mean cross-entropy over "all" positions of
    the window, or that of the "last" one. `weight` is a function of progress; a row of weight zero is not computed.
    """

    layer: int
    offset: int
    """0 in a row of a task of the user's own."""
    positions: Literal["all", "last"]
    weight: Schedule
    hinge: float = 0.0
    """Nats up to which the loss does not count."""
    task: str | None = None
    """Name of the user's own task that this row is for."""

    @property
    def name(self) -> str:
        """Unique in a table, and a path in trackers that group by slashes."""
        what = f"offset{self.offset}/{self.positions}" if self.task is None else f"task/{self.task}"
        return f"layer{self.layer}/{what}"


def build_terms(aux: AuxConfig, num_layers: int) -> tuple[Term, ...]:
    """The table that a config stands for, ordered by layer, offset and positions.

    The main task, the last layer predicting the next character, has weight 1 unless `aux.main_weight` says otherwise.
    A layer's weight multiplies all its rows and an offset's all of its. With the share w of `aux.positions`, each task
    has an "all" row of weight w and a "last" row of weight 1 - w. Rows that are zero throughout are not listed.

    Raises:
        ConfigError: at some point of training no row weighs anything.
    """
    layer_weights = _layer_weights(aux, num_layers)
    offset_weights = _offset_weights(aux)
    positions = aux.positions
    share = DECAYS[positions.schedule](positions.start, positions.end) if positions.enabled else constant(0.0)
    rows = (
        Term(layer, offset, kind, layer_weight * offset_weight * position_weight)
        for layer, layer_weight in layer_weights.items()
        for offset, offset_weight in offset_weights.items()
        for kind, position_weight in (("all", share), ("last", share.complement()))
    )
    terms = tuple(row for row in rows if row.weight.stops_at != 0.0)
    _require_a_loss(terms, aux)
    return terms


def _require_a_loss(terms: Sequence[Term], aux: AuxConfig) -> None:
    edges = [0.0, *sorted(frozenset().union(*(term.weight.breakpoints for term in terms))), 1.0]
    for left, right in pairwise(edges):
        if not any(active(terms, (left + right) / 2)):
            raise ConfigError(
                f"aux.main_weight={aux.main_weight}: all losses have weight zero from progress {left:g} on; "
                "raise it, or enable other losses for that time"
            )


def _layer_weights(aux: AuxConfig, num_layers: int) -> dict[int, Schedule]:
    intermediate = aux.layers.at if aux.layers.at is not None else range(aux.layers.every, num_layers, aux.layers.every)
    weights = {
        layer: constant(aux.layers.weight) * _layer_schedule(aux, layer, num_layers)
        for layer in sorted(intermediate)
        if aux.layers.enabled and layer < num_layers
    }
    weights[num_layers] = constant(aux.main_weight)
    return _averaged(weights) if aux.reduction == "mean" else weights


def _layer_schedule(aux: AuxConfig, layer: int, num_layers: int) -> Schedule:
    if aux.layers.schedule == "staggered":
        return staggered(layer, num_layers, aux.layers.start, aux.layers.end)
    return DECAYS[aux.layers.schedule](aux.layers.start, aux.layers.end)


def _offset_weights(aux: AuxConfig) -> dict[int, Schedule]:
    targets = aux.targets
    extra = constant(targets.weight) * DECAYS[targets.schedule](targets.start, targets.end)
    offsets = range(2, targets.num_targets + 1) if targets.enabled else ()
    return {1: constant(1.0)} | dict.fromkeys(offsets, extra)


def _averaged(weights: dict[int, Schedule]) -> dict[int, Schedule]:
    """Each weight divided by the number of layers that are active at the same progress."""
    schedules = tuple(weights.values())
    share = Schedule(
        lambda p: 1.0 / max(1, sum(schedule(p) > 0.0 for schedule in schedules)),
        frozenset().union(*(schedule.breakpoints for schedule in schedules)),
    )
    return {layer: weight * share for layer, weight in weights.items()}


def active(terms: Sequence[Term], progress: float) -> Iterator[tuple[Term, float]]:
    """The rows that weigh something at `progress`, with their weights."""
    for term in terms:
        weight = term.weight(progress)
        if weight != 0.0:
            yield term, weight
