"""Schedules: exact weights, and exact steps at which they switch and end."""

import math
from fractions import Fraction

import pytest

from charlm.objective.schedules import SWITCHES, Schedule, constant, cosine, cutoff, linear, rotational, staged


def switch(name: str, i: int, n: int, start: float = 0.0, end: float = 1.0) -> Schedule:
    return SWITCHES[name](i, n, start, end)


def stages(weights, ends, start: float = 0.0, end: float = 1.0, passage: str = "step") -> Schedule:
    return staged(weights, ends, start, end, passage)


PROGRESSES = [0.0, 0.1, 0.25, 0.375, 0.5, 0.625, 0.75, 0.9]


@pytest.mark.parametrize(
    ("schedule", "weights"),
    [
        (constant(0.5), [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]),
        (linear(), [1.0, 0.9, 0.75, 0.625, 0.5, 0.375, 0.25, 0.1]),
        (linear(0.25, 0.75), [1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
        (linear(0.0, 0.0), [0.0] * 8),
        (
            cosine(0.0, 0.75),
            [1.0, (1 + math.cos(math.pi * 2 / 15)) / 2, 0.75, 0.5, 0.25, (2 - math.sqrt(3)) / 4, 0.0, 0.0],
        ),
        (cutoff(0.25, 0.75), [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]),
        (cutoff(0.25, 0.75, Fraction(1, 4)), [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]),
        # Layer 3 of 4 falls to zero at 3/8 of the clock: 1 - p / (3/8); with a clock of [1/4, 3/4], at 7/16.
        (switch("staggered_linear", 3, 4), [1.0, 11 / 15, 1 / 3, 0.0, 0.0, 0.0, 0.0, 0.0]),
        (switch("staggered_linear", 3, 4, 0.25, 0.75), [1.0, 1.0, 1.0, 1 / 3, 0.0, 0.0, 0.0, 0.0]),
        (cutoff(0.1, 0.1), [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]),
        (linear(0.25, 0.75) * constant(0.5), [0.5, 0.5, 0.5, 0.375, 0.25, 0.125, 0.0, 0.0]),
        (stages([1.0, 0.25, 0.0], [0.25, 0.625, 1.0]), [1.0, 1.0, 0.25, 0.25, 0.25, 0.0, 0.0, 0.0]),
        (stages([1.0, 0.5], [0.5, 1.0], 0.5, 1.0), [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5]),
        (stages([0.0, 2.0], [0.5, 1.0], passage="linear"), [0.0, 0.4, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0]),
        (
            stages([1.0, 0.5, 0.0], [0.25, 0.75, 1.0], passage="linear"),
            [1.0, 0.8, 0.5, 0.375, 0.25, 0.125, 0.0, 0.0],
        ),
        (
            stages([1.0, 0.0], [0.5, 1.0], 0.25, 0.75, passage="linear"),
            [1.0, 1.0, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0],
        ),
        (stages([0.7], [1.0], passage="linear"), [0.7] * 8),
        (stages([1.0, 0.5], [0.4, 1.0], 0.25, 0.25, passage="linear"), [1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]),
    ],
)
def test_weights_by_hand(schedule, weights):
    """A formula that is off, or a clock that starts or stops at the wrong end."""
    for progress, weight in zip(PROGRESSES, weights, strict=True):
        assert schedule(progress) == pytest.approx(weight, abs=1e-12), progress


@pytest.mark.parametrize(
    ("start", "end"), [("0", "1"), ("0.1", "0.9"), ("0.3", "0.7"), ("0.12", "0.345"), ("0.2", "0.2")]
)
@pytest.mark.parametrize("total", [10, 60, 97, 1000, 999_983, 4_000_000, 8_000_000])
def test_switches_are_at_the_exact_step(total, start, end):
    """A weight that switches a step early or late, as 0.1 + 0.8 / 4 > 0.3 in floating point, or never: l // (2 * n)."""
    span = float(start), float(end)
    switches = [(cutoff(*span), Fraction(1)), (linear(*span), Fraction(1))]
    switches.append((stages([1.0, 0.0], [0.7, 1.0], *span), Fraction("0.7")))
    for n in (2, 3, 5, 12, 64):
        for k in range(1, n):
            switches += [
                (switch("staggered", k, n, *span), Fraction(k, 2 * n)),
                (switch("staggered_linear", k, n, *span), Fraction(k, 2 * n)),
                (switch("gradual", k, n, *span).complement(), Fraction(n - k, 2 * n)),
                (switch("growing", k + 1, n, *span).complement(), Fraction(k, n)),
                (switch("shrinking", k + 1, n, *span), Fraction(n - k, n)),
            ]
    for schedule, clock in switches:
        first_silent = math.ceil((Fraction(start) + (Fraction(end) - Fraction(start)) * clock) * total)
        assert schedule((first_silent - 1) / total) > 0.0
        assert first_silent == total or schedule(first_silent / total) == 0.0


@pytest.mark.parametrize(
    ("schedule", "stops_at", "limit"),
    [
        (constant(1.0), None, 1.0),
        (constant(0.0), 0.0, 0.0),
        (constant(1.0).complement(), 0.0, 0.0),
        (linear(), None, 0.0),
        (cutoff(0.0, 0.0), 0.0, 0.0),
        (cutoff(0.2, 0.6), 0.6, 0.0),
        (cosine(0.2, 0.6), 0.6, 0.0),
        (linear(0.5, 1.0), None, 0.0),
        (linear(0.2, 0.6).complement(), None, 1.0),
        (switch("staggered", 3, 4), 0.375, 0.0),
        (switch("staggered_linear", 3, 4), 0.375, 0.0),
        (switch("staggered", 1, 2) * linear(0.5, 0.9), 0.25, 0.0),
        (switch("staggered", 1, 2) * constant(0.0), 0.0, 0.0),
        (cutoff(0.0, 0.3).complement() * cutoff(0.0, 0.5), 0.5, 0.0),
        (cutoff(0.0, 0.3).complement() * cutoff(0.0, 0.3), 0.0, 0.0),
        (linear() * linear().complement(), None, 0.0),
        (switch("gradual", 3, 4, 0.2, 1.0) * cutoff(0.0, 0.3), 0.0, 0.0),
        (switch("gradual", 3, 4, 0.2, 1.0) * cutoff(0.0, 0.31), 0.31, 0.0),
        (switch("shrinking", 2, 3, 0.1, 0.7), 0.5, 0.0),
        (stages([0.0, 1.0, 0.0], [0.3, 0.6, 1.0]), 0.6, 0.0),
        (stages([1.0, 0.0, 0.0], [0.3, 0.6, 1.0], passage="linear"), 0.3, 0.0),
        (stages([0.0, 0.0, 1.0], [0.3, 0.6, 1.0], passage="linear"), None, 1.0),
        (stages([0.0, 0.5], [0.3, 1.0], 0.5, 0.5), None, 0.5),
        (rotational(3, 4, 100) * cutoff(0.0, 0.5), 0.5, 0.0),
    ],
)
def test_end_of_a_schedule(schedule, stops_at, limit):
    """A row listed that never weighs anything, or one dropped that does; an end that is off by an interval."""
    assert schedule.stops_at == stops_at
    assert schedule.limit == limit


@pytest.mark.parametrize("steps", [7, 60, 1000, 999_983, 8_000_000])
@pytest.mark.parametrize("turns", [1, 2, 3, 11])
def test_rotation_by_the_step(turns, steps):
    """A head that misses its turn, or has two in a row, because step / steps * steps is not the step."""
    some = [*range(min(steps, 300)), *range(max(0, steps - 300), steps)]
    for index in range(turns):
        schedule = constant(0.5) * rotational(index, turns, steps)
        assert [schedule(step / steps) for step in some] == [0.5 * (step % turns == index) for step in some]
    assert rotational(0, turns, steps).at_next_turn(1 / steps) == 1.0


def test_the_next_turn():
    """A weight shown of a step at which the row is off."""
    schedule = linear() * rotational(2, 4, 10)  # on at steps 2, 6
    assert [schedule.at_next_turn(step / 10) for step in range(7)] == pytest.approx([0.8] * 3 + [0.4] * 4)
    assert linear().at_next_turn(0.3) == 0.7
