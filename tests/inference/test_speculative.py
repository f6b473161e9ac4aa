"""Drafts: the text must be that of plain generation, however good or bad they are."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from charlm.config import UserError
from charlm.inference import speculative
from charlm.inference.generation import generate, stream
from charlm.inference.sampling import Sampling
from charlm.inference.speculative import DraftStatistics, Speculation, accept, accept_likeliest
from charlm.inference.stepping import Reader
from charlm.model.cache import KVCache
from charlm.model.heads import Heads
from charlm.model.transformer import CharTransformer
from charlm.runs.trained import TrainedModel


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


@pytest.mark.parametrize("draft", ["offsets", 2])
def test_several_prompts_and_seeds(build_drafting_model, draft):
    """Guards against seeds that are not used, or shared between prompts, and pieces that differ from the whole."""
    trained = build_drafting_model()
    options = {"length": 30, "draft": draft, "temperature": 0.9, "top_p": 0.95}
    texts = generate(trained, ["abc", "same", "same"], seed=4, **options)
    alone = [("".join(stream(trained, prompt, seed=4 + row, **options))) for row, prompt in enumerate(["abc", "same"])]
    assert texts[:2] == alone
    assert texts[2] != texts[1]
    assert generate(trained, "abc", seed=5, **options) != texts[0]


@pytest.mark.parametrize(
    ("draft", "num_draft_tokens", "message"),
    [
        ("offsets", 4, r"num_draft_tokens=4: must lie between 1 and 3 \(the run's heads\)"),
        ("offsets", 0, "num_draft_tokens=0"),
        (1, 17, r"num_draft_tokens=17: must lie between 1 and 16 \(the context\)"),
        (1, 0, "num_draft_tokens=0"),
        (3, None, "draft=3: .*; draft from offsets, 1, 2"),
        (0, None, "draft=0"),
        (None, 2, "num_draft_tokens=2: requires draft"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_written(build_drafting_model, draft, num_draft_tokens, message):
    """Guards against errors that come from deep inside, or only when the first piece is asked for."""
    with pytest.raises(UserError, match=message):
        stream(build_drafting_model(), "a", length=5, draft=draft, num_draft_tokens=num_draft_tokens)


@pytest.mark.parametrize(
    ("num_layers", "draft", "way_out"),
    [(2, "offsets", "draft from 1"), (1, "offsets", "it has none to draft from"), (1, 1, "it has none to draft from")],
)
def test_heads_that_a_run_lacks_are_refused(build_model, num_layers, draft, way_out):
    """Guards against drafts from heads that were never trained."""
    with pytest.raises(UserError, match=f"draft={draft}: .*; {way_out}"):
        stream(build_model(num_layers=num_layers), "a", length=5, draft=draft)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("draft", "sampling", "draws"),
    [
        ("offsets", Sampling(), 20_000),
        (1, Sampling(), 20_000),
        ("offsets", Sampling(temperature=0.6, top_p=0.9), 4_000),
        (1, Sampling(temperature=1.5, top_k=3), 4_000),
    ],
    ids=str,
)
def test_drawn_symbols_follow_the_models_distribution(build_drafting_model, draft, sampling, draws):
    """Guards against any error in the rule of acceptance, the rest that is drawn from, or which position's distribution
    is whose: many continuations of a fixed context, by a chi-square test against all possible ones' probabilities."""
    trained = build_drafting_model(vocabulary_size=4)
    with torch.no_grad():
        for parameter in trained.heads.parameters():
            parameter.mul_(0.3)  # or the heads are too sure to agree now and then
    context, ahead = [0, 3, 1, 2], 2
    last = trained.config.model.num_layers
    expected = {(): 1.0}
    for _ in range(ahead):
        texts = list(expected)
        ids_BT = torch.tensor([[*context, *text] for text in texts])
        with torch.inference_mode():
            logits_BV = trained.heads(trained.transformer(ids_BT, num_last=1)[last], last)[:, 0, 0]
        expected = {
            (*text, symbol): expected[text] * float(probability)
            for text, row_V in zip(texts, sampling.distribution(logits_BV), strict=True)
            for symbol, probability in enumerate(row_V)
        }
    speculation = speculation_of(trained, context[:-1], draft, 2, sampling)
    speculation.advance(1)
    hidden_11D = speculation.hidden_11D
    found = dict.fromkeys(expected, 0)
    for _ in range(draws):
        speculation.context, speculation.hidden_11D, text = list(context), hidden_11D, []
        speculation.cache.lengths.fill_(len(context) - 1)
        while len(text) < ahead:
            text += speculation.advance(9)
        found[tuple(text[:ahead])] += 1
    assert 0.2 < speculation.statistics.acceptance_rate < 0.9  # both ends of the rule were used
    assert not any(found[text] for text, probability in expected.items() if probability == 0)
    # Rare texts together: the statistic is chi-square distributed only where each is expected a few times.
    common = [text for text, probability in expected.items() if probability * draws >= 5]
    cells = [(found[text], expected[text] * draws) for text in common]
    rest = draws - sum(mean for _, mean in cells)
    cells += [(draws - sum(count for count, _ in cells), rest)] if rest > 5 else []
    assert len(cells) >= 6
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    assert torch.special.gammaincc(*half) > 1e-3
