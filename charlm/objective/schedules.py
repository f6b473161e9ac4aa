"""Weights as functions of training progress p = completed optimizer steps / all of them.

A schedule's clock reads u = 0 until p = start and u = 1 from p = end on. A weight that stops at c is
positive while p < c, and zero from c on.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise


@dataclass(frozen=True)
class EveryNthStep:
    """On at every `turns`-th of a run's `steps` steps, first at step `index`."""

    index: int
    turns: int
    steps: int

    def is_on(self, progress: float) -> bool:
        return (round(progress * self.steps) - self.index) % self.turns == 0

    def next_on(self, progress: float) -> float:
        """The progress of the next such step, from `progress` on."""
        step = round(progress * self.steps)
        return (step + (self.index - step) % self.turns) / self.steps


@dataclass(frozen=True)
class Schedule:
    """A weight over progress: `schedule(p)` for p in [0, 1).

    The formula changes at `breakpoints`. Between two of them `weight` is zero or positive throughout
    (except for an isolated zero), so that `stops_at` is exact. With a `rotation` the schedule is
    zero between its turns; `stops_at` and `limit` describe the turns.
    """

    weight: Callable[[float], float]
    breakpoints: frozenset[float] = frozenset()
    rotation: EveryNthStep | None = None

    def __call__(self, progress: float) -> float:
        off = self.rotation is not None and not self.rotation.is_on(progress)
        return 0.0 if off else self.weight(progress)

    def __mul__(self, other: "Schedule") -> "Schedule":
        """The product; at most one has a rotation."""
        return Schedule(
            lambda p: self.weight(p) * other.weight(p),
            self.breakpoints | other.breakpoints,
            self.rotation or other.rotation,
        )

    def complement(self) -> "Schedule":
        """1 - weight, of a schedule without a rotation."""
        return Schedule(lambda p: 1.0 - self.weight(p), self.breakpoints)

    def at_next_turn(self, progress: float) -> float:
        """The weight at the next turn of a rotation, from `progress` on."""
        return self.weight(self.rotation.next_on(progress) if self.rotation else progress)

    @property
    def period(self) -> int:
        """Steps from one turn to the next: 1 without a rotation."""
        return self.rotation.turns if self.rotation else 1

    @property
    def limit(self) -> float:
        """The limit of the weight at p = 1 from the left."""
        return round(self.weight(math.nextafter(1.0, 0.0)), 12)

    @property
    def stops_at(self) -> float | None:
        """The progress from which the weight is zero for good; None if it never is."""
        stop = None
        for left, right in reversed(intervals(self)):
            if self.weight((left + right) / 2) != 0.0:
                break
            stop = left
        return stop


def intervals(*schedules: Schedule) -> list[tuple[float, float]]:
    """The parts of training, in order, within which no formula changes."""
    edges = {0.0, 1.0}.union(*(schedule.breakpoints for schedule in schedules))
    return list(pairwise(sorted(edges)))


def constant(value: float) -> Schedule:
    return Schedule(lambda p: value)


def _at(clock: Fraction, start: float, end: float) -> float:
    """The progress at which the clock reads `clock`; in floats 0.1 + 0.8 * 0.25 is not 0.3."""
    exact_start, exact_end = Fraction(repr(start)), Fraction(repr(end))
    return float(exact_start + (exact_end - exact_start) * clock)


def _clock(progress: float, start: float, end: float) -> float:
    if progress < start:
        return 0.0
    return 1.0 if progress >= end else (progress - start) / (end - start)


def cutoff(start: float = 0.0, end: float = 1.0, clock: Fraction = Fraction(1)) -> Schedule:
    """1 until the clock reads `clock`, then 0."""
    stop = _at(clock, start, end)
    return Schedule(lambda p: 1.0 if p < stop else 0.0, frozenset({stop}))


def linear(start: float = 0.0, end: float = 1.0) -> Schedule:
    """1 - u: a straight fall."""
    return Schedule(lambda p: 1.0 - _clock(p, start, end), frozenset({start, end}))


def cosine(start: float = 0.0, end: float = 1.0) -> Schedule:
    """(1 + cos(pi u)) / 2: a fall that is flat at both ends."""

    def weight(p: float) -> float:
        return (1.0 + math.cos(math.pi * _clock(p, start, end))) / 2

    return Schedule(weight, frozenset({start, end}))


DECAYS: dict[str, Callable[[float, float], Schedule]] = {
    "constant": lambda start, end: constant(1.0),
    "linear": linear,
    "cosine": cosine,
    "cutoff": cutoff,
}

SWITCHES: dict[str, Callable[[int, int, float, float], Schedule]] = {
    # Layers stop from the lowest up, by u = 1/2 (Al-Rfou et al. 2018, "Intermediate Layer Losses").
    "staggered": lambda i, n, *span: cutoff(*span, Fraction(i, 2 * n)),
    # A straight fall to the same ends: the paper can be read so too.
    "staggered_linear": lambda i, n, start, end: linear(start, _at(Fraction(i, 2 * n), start, end)),
    # Layers start from the top down (Elhoushi et al. 2024, LayerSkip, section 4.1.2).
    "gradual": lambda i, n, *span: cutoff(*span, Fraction(n - i, 2 * n)).complement(),
    # The next target starts as each of n equal parts begins.
    "growing": lambda i, n, *span: cutoff(*span, Fraction(i - 1, n)).complement(),
    # The farthest target stops as each of n equal parts ends.
    "shrinking": lambda i, n, *span: cutoff(*span, Fraction(n - i + 1, n)),
}
"""Schedules of layer or target i of n that start or end at a clock of its own."""


def rotational(index: int, turns: int, steps: int) -> Schedule:
    """1 at every `turns`-th step, first at step `index` (LayerSkip, section 4.1.2)."""
    return Schedule(lambda p: 1.0, rotation=EveryNthStep(index, turns, steps))


def staged(weights: Sequence[float], ends: Sequence[float], start: float, end: float, passage: str) -> Schedule:
    """`weights[i]` until the clock reads `ends[i]`; the ends rise to 1.

    With `passage` "linear" a weight moves straight to the next stage's; the last one stays.
    """
    edges = [_at(Fraction(repr(clock)), start, end) for clock in (0.0, *ends)]

    def weight(p: float) -> float:
        stage = min(bisect_right(edges, p, lo=1) - 1, len(weights) - 1)
        if passage == "step" or stage == len(weights) - 1 or p <= edges[stage]:
            return weights[stage]
        passed = (p - edges[stage]) / (edges[stage + 1] - edges[stage])
        return weights[stage] + passed * (weights[stage + 1] - weights[stage])

    return Schedule(weight, frozenset(edges))
