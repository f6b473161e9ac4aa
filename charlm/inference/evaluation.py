"""How well a model predicts a text: bits per character and per byte, with their protocol.

Every symbol of the text is scored exactly once. Each symbol's cost is kept in float64 nats; the costs are added
exactly (`math.fsum`) and divided once, at the end. The figure therefore does not depend on the batch size or the number
of processes, but for the rounding inside the model.

Shapes: B batch, T positions, D d_model, V vocabulary, N symbols, M scored positions of a batch.
"""

import bz2
import gzip
import lzma
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from charlm.config import UserError
from charlm.data.corpus import Corpus
from charlm.data.vocabulary import Vocabulary
from charlm.data.windows import EvaluationWindows, evaluation_windows
from charlm.inference.matmul import exact_matmul
from charlm.model.heads import Heads
from charlm.model.memory import keep_freed_memory
from charlm.model.transformer import CharTransformer
from charlm.runs.loading import TrainedModel

EvaluationPrecision = Literal["fp32", "bf16", "fp16"]
AUTOCAST_DTYPES: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
BATCH_SYMBOLS = {"cpu": 2**11, "cuda": 2**16}
"""Symbols that a batch of windows reads, by type of device, when no batch size is given. On a CPU more gain nothing."""
CHUNK_LOGITS = 2**18
"""Logits of which the softmax is taken at once: float64 copies stay small."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """A figure with its protocol. `as_dict` is what `scripts/evaluate.py --json` prints."""

    bits_per_character: float
    """Bits of all scored symbols over `characters`."""
    bits_per_byte: float
    """The same bits over `bytes`."""
    standard_error: float | None
    """Of bits_per_character, see `standard_error`; None for a single symbol."""
    symbols: int
    """Symbols scored: all of the split's, or the first `limit`."""
    characters: int
    """Characters that begin in the scored text."""
    bytes: int
    split: str
    stride: int
    context_length: int
    checkpoint: str
    corpus: str
    corpus_sha256: str
    precision: EvaluationPrecision
    seconds: float
    layers: dict[str, float] | None = None
    """Bits per character from each layer that has a head for the next symbol, where asked."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; without `layers` unless they were asked for."""
        return {name: value for name, value in asdict(self).items() if name != "layers" or value is not None}


