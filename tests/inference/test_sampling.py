import math

import pytest
import torch

from charlm.inference.sampling import Sampling

# Powers of two, so that sums are exact and a threshold can be met to the last bit.
PROBABILITIES = torch.tensor([0.125, 0.5, 0.125, 0.25], dtype=torch.float64)
LOGITS = PROBABILITIES.log() + 3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
        ({"temperature": 0.5}, [1 / 22, 16 / 22, 1 / 22, 4 / 22]),
        ({"temperature": 0}, [0, 1, 0, 0]),
        ({"temperature": 1e-300}, [0, 1, 0, 0]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_k": 3}, [1 / 7, 4 / 7, 0, 2 / 7]),  # of two equals the first stays
        ({"top_k": 99}, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
        ({"top_p": 1e-9}, [0, 1, 0, 0]),
        ({"top_p": 0.5}, [0, 1, 0, 0]),
        ({"top_p": 0.51}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_p": 0.75}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_p": 0.76}, [1 / 7, 4 / 7, 0, 2 / 7]),
        ({"top_p": 1.0}, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
        ({"top_k": 2, "top_p": 0.66}, [0, 1, 0, 0]),  # 2/3 of what top_k leaves is enough
        ({"temperature": 0.5, "top_p": 0.7}, [0, 1, 0, 0]),  # so are 16/22
    ],
)
def test_distribution_by_hand(options, expected):
    """Guards against a top_p that keeps one symbol too many or too few, symbols that are sorted and not put back, and
    another order of the three."""
    logits = LOGITS.clone()
    assert Sampling(**options).distribution(logits).tolist() == pytest.approx(expected, abs=1e-9)
    assert torch.equal(logits, LOGITS)


def test_greedy_takes_the_first_of_equals():
    """Guards against a choice between equals that differs from machine to machine."""
    assert Sampling(temperature=0).choose(torch.tensor([[0.0, 1.0, 1.0]]), torch.Generator())[0] == [1]


def test_impossible_symbols_are_never_drawn():
    """Guards against a draw that falls on the edge between symbols, or past the last."""
    logits_V = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf])
    symbols, _ = Sampling().choose(logits_V.expand(200, -1), torch.Generator().manual_seed(0))
    assert set(symbols) == {1, 3}


def test_draws_follow_the_distribution():
    """Guards against a distribution that is computed and not drawn from: each draw by the inverse distribution
    function, by hand."""
    for seed in range(200):
        uniform = float(torch.rand((), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
        expected = next(symbol for symbol, end in enumerate([0.125, 0.625, 0.75, 1.0]) if uniform < end)
        assert Sampling().choose(LOGITS[None], torch.Generator().manual_seed(seed))[0] == [expected]
