"""Prediction heads. Shapes: B batch, T positions, D d_model, K offsets, V vocabulary."""

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from charlm.config import LayersConfig, ModelConfig
from charlm.model.heads import Heads
from charlm.model.transformer import CharTransformer

D, V = 4, 5
KINDS = ("linear", "shared", "shared_frozen", "tower")
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


@pytest.mark.parametrize("kind", KINDS)
def test_heads_without_bias(randomise, kind):
    """Guards against a bias that is learned all the same, or left out of norms and towers as well."""
    config = small().replace(head_bias=False)
    final_norm = randomise(nn.LayerNorm(D))
    heads = randomise(Heads(config, V, PAIRS, layers=LayersConfig(head=kind), final_norm=final_norm))
    assert not [name for name, _ in heads.named_parameters() if re.search(r"offset\d+\.bias", name)]
    hidden_BTD = some_states()
    for layer, offsets in ((1, (1, 3)), (3, (2,))):
        states_BTD, classifiers = heads.states(hidden_BTD, layer), heads.linears(layer, offsets)[-len(offsets) :]
        expected_BTKV = torch.stack([states_BTD @ linear.weight.T for linear in classifiers], dim=2)
        torch.testing.assert_close(heads(hidden_BTD, layer, offsets), expected_BTKV)


def test_pairs_are_listed_once_and_in_order():
    """Heads in the order of a set: parameters, and with them optimizer state, would be numbered differently."""
    heads = Heads(small(), V, [(3, 2), (1, 1), (3, 1), (1, 1)])
    names = [name for name, module in heads.named_modules() if isinstance(module, nn.Linear)]
    assert names == ["exits.layer1.offset1", "exits.layer3.offset1", "exits.layer3.offset2"]


def two_wide(norm: str) -> ModelConfig:
    return ModelConfig(num_layers=2, num_heads=1, d_model=2, d_ff=2, context_length=2, norm=norm)


def assign(module: nn.Module, **values: list) -> None:
    for name, value in values.items():
        getattr(module, name).data = torch.tensor(value)


