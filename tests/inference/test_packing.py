"""Packed weights: the same model, as long as its weights stay."""

import pytest
import torch

from charlm.inference.packing import PackedLinear, packed
from charlm.model.attention import KVCache


@pytest.mark.parametrize("options", [{}, {"norm": "post", "positions": "rotary", "ngrams": (2, 3)}], ids=str)
def test_a_packed_model_computes_the_same(build_model, options):
    """Guards against layers that are exchanged, left out or without bias, and against copies of what can be shared."""
    trained = build_model(num_layers=3, **options)
    twin = packed(trained.transformer)
    if twin is trained.transformer:
        pytest.skip("nothing to pack with")
    assert sum(isinstance(module, PackedLinear) for module in twin.modules()) == 3 * 6
    assert twin.embedding.weight is trained.transformer.embedding.weight
    ids = torch.arange(7)[None]
    caches = [KVCache(trained.config.model, 1, trained.device) for _ in range(2)]
    with torch.inference_mode():
        for part in ids.split([1, 4, 2], dim=1):
            one, other = (
                model(part, cache=cache)[3] for model, cache in zip((trained.transformer, twin), caches, strict=True)
            )
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
