"""The network against a plain reference, and what it promises: causality, layers, cache, dropout, checkpointing.

Shapes: B batch, T positions, D d_model, H heads, C = D / H head size, V vocabulary.
"""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from charlm.config import ModelConfig
from charlm.model.cache import KVCache
from charlm.model.transformer import CharTransformer, NgramEmbedding
from tiny import small_model

V = 11
POSITIONS = ("per_layer", "input", "rotary")
SETTINGS = [{"position_encoding": positions, "norm": norm} for positions, norm in product(POSITIONS, ("pre", "post"))]
NGRAMS = {"ngrams": (2, 4), "ngram_buckets": 11, "ngram_width": 3}
DROPOUTS = ("attention_dropout", "activation_dropout", "residual_dropout")


def small(**options) -> ModelConfig:
    return small_model(**({"num_layers": 3, "d_ff": 12, "context_length": 6, "norm": "post"} | options))


def some_ids(config: ModelConfig, batch_size: int = 2, seed: int = 3) -> Tensor:
    return torch.randint(V, (batch_size, config.context_length), generator=torch.Generator().manual_seed(seed))


def all_layers(config: ModelConfig) -> range:
    return range(1, config.num_layers + 1)


@pytest.mark.parametrize("settings", [*SETTINGS, NGRAMS], ids=str)
def test_only_the_past_changes_a_hidden_state(randomise, settings):
    """A mask that leaks the future or hides the past, an n-gram that looks ahead: bit for bit, everywhere."""
    config = small(**settings, context_length=40)  # longer than a block of the fused kernel
    model = randomise(CharTransformer(config, V))
    ids_TT = some_ids(config, batch_size=1).repeat(config.context_length, 1)
    changed_TT = (ids_TT + torch.eye(config.context_length, dtype=torch.long)) % V  # row t differs at position t
    before, after = model(ids_TT, all_layers(config)), model(changed_TT, all_layers(config))
    affected_TT = torch.ones_like(ids_TT, dtype=torch.bool).triu()
    for layer in all_layers(config):
        assert torch.equal((before[layer] != after[layer]).any(dim=-1), affected_TT), layer


