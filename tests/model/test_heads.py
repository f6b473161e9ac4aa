"""Prediction heads. Shapes: B batch, T positions, D d_model, K offsets, V vocabulary."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from charlm.config import ModelConfig
from charlm.model.heads import Heads
from charlm.model.transformer import CharTransformer

D, V = 4, 5
PAIRS = [(1, 1), (1, 3), (3, 1), (3, 2), (3, 3)]


def small(norm: str = "pre") -> ModelConfig:
    return ModelConfig(num_layers=3, num_heads=1, d_model=D, d_ff=8, context_length=6, norm=norm)


def some_states() -> torch.Tensor:
    return 3 + 2 * torch.randn(2, 6, D, generator=torch.Generator().manual_seed(1))


def test_logits_by_hand():
    """A classifier without its bias, transposed, or mixed up with that of another offset."""
    config = ModelConfig(num_layers=1, num_heads=1, d_model=2, d_ff=2, context_length=2)
    heads = Heads(config, 3, [(1, 1), (1, 2)])
    first, second = heads.exits["layer1"]["offset1"], heads.exits["layer1"]["offset2"]
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, -1.0], [3.0, 0.0]]))
        first.bias.copy_(torch.tensor([10.0, 20.0, 30.0]))
        second.weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 1.0], [2.0, 0.0]]))
    hidden_BTD = torch.tensor([[[1.0, 2.0], [-1.0, 4.0]]])
    expected_BTKV = torch.tensor(
        [[[[15.0, 18.0, 33.0], [2.0, 3.0, 2.0]], [[17.0, 16.0, 27.0], [4.0, 3.0, -2.0]]]]  # 10 + 1*1 + 2*2 = 15, ...
    )
    assert torch.equal(heads(hidden_BTD, 1, (1, 2)), expected_BTKV)
    assert torch.equal(heads(hidden_BTD, 1, (2, 1)), expected_BTKV[:, :, [1, 0]])
    assert torch.equal(heads(hidden_BTD, 1), expected_BTKV[:, :, :1])


@pytest.mark.parametrize(("norm", "layer", "normalised"), [("pre", 1, True), ("pre", 3, False), ("post", 1, False)])
def test_only_raw_states_are_normalised(randomise, norm, layer, normalised):
    """An exit that reads the raw residual stream, or a state that is normalised twice."""
    heads = randomise(Heads(small(norm), V, PAIRS))
    hidden_BTD = some_states()
    exit_ = heads.exits[f"layer{layer}"]
    states = hidden_BTD
    if normalised:
        centred = hidden_BTD - hidden_BTD.mean(dim=-1, keepdim=True)
        deviation = (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        states = centred / deviation * exit_["norm"].weight + exit_["norm"].bias
    assert bool(list(exit_["norm"].parameters())) == normalised
    expected_BTV = states @ exit_["offset1"].weight.T + exit_["offset1"].bias
    torch.testing.assert_close(heads(hidden_BTD, layer)[:, :, 0], expected_BTV)


def test_offsets_together_equal_offsets_apart(randomise):
    """Rows of the shared product handed to the wrong offset."""
    heads = randomise(Heads(small(), V, PAIRS))
    together_BTKV = heads(some_states(), 3, (1, 2, 3))
    for index, offset in enumerate((1, 2, 3)):
        torch.testing.assert_close(together_BTKV[:, :, [index]], heads(some_states(), 3, (offset,)))


def test_a_classifier_not_asked_for_gets_no_gradient(randomise):
    """A gradient of zeros in place of none: decay and momentum would go on moving a silent head."""
    heads = randomise(Heads(small(), V, PAIRS))
    heads(some_states(), 3, (1, 3)).square().sum().backward()
    with_gradient = {name for name, parameter in heads.named_parameters() if parameter.grad is not None}
    assert with_gradient == {f"exits.layer3.offset{k}.{part}" for k in (1, 3) for part in ("weight", "bias")}


def test_nothing_is_tied(randomise):
    """Two heads, or a head and the embedding, that share memory (the published sizes count them apart)."""
    config = small()
    parameters = [*Heads(config, V, PAIRS).parameters(), *CharTransformer(config, V).parameters()]
    spans = sorted((p.data_ptr(), p.data_ptr() + p.numel() * p.element_size()) for p in parameters)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_pairs_are_listed_once_and_in_order():
    """Heads in the order of a set: parameters, and with them optimizer state, would be numbered differently."""
    heads = Heads(small(), V, [(3, 2), (1, 1), (3, 1), (1, 1)])
    assert heads.pairs == [(1, 1), (3, 1), (3, 2)]
    assert heads.layers == [1, 3]
    names = [name for name, module in heads.named_modules() if isinstance(module, nn.Linear)]
    assert names == ["exits.layer1.offset1", "exits.layer3.offset1", "exits.layer3.offset2"]


def test_every_loss_starts_at_ln_v():
    """Heads that start with opinions of their own."""
    logits_BTKV = Heads(small(), V, PAIRS)(some_states(), 1, (1, 3))
    losses = F.cross_entropy(logits_BTKV.flatten(0, 2), torch.arange(24) % V, reduction="none")
    torch.testing.assert_close(losses, torch.full((24,), math.log(V)))
