"""Diagnostics of a model in training: bits per character of each head, and gradients of the losses at each layer.

All is measured without dropout on the same text of the validation split, so a curve moves only with the model: bits per
character on the first `SYMBOLS` symbols that validation scores, gradients on `WINDOWS` windows spread evenly over that
part. Training continues as if nothing had been measured.

Shapes: B batch, T positions, D d_model, K offsets, L layers, M scored positions of a batch, W characters of a window.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from charlm.config import Config
from charlm.data.corpus import Corpus
from charlm.data.windows import default_stride, evaluation_windows
from charlm.inference.evaluation import AUTOCAST_DTYPES, count_units
from charlm.inference.scoring import BATCH_SYMBOLS
from charlm.model.heads import Heads
from charlm.model.transformer import CharTransformer
from charlm.objective.cross_entropy import linear_cross_entropy
from charlm.objective.objective import Objective
from charlm.training.device import choose_compile
from charlm.training.sharding import is_sharded, unsharded

SYMBOLS = 20_000
"""Number of symbols that bits per character are measured on; fewer if `train.valid_symbols` is smaller."""
WINDOWS = 16
"""Number of windows that gradients are measured on."""

Figures = dict[str, float]


def diagnose(
    config: Config,
    corpus: Corpus,
    objective: Objective,
    accelerator: Accelerator,
    progress: float,
    micro_batch_size: int | None = None,
) -> dict[str, Any]:
    """Diagnostics of a run at `progress`, as a row of metrics.jsonl has them; values that are not finite are left out.

    Parameters, their `.grad`, optimizers, modes and random state stay as they were. Each process computes everything by
    itself, so none waits for another. For a sharded model, gradients are left out.

    Args:
        objective: not wrapped in DDP, whose reducer must not see these gradients.
        micro_batch_size: most windows per backward pass; None: as many as a process trains on.

    Returns:
        symbols: number of symbols that bits per character were measured on.
        bits_per_character: {"layer3/offset2": ...}, see `bits_per_head`.
        windows: number of windows that gradients were measured on.
        supervision_ratio, main_supervision_ratio, gradient_cosine, gradient_norm: {"layer3": ...}, see
            `gradient_figures`.
    """
    train, ids = config.train, corpus.splits["valid"].ids
    text, part = ids[: min(train.valid_symbols, SYMBOLS)], ids[: max(train.valid_symbols, objective.window_length)]
    autocast_dtype = AUTOCAST_DTYPES.get(accelerator.mixed_precision)
    eager = torch.compiler.set_stance("force_eager") if choose_compile(train) else nullcontext()
    with _undisturbed(objective), unsharded(objective), eager:  # compiling would not pay off for something so rare
        bits = bits_per_head(
            objective.transformer,
            objective.heads,
            text,
            characters=count_units(text, corpus.vocabulary)[0],
            autocast_dtype=autocast_dtype,
        )
        record = {"symbols": len(text), "bits_per_character": _finite(bits)}
        if not is_sharded(objective):
            figures = gradient_figures(
                objective,
                torch.from_numpy(spread_windows(part, WINDOWS, objective.window_length)),
                progress,
                micro_batch_size=micro_batch_size or -(-train.batch_size // accelerator.num_processes),
                autocast_dtype=autocast_dtype,
                loss_scale=accelerator.scaler.get_scale() if accelerator.scaler else 1.0,
            )
            record |= {"windows": WINDOWS} | {name: _finite(values) for name, values in figures.items()}
    return record


def bits_per_head(
    transformer: CharTransformer,
    heads: Heads,
    ids: np.ndarray,
    *,
    characters: int,
    autocast_dtype: torch.dtype | None = None,
) -> Figures:
    """Bits per character of a text by each head, {"layer3/offset2": ...}, silent heads included.

    Scored as in validation: windows at a stride of half the context, heads and softmax in fp32, every symbol once. The
    head of offset k predicts a symbol from those at least k before it; the first k symbols cost ln V. All figures have
    the same denominator, and the figure of the last layer and offset 1 is validation's.

    Args:
        ids: the text, [N].
        characters: number of characters that begin in the text.
    """
    context_length, device = transformer.config.context_length, next(transformer.parameters()).device
    windows = evaluation_windows(len(ids), context_length, default_stride(context_length))
    offsets_of = {layer: [offset for own, offset in heads.pairs if own == layer] for layer in heads.layers}
    nats = {
        (layer, offset): min(offset, len(ids)) * math.log(transformer.vocabulary_size) for layer, offset in heads.pairs
    }
    text = torch.from_numpy(ids.astype(np.int64)).to(device)
    batch_size = max(1, BATCH_SYMBOLS.get(device.type, BATCH_SYMBOLS["cpu"]) // (context_length * len(offsets_of)))
    with torch.no_grad():
        for start in range(0, len(windows.starts), batch_size):
            batch = slice(start, start + batch_size)
            symbols_BT = torch.from_numpy(windows.starts[batch, None] + np.arange(windows.length)).to(device)
            scored_BT = torch.arange(windows.length) >= torch.from_numpy(windows.first_scored[batch, None])
            scored_BT = scored_BT.to(device)
            with torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
                hidden_states = transformer(text[symbols_BT], layers=offsets_of)
            for layer, offsets in offsets_of.items():
                hidden_MD = hidden_states[layer][scored_BT].float()
                targets_MK = symbols_BT[scored_BT][:, None] + torch.tensor(offsets, device=device)
                losses_MK = _losses(heads, hidden_MD, layer, offsets, text[targets_MK.clamp(max=len(ids) - 1)])
                sums = (losses_MK.double() * (targets_MK < len(ids))).sum(dim=0).tolist()
                for offset, total in zip(offsets, sums, strict=True):
                    nats[layer, offset] += total
    return {
        f"layer{layer}/offset{offset}": total / (characters * math.log(2)) for (layer, offset), total in nats.items()
    }


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

    Output i has the loss loss_i: the sum of the active rows of layer l_i on these windows. Output L is the last
    layer's. x_l is the output of layer l (for the last layer, before the final norm), theta_l the parameters of its
    block, |.| the Euclidean norm over all windows and positions, or all parameters. For layer l with the outputs A(l) =
    {i: l_i >= l}:

        supervision_ratio[l]      = mean over i in A(l) of |d loss_i / d x_{l_i}| / |d loss_i / d x_l|
        main_supervision_ratio[l] = |d loss_L / d x_L| / |d loss_L / d x_l|
        gradient_cosine[l]        = <a, m> / (|a| |m|),  a = sum_{i < L} d loss_i / d theta_l,  m = d loss_L / d theta_l
        gradient_norm[l]          = |a + m|

    (Guo et al. 2016, AuxNet, for the ratio of one output; a layer's own output counts with 1.) Layers above the last
    intermediate output have no cosine. The gradients are those of the full losses, whatever aux.route lets through.
    There is one backward pass per output; rows of weight zero take no part.

    Args:
        windows_BW: windows of at most `objective.window_length` symbols.
        loss_scale: factor of the losses in the backward pass, so that fp16 can represent the gradients.
    """
    num_layers, device = objective.transformer.config.num_layers, objective.transformer.embedding.weight.device
    squares: dict[tuple[int, int], Tensor] = {}  # (output, layer): |d loss / d x|^2
    sums: dict[tuple[bool, int], list[Tensor]] = {}  # (whether of output L, layer): d loss / d theta
    for micro_batch_BW in windows_BW.split(micro_batch_size):
        factor = loss_scale * len(micro_batch_BW) / len(windows_BW)
        for output, layer, of_states, of_parameters in _gradients(
            objective, micro_batch_BW.to(device), progress, factor, autocast_dtype
        ):
            key, main = (output, layer), (output == num_layers, layer)
            squares[key] = squares.get(key, 0.0) + of_states.double().square().sum()
            sums[main] = _added(sums[main], of_parameters) if main in sums else of_parameters
    ratios = {
        (output, layer): math.sqrt(squares[output, output] / square) if square > 0 else math.nan
        for (output, layer), square in squares.items()
    }
    cosines, norms = {}, {}
    for layer in sorted({layer for _, layer in sums}):
        found = [sums[main, layer] for main in (False, True) if (main, layer) in sums]
        norms[layer] = _norm(found[0] if len(found) == 1 else _added(*found)) / loss_scale
        if len(found) == 2:
            cosines[layer] = _cosine(*found)
    outputs = {layer: [ratio for (_, below), ratio in ratios.items() if below == layer] for layer in norms}
    return {
        "supervision_ratio": _by_name({layer: sum(values) / len(values) for layer, values in outputs.items()}),
        "main_supervision_ratio": _by_name({layer: r for (output, layer), r in ratios.items() if output == num_layers}),
        "gradient_cosine": _by_name(cosines),
        "gradient_norm": _by_name(norms),
    }


