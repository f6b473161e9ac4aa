"""A few symbols by the short way: what the network itself computes, from the weights that it has now."""

import gc
import weakref
from dataclasses import replace
from itertools import product
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch

from charlm.config import LayersConfig, ModelConfig
from charlm.inference.generation import generate
from charlm.inference.stepping import Reader, _Linear
from charlm.model.cache import KVCache
from charlm.model.heads import Heads
from charlm.model.transformer import CharTransformer

HINTS = get_type_hints(ModelConfig)
CHOICES = {name: get_args(hint) for name, hint in HINTS.items() if get_origin(hint) is Literal}
"""Every option of the architecture that is a choice between names, with all of them."""
VARIANTS = [dict(zip(CHOICES, values, strict=True)) for values in product(*CHOICES.values())]
SIZES = {"d_model": 12, "d_ff": 20, "num_heads": 2, "num_layers": 3, "context_length": 22, "ngram_buckets": 64}
DROPOUT = {"attention_dropout", "activation_dropout", "residual_dropout"}


def test_every_option_of_the_architecture_is_compared():
    """Guards against an option of ModelConfig that the short way ignores. Whoever adds one that is a choice between
    names has it compared below at once; any other must be implemented in stepping.py and given a value here."""
    options = set(vars(ModelConfig()))
    assert options == {*CHOICES, *SIZES, *DROPOUT, "ngrams", "ngram_width", "head_bias"}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(variant.values()))
@pytest.mark.parametrize(("ngrams", "layer"), [((), 3), ((2, 3), 2)], ids=str)
def test_steps_compute_what_the_network_computes(build_model, variant, ngrams, layer):
    """Guards against a part that is left out, exchanged or applied at another position or layer, a mask of other
    positions, widths that do not divide into bags, and buffers that another pass could not continue with."""
    trained = build_model(**SIZES, **variant, ngrams=ngrams, ngram_width=7)
    reader = Reader(trained)
    caches = [KVCache(trained.config.model, 1, trained.device) for _ in range(2)]
    ids = torch.randint(256, (1, 22), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        for part in ids.split([1, 1, 4, 1, 9, 1, 2, 3], dim=1):
            one = trained.transformer(part, [layer], caches[0], num_last=3)[layer]
            other = reader.read(part.tolist(), caches[1], layer=layer, num_last=3)
            assert one.std() > 0.1
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
        for name in ("keys", "values", "ids", "lengths"):
            one, other = (getattr(cache, name) for cache in caches)
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="23 positions exceed the context of 22"):
            reader.read([[1]], caches[1], layer=layer)


@pytest.mark.parametrize("num_symbols", [1, 3, 9])
def test_the_upper_layers_go_on_from_a_lower_one(build_model, num_symbols):
    """Guards against layers that run twice or not at all, or read the buffers of others."""
    trained = build_model(num_layers=3, context_length=16)
    reader, cache = Reader(trained), KVCache(trained.config.model, 1, trained.device)
    ids = list(range(5 + num_symbols))
    with torch.inference_mode():
        expected = trained.transformer(torch.tensor([ids]))[3][:, 5:]
    reader.read([ids[:5]], cache)
    lower = reader.read([ids[5:]], cache, layer=1)
    cache.lengths -= num_symbols
    torch.testing.assert_close(reader.run_from(lower, 1, cache), expected, rtol=1e-5, atol=1e-5)
    assert cache.length == len(ids)


def test_the_bits_of_a_symbol_are_its_own(build_model):
    """Guards against drafts that are in doubt more often than they need be: sums that change with what is beside."""
    trained = build_model(d_model=64, d_ff=96)
    linear = _Linear.of(trained.transformer.blocks[0].feed_forward.up)
    x_TI = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        assert torch.equal(linear(x_TI), torch.cat([linear(x_I[None]) for x_I in x_TI]))


@pytest.mark.parametrize("kind", ["linear", "shared", "shared_frozen", "tower"])
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("layer", [1, 2])
def test_heads_compute_what_heads_compute(build_model, randomise, kind, norm, layer):
    """Guards against a head of another layer or offset, without its norm, its tower or its bias."""
    trained = build_model(norm=norm, head_bias=norm == "pre")
    heads = Heads(
        trained.config.model,
        256,
        [(1, 1), (1, 3), (2, 1), (2, 3)],
        layers=LayersConfig(head=kind, tower_width=12),
        final_norm=trained.transformer.final_norm,
    )
    heads = randomise(heads).eval()
    reader = Reader(replace(trained, heads=heads))
    hidden_BTD = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(3))
    for offsets in ((1,), (3,), (1, 3), range(3, 4)):
        logits_BTKV = reader.logits(hidden_BTD, layer, offsets)
        torch.testing.assert_close(logits_BTKV, heads(hidden_BTD, layer, offsets), rtol=1e-5, atol=1e-5)
    assert len(reader._classifiers) == 3


def test_steps_are_few_operations(build_model, monkeypatch):
    """Guards against single symbols that quietly go the long way through the blocks."""
    trained = build_model(context_length=16)
    passes = []
    whole = CharTransformer.forward
    monkeypatch.setattr(CharTransformer, "forward", lambda *args: passes.append(1) or whole(*args))
    generate(trained, "a" * 9, length=5)
    assert len(passes) == 1  # the prompt


@pytest.mark.parametrize("part", ["attention.key.weight", "feed_forward.up.bias"])
@pytest.mark.parametrize("draft", [None, 1])
def test_text_follows_training(build_model, part, draft):
    """Guards against text of weights that were: a fused optimizer does not even count what it writes."""
    trained = build_model()
    first = generate(trained, "ab", length=30, draft=draft)
    weight = trained.transformer.blocks[0].get_parameter(part)
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=3, fused=True).step()
    fresh = CharTransformer(trained.config.model, 256).eval()
    fresh.load_state_dict(trained.transformer.state_dict())
    expected = generate(replace(trained, transformer=fresh), "ab", length=30, draft=draft)
    assert generate(trained, "ab", length=30, draft=draft) == expected != first


@pytest.mark.parametrize("reason", ["training", "autocast", "two texts", "many"])
def test_what_goes_the_long_way(build_model, reason):
    """Guards against dropout or a precision lost on the short way."""
    trained = build_model(residual_dropout=0.5, context_length=9)
    trained.transformer.train(reason == "training")
    ids_BT = torch.zeros({"two texts": (2, 1), "many": (1, 9)}.get(reason, (1, 1)), dtype=torch.long)
    caches = [KVCache(trained.config.model, len(ids_BT), trained.device) for _ in range(2)]
    with torch.autocast("cpu", enabled=reason == "autocast"), torch.no_grad():
        torch.manual_seed(4)
        expected = trained.transformer(ids_BT, [2], caches[0])[2]
        torch.manual_seed(4)
        reader = Reader(trained)
        assert torch.equal(reader.read(ids_BT.tolist(), caches[1]), expected)
    assert "_layers" not in vars(reader)  # nothing was copied for it


def test_a_model_goes_after_its_text(build_model):
    """Guards against copies that keep a model in memory that nobody uses any more."""
    trained = build_model()
    generate(trained, "ab", length=2)
    reference = weakref.ref(trained.transformer)
    del trained
    gc.collect()
    assert reference() is None


def test_a_gpu_reads_by_itself(build_model):
    """Guards against sums of rows where the host would wait for each."""
    assert Reader(build_model()).has_fast_path
    assert not Reader(replace(build_model(), device=torch.device("cuda"))).has_fast_path
