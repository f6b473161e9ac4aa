"""Losses that break."""

from collections.abc import Callable, Container

import pytest

from charlm.training import loop


@pytest.fixture
def break_losses(monkeypatch) -> Callable[[Container[int], int], None]:
    """`break_losses(passes, term)`: in some passes over the windows, counted from 0, the total and one term are nan."""

    def arrange(passes: Container[int], term: int) -> None:
        plain, count = loop.accumulate_gradients, iter(range(10_000))

        def breaking(*arguments):
            losses = plain(*arguments)
            if next(count) in passes:
                losses.row[0] = losses.row[1:][term] = float("nan")
            return losses

        monkeypatch.setattr(loop, "accumulate_gradients", breaking)

    return arrange