def spread_windows(ids: np.ndarray, count: int, length: int) -> np.ndarray:
    """`count` windows spread evenly over a text, from its beginning to its end: int64 [count, length]."""
    starts = np.linspace(0, len(ids) - length, count).astype(np.int64)
    return np.stack([ids[start : start + length] for start in starts]).astype(np.int64)


def _gradients(
    objective: Objective, windows_BW: Tensor, progress: float, factor: float, autocast_dtype: torch.dtype | None
) -> Iterator[tuple[int, int, Tensor, list[Tensor]]]:
    """(output, layer, d loss / d x, d loss / d theta) for each active output and the layers up to its own, with
    `factor` times its loss."""
    transformer = objective.transformer
    blocks = {layer: list(block.parameters()) for layer, block in enumerate(transformer.blocks, start=1)}
    last = []  # before the final norm, so that all states are of the residual stream
    hook = transformer.final_norm.register_forward_pre_hook(lambda _, inputs: last.append(inputs[0]))
    with (
        torch.enable_grad(),
        torch.autocast(windows_BW.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None),
    ):
        try:
            hidden_states = transformer(windows_BW[:, : -objective.longest_offset], layers=blocks)
        finally:
            hook.remove()
        losses = objective.losses(hidden_states, windows_BW, progress).by_layer
    states = hidden_states | {max(blocks): last[0]}
    for output, loss in losses.items():
        below = range(1, output + 1)
        wanted = [tensor for layer in below for tensor in (states[layer], *blocks[layer])]
        gradients = iter(torch.autograd.grad(loss * factor, wanted, retain_graph=True))
        for layer in below:
            yield output, layer, next(gradients), [next(gradients) for _ in blocks[layer]]


