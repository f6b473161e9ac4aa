"""Computations that torch's own kernels do slower on a CPU.

Shapes: B batch, T positions, Q last positions, D inputs, H heads, C head size.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

FEW_ROWS = 16
"""With fewer rows a CPU multiplies fp32 matrices faster at "highest", else at "medium"."""


@contextmanager
def full_fp32_matmul(device: torch.device, num_rows: int = FEW_ROWS) -> Iterator[None]:
    """Inside, products of `num_rows` rows run at the fastest precision that is fp32."""
    medium = device.type == "cpu" and num_rows >= FEW_ROWS and medium_is_fp32()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if medium else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def medium_is_fp32() -> bool:
    """Whether "medium" is fp32 on this CPU: with AMX it is bf16, elsewhere it may be."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # the oldest torch lacks it
    has_amx = any(present for name, present in capabilities.items() if name.startswith("amx_"))
    return capabilities.get("architecture") == "x86_64" and not has_amx


def apply_linear(layer: nn.Linear, x_BTD: Tensor) -> Tensor:
    """The output of `layer`; for one vector on a CPU twice as fast, by dot products."""
    leading = x_BTD.shape[:-1]
    if torch.is_grad_enabled() or x_BTD.device.type != "cpu" or leading.numel() > 1:  # torch.export: symbols
        return layer(x_BTD)
    output = torch.linalg.vecdot(layer.weight, x_BTD.flatten()) + layer.bias
    return output.expand(*leading, -1)


def many_texts_few_queries(query_BHQC: Tensor) -> bool:
    """Whether `attend_by_text` is faster, and as exact: bf16 would round the scores."""
    B, _, num_queries, _ = query_BHQC.shape
    in_fp32 = query_BHQC.device.type == "cpu" and query_BHQC.dtype == torch.float32
    return in_fp32 and not torch.is_grad_enabled() and num_queries < FEW_ROWS <= B  # symbols come last


def attend_by_text(query_BHQC: Tensor, key_BHTC: Tensor, value_BHTC: Tensor, visible: Tensor | None) -> Tensor:
    """Attention in two batched products, here faster than a fused kernel."""
    with full_fp32_matmul(query_BHQC.device, query_BHQC.shape[2]):
        scores_BHQT = (query_BHQC @ key_BHTC.mT).mul_(query_BHQC.shape[3] ** -0.5)
        if visible is not None:
            scores_BHQT.masked_fill_(~visible, -math.inf)
        return scores_BHQT.softmax(dim=-1) @ value_BHTC


def block_length(head_size: int) -> int:
    """Queries that are taken at once: the fastest number on a CPU."""
    return 256 if head_size >= 128 else 128


class BlockwiseAttention(torch.autograd.Function):
    """Causal attention in blocks of queries, each over the keys up to the block's end.

    Torch's fused CPU kernel also computes masked scores, and its backward pass is slow. This one
    keeps B x H x T x T / 2 weights for it.
    """

    @staticmethod
    def forward(ctx, query_BHQC: Tensor, key_BHTC: Tensor, value_BHTC: Tensor) -> Tensor:
        C = key_BHTC.shape[-1]
        query, key, value = (x.reshape(-1, x.shape[2], C) for x in (query_BHQC, key_BHTC, value_BHTC))
        mixed = torch.empty_like(query)
        future = query.new_full((block_length(C),) * 2, float("-inf")).triu(1)
        weights = []
        nothing, scale = query.new_empty(1), C**-0.5
        with torch.autocast(query.device.type, enabled=False):
            for start, end, own in _blocks(query, key):
                scores = torch.baddbmm(nothing, query[:, own], key[:, :end].mT, beta=0, alpha=scale)
                scores[:, :, start:] += future[: end - start, : end - start]
                block = scores.softmax(dim=-1)
                torch.bmm(block, value[:, :end], out=mixed[:, own])
                if any(ctx.needs_input_grad):
                    weights.append(block)
        ctx.save_for_backward(query, key, value, *weights)
        return mixed.view(query_BHQC.shape)

    @staticmethod
    def backward(ctx, grad_BHQC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *weights = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        grad = grad_BHQC.reshape(query.shape)
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        for (_, end, own), block in zip(_blocks(query, key), weights, strict=True):
            grad_value[:, :end].baddbmm_(block.mT, grad[:, own])
            grad_block = torch.bmm(grad[:, own], value[:, :end].mT)
            # No public name; public operations take twice as long and round otherwise.
            grad_scores = torch.ops.aten._softmax_backward_data(grad_block, block, -1, block.dtype)
            grad_query[:, own].baddbmm_(grad_scores, key[:, :end], beta=0, alpha=scale)
            grad_key[:, :end].baddbmm_(grad_scores.mT, query[:, own], alpha=scale)
        gradients = grad_query, grad_key, grad_value
        return tuple(gradient.unflatten(0, grad_BHQC.shape[:2]) for gradient in gradients)


def _blocks(query: Tensor, key: Tensor) -> Iterator[tuple[int, int, slice]]:
    """Where each block begins and ends, and where its queries lie."""
    T, C = key.shape[1:]
    earlier, length = T - query.shape[1], block_length(C)
    for start in range(earlier, T, length):
        end = min(start + length, T)
        yield start, end, slice(start - earlier, end - earlier)
