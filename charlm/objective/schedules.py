"""Weights as pure functions of training progress p, the completed optimizer steps divided by all of them.

A schedule runs on a clock that reads u = 0 until p = start and u = 1 from p = end on. Weights are half-open: one that
stops at c is positive while p < c, and zero from c on.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise


@dataclass(frozen=True)
class Schedule:
    """A weight over progress: `schedule(p)` for p in [0, 1).

    `breakpoints` are the points inside (0, 1) at which the formula changes. Between two of them a schedule is either
    zero or positive throughout (an isolated zero aside), which lets `stops_at` be exact.
    """

    weight: Callable[[float], float]
    breakpoints: frozenset[float] = frozenset()

    def __call__(self, progress: float) -> float:
        return self.weight(progress)

    def __mul__(self, other: "Schedule") -> "Schedule":
        return Schedule(lambda p: self(p) * other(p), self.breakpoints | other.breakpoints)

    def complement(self) -> "Schedule":
        """1 - weight."""
        return Schedule(lambda p: 1.0 - self(p), self.breakpoints)

    @property
    def limit(self) -> float:
        """The weight that the last steps of a long run approach: the limit at p = 1 from the left."""
        return round(self(math.nextafter(1.0, 0.0)), 12)

    @property
    def stops_at(self) -> float | None:
        """The progress from which the weight is zero for good; 0.0 if it always is, None if it never is."""
        edges = [0.0, *sorted(self.breakpoints), 1.0]
        stop = None
        for left, right in reversed(list(pairwise(edges))):
            if self((left + right) / 2) != 0.0:
                break
            stop = left
        return stop


def constant(value: float) -> Schedule:
    """The same weight throughout."""
    return Schedule(lambda p: value)


def _at(clock: Fraction, start: float, end: float) -> float:
    """The progress at which the clock reads `clock`.

    In exact decimal arithmetic, rounded once: then p < c compares as the fractions do, and a schedule switches at the
    exact step (0.1 + 0.8 * 0.25 as floats is a hair above 0.3 and would switch one step late).
    """
    exact_start, exact_end = Fraction(repr(start)), Fraction(repr(end))
    return float(exact_start + (exact_end - exact_start) * clock)


def _clock(progress: float, start: float, end: float) -> float:
    if progress < start:
        return 0.0
    return 1.0 if progress >= end else (progress - start) / (end - start)


def _inside(*points: float) -> frozenset[float]:
    return frozenset(point for point in points if 0.0 < point < 1.0)


def cutoff(start: float = 0.0, end: float = 1.0, clock: Fraction = Fraction(1)) -> Schedule:
    """1 until the clock reads `clock`, then 0."""
    stop = _at(clock, start, end)
    return Schedule(lambda p: 1.0 if p < stop else 0.0, _inside(stop))


def linear(start: float = 0.0, end: float = 1.0) -> Schedule:
    """1 - u: a straight fall from 1 at `start` to 0 at `end`."""
    return Schedule(lambda p: 1.0 - _clock(p, start, end), _inside(start, end))


def cosine(start: float = 0.0, end: float = 1.0) -> Schedule:
    """(1 + cos(pi u)) / 2: a fall from 1 at `start` to 0 at `end` that is flat at both ends."""
    return Schedule(lambda p: (1.0 + math.cos(math.pi * _clock(p, start, end))) / 2, _inside(start, end))


def staggered(layer: int, num_layers: int, start: float = 0.0, end: float = 1.0) -> Schedule:
    """1 until the clock reads l / (2n), then 0 (Al-Rfou et al. 2018, "Intermediate Layer Losses").

    The lowest of n layers stops first; at u = 1/2 every intermediate layer l < n has stopped.
    """
    return cutoff(start, end, Fraction(layer, 2 * num_layers))


DECAYS: dict[str, Callable[[float, float], Schedule]] = {
    "constant": lambda start, end: constant(1.0),
    "linear": linear,
    "cosine": cosine,
    "cutoff": cutoff,
}