def _losses(heads: Heads, hidden_MD: Tensor, layer: int, offsets: Sequence[int], targets_MK: Tensor) -> Tensor:
    """Loss of each target in nats, [M, K]."""
    hidden_1MD, weight, bias = heads.classifiers(hidden_MD[None], layer, offsets)
    return linear_cross_entropy(hidden_1MD[0], weight, bias, targets_MK, torch.ones(targets_MK.shape).to(hidden_MD))[1]


def _added(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
    return [a + b for a, b in zip(first, second, strict=True)]


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def _cosine(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    norms = _norm(first) * _norm(second)
    product = sum(float((a.double() * b.double()).sum()) for a, b in zip(first, second, strict=True))
    return product / norms if norms > 0 else math.nan


def _by_name(values: dict[int, float]) -> Figures:
    return {f"layer{layer}": value for layer, value in sorted(values.items())}


def _finite(figures: Figures) -> Figures:
    return {name: value for name, value in figures.items() if math.isfinite(value)}


@contextmanager
def _undisturbed(objective: Objective) -> Iterator[None]:
    """Inside there is no dropout; each module's mode is restored after."""
    modes = [(module, module.training) for module in objective.modules()]
    objective.eval()
    # The transformer's own mode only switches activation checkpointing, without which memory may not suffice.
    objective.transformer.training = True
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
