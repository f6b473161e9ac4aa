"""Causal self-attention, in the way that is fastest on the device, with or without a cache of earlier keys and values.

Shapes: B batch, T positions, D d_model, H heads, C = D / H head size, F = C / 2 rotary frequencies, L layers,
Q queries, where they are of fewer positions than the keys.
"""

import copy
import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from charlm.config import AttentionBackend, ModelConfig
from charlm.model.kernels_cpu import FEW_ROWS, exact_matmul

FEW_QUERIES = 16


class Places(NamedTuple):
    """Where the next T positions of each row of a cache lie."""

    positions: slice | Tensor
    """One slice where all rows are equally long, else [B, T]."""
    end: int
    """The number of positions that the longest row then holds."""
    visible_B1TS: Tensor | None
    """Which of the first S = `end` positions each new one attends to; None where that is all up to its own, and the new
    ones are one or many: for a few, masked attention is faster than attention in blocks."""


class LayerCache(NamedTuple):
    """One layer's buffers, [B, H, context_length, C] each, and where the next positions go."""

    keys: Tensor
    values: Tensor
    places: Places

    def extend(self, keys_BHTC: Tensor, values_BHTC: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of new positions; return those of all positions up to them."""
        positions, end, _ = self.places
        for buffer, new_BHTC in ((self.keys, keys_BHTC), (self.values, values_BHTC)):
            if isinstance(positions, slice):
                buffer[:, :, positions] = new_BHTC
            else:
                buffer.scatter_(2, positions[:, None, :, None].expand(new_BHTC.shape), new_BHTC)
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache:
    """Keys and values of the positions seen so far, in buffers that never move: [L, B, H, context_length, C] each.

    Their ids are kept, too, [B, context_length]. Every row has a length of its own. A shorter length forgets the newest
    positions: what was drafted, say.
    """

    def __init__(self, config: ModelConfig, batch_size: int, device: torch.device, dtype: torch.dtype = torch.float32):
        head_size = config.d_model // config.num_heads
        shape = (config.num_layers, batch_size, config.num_heads, config.context_length, head_size)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.ids = torch.zeros(batch_size, config.context_length, device=device, dtype=torch.long)
        self.lengths = torch.zeros(batch_size, dtype=torch.long)
        """[B], on the CPU, where shapes are decided."""

    @property
    def length(self) -> int:
        """The length of the longest row."""
        return max(self.lengths.tolist())

    def reset(self) -> None:
        """Forget every position."""
        self.lengths.zero_()

    def row(self, row: int) -> "KVCache":
        """One row by itself, in the same buffers: what is done to either is done to both."""
        view = copy.copy(self)
        view.keys, view.values = self.keys[:, row : row + 1], self.values[:, row : row + 1]
        view.ids, view.lengths = self.ids[row : row + 1], self.lengths[row : row + 1]
        return view

    def places(self, num_new: int) -> Places:
        """Where the next `num_new` positions of each row go."""
        lengths = self.lengths.tolist()
        end = max(lengths) + num_new
        equal = min(lengths) == max(lengths)
        if equal and not 1 < num_new <= FEW_QUERIES:
            return Places(slice(end - num_new, end), end, None)
        positions_BT = (self.lengths[:, None] + torch.arange(num_new)).to(self.keys.device)
        visible_BTS = torch.arange(end, device=self.keys.device) <= positions_BT[:, :, None]
        return Places(slice(end - num_new, end) if equal else positions_BT, end, visible_BTS[:, None])

    def extend_ids(self, ids_BT: Tensor, places: Places, num_earlier: int) -> Tensor:
        """Store the ids of new positions; return them behind those of up to `num_earlier` before, -1 where none is."""
        if isinstance(places.positions, slice):
            self.ids[:, places.positions] = ids_BT
            return self.ids[:, max(0, places.positions.start - num_earlier) : places.end]
        self.ids.scatter_(1, places.positions, ids_BT)
        wanted_BS = places.positions[:, :1] + torch.arange(-num_earlier, ids_BT.shape[1], device=ids_BT.device)
        return self.ids.gather(1, wanted_BS.clamp(min=0)).masked_fill(wanted_BS < 0, -1)

    def layer(self, layer: int, places: Places) -> LayerCache:
        """The buffers of a layer (1-based)."""
        return LayerCache(self.keys[layer - 1], self.values[layer - 1], places)


class Rotation(NamedTuple):
    """Rotary position embedding (Su et al. 2021, eq. 34): turns the pairs (c, c + C/2) by their position's angles."""

    cos: Tensor
    """[T, C] or [B, 1, T, C], each angle twice."""
    sin: Tensor
    """As cos; negative in the first half: where the other of the pair is subtracted."""

    @staticmethod
    def by(angles_TF: Tensor) -> "Rotation":
        """The rotation by `angles_TF`, in radians."""
        sin = angles_TF.sin()
        return Rotation(torch.cat([angles_TF.cos()] * 2, dim=-1), torch.cat([-sin, sin], dim=-1))

    def at(self, positions: slice | Tensor) -> "Rotation":
        """That of some of the positions: a slice of them, or [B, T] of their numbers."""
        cos, sin = self.cos[positions], self.sin[positions]
        return Rotation(cos, sin) if isinstance(positions, slice) else Rotation(cos[:, None], sin[:, None])

    def last(self, num_positions: int) -> "Rotation":
        """That of the last positions."""
        return Rotation(self.cos[..., -num_positions:, :], self.sin[..., -num_positions:, :])

    def __call__(self, x_BHTC: Tensor) -> Tensor:
        """The queries or keys of T positions, turned."""
        cos, sin = self.cos.to(x_BHTC.dtype), self.sin.to(x_BHTC.dtype)
        return _Rotate.apply(x_BHTC, cos, sin) if torch.is_grad_enabled() else _turn(x_BHTC, cos, sin)


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # or a table made while generating could not be trained with
def rotary_table(num_positions: int, head_size: int, device: torch.device) -> Rotation:
    """The rotation of each position: by position x 10000^(-2i / C), i = 0 ... C / 2 - 1."""
    half = head_size // 2
    frequencies = torch.exp(torch.arange(half, device=device) * (-math.log(10_000.0) / half))
    return Rotation.by(torch.arange(num_positions, device=device)[:, None] * frequencies)


def _turn(x_BHTC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.addcmul(x_BHTC * cos, x_BHTC.roll(x_BHTC.shape[-1] // 2, dims=-1), sin)


class _Rotate(torch.autograd.Function):
    """A rotation, whose gradient is turned back: nothing but the tables is kept."""

    @staticmethod
    def forward(ctx, x_BHTC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TC, sin_TC)
        return _turn(x_BHTC, cos_TC, sin_TC)

    @staticmethod
    def backward(ctx, grad_BHTC: Tensor) -> tuple[Tensor, None, None]:
        cos_TC, sin_TC = ctx.saved_tensors
        return _turn(grad_BHTC, cos_TC, -sin_TC), None, None


def block_length(head_size: int) -> int:
    """Queries that `BlockwiseAttention` takes at once: the fastest of 64 to 512 on a CPU."""
    return 256 if head_size >= 128 else 128


class BlockwiseAttention(torch.autograd.Function):
    """Causal attention in blocks of queries, each over the keys up to its own end and no further.

    The queries are of the last Q of the keys' T positions.

    The CPU's fused kernel computes the masked half of the scores too, and its backward pass uses the processor's matrix
    instructions poorly; here every product is one batched matrix product. The attention weights are kept for the
    backward pass in the precision of the queries, B x H x T x T / 2 of them (activation checkpointing drops them).
    """

    @staticmethod
    def forward(ctx, query_BHTC: Tensor, key_BHTC: Tensor, value_BHTC: Tensor) -> Tensor:
        B, H, T, C = key_BHTC.shape
        query, key, value = (x.reshape(B * H, -1, C) for x in (query_BHTC, key_BHTC, value_BHTC))
        earlier = T - query.shape[1]
        mixed = torch.empty_like(query)
        length = block_length(C)
        future = query.new_full((length, length), float("-inf")).triu(1)
        weights = []
        with torch.autocast(query.device.type, enabled=False):
            for start in range(earlier, T, length):
                end = min(start + length, T)
                own = slice(start - earlier, end - earlier)
                scores = torch.baddbmm(query.new_empty(1), query[:, own], key[:, :end].mT, beta=0, alpha=C**-0.5)
                scores[:, :, start:] += future[: end - start, : end - start]
                block = scores.softmax(dim=-1)
                torch.bmm(block, value[:, :end], out=mixed[:, own])
                if any(ctx.needs_input_grad):
                    weights.append(block)
        ctx.save_for_backward(query, key, value, *weights)
        return mixed.view(query_BHTC.shape)

    @staticmethod
    def backward(ctx, grad_BHTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *weights = ctx.saved_tensors
        T, C = key.shape[1:]
        earlier = T - query.shape[1]
        scale = C**-0.5
        grad = grad_BHTC.reshape(query.shape)
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        length = block_length(C)
        for start, block in zip(range(earlier, T, length), weights, strict=True):
            end = min(start + length, T)
            own = slice(start - earlier, end - earlier)
            grad_value[:, :end].baddbmm_(block.mT, grad[:, own])
            grad_block = torch.bmm(grad[:, own], value[:, :end].mT)
            grad_scores = torch.ops.aten._softmax_backward_data(grad_block, block, -1, block.dtype)
            torch.baddbmm(query.new_empty(1), grad_scores, key[:, :end], beta=0, alpha=scale, out=grad_query[:, own])
            grad_key[:, :end].baddbmm_(grad_scores.mT, query[:, own], alpha=scale)
        heads = grad_BHTC.shape[:2]
        return tuple(gradient.unflatten(0, heads) for gradient in (grad_query, grad_key, grad_value))


def attends_in_blocks(backend: AttentionBackend, device_type: str) -> bool:
    """Whether attention without dropout goes block by block. On a GPU the flash kernel skips the masked half itself."""
    return backend == "blocks" or (backend == "auto" and device_type == "cpu")


class Attention(nn.Module):
    """Causal multi-head self-attention.

    `backend` "sdpa" is torch's `scaled_dot_product_attention`, "blocks" is `BlockwiseAttention`, which knows no dropout
    and leaves that, and single queries, to the former; "auto" takes blocks on a CPU. Few queries of many texts go their
    own way there.
    """

    def __init__(self, config: ModelConfig, backend: AttentionBackend = "auto"):
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.attention_dropout
        self.backend = backend
        # Apart, as an optimizer that orthogonalises whole matrices must see them.
        self.query = nn.Linear(config.d_model, config.d_model)
        self.key = nn.Linear(config.d_model, config.d_model)
        self.value = nn.Linear(config.d_model, config.d_model)
        self.out = nn.Linear(config.d_model, config.d_model)

    def forward(
        self, x_BTD: Tensor, rotation: Rotation | None, cache: LayerCache | None, num_last: int | None = None
    ) -> Tensor:
        """What each position reads from itself and those before it; of the last `num_last` only, if given."""
        B, T, D = x_BTD.shape
        num_queries = T if num_last is None else min(num_last, T)
        queried_BQD = x_BTD[:, T - num_queries :]
        if cache is not None:  # for a few characters at a time joining the weights costs more than it saves
            projected = [self.query(queried_BQD), self.key(x_BTD), self.value(x_BTD)]
        elif num_queries < T:
            projected = [self.query(queried_BQD), *_project(x_BTD, self.key, self.value)]
        else:
            projected = _project(x_BTD, self.query, self.key, self.value)
        query, key, value = (x.view(B, -1, self.num_heads, D // self.num_heads).transpose(1, 2) for x in projected)
        if rotation is not None:
            if cache is None or num_queries < T:
                query, key = rotation.last(num_queries)(query), rotation(key)
            else:  # turned as one, as each operation counts where a character comes at a time
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
        """The queries are of the last positions; each sees those up to its own, or what is `visible`."""
        num_queries, num_keys = query_BHQC.shape[2], key_BHTC.shape[2]
        dropout = self.dropout if self.training else 0.0
        is_causal = visible is None and num_queries > 1
        if is_causal and dropout == 0.0 and attends_in_blocks(self.backend, query_BHQC.device.type):
            return BlockwiseAttention.apply(query_BHQC, key_BHTC, value_BHTC)
        if is_causal and num_queries < num_keys:  # is_causal aligns the triangle top-left
            visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query_BHQC.device)
            visible, is_causal = visible.tril(num_keys - num_queries), False
        if not is_causal and dropout == 0.0 and _many_texts_few_queries(query_BHQC):
            return _mix_text_by_text(query_BHQC, key_BHTC, value_BHTC, visible)
        return F.scaled_dot_product_attention(
            query_BHQC, key_BHTC, value_BHTC, attn_mask=visible, is_causal=is_causal, dropout_p=dropout
        )


def _many_texts_few_queries(query_BHQC: Tensor) -> bool:
    """Whether texts are read side by side, a few symbols of each at a time, without gradients, on a CPU in fp32: bf16
    would round the scores before their softmax."""
    B, _, num_queries, _ = query_BHQC.shape
    in_fp32 = query_BHQC.device.type == "cpu" and query_BHQC.dtype == torch.float32
    return num_queries < FEW_ROWS <= B and in_fp32 and not torch.is_grad_enabled()


def _mix_text_by_text(query_BHQC: Tensor, key_BHTC: Tensor, value_BHTC: Tensor, visible: Tensor | None) -> Tensor:
    """Attention of few queries in two batched products, which read keys and values faster than the fused kernel."""
    with exact_matmul(query_BHQC.device, query_BHQC.shape[2]):  # not the fastest for all texts' rows together
        scores_BHQT = (query_BHQC @ key_BHTC.mT).mul_(query_BHQC.shape[3] ** -0.5)
        if visible is not None:
            scores_BHQT.masked_fill_(~visible, -math.inf)
        return scores_BHQT.softmax(dim=-1) @ value_BHTC


def _project(x_BTD: Tensor, *linears: nn.Linear) -> tuple[Tensor, ...]:
    """All linear layers' outputs, from one matrix product."""
    weight = torch.cat([linear.weight for linear in linears])
    bias = torch.cat([linear.bias for linear in linears])
    return F.linear(x_BTD, weight, bias).chunk(len(linears), dim=-1)
