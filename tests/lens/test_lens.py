"""The lens's numbers, against evaluation, plain forward passes, a plain softmax, and fresh readings."""

import gc
import gzip
import lzma
import math
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import charlm
from charlm.config.adapt import AdaptConfig
from charlm.inference.scoring import negative_log_likelihoods
from charlm.lens.lens import Lens, Reading
from charlm.model.cache import KVCache
from charlm.runs.trained import TrainedModel
from tiny import refused

MODELS = {
    "rotary with n-grams": {"position_encoding": "rotary", "ngrams": (2, 3), "ngram_buckets": 50, "ngram_width": 4},
    "position tables, post-norm": {"position_encoding": "per_layer", "norm": "post", "activation": "gelu"},
}
PAIRS = [(1, 1), (2, 1), (2, 3), (3, 1), (3, 2), (3, 3)]
"""Layer and offset of heads."""


@pytest.fixture(params=MODELS)
def trained(request, build_model) -> TrainedModel:
    """Three layers, with heads for some offsets, and a context of 12."""
    return build_model(num_layers=3, pairs=PAIRS, context_length=12, **MODELS[request.param])


def letters(length: int, seed: int = 0) -> np.ndarray:
    """The ids of random letters."""
    return np.random.default_rng(seed).integers(97, 123, length).astype(np.uint8)


@pytest.fixture
def text() -> str:
    return bytes(letters(60)).decode() + "é\n\udcff€" + bytes(letters(20, seed=1)).decode()


def context_of(lens: Lens, position: int) -> int:
    """The first place seen after `position`, from the words in the class's docstring alone."""
    begin = 0
    while position + 1 - begin > lens.context:
        begin += lens.stride
    return begin


@torch.no_grad()
def plain_logits(lens: Lens, ids: np.ndarray) -> dict[tuple[int, int], np.ndarray]:
    """Log-probabilities of each layer and offset after each position, [N, V], by one forward pass each."""
    found = {pair: [] for pair in PAIRS}
    for position in range(len(ids)):
        seen = torch.from_numpy(ids[None, context_of(lens, position) : position + 1])
        states = lens.trained.transformer(seen, [1, 2, 3])
        for layer, offset in PAIRS:
            logits_V = lens.trained.heads(states[layer], layer, [offset])[0, -1, 0].double()
            found[layer, offset].append(logits_V.log_softmax(-1).numpy())
    return {pair: np.stack(own) for pair, own in found.items()}


def test_costs_are_those_of_evaluation(trained, build_corpus):
    """Guards against costs of another window, of another symbol, or without the first symbol, within the context and
    beyond; 1,000 characters at the paper's stride."""
    ids = letters(1000 if trained.config.model.ngrams else 100)
    reading = Lens(trained, stride=1).read(ids)
    score = charlm.bits_per_character(trained, build_corpus(bytes(ids)), stride=1, show_progress=False)
    assert reading.bits.mean() == pytest.approx(score.bits_per_character, abs=1e-4)
    (expected,) = negative_log_likelihoods(trained.transformer, trained.heads, ids, stride=1).values()
    assert np.abs(reading.bits - expected / math.log(2)).max() < 1e-4
    lens = Lens(trained)
    ids = ids[: lens.context + 1 + 5 * lens.stride]  # so that evaluation does not move its last window
    (expected,) = negative_log_likelihoods(trained.transformer, trained.heads, ids, stride=lens.stride).values()
    assert np.abs(lens.read(ids).bits - expected / math.log(2)).max() < 1e-4


def test_learning_a_text_costs_what_evaluation_says(trained, build_corpus):
    """Guards against a symbol that is learned before its score, and against a lens whose own weights have learned."""
    lens, ids = Lens(trained), letters(100)
    before = lens.read(ids)
    weights = {name: own.clone() for name, own in trained.modules.state_dict().items()}
    how = {"stride": lens.stride, "show_progress": False}
    for costs, adapt in zip(lens.adapted(ids, AdaptConfig(rate=0.01)), (None, {"rate": 0.01}), strict=True):
        score = charlm.bits_per_character(trained, build_corpus(bytes(ids)), adapt=adapt, **how)
        assert costs.mean() == pytest.approx(score.bits_per_character, abs=1e-5)
    for name, own in trained.modules.state_dict().items():
        assert torch.equal(own, weights[name])
    lens.read("")
    assert np.abs(lens.read(ids).bits - before.bits).max() < 1e-4
    interrupted(lens, lens.adapted, ids, 2)
    with refused("streams"):
        lens.adapted("")