@pytest.mark.parametrize("kind", ["shared", "shared_frozen"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_shared_logits_by_hand(kind, norm):
    """An intermediate layer that reads the raw stream, is normalised twice, or has a classifier of its own."""
    final_norm = nn.LayerNorm(2, eps=0.0) if norm == "pre" else nn.Identity()
    heads = Heads(two_wide(norm), 3, [(1, 1), (1, 2), (2, 1)], layers=LayersConfig(head=kind), final_norm=final_norm)
    if norm == "pre":
        assign(final_norm, weight=[2.0, 1.0], bias=[0.5, 0.0])
    assign(heads.exits["layer2"]["offset1"], weight=[[1.0, 2.0], [0.0, -1.0], [3.0, 0.0]], bias=[10.0, 20.0, 30.0])
    assign(heads.exits["layer2"]["offset2"], weight=[[0.0, 1.0], [1.0, 1.0], [2.0, 0.0]], bias=[0.0, 0.0, 0.0])
    # Mean 3, deviation 1: (2, 4) is (-1, 1) when normalised, and 2 * -1 + 0.5, 1 * 1 + 0 after weight and bias.
    x, y = (-1.5, 1.0) if norm == "pre" else (2.0, 4.0)
    hidden_BTD = torch.tensor([[[2.0, 4.0]]])
    expected = [[10 + x + 2 * y, 20 - y, 30 + 3 * x], [y, x + y, 2 * x]]
    torch.testing.assert_close(heads(hidden_BTD, 1, (1, 2)), torch.tensor([[expected]]))
    # The last layer's states went through the final norm in the transformer.
    torch.testing.assert_close(heads(hidden_BTD, 2), torch.tensor([[[[20.0, 16.0, 36.0]]]]))


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_tower_logits_by_hand(norm):
    """A hidden layer without its activation, before the norm, or one per offset; a tower on the last layer."""
    layers = LayersConfig(head="tower", tower_width=3, tower_dropout=0.5)
    heads = Heads(two_wide(norm), 2, [(1, 1), (1, 2), (2, 1)], layers=layers).eval()
    tower = heads.exits["layer1"]["tower"]
    assign(tower.hidden, weight=[[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]], bias=[0.0, -2.0, 0.5])
    assign(heads.exits["layer1"]["offset1"], weight=[[1.0, 1.0, 1.0], [0.0, 2.0, 3.0]], bias=[7.0, 0.0])
    assign(heads.exits["layer1"]["offset2"], weight=[[5.0, 0.0, 0.0], [0.0, 0.0, 1.0]], bias=[0.0, 0.0])
    if norm == "pre":
        heads.norm(1).eps = 0.0
        hidden_BTD, units = torch.tensor([[[4.0, 2.0]]]), (1.0, 0.0, 0.0)  # of (1, -1): 1, -1 - 2, -1 - 1 + 0.5
    else:
        hidden_BTD, units = torch.tensor([[[4.0, 5.0]]]), (4.0, 3.0, 1.5)
    a, b, c = units
    expected = [[7 + a + b + c, 2 * b + 3 * c], [5 * a, c]]
    torch.testing.assert_close(heads(hidden_BTD, 1, (1, 2)), torch.tensor([[expected]]))
    assert heads.linears(1, (2,)) == [tower.hidden, heads.exits["layer1"]["offset2"]]
    assert heads.linears(2, (1,)) == [heads.exits["layer2"]["offset1"]]
    heads.train()
    dropped = torch.stack([heads.classifiers(hidden_BTD, 1, (1,))[0] for _ in range(64)]).flatten(0, 2)
    assert set(dropped[:, 0].tolist()) == {0.0, 2 * a}


def with_trunk(randomise, kind: str, norm: str = "pre") -> nn.ModuleDict:
    """Transformer and heads of all layers, two offsets each, as the objective holds them."""
    config = small(norm)
    transformer = CharTransformer(config, V)
    pairs = [(layer, offset) for layer in (1, 2, 3) for offset in (1, 2)]
    heads = Heads(config, V, pairs, layers=LayersConfig(head=kind), final_norm=transformer.final_norm)
    return randomise(nn.ModuleDict({"transformer": transformer, "heads": heads}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_the_gradient_of_an_intermediate_loss_reaches_what_it_should(randomise, kind, norm):
    """A frozen head that learns after all, a shared one that does not, gradients in layers above the head or in a
    classifier that was not asked for: decay and momentum would go on moving it."""
    model = with_trunk(randomise, kind, norm)
    states = model["transformer"](torch.arange(6)[None] % V, [2])[2]
    model["heads"](states, 2, (2,)).square().sum().backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    final_norm = {"transformer.final_norm.weight", "transformer.final_norm.bias"} if norm == "pre" else set()
    own_norm = {"heads.exits.layer2.norm.weight", "heads.exits.layer2.norm.bias"} if norm == "pre" else set()
    own = {f"heads.exits.layer2.offset2.{part}" for part in ("weight", "bias")}
    assert {name for name in moved if "heads" in name or "final_norm" in name} == {
        "linear": own | own_norm,
        "tower": own | own_norm | {f"heads.exits.layer2.tower.hidden.{part}" for part in ("weight", "bias")},
        "shared": {f"heads.exits.layer3.offset2.{part}" for part in ("weight", "bias")} | final_norm,
        "shared_frozen": set(),
    }[kind]
    assert {name.split(".")[2] for name in moved if "blocks" in name} == {"0", "1"}
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in model.named_parameters() if name in moved)


@pytest.mark.parametrize("kind", ["shared", "shared_frozen"])
def test_shared_heads_hold_nothing_of_their_own(randomise, kind):
    """A tensor saved under two names, and a copy or a load after which a head reads what nobody trains."""
    model = with_trunk(randomise, kind)
    with_one_head = CharTransformer(small(), V), Heads(small(), V, [(3, 1), (3, 2)])
    expected = {f"transformer.{name}" for name in with_one_head[0].state_dict()}
    expected |= {f"heads.{name}" for name in with_one_head[1].state_dict()}
    assert model.state_dict().keys() == expected
    assert {name for name, _ in model.named_parameters(remove_duplicate=False)} == expected
    assert model["heads"].pairs == [(layer, offset) for layer in (1, 2, 3) for offset in (1, 2)]
    with torch.device("meta"):
        loaded = with_trunk(lambda module: module, kind)
    loaded.load_state_dict(model.state_dict(), assign=True)
    for other in (copy.deepcopy(model), loaded):
        assert torch.equal(other["heads"](some_states(), 1, (1, 2)), model["heads"](some_states(), 1, (1, 2)))
        assert other["heads"].norm(1) is other["transformer"].final_norm
    copied = copy.deepcopy(model)
    copied["transformer"].final_norm.weight.data.zero_()
    assert not torch.equal(copied["heads"](some_states(), 1), model["heads"](some_states(), 1))


def test_shared_heads_have_a_classifier_for_each_offset():
    """An intermediate layer that predicts an offset which the last layer does not."""
    layers = LayersConfig(head="shared")
    heads = Heads(small(), V, [(1, 1), (1, 2), (3, 1)], layers=layers, final_norm=nn.LayerNorm(D))
    assert heads.pairs == [(1, 1), (1, 2), (3, 1), (3, 2)]
    assert heads(some_states(), 1, (2,)).shape == (2, 6, 1, V)
    with pytest.raises(KeyError):
        heads(some_states(), 2)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_under_autocast(randomise, kind):
    """A norm in bf16, or tensors of two types that a product does not take."""
    model, hidden_BTD = with_trunk(randomise, kind), some_states().requires_grad_()
    exact = model["heads"](hidden_BTD, 1, (1, 2))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model["heads"](hidden_BTD, 1, (1, 2))
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).norm() < 0.02 * exact.norm()
    rounded.square().sum().backward()
    assert hidden_BTD.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_starts_at_ln_v(kind):
    """A head that starts with opinions of its own, or from which no gradient can ever come."""
    heads = Heads(small(), V, PAIRS, layers=LayersConfig(head=kind), final_norm=nn.LayerNorm(D))
    losses = F.cross_entropy(heads(some_states(), 1, (1, 3)).flatten(0, 2), torch.arange(24) % V, reduction="none")
    torch.testing.assert_close(losses, torch.full((24,), math.log(V)))
    states_BTE, _, _ = heads.classifiers(some_states(), 1, (1,))
    assert (states_BTE.std(dim=(0, 1)) > 0).sum() > 1
