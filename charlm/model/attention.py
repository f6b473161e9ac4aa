"""Causal self-attention, in the way that is fastest on the device, with or without a cache of earlier keys and values.

Shapes: B batch, T positions, D d_model, H heads, C = D / H head size, F = C / 2 rotary frequencies, L layers.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from charlm.config import AttentionBackend, ModelConfig


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
    """Keys and values of the positions seen so far, in buffers that never move: [L, B, H, context_length, C] each.

    Their ids are kept, too, [B, context_length].
    """

    def __init__(self, config: ModelConfig, batch_size: int, device: torch.device, dtype: torch.dtype = torch.float32):
        head_size = config.d_model // config.num_heads
        shape = (config.num_layers, batch_size, config.num_heads, config.context_length, head_size)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.ids = torch.zeros(batch_size, config.context_length, device=device, dtype=torch.int64)
        self.length = 0

    def reset(self) -> None:
        """Forget every position."""
        self.length = 0

    def layer(self, layer: int) -> LayerCache:
        """The buffers of a layer (1-based)."""
        return LayerCache(self.keys[layer - 1], self.values[layer - 1], self.length)


class Rotation(NamedTuple):
    """Rotary position embedding (Su et al. 2021, eq. 34): turns the pairs (c, c + C/2) by their position's angles."""

    cos: Tensor
    """[T, C], each angle twice."""
    sin: Tensor
    """[T, C], negative in the first half: where the other of the pair is subtracted."""

    @staticmethod
    def by(angles_TF: Tensor) -> "Rotation":
        """The rotation by `angles_TF`, in radians."""
        sin = angles_TF.sin()
        return Rotation(torch.cat([angles_TF.cos()] * 2, dim=-1), torch.cat([-sin, sin], dim=-1))

    def __call__(self, x_BHTC: Tensor) -> Tensor:
        """The queries or keys of T positions, turned."""
        return _Rotate.apply(x_BHTC, self.cos.to(x_BHTC.dtype), self.sin.to(x_BHTC.dtype))


class _Rotate(torch.autograd.Function):
    """A rotation, whose gradient is turned back: nothing but the tables is kept."""

    @staticmethod
    def forward(ctx, x_BHTC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TC, sin_TC)
        half = x_BHTC.shape[-1] // 2
        return torch.addcmul(x_BHTC * cos_TC, x_BHTC.roll(half, dims=-1), sin_TC)

    @staticmethod
    def backward(ctx, grad_BHTC: Tensor) -> tuple[Tensor, None, None]:
        cos_TC, sin_TC = ctx.saved_tensors
        half = grad_BHTC.shape[-1] // 2
        return torch.addcmul(grad_BHTC * cos_TC, grad_BHTC.roll(half, dims=-1), -sin_TC), None, None


BLOCK = 128
"""Queries that `BlockwiseAttention` takes at once: the fastest of 64, 128 and 256 on a CPU."""


