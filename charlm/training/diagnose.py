"""Diagnostics in training, on validation text: bits of each head, gradients at each layer.

Shapes: B batch, T positions, D d_model, K offsets, M predictions, W length of a window.
"""

import math
from collections import defaultdict
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from charlm.config import Config
from charlm.data.corpus import Corpus
from charlm.data.windows import default_stride, evaluation_windows
from charlm.hardware import in_float64
from charlm.inference.evaluation import count_units
from charlm.inference.scoring import AUTOCAST_DTYPES, read_windows
from charlm.objective.cross_entropy import linear_cross_entropy
from charlm.objective.objective import Objective
from charlm.training.device import choose_compile
from charlm.training.sharding import is_sharded, unsharded

SYMBOLS = 20_000  # at most, for bits per character
WINDOWS = 16  # for gradients
Figures = dict[str, float]


def diagnose(
    config: Config,
    corpus: Corpus,
    objective: Objective,
    accelerator: Accelerator,
    progress: float,
    micro_batch_size: int | None = None,
) -> dict[str, Any]:
    """A row for metrics.jsonl: `bits_per_head` and, without shards, `gradient_figures`.

    `objective` must not be in DDP, whose reducer would see the gradients.
    """
    train = config.train
    text = np.concatenate(corpus.texts("valid", min(train.valid_symbols, SYMBOLS)))
    autocast_dtype = AUTOCAST_DTYPES.get(accelerator.mixed_precision)
    eager = torch.compiler.set_stance("force_eager") if choose_compile(train, accelerator.device) else nullcontext()
    objective.eval()
    # The transformer's own mode only switches activation checkpointing.
    objective.transformer.training = True
    with unsharded(objective), eager:  # compiling would not pay off
        characters, _ = count_units(text, corpus.vocabulary)
        bits = bits_per_head(objective, text, characters, autocast_dtype)
        record = {"symbols": len(text), "bits_per_character": bits}
        if not is_sharded(objective):
            symbols = max(train.valid_symbols, objective.window_length * len(config.data.shares))
            part = np.concatenate(corpus.texts("valid", symbols))
            windows = spread_windows(part, WINDOWS, objective.window_length)
            record["windows"] = WINDOWS
            record |= gradient_figures(
                objective,
                torch.from_numpy(windows),
                progress,
                micro_batch_size or -(-train.batch_size // accelerator.num_processes),
                autocast_dtype,
                accelerator.scaler.get_scale() if accelerator.scaler else 1.0,
            )
    objective.train()
    return record


@torch.no_grad()
def bits_per_head(
    objective: Objective, ids: np.ndarray, characters: int, autocast_dtype: torch.dtype | None = None
) -> Figures:
    """Bits per character of a text by each head, silent ones included: {"layer3/offset2": ...}.

    The head of offset k predicts a symbol from those at least k before it; the first k cost ln V.
    `ids` is the text, [N], in which `characters` begin.
    """
    transformer, heads = objective.transformer, objective.heads
    context_length = transformer.config.context_length
    device = next(transformer.parameters()).device
    unknown = math.log(transformer.vocabulary_size)
    offsets_of = defaultdict(list)
    nats = {}
    for layer, offset in heads.pairs:
        offsets_of[layer].append(offset)
        nats[f"layer{layer}/offset{offset}"] = min(offset, len(ids)) * unknown
    text = torch.from_numpy(ids.astype(np.int64)).to(device)
    windows = evaluation_windows(len(ids), context_length, default_stride(context_length))
    for symbols_M, hidden_states in read_windows(
        transformer, ids, windows, layers=offsets_of, autocast_dtype=autocast_dtype, share=False
    ):
        for layer, offsets in offsets_of.items():
            targets_MK = symbols_M.to(device)[:, None] - 1 + torch.tensor(offsets, device=device)
            inside_MK = targets_MK < len(ids)
            ids_MK = text[targets_MK.clamp(max=len(ids) - 1)]
            ones_MK = torch.ones(targets_MK.shape, device=device)
            hidden_1MD = hidden_states[layer].float()[None]
            states_1MD, weight, bias = heads.classifiers(hidden_1MD, layer, offsets)
            _, losses_MK = linear_cross_entropy(states_1MD[0], weight, bias, ids_MK, ones_MK)
            sums = in_float64(losses_MK * inside_MK).sum(dim=0).tolist()
            for offset, total in zip(offsets, sums, strict=True):
                nats[f"layer{layer}/offset{offset}"] += total
    return _finite({head: total / (characters * math.log(2)) for head, total in nats.items()})


def gradient_figures(
    objective: Objective,
    windows_BW: Tensor,
    progress: float,
    micro_batch_size: int = WINDOWS,
    autocast_dtype: torch.dtype | None = None,
    loss_scale: float = 1.0,
) -> dict[str, Figures]:
    """Gradients of the losses at each layer, {"supervision_ratio": {"layer3": ...}, ...}.

    loss_i is the sum of the active rows of layer i; L the last layer, x_l the output of layer l
    before the final norm, theta_l the parameters of its block; norms are Euclidean, over all
    windows and positions or parameters. The figures of layer l are

        supervision_ratio      = mean over i >= l of |d loss_i / d x_i| / |d loss_i / d x_l|
        main_supervision_ratio = |d loss_L / d x_L| / |d loss_L / d x_l|
        gradient_cosine        = <a, m> / (|a| |m|)
        gradient_norm          = |a + m|
        a                      = sum over i < L of d loss_i / d theta_l
        m                      = d loss_L / d theta_l

    Figures that are not finite are left out. aux.route is ignored. `loss_scale`, for fp16, is a
    factor of the losses. Source: Guo et al. 2016, AuxNet, for the ratio of one output.
    """
    transformer = objective.transformer
    num_layers, device = transformer.config.num_layers, transformer.embedding.weight.device
    blocks, auxiliary, main = {}, {}, {}
    for layer, block in enumerate(transformer.blocks, start=1):
        blocks[layer] = list(block.parameters())
        auxiliary[layer] = list(map(torch.zeros_like, blocks[layer]))
        main[layer] = list(map(torch.zeros_like, blocks[layer]))
    squares = defaultdict(float)  # |d loss / d x|^2 by output and layer
    for micro_batch_BW in windows_BW.to(device).split(micro_batch_size):
        states, losses = _states_and_losses(objective, micro_batch_BW, progress, autocast_dtype)
        factor = loss_scale * len(micro_batch_BW) / len(windows_BW)
        for output, loss in losses.items():
            below = range(1, output + 1)
            wanted = [tensor for layer in below for tensor in (states[layer], *blocks[layer])]
            gradients = iter(torch.autograd.grad(loss * factor, wanted, retain_graph=True))
            sums = main if output == num_layers else auxiliary
            for layer in below:
                squares[output, layer] += in_float64(next(gradients)).square().sum()
                for total in sums[layer]:
                    total += next(gradients)
    figures = defaultdict(dict)
    for layer in range(1, max(losses) + 1):
        name = f"layer{layer}"
        above = [i for i in losses if i >= layer]
        ratios = {i: float((squares[i, i] / squares[i, layer]).sqrt()) for i in above}
        a, m = auxiliary[layer], main[layer]
        norms = math.sqrt(_dot(a, a)) * math.sqrt(_dot(m, m))
        both = [x + y for x, y in zip(a, m, strict=True)]
        figures["supervision_ratio"][name] = sum(ratios.values()) / len(ratios)
        figures["main_supervision_ratio"][name] = ratios.get(num_layers, math.nan)
        figures["gradient_cosine"][name] = _dot(a, m) / norms if norms > 0 else math.nan
        figures["gradient_norm"][name] = math.sqrt(_dot(both, both)) / loss_scale
    return {kind: _finite(values) for kind, values in figures.items()}


def spread_windows(ids: np.ndarray, count: int, length: int) -> np.ndarray:
    """Windows spread evenly over a text, int64 [count, length]."""
    starts = np.linspace(0, len(ids) - length, count).astype(np.int64)
    return np.stack([ids[start : start + length] for start in starts]).astype(np.int64)


def _states_and_losses(
    objective: Objective, windows_BW: Tensor, progress: float, autocast_dtype: torch.dtype | None
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """The residual stream after each layer, [B, T, D], and the loss of each."""
    transformer = objective.transformer
    last = transformer.config.num_layers
    inputs_BT = windows_BW[:, : -objective.longest_offset]
    before_norm = []  # a shared head calls the norm again
    norm = transformer.final_norm
    hook = norm.register_forward_pre_hook(lambda _, inputs: before_norm.append(inputs[0]))
    with torch.autocast(windows_BW.device.type, autocast_dtype, autocast_dtype is not None):
        hidden_states = transformer(inputs_BT, layers=range(1, last + 1))
        rows = objective.active_rows(progress)
        losses = objective.losses(hidden_states, windows_BW, rows).by_layer
    hook.remove()
    return hidden_states | {last: before_norm[0]}, losses


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return sum(float((in_float64(x) * in_float64(y)).sum()) for x, y in zip(a, b, strict=True))


def _finite(figures: Figures) -> Figures:
    return {name: value for name, value in figures.items() if math.isfinite(value)}
