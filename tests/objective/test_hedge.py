"""Layer weights that learn: the rule in float64 by numpy, and what the weights do to the loss."""

import math

import numpy as np
import pytest
import torch

from charlm.config import AuxConfig, Config, HedgeConfig, LayersConfig, PositionsConfig
from charlm.objective.build import build_objective
from charlm.objective.hedge import Hedge
from charlm.objective.objective import Objective
from tiny import small_model

BETA, SMOOTHING = 0.9, 0.2
HEDGE = HedgeConfig(enabled=True, beta=BETA, smoothing=SMOOTHING)


def test_fifty_steps_by_hand():
    """A weight that forgets the floor, is normalised before it, or follows another layer's loss."""
    rng = np.random.default_rng(0)
    hedge = Hedge([6, 2, 4], BETA, SMOOTHING)
    alpha = np.full(3, 1 / 3)
    floored = 0
    for _ in range(50):
        loss = rng.uniform(0.5, 4.0, size=3) * [3, 1, 0.7]  # of layers 2, 4 and 6
        alpha = np.maximum(alpha * BETA**loss, SMOOTHING / 3)
        floored += int((alpha == SMOOTHING / 3).any())
        alpha /= alpha.sum()
        hedge.adapt({layer: torch.tensor(value) for layer, value in zip((2, 4, 6), loss, strict=True)})
        np.testing.assert_allclose(hedge.weights.numpy(), alpha, rtol=2e-6)
    assert floored > 10
    assert alpha[2] > 0.6
    assert hedge.weight(4).item() == pytest.approx(alpha[1])


def test_a_silent_layer_keeps_its_weight():
    """Weights of layers that are heard in turn: those that are not must not gain by it."""
    hedge = Hedge([1, 2, 3], BETA, 0.0)
    hedge.adapt({1: torch.tensor(1.0), 2: torch.tensor(3.0), 7: torch.tensor(9.0)})
    first, second = BETA**1 / 3, BETA**3 / 3
    scale = (2 / 3) / (first + second)
    torch.testing.assert_close(hedge.weights, torch.tensor([first * scale, second * scale, 1 / 3]))
    before = hedge.weights.clone()
    hedge.adapt({})
    hedge.adapt({1: torch.tensor(math.nan), 2: torch.tensor(1.0)}, skip=torch.tensor(True))
    assert torch.equal(hedge.weights, before)


def test_weights_multiply_the_loss_and_follow_the_next_character(randomise):
    """Weights that are logged and not used, or that follow the loss of another row."""
    positions = PositionsConfig(schedule="cutoff", end=0.5)
    aux = AuxConfig(hedge=HEDGE, layers=LayersConfig(at=(1, 3), schedule="constant"), positions=positions)
    objective = randomise(build_objective(Config(model=small_model(num_layers=4, context_length=6), aux=aux), 5))
    assert objective.hedge.layers == [1, 3, 4]
    windows_BW = torch.randint(5, (3, objective.window_length), generator=torch.Generator().manual_seed(0))
    plain = Objective(objective.transformer, objective.heads, objective.terms)
    alpha = np.full(3, 1 / 3)
    for progress, where in ((0.0, "all"), (0.25, "all"), (0.5, "last")):
        report, unweighted = objective(windows_BW, progress), plain(windows_BW, progress)
        assert report.parts == unweighted.parts
        for layer, weight in zip((1, 3, 4), alpha, strict=True):
            share = weight * unweighted.by_layer[layer].item()
            assert report.by_layer[layer].item() == pytest.approx(share, rel=1e-5)
        assert report.total.item() == pytest.approx(sum(share.item() for share in report.by_layer.values()), rel=1e-6)
        objective.adapt(report.parts)
        loss = [report.parts[f"layer{layer}/offset1/{where}"].item() for layer in (1, 3, 4)]
        alpha = np.maximum(alpha * BETA ** np.array(loss), SMOOTHING / 3)
        alpha /= alpha.sum()
        np.testing.assert_allclose(objective.hedge.weights.numpy(), alpha, rtol=1e-5)
    report.total.backward()  # of weights that have changed meanwhile
