"""What a model makes of each symbol of a text: logits from the layers asked for, and what is measured on them.

Every symbol is predicted once, from the context that the protocol gives it (`charlm.data.windows`), whatever the batch
size and the number of processes.

Shapes: B batch, T positions, D d_model, V vocabulary, N symbols, M predictions of a batch, L layers asked for.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from charlm.data.windows import EvaluationWindows, evaluation_windows
from charlm.model.heads import Heads
from charlm.model.transformer import CharTransformer

BATCH_SYMBOLS = {"cpu": 2**11, "cuda": 2**16}
"""Symbols that a batch of windows reads, by type of device, when no batch size is given. On a CPU more gain nothing."""
CHUNK_LOGITS = 2**18
"""Logits of which the softmax is taken at once: float64 copies stay small."""

Measure = Callable[[Tensor, Tensor], Tensor]
"""Log-probabilities [M, V] in float64 and targets [M] to what is kept of each prediction, [K, M]."""
Visit = Callable[[Tensor, dict[int, Tensor]], None]
"""Takes the places in the text of M symbols, and the measure of each by layer, {layer: float64 [K, M]}, on the CPU."""


def nats(log_probabilities_MV: Tensor, targets_M: Tensor) -> Tensor:
    """What the targets cost, [1, M]."""
    return -log_probabilities_MV.gather(-1, targets_M[:, None]).T


def nats_and_entropies(log_probabilities_MV: Tensor, targets_M: Tensor) -> Tensor:
    """What the targets cost, and the entropy of each prediction, [2, M] in nats."""
    entropies_M = -(log_probabilities_MV.exp() * log_probabilities_MV).sum(-1)
    return torch.cat([nats(log_probabilities_MV, targets_M), entropies_M[None]])


def negative_log_likelihoods(
    transformer: CharTransformer,
    heads: Heads,
    ids: np.ndarray,
    *,
    stride: int,
    layers: Iterable[int] | None = None,
    **options,
) -> dict[int, np.ndarray]:
    """What each symbol costs, in nats, as each of `layers` predicts it: {layer: float64 [N]}.

    Arguments, and what is raised, as for `visit_predictions`; layers by default the last. Where torch.distributed is
    initialised, all processes get the whole result. The first symbol, which has no context, costs ln V.
    """
    layers = sorted(layers) if layers is not None else [transformer.config.num_layers]
    nats_LN = torch.zeros(len(layers), len(ids), dtype=torch.float64)

    def keep(symbols_M: Tensor, measured: dict[int, Tensor]) -> None:
        for row, layer in enumerate(layers):
            nats_LN[row, symbols_M] = measured[layer][0]

    visit_predictions(transformer, heads, ids, keep, stride=stride, layers=layers, **options)
    nats_LN = sum_over_processes(nats_LN, next(transformer.parameters()).device)
    return {layer: nats_LN[row].numpy() for row, layer in enumerate(layers)}


def visit_predictions(
    transformer: CharTransformer,
    heads: Heads,
    ids: np.ndarray,
    visit: Visit,
    *,
    stride: int,
    layers: Iterable[int],
    measure: Measure = nats,
    batch_size: int | None = None,
    autocast_dtype: torch.dtype | None = None,
    progress: bool = False,
    before_batch: Callable[[], None] = lambda: None,
) -> None:
    """Call `visit` with every symbol of a text, in batches; memory does not grow with the text.

    Safe for modules in training: no gradients, dropout off, and their mode is put back. Where torch.distributed is
    initialised, each process visits a contiguous share of the symbols.

    The first symbol, which has no context, is taken as predicted by every layer with equal probabilities.

    Args:
        ids: the text, [N], at least one symbol.
        layers: 1-based, each with a head for offset 1.
        autocast_dtype: of the transformer; None leaves it in the precision of its parameters.
        before_batch: called before each batch, equally often by every process; what it raises ends the scoring.

    Raises:
        UserError: the stride is not in [1, context_length].
    """
    layers = sorted(layers)
    device = next(transformer.parameters()).device
    rank, num_processes = (dist.get_rank(), dist.get_world_size()) if _distributed() else (0, 1)
    windows = evaluation_windows(len(ids), transformer.config.context_length, stride)
    if batch_size is None:
        budget = BATCH_SYMBOLS.get(device.type, BATCH_SYMBOLS["cpu"])
        batch_size = max(1, budget // (transformer.config.context_length * len(layers)))
    if rank == 0:
        V = transformer.vocabulary_size
        first = measure(torch.full((1, V), -math.log(V), dtype=torch.float64), torch.tensor([int(ids[0])]))
        visit(torch.tensor([0]), dict.fromkeys(layers, first))
    bar = tqdm(
        total=math.ceil(len(ids) / num_processes),
        desc="evaluating",
        unit="ch",
        unit_scale=True,
        initial=int(rank == 0),  # the first symbol is in no window
        leave=False,
        disable=None if progress and rank == 0 else True,
    )
    with (
        bar,
        _evaluating(transformer, heads),
        torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None),
    ):
        for symbols_BT, counts_BT in _batches(windows, batch_size, rank, num_processes):
            before_batch()
            window_ids = torch.from_numpy(ids[symbols_BT].astype(np.int64)).to(device)
            # Window 0 scores all that it predicts, every other its last `stride` predictions at most.
            num_last = windows.length if counts_BT[:, :-stride].any() else min(stride, windows.length)
            counts_BT, targets_BT = counts_BT[:, -num_last:], symbols_BT[:, -num_last:]
            counts = torch.from_numpy(counts_BT)
            targets_M = window_ids[:, -num_last:][counts]
            hidden_states = transformer(window_ids[:, :-1], layers=layers, num_last=num_last)
            measured = {
                layer: _measured(measure, _logits(heads, hidden_states[layer][counts], layer), targets_M).cpu()
                for layer in layers
            }
            visit(torch.from_numpy(targets_BT[counts_BT]), measured)
            bar.update(int(counts_BT.sum()))


def sum_over_processes(tensor: Tensor, device: torch.device) -> Tensor:
    """The sum of a tensor on the CPU over all processes, of which `device` is each one's own."""
    if not _distributed():
        return tensor
    shared = tensor.to(device) if "nccl" in dist.get_backend() else tensor
    dist.all_reduce(shared)
    return shared.cpu()


