"""The network before training: the scale of its states and gradients. Shapes: D d_model, V vocabulary."""

import itertools
import math

import pytest
import torch

from charlm.config import ModelConfig
from charlm.model.transformer import CharTransformer


def deep(**options) -> ModelConfig:
    return ModelConfig(num_layers=64, num_heads=2, d_model=32, d_ff=128, context_length=32, **options)


@pytest.mark.parametrize("activation", ["relu", "gelu", "relu_squared"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_64_layers_start_stable(norm, activation):
    """States that explode or die with depth, or lower layers whose gradient vanishes before training begins.

    Bounds: pre-norm states start at the embedding's 0.3 and end normalised; each of 128 sublayers adds 1/128 of about
    0.5 (ReLU) to 1.5 (its square), so that a gradient, which goes as 1 / state, grows three- to fivefold downwards.
    """
    torch.manual_seed(0)
    model = CharTransformer(deep(norm=norm, activation=activation), 256)
    hidden_states = model(torch.randint(256, (8, 32)), range(1, 65))
    stds = [hidden_BTD.std().item() for hidden_BTD in hidden_states.values()]
    assert 0.25 < min(stds) <= max(stds) < 1.5
    (hidden_states[64] * torch.randn(8, 32, 32)).sum().backward()
    for name in ("attention.value", "attention.out", "feed_forward.up", "feed_forward.down"):
        norms = [block.get_submodule(name).weight.grad.norm().item() for block in model.blocks]
        assert max(norms) < 8 * min(norms), name


def test_scales_are_the_documented_ones():
    """A start that is stable because every layer does next to nothing, or that forgets a matrix or a bias."""
    torch.manual_seed(0)
    model = CharTransformer(deep(), 256)
    for name, parameter in model.named_parameters():
        std = parameter.shape[-1] ** -0.5  # rows are outputs
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            std = 0.3 if "embedding" in name else 0.02 if "position_tables" in name else std
            std /= math.sqrt(2 * 64) if ".out." in name or ".down." in name else 1
            assert parameter.std().item() == pytest.approx(std, rel=0.12), name  # five deviations of 1024 numbers


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_zero_residuals_make_every_layer_the_identity(norm):
    """residual_init=zero that leaves one of the two residual branches on."""
    model = CharTransformer(deep(norm=norm, residual_init="zero", position_encoding="input"), 256)
    states = list(model(torch.randint(256, (2, 32)), range(1, 64)).values())
    for lower, upper in itertools.pairwise(states):
        # Post-norm layers normalise what is normalised already, but for their epsilon.
        torch.testing.assert_close(upper, lower, rtol=0 if norm == "pre" else 1e-4, atol=0 if norm == "pre" else 1e-4)
