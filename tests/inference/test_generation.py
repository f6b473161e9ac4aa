import numpy as np
import pytest
import torch

from charlm.inference.generation import generate, stream
from charlm.inference.sampling import Sampling
from charlm.inference.stepping import Reader
from charlm.model.cache import KVCache
from tiny import refused


@torch.no_grad()
def all_logits(trained, ids: list[int]) -> torch.Tensor:
    """Logits after each of `ids`, [T, V], in one pass without a cache."""
    last = trained.config.model.num_layers
    return trained.heads(trained.transformer(torch.tensor([ids]))[last], last)[0, :, 0]


def naive_text(trained, prompt: bytes, length: int, **options) -> str:
    """Generation by its description, without a cache: when the context is full, its newest half is kept."""
    context_length = trained.config.model.context_length
    generator = torch.Generator().manual_seed(options.pop("seed", 0))
    sampling, context, text = Sampling(**options), list(prompt), []
    for _ in range(length):
        if len(context) > context_length:
            context = context[-max(1, context_length // 2) :]
        (symbol,), _ = sampling.choose(all_logits(trained, context)[-1:], generator)
        context.append(symbol)
        text.append(symbol)
    return bytes(text).decode(errors="replace")


@pytest.mark.parametrize(("context_length", "prompt"), [(1, b"a"), (2, b"a"), (7, b"a"), (8, b"a"), (8, b"abcdefgh")])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_text_beyond_the_context_equals_a_naive_implementation(build_model, context_length, prompt, temperature):
    """Guards against a context that is shifted by one, forgotten too early or never, when it is full, and a lost symbol
    where the prompt fills it."""
    trained = build_model(context_length=context_length)
    options = {"temperature": temperature, "top_k": 20, "seed": 5}
    assert generate(trained, prompt, length=40, **options) == naive_text(trained, prompt, 40, **options)


@pytest.mark.parametrize("ngrams", [(), (2, 4)])
@pytest.mark.parametrize("positions", ["per_layer", "input", "rotary"])
def test_texts_of_unequal_lengths_in_one_cache(build_model, positions, ngrams):
    """Guards against a row that reads another's positions, characters or leftovers, or those beyond its own length."""
    trained = build_model(position_encoding=positions, num_layers=3, ngrams=ngrams)
    random = np.random.default_rng(0)
    reader, cache = Reader(trained), KVCache(trained.config.model, 3, trained.device)
    for _ in range(2):  # and again over what the first time left
        texts = random.integers(0, 256, (3, 8)).tolist()
        lengths = [5, 1, 3]
        logits_BV = reader.next_logits([text[:n] for text, n in zip(texts, lengths, strict=True)], cache)
        for _ in range(3):
            assert cache.lengths.tolist() == lengths and cache.length == max(lengths)
            for text, n, logits_V in zip(texts, lengths, logits_BV, strict=True):
                torch.testing.assert_close(logits_V, all_logits(trained, text[:n])[-1], rtol=1e-4, atol=1e-5)
            logits_BV = reader.next_logits([[text[n]] for text, n in zip(texts, lengths, strict=True)], cache)
            lengths = [n + 1 for n in lengths]
        cache.lengths.zero_()


@pytest.mark.parametrize("draft", [None, 1])
@pytest.mark.parametrize("prompts", [["abc", "defghijk", "x", b"\xe2\x82"], ["same", "same"], ["one"]], ids=len)
def test_several_prompts_are_written_as_each_alone(build_model, prompts, draft):
    """Guards against texts that depend on their neighbours, at unequal lengths and each beyond its context, and against
    equal prompts that draw alike."""
    trained, options = build_model(), {"length": 30, "draft": draft}
    texts = generate(trained, prompts, seed=4, **options)
    assert texts == [generate(trained, prompt, seed=4 + row, **options) for row, prompt in enumerate(prompts)]
    assert len(set(texts)) == len(texts)


def test_a_model_is_trainable_after_it_has_written(build_model):
    """Guards against tables made in inference mode, which no backward pass may use."""
    trained = build_model(position_encoding="rotary", context_length=9)  # no other test has made its table
    generate(trained, "abc", length=20)
    trained.transformer(torch.zeros(1, 9, dtype=torch.long))[2].sum().backward()
    assert trained.transformer.embedding.weight.grad is not None


@pytest.mark.parametrize("draft", [None, 1])
def test_the_seed_decides_and_nothing_else(build_model, draft):
    """Guards against a global generator that is read or moved, and pieces that differ from the whole."""
    trained, options = build_model(), {"length": 60, "draft": draft}
    before = torch.get_rng_state()
    first = generate(trained, "abc", seed=3, **options)
    torch.rand(1)
    assert generate(trained, "abc", seed=3, **options) == first
    assert "".join(stream(trained, "abc", seed=3, **options)) == first
    assert generate(trained, "abc", seed=4, **options) != first
    torch.set_rng_state(before)
    generate(trained, "abc", **options)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()


def test_two_streams_do_not_disturb_each_other(build_model):
    """Guards against caches, generators or modes that streams share."""
    trained = build_model()
    one, two = stream(trained, "abc", length=40, seed=1), stream(trained, "xyz", length=40, seed=2)
    pieces = list(zip(one, two, strict=False))
    for number, (prompt, seed) in enumerate([("abc", 1), ("xyz", 2)]):
        alone = generate(trained, prompt, length=40, seed=seed)
        assert alone.startswith("".join(pair[number] for pair in pieces))


@pytest.mark.parametrize(
    ("prompt", "written", "expected"),
    [
        (b"a", "né€😀".encode(), "né€😀"),
        (b"a", b"a\xffb", "a\ufffdb"),
        (b"a", b"a\xe2\x82", "a\ufffd"),  # cut short at the end
        ("é".encode()[:1], "é".encode()[1:] + b"!", "é!"),  # the prompt ends within a character
    ],
)
def test_pieces_are_whole_characters(build_model, monkeypatch, prompt, written, expected):
    """Guards against characters that are torn between pieces, and an end that is swallowed."""
    symbols = iter(written)
    monkeypatch.setattr(Sampling, "choose", lambda *_: ([next(symbols)], None))
    pieces = list(stream(build_model(), prompt, length=len(written)))
    assert "".join(pieces) == expected
    assert all(pieces)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("prompt", ""),
        ("prompt", "é" * 5),  # 10 symbols for a context of 8
        ("length", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("seed", -1),
    ],
)
def test_bad_requests_are_refused_before_anything_is_written(build_model, option, value):
    """Guards against errors that come from deep inside, or only when the first piece is asked for."""
    with refused(option):
        stream(build_model(), **({"prompt": "a", "length": 5} | {option: value}))


def test_no_prompt_at_all_is_refused(build_model):
    """Guards against an error from deep inside."""
    with refused("prompt"):
        generate(build_model(), [], length=5)
