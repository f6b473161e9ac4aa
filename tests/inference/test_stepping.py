"""Single symbols by the short way: what the network itself computes, from the weights that it has now."""

import gc
import weakref
from dataclasses import replace
from itertools import product

import pytest
import torch

from charlm.inference.generation import generate
from charlm.inference.stepping import SteppingTransformer, stepping
from charlm.model.attention import KVCache
from charlm.model.transformer import CharTransformer

SETTINGS = [
    *product(("per_layer", "input", "rotary"), ("pre", "post"), ("relu",), ((),)),
    ("rotary", "pre", "relu_squared", (2, 3)),
    ("input", "post", "gelu", (3,)),
]


@pytest.mark.parametrize(("positions", "norm", "activation", "ngrams"), SETTINGS, ids=str)
@pytest.mark.parametrize("layer", [2, 3])
def test_steps_compute_what_the_network_computes(build_model, positions, norm, activation, ngrams, layer):
    """Guards against a part that is left out, exchanged or applied at another position or layer, against widths that do
    not divide into bags, and against buffers that another pass could not go on with."""
    options = {"d_model": 12, "d_ff": 20, "num_layers": 3, "context_length": 11, "ngrams": ngrams, "ngram_buckets": 64}
    trained = build_model(positions=positions, norm=norm, activation=activation, **options)
    swift = stepping(trained).transformer
    assert isinstance(swift, SteppingTransformer)
    caches = [KVCache(trained.config.model, 1, trained.device) for _ in range(2)]
    ids = torch.randint(256, (1, 11), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        for part in ids.split([1, 1, 4, 1, 3, 1], dim=1):
            one, other = (
                model(part, [layer], cache)[layer]
                for model, cache in zip((trained.transformer, swift), caches, strict=True)
            )
            assert one.std() > 0.1
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
    for name in ("keys", "values", "ids", "lengths"):
        one, other = (getattr(cache, name) for cache in caches)
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="12 positions exceed the context of 11"):
        swift(ids[:, :1], [layer], caches[1])


def test_steps_are_few_operations(build_model, monkeypatch):
    """Guards against single symbols that quietly go the long way through the blocks."""
    trained = build_model()
    passes = []
    whole = CharTransformer.forward
    monkeypatch.setattr(CharTransformer, "forward", lambda *args: passes.append(1) or whole(*args))
    generate(trained, "a" * 3, length=5)
    assert len(passes) == 1  # the prompt


def fused_step(weight: torch.nn.Parameter) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=3, fused=True).step()


def in_place(weight: torch.nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(-3)


@pytest.mark.parametrize("part", ["attention.key.weight", "feed_forward.up.bias"])
@pytest.mark.parametrize("change", [in_place, fused_step])
@pytest.mark.parametrize("draft", [None, 1])
def test_text_follows_training(build_model, part, change, draft):
    """Guards against text of weights that were: a fused optimizer does not even count what it writes."""
    trained = build_model()
    first = generate(trained, "ab", length=30, draft=draft)
    change(trained.transformer.blocks[0].get_parameter(part))
    fresh = CharTransformer(trained.config.model, 256).eval()
    fresh.load_state_dict(trained.transformer.state_dict())
    expected = generate(replace(trained, transformer=fresh), "ab", length=30, draft=draft)
    assert generate(trained, "ab", length=30, draft=draft) == expected != first


@pytest.mark.parametrize("reason", ["gradients", "training", "autocast", "two texts", "two layers", "no such layer"])
def test_what_goes_the_long_way(build_model, reason):
    """Guards against dropout, gradients or a precision lost on the short way, and layers that there are not."""
    trained = build_model(residual_dropout=0.5)
    trained.transformer.train(reason == "training")
    swift = stepping(trained).transformer
    ids_BT = torch.zeros(2 if reason == "two texts" else 1, 1, dtype=torch.long)
    layers = {"two layers": [1, 2], "no such layer": [3]}.get(reason, [2])
    found = []
    for model in (trained.transformer, swift):
        cache = KVCache(trained.config.model, len(ids_BT), trained.device)
        torch.manual_seed(4)
        with torch.set_grad_enabled(reason == "gradients"), torch.autocast("cpu", enabled=reason == "autocast"):
            if reason == "no such layer":
                with pytest.raises(ValueError, match="name some of 1 to 2"):
                    model(ids_BT, layers, cache)
            else:
                found.append(model(ids_BT, layers, cache)[2])
    assert "layers" not in vars(swift)  # nothing was copied for it
    if found:
        assert torch.equal(*found)
        assert found[1].requires_grad == (reason == "gradients")


def test_a_model_of_inference_mode_writes(build_model):
    """Guards against bookkeeping that tensors made in inference mode do not take part in."""
    with torch.inference_mode():
        trained = build_model()
    assert len(generate(trained, b"ab", length=5).encode()) >= 5


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
    trained = replace(build_model(), device=torch.device("cuda"))
    assert stepping(trained) is trained
