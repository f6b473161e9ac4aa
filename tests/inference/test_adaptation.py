"""Learning while reading: scores, streams, and the model that learned."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from charlm.config import UserError
from charlm.config.adapt import AdaptConfig
from charlm.inference.adaptation import Learner, adapted, read_streams
from charlm.inference.evaluation import bits_per_character, tune
from charlm.inference.scoring import measure_text
from tiny import refused

PLAIN = AdaptConfig(rule="sgd", rate=0.05, ngram_rate=0.0)
ALL = AdaptConfig(rule="rms", rate=0.01, ngram_rate=0.02, decay=0.1, steps=2)


def nats_of(trained, ids: np.ndarray, adapt: AdaptConfig = PLAIN, *, streams: int = 1, stride: int = 3) -> np.ndarray:
    """The adaptive cost of each symbol."""
    costs = np.full(len(ids), np.nan)
    learner = Learner(trained.transformer, trained.heads, adapt)
    for symbols_SQ, counts_SQ, logits_LSQV in read_streams(learner, ids, streams=streams, stride=stride):
        own, logits_MV = symbols_SQ[counts_SQ], logits_LSQV[0][counts_SQ].double()
        assert np.isnan(costs[own]).all()
        costs[own] = F.cross_entropy(logits_MV, torch.tensor(ids[own]).long(), reduction="none")
    assert not np.isnan(costs).any()
    return costs


def by_hand(trained, ids: np.ndarray, rate: float, stride: int) -> list[float]:
    """One stream and plain gradient descent, without a cache: each symbol's cost before it is learned from."""
    transformer, heads = copy.deepcopy((trained.transformer, trained.heads))
    names = [name for name, _ in transformer.named_parameters() if "ngram_embedding.tables" not in name]
    parameters = [*map(transformer.get_parameter, names), *heads.parameters()]
    text, T, costs, end = torch.tensor(ids).long(), trained.config.model.context_length, [math.log(256)], 1
    while end < len(text):
        begin, end = end, min(len(text), end + (T if end == 1 else stride))
        start = max(0, end - 1 - T)
        hidden = transformer(text[None, start : end - 1])[trained.config.model.num_layers]
        logits = heads(hidden, trained.config.model.num_layers)[0, :, 0][begin - end :]
        losses = F.cross_entropy(logits, text[begin:end], reduction="none")
        costs += losses.tolist()
        gradients = torch.autograd.grad(losses.mean(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.data -= rate * gradient
    return costs


@pytest.mark.parametrize(("length", "stride"), [(2, 3), (9, 3), (41, 1), (41, 3), (60, 8)])
def test_costs_are_those_of_a_plain_implementation(build_model, letters, length, stride):
    """Guards against learning before scoring, from other symbols than those just scored, with another context, or by
    another step; and against what a cache of older weights would give."""
    trained = build_model(ngrams=(2, 3))
    expected = by_hand(trained, letters(length), rate=0.05, stride=stride)
    found = nats_of(trained, letters(length), stride=stride)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("streams", [1, 3])
def test_a_later_symbol_never_changes_an_earlier_cost(build_model, letters, streams):
    """Guards against a step on what is not scored yet, and a window that reads into the next stream: each symbol in
    turn is changed, so that every boundary of windows, steps and streams is met."""
    trained, ids = build_model(ngrams=(2,)), letters(25)
    learner = Learner(trained.transformer, trained.heads, ALL)
    when, whose = np.zeros(len(ids), int), np.zeros(len(ids), int)
    for step, (symbols_SQ, counts_SQ, _) in enumerate(read_streams(learner, ids, streams=streams, stride=3)):
        when[symbols_SQ[counts_SQ]] = step
        whose[symbols_SQ[counts_SQ]] = counts_SQ.nonzero()[0]
    before = nats_of(trained, ids, ALL, streams=streams)
    for place in range(len(ids)):
        changed = ids.copy()
        changed[place] += 1
        after = nats_of(trained, changed, ALL, streams=streams)
        order = np.arange(len(ids))
        same = (when < when[place]) | ((when == when[place]) & ((whose != whose[place]) | (order < place)))
        np.testing.assert_array_equal(after[same], before[same])
        later = when > when[place]
        assert not later.any() or (after[later] != before[later]).any()


def test_streams_begin_without_context(build_model, letters):
    """Guards against a stream that begins or ends elsewhere, or sees another's symbols. Nothing is learned here."""
    trained, ids = build_model(), letters(48)
    learner, costs = Learner(trained.transformer, trained.heads, None), np.zeros(48)
    for symbols_SQ, counts_SQ, logits_LSQV in read_streams(learner, ids, streams=4, stride=5):
        own = symbols_SQ[counts_SQ]
        costs[own] = F.cross_entropy(logits_LSQV[0][counts_SQ], torch.tensor(ids[own]).long(), reduction="none")
    options = {"stride": 5, "layers": [2]}
    parts = [measure_text(trained.transformer, trained.heads, part, **options) for part in np.array_split(ids, 4)]
    np.testing.assert_allclose(costs, np.concatenate(parts, axis=2)[0, 0], atol=1e-5)


MOVED = {"all": "", "heads": "heads|norm", "ngrams": "ngram_embedding.tables"}


@pytest.mark.parametrize("parameters", MOVED)
@pytest.mark.parametrize("rule", ["sgd", "rms"])
def test_what_learns_and_what_stays(build_model, letters, parameters, rule):
    """Guards against a model that is not left as it was, and parameters that learn although nobody asked, or do not."""
    trained = build_model(ngrams=(2,), pairs=[(2, 1)])
    before = copy.deepcopy(trained.modules.state_dict())
    flags = [parameter.requires_grad for parameter in trained.modules.parameters()]
    own = adapted(trained, letters(40).tobytes(), {"rule": rule, "parameters": parameters, "rate": 0.01})
    after = trained.modules.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [parameter.requires_grad for parameter in trained.modules.parameters()] == flags
    assert all(parameter.grad is None for parameter in trained.modules.parameters())
    for name, tensor in own.modules.state_dict().items():
        if not name.endswith("key.bias"):  # it adds the same to all scores
            assert torch.equal(tensor, before[name]) != any(part in name for part in MOVED[parameters].split("|"))


def moved(trained, times: int = 1, **options) -> torch.Tensor:
    """How far one window, read so many times, moves the parameters."""
    learner = Learner(trained.transformer, trained.heads, AdaptConfig(**options))
    random = torch.Generator().manual_seed(0)
    windows_SW = torch.randint(256, (3, 9), generator=random)
    for _ in range(times):
        learner.learn(windows_SW, torch.ones(3, 5, dtype=torch.bool))
    pairs = zip(learner.modules.parameters(), trained.modules.parameters(), strict=True)
    return torch.cat([(own - before).flatten().detach() for own, before in pairs])


def test_the_rules_by_hand(build_model, monkeypatch):
    """Guards against a decay to something else than the trained weights, gradients that are not normalised by their
    own size, a second step that is the first, and streams whose gradients are lost where memory splits them."""
    trained = build_model(ngrams=(2,))
    plain = moved(trained, rule="sgd", rate=0.1, ngram_rate=0.0)
    torch.testing.assert_close(
        moved(trained, rule="sgd", rate=0.1, ngram_rate=0.0, decay=0.25), 0.75 * plain, atol=1e-6, rtol=1e-3
    )
    normalised = moved(trained, rule="rms", rate=0.1, ngram_rate=0.0)
    large = plain.abs() > 1e-5
    torch.testing.assert_close(normalised[large], 0.1 * plain[large].sign(), atol=1e-3, rtol=0)
    tables = moved(trained, parameters="ngrams", ngram_rate=0.01)
    first_steps = tables[tables != 0].view(-1, 64).square().mean(dim=1).sqrt()
    torch.testing.assert_close(first_steps, torch.full_like(first_steps, 0.01), rtol=1e-3, atol=0)
    twice = moved(trained, rule="sgd", rate=0.1, ngram_rate=0.0, steps=2)
    torch.testing.assert_close(twice, moved(trained, times=2, rule="sgd", rate=0.1, ngram_rate=0.0))
    monkeypatch.setattr("charlm.inference.adaptation.AT_ONCE", {"cpu": 8, "cuda": 8})
    torch.testing.assert_close(moved(trained, rule="sgd", rate=0.1, ngram_rate=0.0), plain, atol=1e-6, rtol=1e-4)


def test_the_score_says_how_it_learned(build_model, build_corpus, letters):
    """Guards against an adaptive figure that passes for a static one, or a static one that changed; every layer with a
    head can be scored beside the last, which is the one that learns."""
    trained, corpus = build_model(), build_corpus(letters(100).tobytes())
    score = bits_per_character(
        trained, corpus, stride=3, adapt={"rule": "sgd", "rate": 0.05}, streams=2, all_layers=True
    )
    assert score.adapt == dict(AdaptConfig(rule="sgd", rate=0.05)) and score.streams == 2
    assert score.bits_per_character == pytest.approx(score.layers["2"]) != score.layers["1"]
    expected = nats_of(trained, letters(100), AdaptConfig(rule="sgd", rate=0.05), streams=2).mean() / math.log(2)
    assert score.bits_per_character == pytest.approx(expected, abs=1e-6)
    static = bits_per_character(trained, corpus, stride=3)
    assert static.adapt is None and "adapt" not in static.as_dict()


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"adapt": {"rate": 0}}, "rate"),
        ({"adapt": {"rule": "adam"}}, "rule"),
        ({"adapt": {"parameters": "ngrams"}}, "adapt.parameters"),
        ({"adapt": {"parameters": "ngrams", "ngram_rate": 0}}, "adapt.parameters"),
        ({"adapt": {"rule": "sgd", "rate": 1e30}}, "adapt.rate"),
        ({"adapt": {}, "streams": 0}, "streams"),
        ({"adapt": {}, "streams": 101}, "streams"),
        ({"adapt": {}, "stride": 9}, "stride"),
        ({"adapt": {}, "batch_size": 2}, "batch_size"),
        ({"streams": 2}, "streams"),
    ],
)
def test_options_that_do_not_fit(build_model, build_corpus, letters, options, option):
    """Guards against a traceback, a score of nan, and options that are silently ignored."""
    with refused(option):
        bits_per_character(build_model(), build_corpus(letters(100).tobytes()), **options)


