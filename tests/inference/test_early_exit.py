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


@pytest.fixture
def setting(build_model, build_corpus, letters):
    """A model of three layers with a head on each, and a corpus with a validation split."""
    trained = build_model(num_layers=3)
    config = Config(model=trained.config.model, train=TrainConfig(valid_symbols=90))
    corpus = build_corpus(letters(60, seed=1).tobytes())
    valid = build_corpus(letters(120, seed=2).tobytes()).splits["test"]
    corpus = corpus.model_copy(update={"splits": corpus.splits | {"valid": valid}})
    return replace(trained, config=config), corpus


@pytest.mark.parametrize("batch_size", [None, 7])
def test_the_curve_equals_brute_force(setting, brute_force, batch_size):
    """Guards against an exit at the last sure layer, thresholds from the scored text, layers that are off by one, sums
    that lose a batch, and validation text beyond what the run was validated on."""
    trained, corpus = setting
    ids, valid = corpus.splits["test"].ids[:50], corpus.splits["valid"].ids[:90]

    def bits_and_entropies(text: np.ndarray) -> tuple[list, list]:
        logarithms_LNV = brute_force(trained, text, stride=1) / math.log(2)
        entropies_LN = -(logarithms_LNV * 2**logarithms_LNV).sum(-1)
        return (-logarithms_LNV[:, range(len(text)), text]).T.tolist(), entropies_LN.T.tolist()

    valid_entropies = sorted(entropy for row in bits_and_entropies(valid)[1] for entropy in row[:2])
    bits, entropies = bits_and_entropies(ids)
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
