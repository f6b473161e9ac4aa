"""Early exit against brute force: one prediction after the other, one layer after the other."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from charlm.config import Config, TrainConfig, UserError
from charlm.inference.early_exit import QUANTILES, choose_thresholds, early_exit, first_sure
from charlm.inference.evaluation import bits_per_character
from charlm.model.heads import Heads
from charlm.report import figures
from charlm.report.style import save


def letters(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(ord("a"), ord("z") + 1, length).astype(np.uint8)


@pytest.fixture
def setting(build_model, build_corpus):
    """A model of three layers with a head on each, and a corpus with a validation split."""
    trained = build_model(num_layers=3)
    config = Config(model=trained.config.model, train=TrainConfig(valid_symbols=90))
    corpus = build_corpus(letters(60, seed=1).tobytes())
    valid = build_corpus(letters(120, seed=2).tobytes()).splits["test"]
    corpus = corpus.model_copy(update={"splits": corpus.splits | {"valid": valid}})
    return replace(trained, config=config), corpus


@torch.no_grad()
def brute_force(trained, ids: np.ndarray) -> tuple[list, list]:
    """Bits and entropies in bits of each symbol by each layer, each from a forward pass of its own."""
    bits, entropies = [[8.0] * 3], [[8.0] * 3]
    for target in range(1, len(ids)):
        context = torch.from_numpy(ids[max(0, target - 8) : target].astype(np.int64))[None]
        rows = [
            trained.heads(trained.transformer(context, layers=[layer])[layer], layer)[0, -1, 0].double().softmax(0)
            for layer in (1, 2, 3)
        ]
        bits.append([-math.log2(row[int(ids[target])]) for row in rows])
        entropies.append([-float((row * row.log2()).sum()) for row in rows])
    return bits, entropies


@pytest.mark.parametrize("batch_size", [None, 7])
def test_the_curve_equals_brute_force(setting, batch_size):
    """Guards against an exit at the last sure layer, thresholds from the scored text, layers that are off by one, sums
    that lose a batch, and validation text beyond what the run was validated on."""
    trained, corpus = setting
    ids, valid = corpus.splits["test"].ids[:50], corpus.splits["valid"].ids[:90]
    valid_entropies = sorted(entropy for row in brute_force(trained, valid)[1] for entropy in row[:2])
    bits, entropies = brute_force(trained, ids)
    options = {"stride": 1, "limit": 50, "batch_size": batch_size, "quantiles": [0.3, 0.6]}
    found = early_exit(trained, corpus, show_progress=False, **options)
    for point, quantile in zip(found.early_exit.points, (0.3, 0.6), strict=True):
        place = quantile * (len(valid_entropies) - 1)
        below = valid_entropies[math.floor(place)]
        threshold = below + (place % 1) * (valid_entropies[math.ceil(place)] - below)
        used = [next((layer for layer in (1, 2) if row[layer - 1] < threshold), 3) for row in entropies]
        costs = [row[layer - 1] for row, layer in zip(bits, used, strict=True)]
        assert 1 < sum(used) / 50 < 3
        assert point.threshold == pytest.approx(threshold, abs=1e-6)
        assert point.mean_layers == pytest.approx(sum(used) / 50)
        assert point.shares == pytest.approx({str(layer): used.count(layer) / 50 for layer in (1, 2, 3)})
        assert point.bits_per_character == pytest.approx(sum(costs) / 50, abs=1e-6)
    assert found.early_exit.chosen_on == "the first 90 of 120 symbols of the valid split"


def test_the_ends_are_the_whole_depth_and_the_first_exit(setting):
    """Guards against ends of the curve that only come near: a quantile is the largest value of the validation text, and
    the scored one may exceed it."""
    trained, corpus = setting
    found = early_exit(trained, corpus, stride=3, show_progress=False)
    plain = bits_per_character(trained, corpus, stride=3, all_layers=True)
    points = found.early_exit.points
    assert [point.quantile for point in points] == list(QUANTILES)
    first, last = points[0], points[-1]
    assert (first.threshold, first.mean_layers, first.shares) == (0.0, 3.0, {"1": 0.0, "2": 0.0, "3": 1.0})
    assert (last.threshold, last.mean_layers, last.shares) == (None, 1.0, {"1": 1.0, "2": 0.0, "3": 0.0})
    assert first.bits_per_character == pytest.approx(plain.bits_per_character, abs=1e-12)
    assert last.bits_per_character == pytest.approx(plain.layers["1"], abs=1e-12)
    assert last.bits_per_byte == pytest.approx(last.bits_per_character, abs=1e-12)
    assert found.layers == pytest.approx(plain.layers, abs=1e-12)
    assert replace(found, seconds=0, layers=None, early_exit=None) == replace(plain, seconds=0, layers=None)
    means = [point.mean_layers for point in points]
    assert means == sorted(means, reverse=True)
    assert "Infinity" not in json.dumps(found.as_dict())
    assert len(found.as_dict()["early_exit"]["points"]) == len(QUANTILES)


def test_the_first_sure_exit_by_hand():
    """Guards against a threshold that counts where it is only reached, and a last exit that has to be sure."""
    entropies = torch.tensor([[0.5, 2.0, 0.1], [0.4, 1.0, 0.0], [9.0, 9.0, 9.0]])
    assert first_sure(entropies, torch.tensor([0.0, 0.1, 1.0, 2.5, math.inf])).tolist() == [
        [2, 2, 2],
        [2, 2, 1],
        [0, 2, 0],
        [0, 0, 0],
        [0, 0, 0],
    ]
    thresholds = choose_thresholds(entropies.numpy(), [0.0, 0.2, 1.0])
    assert thresholds.tolist() == pytest.approx([0.0, 0.1, math.inf])


def test_a_model_with_one_exit_is_refused(setting):
    """Guards against a curve of one point."""
    trained, corpus = setting
    alone = replace(trained, heads=Heads(trained.config.model, 256, [(3, 1), (3, 2), (1, 2)]))
    with pytest.raises(UserError, match="only the last layer has a head for the next symbol"):
        early_exit(alone, corpus)
    with pytest.raises(UserError, match=r"quantiles=\[0.5, 1.5\]: must lie in \[0, 1\]"):
        early_exit(trained, corpus, quantiles=[0.5, 1.5])


def test_what_the_picture_shows(setting, tmp_path):
    """Guards against a curve drawn from other figures, and layers that are missing."""
    score = early_exit(*setting, quantiles=[0, 0.5, 1], show_progress=False)
    axes = figures.early_exit(score).axes[0]
    exits, layers = axes.lines[:2]
    assert list(exits.get_xdata()) == sorted(point.mean_layers for point in score.early_exit.points)
    assert list(layers.get_xdata()) == [1, 2, 3]
    assert list(layers.get_ydata()) == list(score.layers.values())
    assert save(figures.early_exit(score), tmp_path / "exits.svg").stat().st_size > 1000
