import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from charlm.config import UserError
from charlm.data.vocabulary import ByteVocabulary
from charlm.inference.evaluation import (
    bits_per,
    bits_per_character,
    mixture_nats,
    standard_error,
)
from charlm.inference.scoring import negative_log_likelihoods
from charlm.model import kernels_cpu as matmul
from tiny import refused


def test_only_what_is_scored_is_computed(build_model, letters):
    """Guards against a highest layer and logits for positions that are not scored, and against windows that are cut
    where one scores more."""
    trained, ids, read = build_model(), letters(50), []
    trained.transformer.blocks[1].feed_forward.register_forward_pre_hook(lambda _, args: read.append(args[0].shape))
    trained.heads.register_forward_pre_hook(lambda _, args: read.append(args[0].shape))
    negative_log_likelihoods(trained.transformer, trained.heads, ids, stride=2, batch_size=3)
    # 22 windows of 8: the first batch computes all positions, as window 0 scores 8, and the others score 2 each.
    assert read[:4] == [(3, 8, 8), (1, 8 + 2 + 2, 8), (3, 2, 8), (1, 6, 8)]
    assert len(read) == 2 * 8 and set(read[4::2]) == {(3, 2, 8)}


@pytest.mark.parametrize("setting", range(20))
def test_each_symbol_is_scored_once_from_the_right_context(build_model, build_corpus, letters, brute_force, setting):
    """Guards against symbols that are skipped, scored twice or from a wrong context, a first symbol that is free or
    predicted from nothing, averages of per-batch averages, and windows lost at the end of the last batch; at any
    length, context, stride, batch size and limit."""
    random = np.random.default_rng(setting)
    context_length = int(random.integers(1, 13))
    trained = build_model(context_length=context_length)
    ids = letters(int(random.integers(1, 61)), seed=setting)
    stride = 1 if setting % 4 == 0 else int(random.integers(1, context_length + 1))
    batch_size = (None, 1000, *range(1, 7))[random.integers(8)]
    limit = int(random.integers(1, 71)) if setting % 2 else None
    layer = int(random.integers(1, 3))

    scored = ids[:limit]
    expected = -brute_force(trained, scored, stride)[layer - 1, range(len(scored)), scored]
    found = negative_log_likelihoods(
        trained.transformer, trained.heads, scored, stride=stride, layers=[layer], batch_size=batch_size
    )
    assert list(found) == [layer]
    np.testing.assert_allclose(found[layer], expected, rtol=0, atol=1e-5)
    score = bits_per_character(
        trained, build_corpus(ids.tobytes()), stride=stride, batch_size=batch_size, limit=limit, all_layers=True
    )
    assert score.layers[str(layer)] == pytest.approx(float(expected.mean()) / math.log(2), abs=1e-6)
    assert score.symbols == len(scored)


def test_a_text_in_several_bytes_per_character(build_model, build_corpus):
    """Guards against denominators that are mixed up, or taken from the split where a limit was set."""
    trained, corpus = build_model(zero_heads=True), build_corpus("né€ß".encode())  # 1 + 2 + 3 + 2 bytes
    whole = bits_per_character(trained, corpus)
    assert (whole.symbols, whole.characters, whole.bytes) == (8, 4, 8)
    assert (whole.bits_per_character, whole.bits_per_byte) == (16.0, 8.0)
    part = bits_per_character(trained, corpus, limit=4)  # n, é and the first byte of €
    assert (part.symbols, part.characters, part.bytes) == (4, 3, 4)
    assert part.bits_per_character == pytest.approx(32 / 3, abs=1e-12)


def test_a_mixture_equals_brute_force(build_model, build_corpus, letters, brute_force):
    """Guards against costs that are averaged in place of probabilities, weights that are not scaled to add up to 1, or
    given to another layer, and a layer of weight zero that makes the cost infinite."""
    weights = {1: 0.1, 2: 0.3, 4: 0.6, 3: 0.0}
    trained, ids = replace(build_model(num_layers=4), hedge_weights=weights), letters(40)
    probabilities_LNV = np.exp(brute_force(trained, ids, stride=1))
    mixed_NV = sum(weight * probabilities_LNV[layer - 1] for layer, weight in weights.items())
    costs = -np.log2(mixed_NV[range(40), ids])
    corpus = build_corpus(ids.tobytes())
    score = bits_per_character(trained, corpus, stride=1, mixture="hedge", all_layers=True)
    assert score.bits_per_character == pytest.approx(float(costs.mean()), abs=1e-6)
    assert score.mixture == score.as_dict()["mixture"] == {"1": 0.1, "2": 0.3, "3": 0.0, "4": 0.6}
    alone = bits_per_character(trained, corpus, stride=1, all_layers=True)
    assert alone.mixture is None and "mixture" not in alone.as_dict()
    assert alone.layers == score.layers
    nats = {1: np.log([2.0, 4.0]), 2: np.log([8.0, 1.0])}
    np.testing.assert_allclose(mixture_nats(nats, {1: 1.0, 2: 1.0}), -np.log([(1 / 2 + 1 / 8) / 2, (1 / 4 + 1) / 2]))