def reference(model: CharTransformer, ids_BT: Tensor) -> dict[int, Tensor]:
    """All layers in float64, from the parameters alone: explicit softmax, triangle, norms, complex rotations."""
    config = model.config
    weights = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    T, H, C = ids_BT.shape[1], config.num_heads, config.d_model // config.num_heads

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        scaled = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def turned(x_TC: Tensor) -> Tensor:
        frequencies = 10_000.0 ** (-2 * torch.arange(C // 2, dtype=torch.float64) / C)
        turns = torch.polar(torch.ones(1, dtype=torch.float64), torch.outer(torch.arange(T), frequencies))
        pairs = torch.complex(x_TC[:, : C // 2], x_TC[:, C // 2 :]) * turns
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    def attention(name: str, x_BTD: Tensor) -> Tensor:
        mixed = torch.zeros_like(x_BTD)
        for b, h in product(range(len(x_BTD)), range(H)):
            own = slice(h * C, (h + 1) * C)
            query, key, value = (linear(f"{name}.{kind}", x_BTD[b])[:, own] for kind in ("query", "key", "value"))
            if config.position_encoding == "rotary":
                query, key = turned(query), turned(key)
            for t in range(T):
                scores = (key[: t + 1] @ query[t] / math.sqrt(C)).exp()
                mixed[b, t, own] = (scores / scores.sum()) @ value[: t + 1]
        return linear(f"{name}.out", mixed)

    def feed_forward(name: str, x: Tensor) -> Tensor:
        up = linear(f"{name}.up", x)
        activated = {
            "relu": up * (up > 0),
            "gelu": up * 0.5 * (1 + torch.erf(up / math.sqrt(2))),
            "relu_squared": up**2 * (up > 0),
        }[config.activation]
        return linear(f"{name}.down", activated)

    x = weights["embedding.weight"][ids_BT]
    hidden_states = {}
    for layer in all_layers(config):
        block = f"blocks.{layer - 1}"
        if config.position_encoding == "per_layer" or (config.position_encoding == "input" and layer == 1):
            x = x + weights[f"position_tables.{layer - 1}"][:T]
        for sublayer, function in (("attention", attention), ("feed_forward", feed_forward)):
            name, norm_name = f"{block}.{sublayer}", f"{block}.{sublayer}_norm"
            if config.norm == "pre":
                x = x + function(name, norm(norm_name, x))
            else:
                x = norm(norm_name, x + function(name, x))
        hidden_states[layer] = x
    if config.norm == "pre":
        hidden_states[config.num_layers] = norm("final_norm", x)
    return hidden_states


@pytest.mark.parametrize("activation", ["relu", "gelu", "relu_squared"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_forward_equals_a_plain_reference(randomise, settings, activation):
    """Any slip in the architecture: scale, mask, head layout, place of norms and tables, activation, rotation."""
    config = small(**settings, activation=activation)
    model = randomise(CharTransformer(config, V))
    ids_BT = some_ids(config)[:, :5]
    expected = reference(model, ids_BT)
    for layer, hidden_BTD in model(ids_BT, all_layers(config)).items():
        torch.testing.assert_close(hidden_BTD.double(), expected[layer], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_layers_asked_for(randomise, norm):
    """Layers computed in vain above the highest asked for, or a state that depends on what else was asked for."""
    config = small(num_layers=4, norm=norm)
    model = randomise(CharTransformer(config, V))
    ids_BT = some_ids(config)
    everything = model(ids_BT, all_layers(config))
    assert list(model(ids_BT)) == [4]
    ran = []
    for number, block in enumerate(model.blocks, start=1):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    for layers in ({4}, {1}, {2, 3}, {1, 4}, [3, 1]):
        ran.clear()
        hidden_states = model(ids_BT, layers)
        assert hidden_states.keys() == set(layers)
        assert ran == list(range(1, max(layers) + 1))
        for layer, hidden_BTD in hidden_states.items():
            assert torch.equal(hidden_BTD, everything[layer])


@pytest.mark.parametrize("chunks", [(1, 1, 1, 1, 1, 1), (2, 4), (3, 1, 2), (6,), (1, 4)], ids=str)
@pytest.mark.parametrize("settings", [*SETTINGS, NGRAMS], ids=str)
def test_cached_equals_uncached(randomise, settings, chunks):
    """Cached decoding with a triangle aligned to the wrong corner, positions that start over, n-grams that begin at the
    edge of what is given at once, or a stale cache."""
    config = small(**settings)
    model = randomise(CharTransformer(config, V)).eval()
    cache = KVCache(config, 2, torch.device("cpu"))
    for seed in (4, 5):  # the second time over what the first left in the buffers
        cache.lengths.zero_()
        ids_BT = some_ids(config, seed=seed)[:, : sum(chunks)]
        expected = model(ids_BT, all_layers(config))
        pieces = []
        with torch.no_grad():
            for part in ids_BT.split(chunks, dim=1):
                pieces.append(model(part, all_layers(config), cache=cache))
        assert cache.length == sum(chunks)
        for layer in all_layers(config):
            cached_BTD = torch.cat([piece[layer] for piece in pieces], dim=1)
            torch.testing.assert_close(cached_BTD, expected[layer], rtol=1e-4, atol=1e-5)


def test_more_positions_than_the_context_are_refused(randomise):
    """Positions past the context that wrap around or crash deep inside, or a cache spoilt by the attempt."""
    config = small()
    model = randomise(CharTransformer(config, V)).eval()
    ids_BT = some_ids(config)
    with pytest.raises(ValueError, match="7 positions exceed the context of 6"):
        model(torch.zeros(2, 7, dtype=torch.long))
    cache = KVCache(config, 2, torch.device("cpu"))
    with torch.no_grad():
        model(ids_BT[:, :4], cache=cache)
        with pytest.raises(ValueError, match="7 positions exceed the context of 6"):
            model(ids_BT[:, :3], cache=cache)
        last_BTD = model(ids_BT[:, 4:], cache=cache)[3]
    torch.testing.assert_close(last_BTD, model(ids_BT)[3][:, 4:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("option", DROPOUTS)
def test_each_dropout_acts_at_its_place_and_only_there(randomise, option):
    """A dropout option that does nothing, acts elsewhere, does not rescale what it keeps, or drops in evaluation."""
    config = small(num_layers=1, activation="gelu", **{option: 0.5})
    model = randomise(CharTransformer(config, V))
    block = model.blocks[0]
    seen: dict[str, Tensor] = {}

    def note(name: str, values_BTD: Tensor) -> None:
        seen.setdefault(name, values_BTD)

    # The first position attends only to itself: a dropped weight leaves a head at zero there.
    block.attention.out.register_forward_pre_hook(lambda _, args: note("attention_dropout", args[0][:, 0]))
    block.feed_forward.down.register_forward_pre_hook(lambda _, args: note("activation_dropout", args[0]))
    block.dropout.register_forward_hook(lambda _, args, output: note("residual_dropout", output))
    ids_BT = some_ids(config, batch_size=50)

    evaluated = model.eval()(ids_BT)[1]
    whole = dict(seen)
    seen.clear()
    torch.manual_seed(0)
    trained = model.train()(ids_BT)[1]
    dropped = {name: values == 0 for name, values in seen.items()}

    assert not any((values == 0).any() for values in whole.values())
    assert not any(dropped[other].any() for other in DROPOUTS if other != option)
    assert 0.4 < dropped[option].float().mean() < 0.6
    kept = ~dropped[option]
    torch.testing.assert_close(seen[option][kept], 2 * whole[option][kept])
    assert not torch.equal(trained, evaluated)
    without = CharTransformer(small(num_layers=1, activation="gelu"), V)
    without.load_state_dict(model.state_dict())
    assert torch.equal(evaluated, without.train()(ids_BT)[1])


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_activation_checkpointing_gives_the_same_bits(randomise, settings):
    """Dropout drawn anew when a layer is recomputed, or checkpointing that keeps the activations all the same."""
    config, gradients = small(**settings, **dict.fromkeys(DROPOUTS, 0.3)), {}
    for checkpointing in (False, True):
        model = randomise(CharTransformer(config, V, activation_checkpointing=checkpointing))
        projections = []
        model.blocks[0].attention.out.register_forward_hook(lambda *_, seen=projections: seen.append(1))
        torch.manual_seed(0)
        sum(hidden.square().sum() for hidden in model(some_ids(config), (1, 3)).values()).backward()
        gradients[checkpointing] = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert len(projections) == (2 if checkpointing else 1)
    for name, gradient in gradients[False].items():
        assert torch.equal(gradient, gradients[True][name]), name


def test_rows_are_those_of_the_hashed_ngrams():
    """An n-gram read in the wrong order or of the wrong length, a table of another n, a start that is not padded."""
    config = small(**NGRAMS, context_length=9)
    embedding, ids_BS = NgramEmbedding(config), some_ids(config)
    result_BTD = embedding(ids_BS, 9)
    for b in range(2):
        for t in range(9):
            rows = []
            for n, table in zip((2, 4), embedding.tables, strict=True):
                ngram = [ids_BS[b, t - j].item() + 1 if t >= j else 0 for j in range(n)]
                rows.append(table.weight[sum(sign * 1_000_003**j for j, sign in enumerate(ngram)) % (2**31 - 1) % 11])
            torch.testing.assert_close(result_BTD[b, t], embedding.up(torch.cat(rows)))