class BlockwiseAttention(torch.autograd.Function):
    """Causal attention in blocks of queries, each over the keys up to its own end and no further.

    The CPU's fused kernel computes the masked half of the scores too, and its backward pass uses the processor's matrix
    instructions poorly; here every product is one batched matrix product. The attention weights are kept for the
    backward pass in the precision of the queries, B x H x T x T / 2 of them (activation checkpointing drops them).
    """

    @staticmethod
    def forward(ctx, query_BHTC: Tensor, key_BHTC: Tensor, value_BHTC: Tensor) -> Tensor:
        B, H, T, C = query_BHTC.shape
        query, key, value = (x.reshape(B * H, T, C) for x in (query_BHTC, key_BHTC, value_BHTC))
        mixed = torch.empty_like(query)
        future = query.new_full((BLOCK, BLOCK), float("-inf")).triu(1)
        weights = []
        with torch.autocast(query.device.type, enabled=False):
            for start in range(0, T, BLOCK):
                end = min(start + BLOCK, T)
                scores = torch.baddbmm(query.new_empty(1), query[:, start:end], key[:, :end].mT, beta=0, alpha=C**-0.5)
                scores[:, :, start:] += future[: end - start, : end - start]
                weights.append(scores.softmax(dim=-1))
                torch.bmm(weights[-1], value[:, :end], out=mixed[:, start:end])
        ctx.save_for_backward(query, key, value, *weights)
        return mixed.view(B, H, T, C)

    @staticmethod
    def backward(ctx, grad_BHTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *weights = ctx.saved_tensors
        B, H, T, C = grad_BHTC.shape
        scale = C**-0.5
        grad = grad_BHTC.reshape(B * H, T, C)
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for start, block in zip(range(0, T, BLOCK), weights, strict=True):
            end = min(start + BLOCK, T)
            grad_value[:, :end].baddbmm_(block.mT, grad[:, start:end])
            grad_block = torch.bmm(grad[:, start:end], value[:, :end].mT)
            grad_scores = torch.ops.aten._softmax_backward_data(grad_block, block, -1, block.dtype)
            torch.baddbmm(
                query.new_empty(1), grad_scores, key[:, :end], beta=0, alpha=scale, out=grad_query[:, start:end]
            )
            grad_key[:, :end].baddbmm_(grad_scores.mT, query[:, start:end], alpha=scale)
        return grad_query.view(B, H, T, C), grad_key.view(B, H, T, C), grad_value.view(B, H, T, C)


def attends_in_blocks(backend: AttentionBackend, device_type: str) -> bool:
    """Whether attention without dropout goes block by block. On a GPU the flash kernel skips the masked half itself."""
    return backend == "blocks" or (backend == "auto" and device_type == "cpu")


class Attention(nn.Module):
    """Causal multi-head self-attention.

    `backend` "sdpa" is torch's `scaled_dot_product_attention`, "blocks" is `BlockwiseAttention`, which knows neither
    dropout nor cached keys and leaves those to the former; "auto" takes blocks on a CPU.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.attention_dropout
        self.backend: AttentionBackend = "auto"
        # Apart, as an optimizer that orthogonalises whole matrices must see them.
        self.query = nn.Linear(config.d_model, config.d_model)
        self.key = nn.Linear(config.d_model, config.d_model)
        self.value = nn.Linear(config.d_model, config.d_model)
        self.out = nn.Linear(config.d_model, config.d_model)

    def forward(self, x_BTD: Tensor, rotation: Rotation | None, cache: LayerCache | None) -> Tensor:
        B, T, D = x_BTD.shape
        projections = (self.query, self.key, self.value)
        if cache is None:  # one product; for a few characters at a time joining the weights costs more than it saves
            weight = torch.cat([project.weight for project in projections])
            bias = torch.cat([project.bias for project in projections])
            projected = F.linear(x_BTD, weight, bias).chunk(3, dim=-1)
        else:
            projected = [project(x_BTD) for project in projections]
        query, key, value = (x.view(B, T, self.num_heads, D // self.num_heads).transpose(1, 2) for x in projected)
        if rotation is not None:
            query, key = rotation(query), rotation(key)
        mask = None
        if cache is not None:
            key, value = cache.extend(key, value)
            # is_causal aligns the triangle top-left, which is wrong where earlier keys are cached.
            if cache.length > 0:
                mask = torch.ones(T, key.shape[2], dtype=torch.bool, device=x_BTD.device).tril(cache.length)
        dropout = self.dropout if self.training else 0.0
        if mask is None and dropout == 0.0 and attends_in_blocks(self.backend, x_BTD.device.type):
            mixed_BHTC = BlockwiseAttention.apply(query, key, value)
        else:
            mixed_BHTC = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, dropout_p=dropout
            )
        return self.out(mixed_BHTC.transpose(1, 2).reshape(B, T, D))