def test_standard_error_by_hand(letters):
    """Guards against a formula that ignores the blocks, the small-sample factor or the denominator."""
    vocabulary = ByteVocabulary()
    # 10 blocks of one symbol each, costing 1 or 3 bits: residuals of 1, sqrt(10/9 * 10) / 10 = 1/3.
    bits = np.array([1.0, 3.0] * 5)
    assert standard_error(bits * math.log(2), letters(10), vocabulary) == pytest.approx(1 / 3)
    # The same costs over 5 characters of two bytes: R = 4, residuals -3 and 3, sqrt(10/9 * 90) / 5 = 2.
    ids = np.frombuffer("é".encode() * 5, np.uint8)
    assert standard_error(bits * math.log(2), ids, vocabulary) == pytest.approx(2)
    # 30 blocks of 1,000 symbols that cost 0 or 2 bits each: residuals of 1,000.
    bits = np.repeat([0.0, 2.0] * 15, 1000)
    expected = math.sqrt(30 / 29 * 30 * 1000**2) / 30_000
    assert standard_error(bits * math.log(2), letters(30_000), vocabulary) == pytest.approx(expected)
    assert standard_error(np.array([1.0]), letters(1), vocabulary) is None


def test_sums_lose_nothing():
    """Guards against sums in float32, or in an order that the number of processes changes."""
    nats = np.array([1e16, *[1.0] * 1000, -1e16]) * math.log(2)
    assert bits_per(nats, 1000) == pytest.approx(1.0, rel=1e-2)


def test_modules_in_training_are_left_as_they_were(build_model, letters):
    """Guards against validation with dropout on, and against training that goes on without dropout after it."""
    trained, ids = build_model(residual_dropout=0.5, attention_dropout=0.5), letters(40)
    expected = negative_log_likelihoods(trained.transformer, trained.heads, ids, stride=4)[2]
    trained.transformer.train()
    found = negative_log_likelihoods(trained.transformer, trained.heads, ids, stride=4)[2]
    np.testing.assert_array_equal(found, expected)
    assert trained.transformer.training and trained.transformer.blocks[0].dropout.training
    assert not trained.heads.training
    assert all(parameter.grad is None for parameter in trained.transformer.parameters())


def test_bf16_is_close_to_fp32_but_not_equal(build_model, build_corpus, letters):
    """Guards against a precision that is accepted and ignored, and against logits rounded to bf16."""
    trained, corpus = build_model(), build_corpus(letters(300).tobytes())
    fp32, bf16 = (
        bits_per_character(trained, corpus, precision=precision).bits_per_character for precision in ("fp32", "bf16")
    )
    assert fp32 != bf16
    assert bf16 == pytest.approx(fp32, abs=0.05)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("stride", 9),
        ("stride", 0),
        ("limit", 0),
        ("batch_size", 0),
        ("precision", "fp16"),
        ("precision", "int8"),
        ("split", "dev"),
        ("mixture", "hedge"),
    ],
)
def test_bad_options_are_refused(build_model, build_corpus, option, value):
    """Guards against a figure under a protocol that nobody asked for, or the last layer's called a mixture's."""
    with refused(option):
        bits_per_character(build_model(), build_corpus(b"some text"), **{option: value})


@pytest.mark.parametrize(
    ("text", "sha256", "message"),
    [(b"some text", "def", "trained on letters"), (b"\x80\x80", "abc", "no character begins")],
)
def test_other_texts_are_refused(build_model, build_corpus, text, sha256, message):
    """Guards against a score on text that was not the run's, under the run's name, and a division by zero."""
    with pytest.raises(UserError, match=message):
        bits_per_character(build_model(), build_corpus(text).model_copy(update={"sha256": sha256}))


@pytest.mark.parametrize(
    ("has_amx", "num_rows", "expected"), [(False, 512, "medium"), (True, 512, "highest"), (False, 1, "highest")]
)
def test_matmul_stays_fp32_and_is_put_back(monkeypatch, plain_fp32, has_amx, num_rows, expected):
    """Guards against bf16 inside a figure stamped fp32, a path that is slow for single rows, and a global setting that
    outlives the evaluation."""
    monkeypatch.setattr(matmul, "medium_is_fp32", plain_fp32)
    capabilities = {"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": has_amx, "amx_tile": has_amx}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    before = torch.get_float32_matmul_precision()
    with pytest.raises(ZeroDivisionError), matmul.full_fp32_matmul(torch.device("cpu"), num_rows):
        assert torch.get_float32_matmul_precision() == expected
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == before
