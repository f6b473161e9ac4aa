"""Causal self-attention through torch's fused kernels, with or without a cache of earlier keys and values.

Shapes: B batch, T positions, D d_model, H heads, C = D / H head size, F = C / 2 frequencies, L layers.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from charlm.config import ModelConfig


class LayerCache(NamedTuple):
    """One layer's buffers, [B, H, context_length, C] each, of which the first `length` positions are filled."""

    keys: Tensor
    values: Tensor
    length: int

    def extend(self, keys_BHTC: Tensor, values_BHTC: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of new positions; return those of all positions up to them."""
        end = self.length + keys_BHTC.shape[2]
        self.keys[:, :, self.length : end] = keys_BHTC
        self.values[:, :, self.length : end] = values_BHTC
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache:
    """Keys and values of the positions seen so far, in buffers that never move: [L, B, H, context_length, C] each."""

    def __init__(self, config: ModelConfig, batch_size: int, device: torch.device, dtype: torch.dtype = torch.float32):
        head_size = config.d_model // config.num_heads
        shape = (config.num_layers, batch_size, config.num_heads, config.context_length, head_size)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def reset(self) -> None:
        """Forget every position."""
        self.length = 0

    def layer(self, layer: int) -> LayerCache:
        """The buffers of a layer (1-based)."""
        return LayerCache(self.keys[layer - 1], self.values[layer - 1], self.length)


def rotate(x_BHTC: Tensor, angles_TF: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021, eq. 34): turn the pairs (c, c + C/2) by their position's angles."""
    first, second = x_BHTC.float().chunk(2, dim=-1)
    cos, sin = angles_TF.cos(), angles_TF.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BHTC.dtype)


class Attention(nn.Module):
    """Causal multi-head self-attention through `scaled_dot_product_attention`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.attention_dropout
        # Apart, as an optimizer that orthogonalises whole matrices must see them.
        self.query = nn.Linear(config.d_model, config.d_model)
        self.key = nn.Linear(config.d_model, config.d_model)
        self.value = nn.Linear(config.d_model, config.d_model)
        self.out = nn.Linear(config.d_model, config.d_model)

    def forward(self, x_BTD: Tensor, angles_TF: Tensor | None, cache: LayerCache | None) -> Tensor:
        B, T, D = x_BTD.shape
        query, key, value = (
            project(x_BTD).view(B, T, self.num_heads, D // self.num_heads).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        if angles_TF is not None:
            query, key = rotate(query, angles_TF), rotate(key, angles_TF)
        mask = None
        if cache is not None:
            key, value = cache.extend(key, value)
            # is_causal aligns the triangle top-left, which is wrong where earlier keys are cached.
            if cache.length > 0:
                mask = torch.ones(T, key.shape[2], dtype=torch.bool, device=x_BTD.device).tril(cache.length)
        mixed_BHTC = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out(mixed_BHTC.transpose(1, 2).reshape(B, T, D))
