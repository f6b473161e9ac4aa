"""Early exit against brute force: one prediction after the other, one layer after the other."""

import json
import math
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from charlm.config import Config, TrainConfig, UserError
from charlm.inference.early_exit import QUANTILES, ExitReader, choose_thresholds, early_exit, first_sure
from charlm.inference.evaluation import bits_per_character
from charlm.inference.generation import generate, stream
from charlm.inference.sampling import Sampling
from charlm.inference.speculative import DraftStatistics
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
    with pytest.raises(ValueError, match="Quantiles must be in the range"):
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


@torch.no_grad()
def written_by_exits(trained, length: int, threshold: float) -> tuple[str, list[int], list[float]]:
    """A text after "ab", the layer that predicts each symbol, and the entropies, by the description: every layer keeps
    the input that it had at each position, or the hidden state of the exit below, and attends to all of them."""
    transformer, last = trained.transformer, trained.config.model.num_layers
    context_length, exits = trained.config.model.context_length, [layer for layer, _ in trained.heads.pairs]
    generator = torch.Generator().manual_seed(3)
    context, text, used, entropies, inputs = list(b"ab"), [], [], [], None
    for _ in range(length):
        if len(context) > context_length:
            context, inputs = context[-max(1, context_length // 2) :], None
        x_BTD = transformer.embed(torch.tensor([context]), transformer.places(len(context), None), None)
        can_exit = inputs is not None
        inputs = inputs or dict.fromkeys(range(1, last + 1), x_BTD[:, :0])
        x_BTD = x_BTD[:, inputs[1].shape[1] :]
        for layer in range(1, last + 1):
            inputs[layer] = torch.cat([inputs[layer], x_BTD], dim=1)
            whole_BTD = inputs[layer]
            if layer <= len(transformer.position_tables):
                whole_BTD = whole_BTD + transformer.position_tables[layer - 1][: whole_BTD.shape[1]]
            rotation = transformer.rotation(transformer.places(whole_BTD.shape[1], None))
            new = x_BTD.shape[1]
            x_BTD = transformer.blocks[layer - 1](whole_BTD, rotation)[:, -new:]
            if layer not in exits or (layer < last and not can_exit):
                continue
            hidden_BTD = transformer.final_norm(x_BTD) if layer == last else x_BTD
            logits_1V = trained.heads(hidden_BTD, layer)[0, -1:, 0]
            bits_1V = logits_1V.double().log_softmax(-1) / math.log(2)
            entropies.append(-float((2**bits_1V * bits_1V).sum()))
            if layer == last or entropies[-1] < threshold:
                break
        for above in range(layer + 1, last + 1):
            inputs[above] = torch.cat([inputs[above], x_BTD], dim=1)
        (symbol,), _ = Sampling().choose(logits_1V, generator)
        context.append(symbol)
        text.append(symbol)
        used.append(layer)
    return bytes(text).decode(errors="replace"), used, entropies


@pytest.mark.parametrize("heads", [(1, 2, 3, 4), (2, 4)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"context_length": 2},
        {"context_length": 7, "position_encoding": "input", "norm": "post"},
        {"context_length": 24, "position_encoding": "rotary", "ngrams": (2, 4)},
        {"context_length": 32},
    ],
    ids=str,
)
def test_a_text_with_exits_by_its_description(build_model, heads, options):
    """Guards against keys and values that a skipped layer never got, or got from another state, position or norm; a
    layer that runs twice; and an exit below the threshold that is not the first, or is taken in a prompt."""
    trained = build_model(num_layers=4, pairs=[(layer, 1) for layer in heads], **options)
    write = partial(generate, trained, b"ab", length=60, seed=3)
    entropies = np.unique(np.round(written_by_exits(trained, 60, 0.0)[2], 3))
    for place in (len(entropies) // 10, len(entropies) // 3, len(entropies) // 2):
        threshold, statistics = entropies[place : place + 2].mean(), DraftStatistics()  # between two, however rounded
        text, used, _ = written_by_exits(trained, 60, threshold)
        assert write(exit_entropy=threshold, statistics=statistics) == text
        assert statistics.exits == Counter(used) and len(statistics.exits) > 1
    assert write(exit_entropy=0.0) == write()


def test_skipped_layers_do_not_run(build_model, monkeypatch):
    """Guards against an exit that saves nothing."""
    trained, ran = build_model(num_layers=3, context_length=32), []
    run = ExitReader._run
    monkeypatch.setattr(ExitReader, "_run", lambda self, x, *span: ran.append(span[:2]) or run(self, x, *span))
    texts = generate(trained, ["a", "bc"], length=9, exit_entropy=math.inf)
    assert ran == [(0, 3), *[(0, 1)] * 8] * 2  # the prompt, and each symbol
    assert texts == ["".join(stream(trained, p, length=9, seed=n, exit_entropy=9.0)) for n, p in enumerate(["a", "bc"])]


@pytest.mark.parametrize(
    ("options", "pairs", "message"),
    [
        ({"exit_entropy": -0.1}, None, "exit_entropy=-0.1: "),
        ({"exit_entropy": math.nan}, None, "exit_entropy=NaN"),
        ({"exit_entropy": 1.0, "draft": 1}, None, "cannot be combined with draft"),
        ({"exit_entropy": 1.0}, [(2, 1)], "only the last layer has a head"),
    ],
)
def test_exits_that_cannot_be_taken(build_model, options, pairs, message):
    """Guards against an exit that is silently ignored, and one that is never or always taken by mistake."""
    with pytest.raises(UserError, match=message):
        generate(build_model(pairs=pairs), "a", length=3, **options)
