"""Diagnostics in training: bits per character of each head, and gradients of the losses at each layer.

All is measured without dropout on the same text, so a curve moves only with the model: bits per character on the
beginning of what validation scores, gradients on windows spread evenly over all of it.

Shapes: B batch, T positions, D d_model, K offsets, M predictions of a batch, W characters of a window.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from charlm.config import Config
from charlm.data.corpus import Corpus
from charlm.data.windows import default_stride, evaluation_windows
from charlm.inference.evaluation import AUTOCAST_DTYPES, count_units
from charlm.inference.scoring import read_windows
from charlm.objective.cross_entropy import linear_cross_entropy
from charlm.objective.objective import Objective
from charlm.training.device import choose_compile
from charlm.training.sharding import is_sharded, unsharded

SYMBOLS = 20_000  # most that bits per character are measured on
WINDOWS = 16  # that gradients are measured on
Figures = dict[str, float]


def diagnose(
    config: Config,
    corpus: Corpus,
    objective: Objective,
    accelerator: Accelerator,
    progress: float,
    micro_batch_size: int | None = None,
) -> dict[str, Any]:
    """The results of `bits_per_head` and, unless the model is sharded, `gradient_figures`, as metrics.jsonl has them.

    Parameters, their `.grad`, optimizers and random state stay as they were. Each process computes everything.
    `objective` is in training mode, and not in DDP, whose reducer must not see these gradients.
    """
    train, ids = config.train, corpus.splits["valid"].ids
    text, part = ids[: min(train.valid_symbols, SYMBOLS)], ids[: max(train.valid_symbols, objective.window_length)]
    autocast_dtype = AUTOCAST_DTYPES.get(accelerator.mixed_precision)
    eager = torch.compiler.set_stance("force_eager") if choose_compile(train) else nullcontext()
    objective.eval()
    # The transformer's own mode only switches activation checkpointing, which saves memory here, too.
    objective.transformer.training = True
    with unsharded(objective), eager:  # compiling would not pay off for something so rare
        characters, _ = count_units(text, corpus.vocabulary)
        bits = bits_per_head(objective, text, characters, autocast_dtype)
        record = {"symbols": len(text), "bits_per_character": bits}
        if not is_sharded(objective):
            record["windows"] = WINDOWS
            record |= gradient_figures(
                objective,
                torch.from_numpy(spread_windows(part, WINDOWS, objective.window_length)),
                progress,
                micro_batch_size=micro_batch_size or -(-train.batch_size // accelerator.num_processes),
                autocast_dtype=autocast_dtype,
                loss_scale=accelerator.scaler.get_scale() if accelerator.scaler else 1.0,
            )
    objective.train()
    return record


@torch.no_grad()
def bits_per_head(
    objective: Objective, ids: np.ndarray, characters: int, autocast_dtype: torch.dtype | None = None
) -> Figures:
    """Bits per character of a text by each head, {"layer3/offset2": ...}, silent heads included.

    Scored as in validation, whose figure is that of the last layer and offset 1. The head of offset k predicts a symbol
    from those at least k before it; the first k symbols cost ln V. Figures that are not finite are left out.

    `ids` is the text, [N], in which `characters` begin.
    """
    transformer, heads = objective.transformer, objective.heads
    context_length, device = transformer.config.context_length, next(transformer.parameters()).device
    offsets_of = {layer: [offset for own, offset in heads.pairs if own == layer] for layer in heads.layers}
    unknown = math.log(transformer.vocabulary_size)
    nats = {f"layer{layer}/offset{offset}": min(offset, len(ids)) * unknown for layer, offset in heads.pairs}
    text = torch.from_numpy(ids.astype(np.int64)).to(device)
    windows = evaluation_windows(len(ids), context_length, default_stride(context_length))
    for symbols_M, hidden_states in read_windows(
        transformer, ids, windows, layers=offsets_of, autocast_dtype=autocast_dtype, share=False
    ):
        for layer, offsets in offsets_of.items():
            targets_MK = symbols_M.to(device)[:, None] - 1 + torch.tensor(offsets, device=device)
            hidden_1MD = hidden_states[layer].float()[None]
            states_1MD, weight, bias = heads.classifiers(hidden_1MD, layer, offsets)
            ones_MK = torch.ones(targets_MK.shape, device=device)
            ids_MK = text[targets_MK.clamp(max=len(ids) - 1)]
            _, losses_MK = linear_cross_entropy(states_1MD[0], weight, bias, ids_MK, ones_MK)
            sums = (losses_MK.double() * (targets_MK < len(ids))).sum(dim=0).tolist()
            for offset, total in zip(offsets, sums, strict=True):
                nats[f"layer{layer}/offset{offset}"] += total
    return _finite({head: total / (characters * math.log(2)) for head, total in nats.items()})


def gradient_figures(
    objective: Objective,
    windows_BW: Tensor,
    progress: float,
    *,
    micro_batch_size: int = WINDOWS,
    autocast_dtype: torch.dtype | None = None,
    loss_scale: float = 1.0,
) -> dict[str, Figures]:
    """Gradients of the table's losses at each layer, {"supervision_ratio": {"layer3": ...}, ...}.

    loss_i is the sum of the active rows of layer l_i on these windows, L the last layer, x_l the output of layer l (for
    the last layer, before the final norm), theta_l the parameters of its block, |.| the Euclidean norm over all windows
    and positions, or all parameters. For layer l with the outputs A(l) = {i: l_i >= l}:

        supervision_ratio[l]      = mean over i in A(l) of |d loss_i / d x_{l_i}| / |d loss_i / d x_l|
        main_supervision_ratio[l] = |d loss_L / d x_L| / |d loss_L / d x_l|
        gradient_cosine[l]        = <a, m> / (|a| |m|),  a = sum_{i < L} d loss_i / d theta_l,  m = d loss_L / d theta_l
        gradient_norm[l]          = |a + m|

    (Guo et al. 2016, AuxNet, for the ratio of one output; a layer's own output counts with 1.) Figures that are not
    finite, or that no output defines, are left out. aux.route does not count.

    Args:
        windows_BW: windows of at most `objective.window_length` symbols.
        loss_scale: factor of the losses in the backward pass, so that fp16 can represent the gradients.
    """
    num_layers, device = objective.transformer.config.num_layers, objective.transformer.embedding.weight.device
    blocks = {layer: list(block.parameters()) for layer, block in enumerate(objective.transformer.blocks, start=1)}
    squares: dict[tuple[int, int], Any] = defaultdict(float)  # |d loss / d x|^2 by output and layer
    auxiliary, main = ({layer: [torch.zeros_like(p) for p in own] for layer, own in blocks.items()} for _ in range(2))
    for micro_batch_BW in windows_BW.split(micro_batch_size):
        states, losses = _states_and_losses(objective, micro_batch_BW.to(device), progress, autocast_dtype)
        factor = loss_scale * len(micro_batch_BW) / len(windows_BW)
        for output, loss in losses.items():
            below = range(1, output + 1)
            wanted = [tensor for layer in below for tensor in (states[layer], *blocks[layer])]
            gradients = iter(torch.autograd.grad(loss * factor, wanted, retain_graph=True))
            sums = main if output == num_layers else auxiliary
            for layer in below:
                squares[output, layer] += next(gradients).double().square().sum()
                for total in sums[layer]:
                    total += next(gradients)
    names = ("supervision_ratio", "main_supervision_ratio", "gradient_cosine", "gradient_norm")
    figures: dict[str, Figures] = {name: {} for name in names}
    for layer in range(1, max(losses) + 1):
        ratios = {i: float((squares[i, i] / squares[i, layer]).sqrt()) for i in losses if i >= layer}
        a, m = auxiliary[layer], main[layer]
        norms = math.sqrt(_dot(a, a)) * math.sqrt(_dot(m, m))
        both = [x + y for x, y in zip(a, m, strict=True)]
        figures["supervision_ratio"][f"layer{layer}"] = sum(ratios.values()) / len(ratios)
        figures["main_supervision_ratio"][f"layer{layer}"] = ratios.get(num_layers, math.nan)
        figures["gradient_cosine"][f"layer{layer}"] = _dot(a, m) / norms if norms > 0 else math.nan
        figures["gradient_norm"][f"layer{layer}"] = math.sqrt(_dot(both, both)) / loss_scale
    return {name: _finite(values) for name, values in figures.items()}


def spread_windows(ids: np.ndarray, count: int, length: int) -> np.ndarray:
    """`count` windows spread evenly over a text, from its beginning to its end: int64 [count, length]."""
    starts = np.linspace(0, len(ids) - length, count).astype(np.int64)
    return np.stack([ids[start : start + length] for start in starts]).astype(np.int64)


def _states_and_losses(
    objective: Objective, windows_BW: Tensor, progress: float, autocast_dtype: torch.dtype | None
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """The residual stream after each layer, [B, T, D], and the loss of each layer with an active row."""
    transformer, before_norm = objective.transformer, []
    hook = transformer.final_norm.register_forward_pre_hook(lambda _, inputs: before_norm.append(inputs[0]))
    num_layers = transformer.config.num_layers
    with torch.autocast(windows_BW.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
        hidden_states = transformer(windows_BW[:, : -objective.longest_offset], layers=range(1, num_layers + 1))
        losses = objective.losses(hidden_states, windows_BW, progress).by_layer
    hook.remove()
    return hidden_states | {num_layers: before_norm[0]}, losses


def _dot(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


def _finite(figures: Figures) -> Figures:
    return {name: value for name, value in figures.items() if math.isfinite(value)}
