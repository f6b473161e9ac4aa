"""The scoring loop: a model reads a text in windows and predicts every symbol once.

Where torch.distributed is initialised, each process predicts a contiguous share of the symbols.

Shapes: B batch, T positions, W = T + 1 symbols of a window, D d_model, V vocabulary, N symbols,
M predictions of a batch, L layers asked for, K figures of a prediction.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from charlm.config import UserError
from charlm.data.windows import EvaluationWindows, evaluation_windows
from charlm.hardware import in_float64
from charlm.model.heads import Heads
from charlm.model.transformer import CharTransformer

AUTOCAST_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Type of matrix products by precision; None leaves that of the parameters."""
BATCH_SYMBOLS = {"cpu": 2**11, "cuda": 2**16}
"""Symbols that a batch reads by default, by type of device."""
CHUNK_LOGITS = {"cpu": 2**18, "cuda": 2**24}
"""Logits whose softmax is taken at once: keeps their float64 copies small."""

Measure = Callable[[Tensor, Tensor], Tensor]
"""(log-probabilities [M, V] in float64, targets [M]) -> figures [K, M]."""


def check_precision(precision: str, device: torch.device) -> None:
    """Raise UserError unless the device has this precision."""
    if precision not in AUTOCAST_DTYPES:
        raise UserError(f"precision={precision}: must be fp32, bf16 or fp16", "precision")
    if precision == "fp16" and device.type == "cpu":
        raise UserError("precision=fp16: needs a GPU; on a CPU use bf16 or fp32", "precision")


def nats(log_probabilities_MV: Tensor, targets_M: Tensor) -> Tensor:
    """The cost of each target, [1, M]."""
    return -log_probabilities_MV.gather(-1, targets_M[:, None]).T


def nats_and_entropies(log_probabilities_MV: Tensor, targets_M: Tensor) -> Tensor:
    """The cost of each target, and the entropy of each prediction in nats, [2, M]."""
    entropies_M = -(log_probabilities_MV.exp() * log_probabilities_MV).sum(-1)
    return torch.cat([nats(log_probabilities_MV, targets_M), entropies_M[None]])


def nats_and_likeliest(log_probabilities_MV: Tensor, targets_M: Tensor) -> Tensor:
    """The cost of each target, and 1 where it is the likeliest symbol, else 0, [2, M]."""
    likeliest_M = log_probabilities_MV.argmax(-1) == targets_M
    return torch.cat([nats(log_probabilities_MV, targets_M), likeliest_M[None]])


def negative_log_likelihoods(
    transformer: CharTransformer,
    heads: Heads,
    ids: np.ndarray,
    *,
    layers: Iterable[int] | None = None,
    lengths: Sequence[int] = (),
    **options,
) -> dict[int, np.ndarray]:
    """Nats of each symbol, {layer: float64 [N]}; options as for `measure_text`. Texts of `lengths` are read apart.

    Layer 0 stands for a mixture with experts.
    """
    layers = sorted(layers) if layers is not None else [transformer.config.num_layers]
    texts = np.split(ids, np.cumsum(lengths[:-1], dtype=int))
    nats = [measure_text(transformer, heads, text, layers=layers, **options)[:, 0] for text in texts]
    return dict(zip([*layers, 0], np.concatenate(nats, axis=1), strict=False))


def measure_text(
    transformer: CharTransformer, heads: Heads, ids: np.ndarray, *, read: Callable | None = None, **options
) -> np.ndarray:
    """The figures of all symbols, float64 [L, K, N]; options as for `read`, by default `predictions`."""
    found_LKN = None
    for symbols_M, figures_LKM in (read or predictions)(transformer, heads, ids, **options):
        if found_LKN is None:
            found_LKN = figures_LKM.new_zeros(*figures_LKM.shape[:2], len(ids))
        found_LKN[:, :, symbols_M] = figures_LKM
    return sum_over_processes(found_LKN, next(transformer.parameters()).device).numpy()


