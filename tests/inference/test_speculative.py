"""Drafts: the text must be that of plain generation, however good or bad they are."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from charlm.inference import speculative
from charlm.inference.generation import generate, stream
from charlm.inference.sampling import Sampling
from charlm.inference.speculative import DraftStatistics, Speculation, accept, accept_likeliest
from charlm.inference.stepping import Reader
from charlm.model.cache import KVCache
from charlm.model.heads import Heads
from charlm.model.transformer import CharTransformer
from charlm.runs.trained import TrainedModel
from tiny import refused


@pytest.fixture
def build_drafting_model(build_model, randomise):
    """`build_drafting_model(agreeing=..., **options)`: a random model of three layers with heads for offsets 1 to 4 on
    the last, and an exit on the others. With `agreeing` it counts: a symbol is mostly that before it plus 1, and most
    drafts are right. Its symbols are ASCII: each is a character."""

    def build(*, agreeing: bool = False, **options) -> TrainedModel:
        pairs = [(1, 1), (2, 1), *((3, offset) for offset in range(1, 5))]
        small = {"num_layers": 3, "context_length": 16, "vocabulary_size": 128}
        trained = build_model(pairs=pairs, **(small | options))
        randomise(trained.heads, seed=1)
        if agreeing:
            count_upwards(trained.transformer, trained.heads)
        return trained

    return build


@torch.no_grad()
def count_upwards(transformer: CharTransformer, heads: Heads) -> None:
    """Make the residual stream mostly the symbol's embedding, whose image is each head's row of the symbol that comes
    so many steps later."""
    rows_VD = F.layer_norm(transformer.embedding.weight, [transformer.config.d_model])
    transformer.embedding.weight.copy_(rows_VD)
    for name, parameter in transformer.named_parameters():
        if "norm" not in name and not name.startswith("embedding"):
            parameter.mul_(0.3)
    for module in (*transformer.modules(), *heads.modules()):
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    for layer, offset in heads.pairs:
        classifier = heads.exits[f"layer{layer}"][f"offset{offset}"]
        classifier.weight.copy_(rows_VD.roll(offset, dims=0))
        classifier.bias.zero_()


def speculation_of(trained, prompt, draft, num_drafts, sampling) -> Speculation:
    generator = torch.Generator().manual_seed(0)
    return Speculation(Reader(trained), draft, num_drafts, sampling, generator, DraftStatistics(), list(prompt))


def with_drafts(trained, prompt, draft, **options) -> tuple[str, DraftStatistics]:
    statistics = DraftStatistics()
    return generate(trained, prompt, draft=draft, statistics=statistics, **options), statistics


@pytest.mark.parametrize("draft", ["offsets", 2])
@pytest.mark.parametrize("agreeing", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "post", "position_encoding": "input"},
        {"position_encoding": "rotary", "ngrams": (2, 4)},
        {"context_length": 1},
        {"context_length": 2},
        {"context_length": 5, "ngrams": (3,)},
    ],
    ids=str,
)
def test_greedy_text_is_that_of_plain_generation(build_drafting_model, draft, agreeing, options):
    """Guards against rejected symbols that stay in the cache or among the n-grams, drafts past the edge of the context,
    a context that is halved at another place than in plain generation, and texts that are too long."""
    trained = build_drafting_model(agreeing=agreeing, **options)
    for prompt, length in ((b"a", 37), (b"abcde"[: trained.config.model.context_length], 19), (b"b", 1), (b"c", 2)):
        plain = generate(trained, prompt, length=length, temperature=0)
        text, statistics = with_drafts(trained, prompt, draft, length=length, temperature=0)
        assert text == plain
        assert statistics.characters == len(text) == length


@pytest.mark.parametrize("draft", ["offsets", 1])
def test_drafts_that_agree_save_passes(build_drafting_model, draft):
    """Guards against drafts that are thrown away though they are right, which no text would show, and wrong counts."""
    trained = build_drafting_model(agreeing=True, context_length=64)
    text, statistics = with_drafts(trained, b"a", draft, length=50, temperature=0)
    assert len(set(text)) > 20
    assert statistics.num_draft_tokens == (3 if draft == "offsets" else 5)
    assert statistics.acceptance_rate > 0.4
    assert statistics.characters_per_pass > 2
    # Every character came from an accepted draft or from a pass of its own; of exits' drafts all may stay, and none.
    own = statistics.characters - statistics.accepted
    assert own == statistics.passes if draft == "offsets" else own <= statistics.passes


def test_acceptance_is_counted_by_hand(build_drafting_model, monkeypatch):
    """Guards against a rate that counts what was never drafted, or accepted symbols beyond the first rejected one."""
    trained = build_drafting_model()

    def first_stays(_, drafts, near_tie):
        return [drafts[0], (drafts[1] + 1) % 256 if len(drafts) > 1 else 0], 2

    monkeypatch.setattr(speculative, "accept_likeliest", first_stays)
    _, statistics = with_drafts(trained, b"a", "offsets", length=7, temperature=0)
    # One character after the prompt, then two of each pass; the last two need one draft.
    assert (statistics.passes, statistics.drafted, statistics.accepted) == (4, 3 + 3 + 1, 3)
    assert statistics.acceptance_rate == pytest.approx(3 / 7)
    assert statistics.characters_per_pass == pytest.approx(7 / 4)


@pytest.mark.parametrize("draft", ["offsets", 1])
def test_near_ties_are_decided_as_plain_generation_decides_them(build_drafting_model, draft):
    """Guards against a tie that falls otherwise where several symbols are read at once: all logits but a few are equal
    to the last bit here, or differ in the last."""
    trained = build_drafting_model(agreeing=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        classifier = trained.heads.exits["layer3"]["offset1"]
        classifier.weight[1::2] = classifier.weight[::2]
        classifier.bias[1::2] = 2e-7 * torch.randn(64, generator=generator)
    plain = generate(trained, b"a", length=60, temperature=0)
    text, statistics = with_drafts(trained, b"a", draft, length=60, temperature=0)
    assert text == plain
    assert statistics.passes <= 2 * 60  # every symbol is read again once at most


@pytest.mark.parametrize("draft", ["offsets", 1])
def test_in_doubt_all_since_the_last_certain_symbol_is_read_again(build_drafting_model, draft):
    """Guards against a cache that keeps what was read together, whose bits are not those of plain generation."""
    trained = build_drafting_model(agreeing=True, context_length=64)
    speculation = speculation_of(trained, b"abc", draft, 3, Sampling(temperature=0))
    for near_tie in (-1, -1, -1, -1, 1e9, -1, -1, 1e9):  # sure of everything, or of nothing
        speculation.near_tie = near_tie
        speculation.advance(9)
    seen = speculation.context[:-1]
    assert speculation.num_exact == speculation.cache.length == len(seen) > 9
    reader, plain = Reader(trained), KVCache(trained.config.model, 1, trained.device)
    reader.read([seen[:3]], plain, num_last=1)
    for symbol in seen[3:]:
        hidden_11D = reader.read([[symbol]], plain, num_last=1)
    assert torch.equal(speculation.cache.keys[..., : len(seen), :], plain.keys[..., : len(seen), :])
    assert torch.equal(speculation.hidden_11D, hidden_11D)


def test_doubt_stops_at_the_first_near_tie():
    """Guards against doubt that comes from symbols that are not used, or that is missed."""
    clear, tie = [0.0, 5.0, 1.0], [4.0, 4.0, 0.0]

    def outcome(rows, drafts):
        return accept_likeliest(torch.tensor(rows), drafts, 1e-4)

    assert outcome([clear, clear], [1]) == ([1, 1], 2)
    assert outcome([clear, tie], [0]) == ([1], 1)
    assert outcome([clear, tie, clear], [1, 0])[1] == 1
    assert outcome([clear, clear], [1, 1]) == ([1, 1], 2)  # the last draft was not read
    assert outcome([[4.0, 4.0 - 3e-4, 0.0]], [])[1] == 0
    assert outcome([[4.0, 4.0 - 5e-4, 0.0]], [])[1] == 1
    assert outcome([[float("nan"), 1.0]], [])[1] == 0


@pytest.fixture
def dice(monkeypatch) -> list[float]:
    """The numbers that the next draws take, in order."""
    numbers: list[float] = []

    def rand(shape, *, dtype, generator):
        return torch.tensor([numbers.pop(0) for _ in range(math.prod(shape))], dtype=dtype).reshape(shape)

    monkeypatch.setattr(torch, "rand", rand)
    return numbers


@pytest.mark.parametrize(
    ("drafts", "numbers", "expected"),
    [
        # p / q of the drafts: 0.25 / 0.5 = 0.5 for symbol 0 in the first row, 0.2 / 0.1 for symbol 2 in the second.
        ([0, 2], [0.49, 0.99, 0.1], [0, 2, 0]),  # both stay; the third row is (0.5, 0.25, 0.25)
        ([0, 2], [0.49, 0.99, 0.6], [0, 2, 1]),
        ([0, 2], [0.51, 0.0, 0.45], [1]),  # p - q = (-0.25, 0.25, 0): only symbol 1 is left
        ([1, 2], [0.99, 0.99, 0.8], [1, 2, 2]),  # p > q: stays whatever the number
        ([0, 0], [0.1, 0.51, 0.65], [0, 1]),  # 0.3 / 0.6; p - q = (-0.3, 0.2, 0.1): 2/3 symbol 1
        ([0, 0], [0.1, 0.51, 0.68], [0, 2]),
    ],
)
def test_rule_of_acceptance_by_hand(dice, drafts, numbers, expected):
    """Guards against chances upside down, the rest of another row, and a draw from what was not normalised."""
    p = torch.tensor([[0.25, 0.5, 0.25], [0.3, 0.5, 0.2], [0.5, 0.25, 0.25]], dtype=torch.float64)
    q = torch.tensor([[0.5, 0.25, 0.25], [0.6, 0.3, 0.1]], dtype=torch.float64)
    dice[:] = numbers
    assert accept(p, drafts, q) == expected
    # Without the row after the last draft, nothing is added behind it.
    dice[:] = numbers
    assert accept(p[:2], drafts, q) == expected[:2]


def test_equal_distributions_leave_something_to_draw_from(dice):
    """Guards against a draw from nothing where p and q differ by rounding alone."""
    p = torch.tensor([[0.0, 1 - 1e-15, 0.0]], dtype=torch.float64)
    q = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)
    dice[:] = [1 - 2**-53, 0.5]
    assert accept(p, [1], q) == [1]


@pytest.mark.parametrize("draft", ["offsets", 1, 2])
@pytest.mark.parametrize("options", [{}, {"position_encoding": "rotary", "ngrams": (2, 4), "norm": "post"}], ids=str)
def test_the_cache_is_rolled_back_to_what_was_kept(build_drafting_model, draft, options):
    """Guards against positions of rejected drafts that stay, and layers above an exit that miss some."""
    trained = build_drafting_model(**options)
    speculation = speculation_of(trained, b"abc", draft, 3, Sampling())
    speculation.advance(9)
    for _ in range(6):
        speculation.advance(9)
        length, seen = speculation.cache.length, speculation.context[:-1]
        assert length == len(seen)
        fresh = KVCache(trained.config.model, 1, trained.device)
        hidden = Reader(trained).read([seen], fresh, num_last=1)
        for name in ("keys", "values"):
            kept, expected = (getattr(cache, name)[:, :, :, :length] for cache in (speculation.cache, fresh))
            torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-4)
        if options:
            assert speculation.cache.ids[:, :length].tolist() == [seen]
        torch.testing.assert_close(speculation.hidden_11D, hidden, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("last_offset", "draft", "num_draft_tokens", "option", "words"),
    [
        (4, "offsets", 4, "num_draft_tokens", "at most 3"),
        (4, "offsets", 0, "num_draft_tokens", None),
        (4, 1, 17, "num_draft_tokens", "at most 16"),
        (4, 1, 0, "num_draft_tokens", None),
        (4, None, 2, "num_draft_tokens", "requires draft"),
        (4, 3, None, "draft", "draft from offsets, 1, 2$"),
        (4, 0, None, "draft", "draft from offsets, 1, 2$"),
        (1, "offsets", None, "draft", "draft from 1, 2$"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_written(
    build_model, last_offset, draft, num_draft_tokens, option, words
):
    """Guards against drafts from heads that were never trained, and errors that come from deep inside, or only when the
    first piece is asked for."""
    pairs = [(1, 1), (2, 1), *((3, offset) for offset in range(1, last_offset + 1))]
    with refused(option, words):
        stream(
            build_model(num_layers=3, context_length=16, pairs=pairs),
            "a",
            length=5,
            draft=draft,
            num_draft_tokens=num_draft_tokens,
        )


@pytest.mark.parametrize("draft", ["offsets", 1])
def test_a_model_without_other_heads_drafts_nothing(build_model, draft):
    """Guards against a way out that does not exist."""
    with refused("draft", "generate without drafts$"):
        stream(build_model(num_layers=1), "a", length=5, draft=draft)


@pytest.mark.parametrize("draft", ["offsets", 1])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "top_p": 0.9}, {"temperature": 1.5, "top_k": 3}], ids=str)
def test_drafts_are_judged_by_the_distributions_of_their_positions(build_drafting_model, monkeypatch, draft, options):
    """Guards against a draft that is judged by another position's distribution, by another than it was drawn from, or
    by numbers that are not independent of it: the text would not follow the model's distribution."""
    trained, sampling, judged = build_drafting_model(), Sampling(**options), []

    plain_rand = torch.rand

    def noted(p_PV, drafts, q_KV, generator):
        judged.append((list(speculation.context), p_PV, drafts, q_KV))
        return accept(p_PV, drafts, q_KV, generator)

    def rand(*shape, generator, **options):
        assert generator is speculation.generator
        return plain_rand(*shape, generator=generator, **options)

    monkeypatch.setattr(torch, "rand", rand)
    monkeypatch.setattr(speculative, "accept", noted)
    speculation = speculation_of(trained, b"abc", draft, 3, sampling)
    for _ in range(9):
        speculation.advance(9)
    assert len(judged) > 5
    for context, p_PV, drafts, q_KV in judged:
        newest, K = len(context) - 1, len(drafts)
        with torch.inference_mode():
            states = trained.transformer(torch.tensor([[*context, *drafts][:16]]), [1, 3])
            logits_TKV = trained.heads(states[3], 3, (1, 2, 3, 4))[0]
            drafting_KV = trained.heads(states[1], 1)[0, newest : newest + K, 0]
        if draft == "offsets":  # from the symbol before the newest
            drafting_KV = logits_TKV[newest - 1, 1 : 1 + K]
        judging_PV = logits_TKV[newest : newest + len(p_PV), 0]
        torch.testing.assert_close(p_PV, sampling.distribution(judging_PV), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(q_KV, sampling.distribution(drafting_KV), rtol=1e-4, atol=1e-5)