def test_the_grid_is_that_of_plain_forward_passes(trained, text):
    """Guards against a layer, an offset or a place in another's row, an intermediate layer after the last norm, and a
    decision that does not stay."""
    lens = Lens(trained)
    reading = lens.read(text)
    assert "".join(reading.pieces()) == text and len(reading.ids) == len(text) + 3
    plain = plain_logits(lens, reading.ids)
    for offset in (1, 2, 3):
        grid = reading.grid(offset)
        assert list(grid) == [layer for layer, own in PAIRS if own == offset]
        for layer, cells in grid.items():
            logits_NV = plain[layer, offset][:-offset]
            assert (cells.symbol[:offset] == -1).all() and np.isnan(cells.probability[:offset]).all()
            assert (cells.symbol[offset:] == logits_NV.argmax(-1)).all()
            assert np.abs(cells.probability[offset:] - np.exp(logits_NV.max(-1))).max() < 1e-5
            for place in (offset, 11, 12, 40):
                probabilities_V = lens.distribution(text, place, layer, offset)
                assert np.abs(probabilities_V - np.exp(logits_NV[place - offset])).max() < 1e-5
        for place, layer in enumerate(reading.decided(offset)):
            symbols = {at: cells.symbol[place] for at, cells in grid.items()}
            stays = [at for at in symbols if len({own for above, own in symbols.items() if above >= at}) == 1]
            assert layer == (min(stays) if place >= offset else -1)
    assert np.abs(reading.next_logits - plain[3, 1][-1]).max() < 1e-4
    assert np.abs(lens.distribution(text, len(reading.ids)) - np.exp(plain[3, 1][-1])).max() < 1e-5


def test_a_symbol_is_followed(trained, text):
    """Guards against probabilities of another place after an edit, and against those of another offset."""
    lens = Lens(trained)
    ids = lens.ids(text)
    plain = plain_logits(lens, ids)
    for offset, since in ((1, 0), (2, 0), (3, 1), (3, 40), (1, len(ids) - 1), (2, len(ids))):
        for layer, found in lens.follow(text, ids[30], offset, since).items():
            assert len(found) == len(ids) - since
            assert np.isnan(found[: max(0, offset - since)]).all()
            known = found[max(0, offset - since) :]
            expected = np.exp(plain[layer, offset][max(0, since - offset) : len(ids) - offset, ids[30]])
            assert np.abs(known - expected).max(initial=0) < 1e-6


EDITS = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.text("abcé", max_size=40)), max_size=5)
"""Where a text is cut, how much is left out there, and what is put in its place."""


@given(edits=EDITS, stop=st.integers(0, 30))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_edits_give_what_a_fresh_reading_gives(trained, edits, stop):
    """Guards against keys and values of a text that was there before: typed over, deleted, pasted, or read in part
    when the reader typed on."""
    lens, text = Lens(trained), "the first text of some length"
    lens.read(text)
    for where, much, new in edits:
        first = round(where * len(text))
        text = text[:first] + new + text[first + round(much * (len(text) - first)) :]
        interrupted(lens, lens.read, text + "and more", stop)
        found, fresh = lens.read(text), Lens(trained).read(text)
        assert np.array_equal(found.ids, fresh.ids)
        assert np.abs(found.bits - fresh.bits).max(initial=0) < 1e-4
        assert np.abs(found.probabilities - fresh.probabilities).max(initial=0) < 1e-5
        assert (found.symbols == fresh.symbols).all()
        assert np.abs(found.next_logits - fresh.next_logits).max() < 1e-4


class Enough(Exception):
    pass


def interrupted(lens: Lens, work: Callable, text: str | np.ndarray, stop: int) -> None:
    """Begin some work on a text, and stop before the `stop`-th piece of it."""
    pieces = iter(range(stop))

    def watch() -> None:
        if next(pieces, None) is None:
            raise Enough

    lens.watch = watch
    with suppress(Enough):
        work(text)
    lens.watch = lambda: None


@pytest.mark.parametrize("place", [0, 1, 11, 12, 40])
def test_attention_is_a_plain_softmax(trained, text, place):
    """Guards against keys without their rotation, the query of another place or head, and weights beyond
    the window."""
    lens = Lens(trained)
    ids = lens.ids(text)
    begin = context_of(lens, place)
    for layer in (1, 3):
        block = trained.transformer.blocks[layer - 1]
        inputs = []
        hook = block.attention.register_forward_pre_hook(lambda module, given, inputs=inputs: inputs.append(given))
        with torch.no_grad(), hook:
            trained.transformer(torch.from_numpy(ids[None, begin : place + 1]), [layer])
            x_1TD, rotation = inputs[0][:2]
            for head in range(trained.config.model.num_heads):
                query, key = (
                    part(x_1TD).unflatten(-1, (trained.config.model.num_heads, -1)).transpose(1, 2)
                    for part in (block.attention.query, block.attention.key)
                )
                if rotation is not None:
                    query, key = rotation(query), rotation(key)
                scores_TT = query[0, head] @ key[0, head].T / math.sqrt(key.shape[-1])
                found = lens.attention(text, layer, head, place)
                assert len(found) == place + 1 and found.sum() == pytest.approx(1, abs=1e-5)
                assert (found[:begin] == 0).all()
                assert np.abs(found[begin:] - scores_TT[-1].softmax(-1).numpy()).max() < 1e-5