@torch.no_grad()
def predictions(
    transformer: CharTransformer,
    heads: Heads,
    ids: np.ndarray,
    *,
    stride: int,
    layers: Iterable[int],
    measure: Measure = nats,
    show_progress: bool = False,
    **options,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Predict every symbol of a text once, without dropout; the first with equal probabilities.

    Args:
        ids: the text, [N], at least one symbol.
        layers: 1-based, in ascending order, each with a head for offset 1.
        options: batch_size, autocast_dtype and before_batch of `read_windows`.

    Yields indices [M] in the text and figures [L, K, M], float64, both on the CPU.

    Raises UserError if the stride is not in [1, context_length].
    """
    rank, num_processes = rank_and_processes()
    windows = evaluation_windows(len(ids), transformer.config.context_length, stride)
    V = transformer.vocabulary_size
    first_M = torch.arange(int(rank == 0))
    targets_M = torch.tensor([int(ids[0])])[first_M]
    uniform_MV = torch.full((len(first_M), V), -math.log(V), dtype=torch.float64)
    yield first_M, measure(uniform_MV, targets_M).repeat(len(layers), 1, 1)
    modes = [(module, module.training) for module in (transformer, heads)]
    try:
        transformer.eval()
        heads.eval()
        total = math.ceil(len(ids) / num_processes)
        with progress_bar(total, "evaluating", show_progress and rank == 0) as bar:
            for symbols_M, hidden_states in read_windows(transformer, ids, windows, layers=layers, **options):
                targets_M = torch.from_numpy(ids[symbols_M.numpy()].astype(np.int64))
                figures = []
                for layer, hidden_MD in hidden_states.items():
                    logits_MV = heads(hidden_MD[None].float(), layer)[0, :, 0]
                    targets_M = targets_M.to(logits_MV.device)
                    figures.append(measured(measure, logits_MV, targets_M))
                yield symbols_M, torch.stack(figures).cpu()
                bar.update(len(symbols_M))
    finally:
        for module, mode in modes:
            module.train(mode)


def progress_bar(total: int, description: str, shown: bool) -> tqdm:
    """A bar of symbols on stderr, if that is a terminal."""
    disable = None if shown else True
    return tqdm(total=total, desc=description, unit="ch", unit_scale=True, leave=False, disable=disable)


@torch.no_grad()
def read_windows(
    transformer: CharTransformer,
    ids: np.ndarray,
    windows: EvaluationWindows,
    *,
    layers: Iterable[int],
    batch_size: int | None = None,
    autocast_dtype: torch.dtype | None = None,
    share: bool = True,
    before_batch: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Tensor, dict[int, Tensor]]]:
    """Read a text in windows, batch by batch; the transformer stays in its mode.

    Args:
        ids: the text, [N].
        layers: 1-based.
        batch_size: windows per batch; by default as many as `BATCH_SYMBOLS` allows.
        share: if false, every process reads all windows.
        before_batch: called before each batch, equally often by every process.

    Yields the indices [M] of the predicted symbols, on the CPU, and {layer: hidden_MD}.
    """
    layers = sorted(layers)
    device = next(transformer.parameters()).device
    rank, num_processes = rank_and_processes() if share else (0, 1)
    if batch_size is None:
        budget = BATCH_SYMBOLS.get(device.type, BATCH_SYMBOLS["cuda"])
        batch_size = max(1, budget // (transformer.config.context_length * len(layers)))
    # Windows after the first score, and the top layer computes, only the last predictions.
    num_later = int((windows.length - windows.first_scored[1:]).max(initial=1))
    for symbols_BW, counts_BT in _batches(windows, batch_size, rank, num_processes):
        before_batch()
        window_ids = torch.from_numpy(ids[symbols_BW[:, :-1]].astype(np.int64)).to(device)
        num_last = windows.length if counts_BT[:, :-num_later].any() else num_later
        counts = torch.from_numpy(counts_BT[:, -num_last:])
        rows = counts.flatten().nonzero()[:, 0].to(device)  # a mask would make the device wait
        with torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
            fewer = num_last if num_last < windows.length else None
            hidden_states = transformer(window_ids, layers=layers, num_last=fewer)
        symbols_M = torch.from_numpy(symbols_BW[:, -num_last:])[counts]
        yield symbols_M, {layer: hidden_states[layer].flatten(0, 1)[rows] for layer in layers}


def sum_over_processes(tensor: Tensor, device: torch.device) -> Tensor:
    """The sum over all processes of a tensor on the CPU."""
    if rank_and_processes()[1] == 1:
        return tensor
    shared = tensor if "gloo" in dist.get_backend() else tensor.to(device)
    dist.all_reduce(shared)
    return shared.cpu()


def _batches(
    windows: EvaluationWindows, batch_size: int, rank: int, num_processes: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of one process's windows: indices [B, W], and which predictions count, bool [B, T].

    Compiled modules need batches of one size, sharded ones equally many in every process: windows that
    do not count fill up the last.
    """
    num_windows = len(windows.starts)
    offsets = np.arange(windows.length + 1)
    share = math.ceil(num_windows / num_processes)
    first, end = rank * share, min((rank + 1) * share, num_windows)
    batch_size = min(batch_size, share)
    for batch_start in range(first, first + share, max(1, batch_size)):
        batch = np.arange(batch_start, batch_start + batch_size)
        own, batch = batch < end, np.minimum(batch, num_windows - 1)
        counts_BT = own[:, None] & (offsets[:-1] >= windows.first_scored[batch, None])
        yield windows.starts[batch, None] + offsets, counts_BT


def measured(measure: Measure, logits_MV: Tensor, targets_M: Tensor) -> Tensor:
    """The figures of each prediction, [K, M], from a part of the logits at a time."""
    budget = CHUNK_LOGITS.get(logits_MV.device.type, CHUNK_LOGITS["cuda"])
    rows = max(1, budget // logits_MV.shape[-1])
    figures = []
    for logits, targets in zip(logits_MV.split(rows), targets_M.split(rows), strict=True):
        log_probabilities = in_float64(logits).log_softmax(-1)
        figures.append(measure(log_probabilities, targets.to(log_probabilities.device)))
    return torch.cat(figures, dim=-1)


def rank_and_processes() -> tuple[int, int]:
    """This process's rank and the number of processes: 0 and 1 without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
