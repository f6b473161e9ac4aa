"""What is measured on every prediction of a text, in parts and in shares."""

import math

import numpy as np
import pytest
import torch

from charlm.data.windows import evaluation_windows
from charlm.inference import scoring
from charlm.inference.scoring import nats_and_entropies


def test_costs_and_entropies_in_chunks(monkeypatch):
    """Guards against values that a chunk boundary shifts, a wrong formula, and values rounded to fp32."""
    random = torch.Generator().manual_seed(0)
    logits_MV, targets_M = torch.randn(23, 7, generator=random) * 5, torch.randint(7, (23,), generator=random)
    expected = [[], []]
    for row, target in zip(logits_MV.tolist(), targets_M.tolist(), strict=True):
        probabilities = [math.exp(x) / sum(map(math.exp, row)) for x in row]
        expected[0].append(-math.log(probabilities[target]))
        expected[1].append(-sum(p * math.log(p) for p in probabilities))
    for size in (1, 7, 30, 10_000):
        monkeypatch.setattr(scoring, "CHUNK_LOGITS", {"cpu": size, "cuda": size})
        found = scoring.measured(nats_and_entropies, logits_MV, targets_M)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_processes", [1, 2, 3, 5])
@pytest.mark.parametrize("num_symbols", [1, 2, 12, 29, 30])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_processes_share_the_windows(num_processes, num_symbols, batch_size):
    """Guards against symbols that two processes score or none, and unequal numbers of batches, on which processes that
    wait for each other in every forward pass would hang."""
    windows = evaluation_windows(num_symbols, context_length=4, stride=3)
    batches = [list(scoring._batches(windows, batch_size, rank, num_processes)) for rank in range(num_processes)]
    scored = [int(symbol) for own in batches for symbols, counts in own for symbol in symbols[:, 1:][counts]]
    assert sorted(scored) == list(range(1, num_symbols))
    assert len({tuple(len(symbols) for symbols, _ in own) for own in batches}) == 1