def test_a_unit_is_that_of_the_feed_forward_layer(trained, text):
    """Guards against an activation before the nonlinearity, of another layer, or of another place."""
    lens = Lens(trained)
    ids = lens.ids(text)
    for layer, unit, since in ((1, 0, 0), (2, 7, 13), (3, 15, len(ids) - 1), (3, 1, len(ids))):
        found = lens.unit(text, layer, unit, since)
        assert len(found) == len(ids) - since
        feed_forward, inputs = trained.transformer.blocks[layer - 1].feed_forward, []
        hook = feed_forward.register_forward_pre_hook(lambda module, given, inputs=inputs: inputs.append(given[0]))
        with torch.no_grad(), hook:
            for place in range(since, len(ids)):
                seen = torch.from_numpy(ids[None, context_of(lens, place) : place + 1])
                trained.transformer(seen, [layer])
                expected = feed_forward.activation(feed_forward.up(inputs[-1]))[0, -1, unit]
                assert found[place - since] == pytest.approx(float(expected), abs=1e-4)


def test_n_grams_are_left_out_one_by_one(build_model):
    """Guards against another table's columns, earlier rows left out as well, and a change with the wrong
    sign."""
    trained = build_model(num_layers=2, context_length=12, **MODELS["rotary with n-grams"])
    lens, ids = Lens(trained), letters(30).astype(np.int64)
    ngrams = trained.transformer.ngram_embedding
    for place in (1, 2, 12, 13, 30):
        window = torch.from_numpy(ids[None, context_of(lens, place - 1) : place])
        longest = max(ngrams.lengths)
        logits = {}
        with torch.no_grad():
            places = trained.transformer.places(window.shape[1], None)
            x_1TD = trained.transformer.embed(window, places, None)
            for number, length in enumerate([None, *ngrams.lengths]):
                changed = x_1TD.clone()
                if length is not None:
                    symbols = [0] * longest + [symbol + 1 for symbol in window[0].tolist()]
                    powers = [pow(1_000_003, j, 2**31 - 1) for j in range(longest)]
                    row = sum(s * p for s, p in zip(symbols[::-1][:length], powers, strict=False)) % (2**31 - 1) % 50
                    width = ngrams.tables[0].weight.shape[1]
                    columns = ngrams.up.weight[:, (number - 1) * width : number * width]
                    changed[0, -1] -= columns @ ngrams.tables[number - 1].weight[row]
                hidden = trained.transformer.run(changed, 0, {2}, places, None)[2]
                logits[length] = trained.heads(hidden, 2)[0, -1, 0].double().log_softmax(-1)
        found = lens.knockouts(ids, place)
        assert [own.length for own in found] == [2, 3]
        for own in found:
            if place < 30:
                cost = float(logits[None][ids[place]] - logits[own.length][ids[place]]) / math.log(2)
                assert own.bits == pytest.approx(cost, abs=1e-4)
            assert own.symbol == int(logits[own.length].argmax())
            assert own.probability == pytest.approx(float(logits[own.length].max().exp()), abs=1e-5)
        assert (found[0].bits is None) == (place == 30)
    assert lens.knockouts(ids, 0) == []
    assert Lens(build_model()).knockouts("some text", 3) == []


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_what_is_written_is_what_charlm_generates(trained, drafts, temperature):
    """Guards against other text than `charlm.generate` writes, distributions that it was not drawn from, and marks that
    no draft has."""
    lens = Lens(trained)
    drawn = list(lens.generate("abcdef", length=40, temperature=temperature, top_k=3, seed=5, drafts=drafts))
    how = {"length": 40, "temperature": temperature, "top_k": 3, "seed": 5, "draft": "offsets" if drafts else None}
    statistics = charlm.DraftStatistics()
    text = charlm.generate(trained, "abcdef", statistics=statistics, **how)
    written = trained.vocabulary.decode(np.array([own.symbol for own in drawn]))
    assert written.decode(errors="replace") == text
    reading = Lens(trained).read(np.concatenate([lens.ids("abcdef"), [own.symbol for own in drawn]]))
    costs = [-math.log2(own.before[own.symbol]) for own in drawn]
    assert np.abs(reading.bits[6:] - costs).max() < 1e-4
    for own in drawn:
        kept = np.argsort(-own.before)[: 3 if temperature else 1]
        weights = own.before[kept] ** (1 / temperature if temperature else 1)
        assert own.after.sum() == pytest.approx(1) and own.after[own.symbol] > 0
        assert np.abs(own.after[kept] - weights / weights.sum()).max() < 1e-6
    marks = [own.draft for own in drawn]
    if drafts:
        assert marks.count("accepted") == statistics.accepted and drawn[-1].passes == statistics.passes
        assert marks.count("rejected") > 0
    else:
        assert set(marks) == {None} and drawn[-1].passes == 40