def bits_per_character(
    trained: TrainedModel,
    corpus: Corpus,
    *,
    split: str = "test",
    stride: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    precision: EvaluationPrecision = "fp32",
    all_layers: bool = False,
    progress: bool = True,
) -> Score:
    """Score a split of the corpus that the model was trained on (see `charlm.data.windows`).

    Where torch.distributed is initialised, every process calls this, each scores its share of the windows, and all
    return the same figure.

    Args:
        corpus: as `charlm.load_corpus(trained.config.data)` gives it.
        stride: symbols from one window to the next; 1 is the paper's, the default half the context.
        limit: score the first so many symbols, as if the split ended there.
        batch_size: windows that one process runs at once; by default as many as `BATCH_SYMBOLS` allows.
        precision: of the transformer; heads and softmax are computed in fp32 and float64 whatever it is.
        all_layers: score every layer that has a head for the next symbol, in the same pass.
        progress: show a bar on stderr if that is a terminal.

    Raises:
        UserError: a value out of range, fp16 on a CPU, or a corpus other than the run's.
    """
    _check_options(trained, corpus, split, limit, batch_size, precision)
    started = time.perf_counter()
    last_layer, context_length = trained.config.model.num_layers, trained.config.model.context_length
    stride = stride if stride is not None else max(1, context_length // 2)
    ids = corpus.splits[split].ids[:limit]
    characters, num_bytes = count_units(ids, corpus.vocabulary)
    keep_freed_memory()
    with exact_matmul(trained.device):
        nats = negative_log_likelihoods(
            trained.transformer,
            trained.heads,
            ids,
            stride=stride,
            layers=[layer for layer, offset in trained.heads.pairs if offset == 1] if all_layers else None,
            batch_size=batch_size,
            autocast_dtype=AUTOCAST_DTYPES[precision],
            progress=progress,
        )
    return Score(
        bits_per_character=bits_per(nats[last_layer], characters),
        bits_per_byte=bits_per(nats[last_layer], num_bytes),
        standard_error=standard_error(nats[last_layer], ids, corpus.vocabulary),
        symbols=len(ids),
        characters=characters,
        bytes=num_bytes,
        split=split,
        stride=stride,
        context_length=context_length,
        checkpoint=trained.checkpoint,
        corpus=corpus.name,
        corpus_sha256=corpus.sha256,
        precision=precision,
        seconds=time.perf_counter() - started,
        layers={str(layer): bits_per(nats[layer], characters) for layer in sorted(nats)} if all_layers else None,
    )


def negative_log_likelihoods(
    transformer: CharTransformer,
    heads: Heads,
    ids: np.ndarray,
    *,
    stride: int,
    layers: Iterable[int] | None = None,
    batch_size: int | None = None,
    autocast_dtype: torch.dtype | None = None,
    progress: bool = False,
    before_batch: Callable[[], None] = lambda: None,
) -> dict[int, np.ndarray]:
    """What each symbol costs, in nats, as each of `layers` predicts it.

    Safe for modules in training: no gradients, dropout off, and their mode is put back. Where torch.distributed is
    initialised, each process scores a contiguous share of the windows and all get the whole result.

    Args:
        ids: the text, [N], at least one symbol.
        layers: 1-based, each with a head for offset 1; by default the last layer.
        autocast_dtype: of the transformer; None leaves it in the precision of its parameters.
        before_batch: called before each batch, equally often by every process; what it raises ends the scoring.

    Returns:
        {layer: float64 [N]}; the first symbol, which has no context, costs ln V.

    Raises:
        UserError: the stride is not in [1, context_length].
    """
    layers = sorted(layers) if layers is not None else [transformer.config.num_layers]
    device = next(transformer.parameters()).device
    rank, num_processes = (dist.get_rank(), dist.get_world_size()) if _distributed() else (0, 1)
    windows = evaluation_windows(len(ids), transformer.config.context_length, stride)
    if batch_size is None:
        budget = BATCH_SYMBOLS.get(device.type, BATCH_SYMBOLS["cpu"])
        batch_size = max(1, budget // (transformer.config.context_length * len(layers)))

    nats_LN = torch.zeros(len(layers), len(ids), dtype=torch.float64)
    bar = tqdm(
        total=math.ceil(len(ids) / num_processes),
        desc="evaluating",
        unit="ch",
        unit_scale=True,
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
            for row, layer in enumerate(layers):
                nats_M = _nats(_logits(heads, hidden_states[layer][counts], layer), targets_M)
                nats_LN[row, torch.from_numpy(targets_BT[counts_BT])] = nats_M.cpu()
            bar.update(int(counts_BT.sum()))
    nats_LN = _sum_over_processes(nats_LN, device)
    nats_LN[:, 0] = math.log(transformer.vocabulary_size)
    return {layer: nats_LN[row].numpy() for row, layer in enumerate(layers)}


def bits_per(nats: np.ndarray, count: int) -> float:
    """Nats of all symbols to bits per unit, of which the text has `count`. The sum is exact, whatever its order."""
    return math.fsum(nats) / (count * math.log(2))


def count_units(ids: np.ndarray, vocabulary: Vocabulary) -> tuple[int, int]:
    """The characters that begin in a text, and its bytes.

    Raises:
        UserError: no character begins in it, as in a few bytes from the middle of one.
    """
    characters = vocabulary.count_characters(ids)
    if characters == 0:
        raise UserError(f"a text of {len(ids)} symbols: no character begins in it, so bits per character do not exist")
    return characters, vocabulary.count_bytes(ids)


def standard_error(nats: np.ndarray, ids: np.ndarray, vocabulary: Vocabulary) -> float | None:
    """Standard error of bits per character, as of a sample of text of this length.

    Neighbouring symbols are not independent, so the text is cut into K contiguous blocks of equal numbers of symbols:
    100, or fewer so that each holds 1,000 symbols, yet at least 10. With b_k bits and c_k characters in block k and
    R = sum b / sum c, it is the ratio estimator's

        sqrt(K / (K - 1) * sum_k (b_k - R c_k)^2) / sum_k c_k

    None where there are not two symbols.
    """
    num_blocks = min(max(10, min(100, len(nats) // 1000)), len(nats))
    if num_blocks < 2:
        return None
    bits = np.array([block.sum() for block in np.array_split(nats, num_blocks)]) / math.log(2)
    characters = np.array([vocabulary.count_characters(block) for block in np.array_split(ids, num_blocks)])
    residuals = bits - bits.sum() / characters.sum() * characters
    return math.sqrt(num_blocks / (num_blocks - 1) * np.square(residuals).sum()) / int(characters.sum())


def compressor_bits_per_byte(data: bytes) -> dict[str, float]:
    """What gzip -9, bzip2 -9 and xz -9e need for the same bytes: yardsticks for bits_per_byte.

    gzip's is zlib's, which is within 0.2 % of the program's.
    """
    compressed = {
        "gzip": gzip.compress(data, compresslevel=9),
        "bzip2": bz2.compress(data, compresslevel=9),
        "xz": lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
    }
    return {name: 8 * len(packed) / len(data) for name, packed in compressed.items()}


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


def _nats(logits_MV: Tensor, targets_M: Tensor) -> Tensor:
    """What the targets cost, float64 [M]."""
    rows = max(1, CHUNK_LOGITS // logits_MV.shape[-1])
    return torch.cat(
        [
            -logits.double().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
            for logits, targets in zip(logits_MV.split(rows), targets_M.split(rows), strict=True)
        ]
    )


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _sum_over_processes(tensor: Tensor, device: torch.device) -> Tensor:
    if not _distributed():
        return tensor
    shared = tensor.to(device) if "nccl" in dist.get_backend() else tensor
    dist.all_reduce(shared)
    return shared.cpu()


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


def _check_options(
    trained: TrainedModel, corpus: Corpus, split: str, limit: int | None, batch_size: int | None, precision: str
) -> None:
    if corpus.sha256 != trained.corpus["sha256"] or corpus.vocabulary != trained.vocabulary:
        raise UserError(
            f"corpus={corpus.name} ({corpus.sha256[:12]}): the model was trained on {trained.corpus['name']} "
            f"({trained.corpus['sha256'][:12]}), another text or vocabulary; score it on that one "
            "(--data.path, --data.hub_id)"
        )
    if split not in corpus.splits:
        raise UserError(f"split={split}: must be one of {', '.join(corpus.splits)}")
    if precision not in AUTOCAST_DTYPES:
        raise UserError(f"precision={precision}: must be one of {', '.join(AUTOCAST_DTYPES)}")
    if precision == "fp16" and trained.device.type == "cpu":
        raise UserError("precision=fp16: needs a GPU; on a CPU use bf16 or fp32")
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{name}={value}: must be at least 1")