def _batches(
    windows: EvaluationWindows, batch_size: int, rank: int, num_processes: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The windows of one process in batches: the symbols that each reads and predicts, and which predictions count.

    Compiled modules want batches of one size, and sharded ones equally many in every process. So the last batches are
    filled up with windows that belong to another process or were scored before, of which nothing counts.

    Yields:
        symbols: int64 [B, T + 1], indices into the text.
        counts: bool [B, T], over symbols[:, 1:].
    """
    num_windows, offsets = len(windows.starts), np.arange(windows.length + 1)
    share = math.ceil(num_windows / num_processes)
    first, end = rank * share, min((rank + 1) * share, num_windows)
    batch_size = min(batch_size, share)
    for batch_start in range(first, first + share, max(1, batch_size)):
        batch = np.arange(batch_start, batch_start + batch_size)
        own, batch = batch < end, np.minimum(batch, num_windows - 1)
        counts_BT = own[:, None] & (offsets[:-1] >= windows.first_scored[batch, None])
        yield windows.starts[batch, None] + offsets, counts_BT


def _logits(heads: Heads, hidden_MD: Tensor, layer: int) -> Tensor:
    """Logits of the next symbol, [M, V], in fp32 also under autocast: at one row a symbol it costs next to nothing."""
    with torch.autocast(hidden_MD.device.type, enabled=False):
        return heads(hidden_MD[None].float(), layer)[0, :, 0]


def _measured(measure: Measure, logits_MV: Tensor, targets_M: Tensor) -> Tensor:
    """What `measure` gives, [K, M], with the softmax of a part of the logits at a time."""
    rows = max(1, CHUNK_LOGITS // logits_MV.shape[-1])
    return torch.cat(
        [
            measure(logits.double().log_softmax(-1), targets)
            for logits, targets in zip(logits_MV.split(rows), targets_M.split(rows), strict=True)
        ],
        dim=-1,
    )


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def _evaluating(*modules: torch.nn.Module) -> Iterator[None]:
    """No gradients and no dropout inside; each module's mode is put back after."""
    modes = [module.training for module in modules]
    try:
        with torch.no_grad():
            for module in modules:
                module.eval()
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)