def test_pieces_costs_and_sizes(build_model):
    """Guards against a character whose later bytes cost nothing, and sizes that the programs would not have."""
    lens = Lens(build_model(num_layers=1))
    text = "é€ and more, and more, " * 30 + "\udcff"
    reading = lens.read(text)
    assert len(reading.bits_by_character()) == len(text) == sum(piece != "" for piece in reading.pieces())
    assert reading.bits_by_character()[0] == pytest.approx(reading.bits[:2].sum())
    assert reading.pieces(700) == reading.pieces()[700:]
    data = text.encode("utf-8", "surrogateescape")
    others = {"gzip": len(gzip.compress(data, 9)), "xz": len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))}
    assert reading.sizes() == {"charlm": math.ceil(math.fsum(reading.bits) / 8)} | others
    nothing = lens.read("")
    assert (len(nothing.bits_by_character()), nothing.sizes()["charlm"]) == (0, 0)
    assert np.exp(nothing.next_logits) == pytest.approx(1 / 256)
    assert lens.distribution("", 0) == pytest.approx(1 / 256)


def test_what_is_not_there_is_refused(trained):
    """Guards against a traceback, or an answer about something else, where a page asks for what is not there."""
    lens = Lens(trained)
    wrong = {
        "place": [lambda: lens.distribution("ab", 3), lambda: lens.attention("ab", 1, 0, 2)],
        "offset": [lambda: lens.distribution("ab", 1, 1, 2), lambda: lens.follow("ab", 1, 9)],
        "layer": [lambda: lens.attention("ab", 4, 0, 1), lambda: lens.unit("ab", 0, 1)],
        "head": [lambda: lens.attention("ab", 1, 2, 1)],
        "unit": [lambda: lens.unit("ab", 1, 16)],
        "since": [lambda: lens.unit("ab", 1, 1, 3)],
        "symbol": [lambda: lens.follow("ab", 256)],
        "text": [lambda: lens.read("a\ud800"), lambda: next(lens.generate("", length=1))],
        "stride": [lambda: Lens(trained, stride=0), lambda: Lens(trained, stride=13)],
    }
    for option, calls in wrong.items():
        for call in calls:
            with refused(option):
                call()
    with refused("offset"):
        lens.read("ab").grid(7)


def test_keys_and_values_take_bounded_memory(trained, text, monkeypatch):
    """Guards against those of every window of a long text, and those of another window in their place."""
    text *= 5
    expected = Lens(trained).read(text)
    monkeypatch.setattr("charlm.lens.lens.CACHED", 2 * 8 * 3 * 12 * trained.config.model.d_model)

    def kept() -> int:
        gc.collect()
        return sum(type(own) is KVCache for own in gc.get_objects())

    lens, before = Lens(trained), kept()
    for place in (300, 40, 41, 0):
        assert lens.attention(text, 1, 0, place) == pytest.approx(Lens(trained).attention(text, 1, 0, place), abs=1e-5)
        assert (
            np.abs(lens.read(text[:place] + "-" + text[place:]).bits[:place] - expected.bits[:place]).max(initial=0)
            < 1e-4
        )
    assert np.abs(lens.read(text).bits - expected.bits).max() < 1e-4
    assert kept() == before + 2


def test_memory_is_bounded_however_long_one_types(trained):
    """Guards against readings, caches, pictures of the model or hooks that stay after every key."""
    lens, text = Lens(trained), ""
    counts = []
    for number in range(1200):
        text = (text + "ab"[number % 2]) if len(text) < 40 else text[:7]
        lens.read(text)
        if number % 100 == 99:
            lens.attention(text, 1, 0, 3), lens.unit(text, 1, 1), lens.knockouts(text, 4), lens.follow(text, 7)
        if number % 300 == 299:
            gc.collect()
            kinds = [type(own) for own in gc.get_objects()]
            counts.append((kinds.count(Reading), sum(issubclass(kind, torch.Tensor) for kind in kinds)))
    assert counts[0][0] == 2 and len(set(counts)) == 1  # the last one, and that of no text
    assert not any(module._forward_hooks for module in trained.transformer.modules())