def test_an_adapted_model_says_so(build_model):
    """Guards against a score of the text itself under the name of the trained model, and a model of no numbers."""
    trained = build_model()
    text = trained.vocabulary.decode(np.arange(40) % trained.vocabulary.size)
    learned = adapted(trained, text)
    assert learned.checkpoint == f"{trained.checkpoint}, adapted" and learned.scores == ()
    with refused("adapt.rate"):
        adapted(trained, text[:6], {"rule": "sgd", "rate": 1e38})


def test_several_processes(build_model, build_corpus, letters, monkeypatch):
    """Guards against processes that each learn from another share, and agree on nothing."""
    monkeypatch.setattr("charlm.inference.evaluation.rank_and_processes", lambda: (1, 2))
    with refused("adapt"):
        bits_per_character(build_model(), build_corpus(letters(100).tobytes()), adapt={})


def test_rates_are_chosen_on_the_validation_split(build_model, build_corpus, letters, monkeypatch):
    """Guards against a choice by the test split, and a search that stops early, goes on for ever, or ends where
    learning diverges."""
    trained, corpus = build_model(ngrams=(2,)), build_corpus(letters(100).tobytes())
    corpus.splits["valid"] = corpus.splits["test"]
    template, splits = bits_per_character(trained, corpus), []

    def pretended(trained, corpus, *, split, limit, adapt, streams):
        own = AdaptConfig.read(dict(adapt))
        splits.append((split, limit, streams))
        if own.rate > 1:
            raise UserError("diverged", "adapt.rate")
        bits = abs(math.log2(own.rate) - math.log2(0.9)) + abs(math.log2(own.ngram_rate) - math.log2(0.005))
        return replace(template, bits_per_character=bits, adapt=dict(own))

    monkeypatch.setattr("charlm.inference.evaluation.bits_per_character", pretended)
    scores = list(tune(trained, corpus, AdaptConfig(rate=0.1, ngram_rate=0.02), streams=3))
    assert set(splits) == {("valid", trained.config.train.valid_symbols, 3)}
    best = min(scores, key=lambda score: score.bits_per_character)
    assert (best.adapt["rate"], best.adapt["ngram_rate"]) == (0.8, 0.005)
    assert [score.adapt["rate"] for score in scores] == [0.1, 0.2, 0.4, 0.8, *[0.8] * 4]
