"""Causal self-attention by the fastest kernel of the device, with or without a cache.

Shapes: B batch, T positions, Q last positions, D d_model, H heads, C = D / H, F = C / 2.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from charlm.config import AttentionBackend, ModelConfig
from charlm.model.cache import LayerCache
from charlm.model.kernels_cpu import BlockwiseAttention, attend_by_text, many_texts_few_queries


class RotaryTable(NamedTuple):
    """Rotary position embedding (Su et al. 2021, eq. 34) of the pairs (c, c + C/2)."""

    cos: Tensor
    """[T, C], [1, T, C] or [B, 1, T, C]; both halves of C hold the same angles."""
    sin: Tensor
    """Like cos, but negative in the first half, where the partner is subtracted."""

    def at(self, positions: slice | Tensor) -> "RotaryTable":
        """The entries of a slice of positions, or of [B, T] positions."""
        return RotaryTable(*(angles[positions].unsqueeze(-3) for angles in self))

    def last(self, num_positions: int) -> "RotaryTable":
        return RotaryTable(*(angles[..., -num_positions:, :] for angles in self))

    def __call__(self, x_BHTC: Tensor) -> Tensor:
        cos, sin = self.cos.to(x_BHTC.dtype), self.sin.to(x_BHTC.dtype)
        return _Rotate.apply(x_BHTC, cos, sin) if torch.is_grad_enabled() else _rotate(x_BHTC, cos, sin)


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # or generation would make tables that training cannot use
def rotary_table(num_positions: int, head_size: int, device: torch.device) -> RotaryTable:
    """The table whose angles are position x 10000^(-2i / C) for i = 0 ... C / 2 - 1."""
    half = head_size // 2
    frequencies = torch.exp(torch.arange(half, device=device) * (-math.log(10_000.0) / half))
    angles_TF = torch.arange(num_positions, device=device)[:, None] * frequencies
    cos, sin = angles_TF.cos(), angles_TF.sin()
    return RotaryTable(torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))


def _rotate(x_BHTC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.addcmul(x_BHTC * cos, x_BHTC.roll(x_BHTC.shape[-1] // 2, dims=-1), sin)


class _Rotate(torch.autograd.Function):
    """Keeps only the table for the backward pass."""

    @staticmethod
    def forward(ctx, x_BHTC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TC, sin_TC)
        return _rotate(x_BHTC, cos_TC, sin_TC)

    @staticmethod
    def backward(ctx, grad_BHTC: Tensor) -> tuple[Tensor, None, None]:
        cos_TC, sin_TC = ctx.saved_tensors
        return _rotate(grad_BHTC, cos_TC, -sin_TC), None, None


def attends_in_blocks(backend: AttentionBackend, device_type: str) -> bool:
    """Whether to attend in blocks without dropout; GPU kernels skip masked scores anyway."""
    return backend == "blocks" or (backend == "auto" and device_type == "cpu")


class Attention(nn.Module):
    """Causal multi-head self-attention, by the first of these that applies:

    1. `BlockwiseAttention`: several queries, no mask or dropout, and `attends_in_blocks`.
    2. `attend_by_text`: many texts with few queries, in fp32 on a CPU, no gradients or dropout.
    3. torch's `scaled_dot_product_attention` (SDPA).
    """

    def __init__(self, config: ModelConfig, backend: AttentionBackend):
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.attention_dropout
        self.backend = backend
        # Separate matrices, because Muon orthogonalises each one as a whole.
        D = config.d_model
        self.query, self.key, self.value, self.out = (nn.Linear(D, D) for _ in range(4))

    def forward(
        self, x_BTD: Tensor, rotation: RotaryTable | None, cache: LayerCache | None, num_last: int | None = None
    ) -> Tensor:
        """The output at the last `num_last` positions, [B, Q, D]; at all by default."""
        B, T, D = x_BTD.shape
        num_queries = T if num_last is None else min(num_last, T)
        queried_BQD = x_BTD[:, T - num_queries :]
        if cache is not None:  # for a few characters joining the weights costs too much
            projected = [self.query(queried_BQD), self.key(x_BTD), self.value(x_BTD)]
        elif num_queries < T:
            projected = [self.query(queried_BQD), *_project(x_BTD, self.key, self.value)]
        else:
            projected = _project(x_BTD, self.query, self.key, self.value)
        per_head = (x.view(B, -1, self.num_heads, D // self.num_heads) for x in projected)
        query, key, value = (x.transpose(1, 2) for x in per_head)
        if rotation is not None:
            if cache is None or num_queries < T:
                query, key = rotation.last(num_queries)(query), rotation(key)
            else:  # in one operation: character by character, each one counts
                query, key = rotation(torch.cat([query, key], dim=1)).chunk(2, dim=1)
        visible = None
        if cache is not None:
            key, value = cache.extend(key, value)
            visible = cache.places.visible_B1TS
        if visible is not None:
            visible = visible[:, :, T - num_queries :]
        mixed_BHQC = self._mix(query, key, value, visible)
        return self.out(mixed_BHQC.transpose(1, 2).reshape(B, num_queries, D))

    def _mix(self, query_BHQC: Tensor, key_BHTC: Tensor, value_BHTC: Tensor, visible: Tensor | None) -> Tensor:
        """Let the last positions attend to those up to their own, or to the `visible` ones."""
        num_queries, num_keys = query_BHQC.shape[2], key_BHTC.shape[2]
        dropout = self.dropout if self.training else 0.0
        causal = visible is None and num_queries > 1
        if causal and dropout == 0.0 and attends_in_blocks(self.backend, query_BHQC.device.type):
            return BlockwiseAttention.apply(query_BHQC, key_BHTC, value_BHTC)
        is_causal = bool(causal and num_queries == num_keys)  # SDPA takes no symbol of a compiler
        if causal and not is_causal:
            # SDPA's is_causal assumes that query 0 is key 0.
            every_pair = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query_BHQC.device)
            visible = every_pair.tril(num_keys - num_queries)
        if not is_causal and dropout == 0.0 and many_texts_few_queries(query_BHQC):
            return attend_by_text(query_BHQC, key_BHTC, value_BHTC, visible)
        return F.scaled_dot_product_attention(
            query_BHQC, key_BHTC, value_BHTC, attn_mask=visible, is_causal=is_causal, dropout_p=dropout
        )


def _project(x_BTD: Tensor, *linears: nn.Linear) -> tuple[Tensor, ...]:
    """The outputs of all linear layers, from one matrix product."""
    weight = torch.cat([linear.weight for linear in linears])
    bias = torch.cat([linear.bias for linear in linears])
    return F.linear(x_BTD, weight, bias).chunk(len(linears), dim=-1)
