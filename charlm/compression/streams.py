"""Streams of text that a model reads side by side, a symbol of each at a time: what encoder, decoder and scorer share.

A text is cut into blocks and each block into S streams of equal lengths, but for one symbol. Every step gives the next
symbol's logits in each stream, whatever the symbols will turn out to be, so that who decodes does the very same
arithmetic as who encodes: the same operations on the same shapes, to the last step, with the same threads.

A stream begins without context: its first symbol costs log2 V bits. When `context` symbols have been read, the newest
`context - stride + 1` are kept, read again in one pass, and the older ones forgotten. So with a single stream every
symbol has the context that `evaluate --stride` gives it, and the default stride forgets what generation forgets.

Shapes: S streams, A of which still have symbols, T symbols read at once, V vocabulary.
"""

import hashlib
import json
import math
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version

import constriction
import numpy as np
import torch
from torch import Tensor

from charlm.compression.container import MAX_BLOCK, MAX_STREAMS, MAX_THREADS, PRECISIONS
from charlm.config import UserError
from charlm.data.vocabulary import Vocabulary
from charlm.data.windows import default_stride
from charlm.model.cache import KVCache
from charlm.model.kernels_cpu import exact_matmul
from charlm.process import physical_memory
from charlm.runs.load import TrainedModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MOST_STREAMS = {"cpu": 64, "cuda": 512}
"""By default, by type of device."""
SYMBOLS_PER_STREAM = 2**13
"""At least, by default: shorter ones cost more than a few per cent, as each begins without context."""
BLOCK_PER_STREAM = 2**16
READ_AT_ONCE = 2**13
"""Symbols of all streams together: bounds the memory that reading again needs."""
PROBE_SYMBOLS = 16

Exchange = Callable[[np.ndarray, Tensor], np.ndarray]
"""(where in the block the next symbol of each of A streams is, their logits [A, V]) -> their symbols, integers [A]."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What, beside the model, every probability depends on."""

    streams: int
    context: int
    """Symbols that a prediction sees at most."""
    stride: int
    """Predictions from one forgetting to the next."""
    block: int
    precision: str
    threads: int

    @property
    def kept(self) -> int:
        """Symbols that are not forgotten."""
        return self.context - self.stride + 1


def choose_protocol(
    trained: TrainedModel,
    num_symbols: int,
    *,
    streams: int | None = None,
    context: int | None = None,
    stride: int | None = None,
    block: int | None = None,
    precision: str = "fp32",
    threads: int | None = None,
) -> Protocol:
    """The options, and defaults for those that are None.

    Raises:
        UserError: a value out of range, or more streams than the machine's memory holds caches for.
    """
    device = trained.device.type
    if streams is None:
        most = MOST_STREAMS.get(device, MOST_STREAMS["cpu"])
        streams = min(max(1, num_symbols // SYMBOLS_PER_STREAM), most)
    context = trained.config.model.context_length if context is None else context
    if stride is None:
        stride = context - default_stride(context) + 1  # keeps as many symbols as generation
    protocol = Protocol(
        streams=streams,
        context=context,
        stride=stride,
        block=min(BLOCK_PER_STREAM * streams, MAX_BLOCK) if block is None else block,
        precision=precision,
        threads=torch.get_num_threads() if threads is None else threads,
    )
    check_protocol(trained, protocol)
    return protocol


def check_protocol(trained: TrainedModel, protocol: Protocol) -> None:
    """Raise UserError if model and machine cannot work so."""
    model = trained.config.model
    for name, value, most in (
        ("streams", protocol.streams, MAX_STREAMS),
        ("context", protocol.context, model.context_length),
        ("stride", protocol.stride, protocol.context),
        ("threads", protocol.threads, MAX_THREADS),
        ("block", protocol.block, MAX_BLOCK),
    ):
        if not 1 <= value <= most:
            raise UserError(f"{name}={value}: must lie between 1 and {most:,}")
    if protocol.block < protocol.streams:
        raise UserError(f"block={protocol.block}: must hold a symbol of each of the {protocol.streams:,} streams")
    if protocol.precision not in PRECISIONS:
        raise UserError(f"precision={protocol.precision}: must be one of {', '.join(PRECISIONS)}")
    if protocol.precision == "fp16" and trained.device.type == "cpu":
        raise UserError("precision=fp16: needs a GPU; on a CPU use bf16 or fp32")
    on_gpu = trained.device.type == "cuda"
    memory = torch.cuda.mem_get_info(trained.device)[1] if on_gpu else physical_memory()
    size = DTYPES[protocol.precision].itemsize
    needed = 2 * size * protocol.streams * model.num_layers * model.context_length * model.d_model
    if needed > memory:
        raise UserError(
            f"streams={protocol.streams}: their keys and values take {needed / 1e9:,.0f} GB, and there are "
            f"{memory / 1e9:,.0f} GB of memory; take fewer streams"
        )


class Streams:
    """The model's state in all streams. Use it inside `arithmetic_of` the same protocol."""

    def __init__(self, trained: TrainedModel, protocol: Protocol):
        self._trained, self._protocol = trained, protocol
        self._dtype = DTYPES[protocol.precision]
        with torch.inference_mode():
            self._cache = KVCache(trained.config.model, protocol.streams, trained.device, self._dtype)
            self._newest = torch.zeros(protocol.streams, protocol.context, dtype=torch.long, device=trained.device)

    @torch.inference_mode()
    def restart(self) -> Tensor:
        """Forget everything: the logits [S, V] of a first symbol, all equal."""
        self._cache.reset()
        return torch.zeros(self._protocol.streams, self._trained.vocabulary.size, device=self._trained.device)

    @torch.inference_mode()
    def append(self, symbols_S: np.ndarray) -> Tensor:
        """One more symbol of each stream; the logits [S, V] of the next."""
        start = self._cache.length
        if start == self._protocol.context:
            self._cache.reset()
            earlier = self._protocol.kept - 1
            self._newest[:, :earlier] = self._newest[:, start - earlier :].clone()
            start = earlier
        self._newest[:, start] = torch.from_numpy(symbols_S.astype(np.int64)).to(self._newest.device)
        end, at_once = start + 1, max(1, READ_AT_ONCE // self._protocol.streams)
        for begin in range(self._cache.length, end, at_once):
            logits_SV = self._read(self._newest[:, begin : min(begin + at_once, end)])
        return logits_SV

    def _read(self, ids_ST: Tensor) -> Tensor:
        model, device = self._trained.config.model, self._trained.device
        with (
            exact_matmul(device, ids_ST.numel()),
            torch.autocast(device.type, dtype=self._dtype, enabled=self._dtype != torch.float32),
        ):
            hidden_S1D = self._trained.transformer(ids_ST, cache=self._cache, num_last=1)[model.num_layers]
        with exact_matmul(device, len(ids_ST)):
            return self._trained.heads(hidden_S1D.float(), model.num_layers)[:, 0, 0]


def walk(streams: Streams, num_streams: int, num_symbols: int, exchange: Exchange) -> None:
    """Go through a block of `num_symbols`, at least 1: `exchange` names the symbols, step by step."""
    each, longer = divmod(num_symbols, num_streams)
    starts_S = np.arange(num_streams) * each + np.minimum(np.arange(num_streams), longer)
    logits_SV = streams.restart()
    symbols_S = np.zeros(num_streams, np.int64)
    steps = math.ceil(num_symbols / num_streams)
    for step in range(steps):
        num_active = num_streams if step < each else longer
        symbols_S[:num_active] = exchange(starts_S[:num_active] + step, logits_SV[:num_active])
        if step + 1 < steps:
            logits_SV = streams.append(symbols_S)


@contextmanager
def arithmetic_of(protocol: Protocol) -> Iterator[None]:
    """The protocol's number of threads inside, that of before after."""
    before = torch.get_num_threads()
    torch.set_num_threads(protocol.threads)  # also where it is the same: it keeps MKL from choosing fewer by itself
    try:
        yield
    finally:
        torch.set_num_threads(before)


def probabilities(logits_AV: Tensor) -> np.ndarray:
    """What the coder takes, float64 [A, max(V, 2)]: it knows no vocabulary of one symbol.

    Raises:
        UserError: they are not finite.
    """
    probabilities_AV = logits_AV.double().softmax(dim=-1).cpu().numpy()
    if not np.isfinite(probabilities_AV).all():
        raise UserError("the model predicts no finite probabilities, as after a training that diverged; use another")
    return np.pad(probabilities_AV, ((0, 0), (0, 1))) if probabilities_AV.shape[1] == 1 else probabilities_AV


def probe(trained: TrainedModel, protocol: Protocol) -> bytes:
    """A digest of what model and coder make of a fixed text; call it inside `arithmetic_of`.

    It reads `PROBE_SYMBOLS` symbols one by one and again in one pass, in as many streams as the protocol has.
    """
    context = min(protocol.context, PROBE_SYMBOLS)
    small = Protocol(**asdict(protocol) | {"context": context, "stride": 1})
    streams = Streams(trained, small)
    random_NS = np.random.Philox(key=0).random_raw((context + 2, protocol.streams)) % trained.vocabulary.size
    digest, encoder = hashlib.sha256(), constriction.stream.queue.RangeEncoder()
    streams.restart()
    for symbols_S in random_NS:
        logits_SV = streams.append(symbols_S)
        digest.update(logits_SV.float().cpu().numpy().tobytes())
        encoder.encode(symbols_S.astype(np.int32), FAMILY, probabilities(logits_SV))
    digest.update(encoder.get_compressed().astype("<u4").tobytes())
    return digest.digest()[:8]


FAMILY = constriction.stream.model.Categorical(perfect=False)
"""Each symbol gets a unit of 2^-24 and its share of the rest, computed in float64 one symbol after the other."""


def environment(device: torch.device) -> str:
    """Versions, device and processor, of which the last bits of a probability depend."""
    if device.type == "cuda":
        place = f"{torch.cuda.get_device_name(device)} cuda {torch.version.cuda}"
    else:
        found = getattr(torch.cpu, "get_capabilities", dict)()  # younger than the oldest torch supported
        features = {name: value for name, value in found.items() if not name.startswith("num_")}  # of cores, sockets
        features = hashlib.sha256(json.dumps(features, sort_keys=True).encode()).hexdigest()[:8]
        place = f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()} {features}"
    return f"torch {torch.__version__}, constriction {version('constriction')}, {place}"


def predicting_tensors(trained: TrainedModel) -> dict[str, Tensor]:
    """Every parameter that the next symbol's prediction depends on, by name."""
    with torch.inference_mode():
        nothing_11D = torch.zeros(1, 1, trained.config.model.d_model, device=trained.device)
        _, weight, bias = trained.heads.classifiers(nothing_11D, trained.config.model.num_layers, (1,))
    tensors = trained.transformer.state_dict() | {"head.weight": weight, "head.bias": bias}
    return dict(sorted(tensors.items()))


def model_digest(trained: TrainedModel) -> bytes:
    """16 bytes that name the model: its shape, and the parameters that predict the next symbol."""
    digest = hashlib.sha256(json.dumps(asdict(trained.config.model), sort_keys=True).encode())
    for name, tensor in predicting_tensors(trained).items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.digest()[:16]


def vocabulary_digest(vocabulary: Vocabulary) -> bytes:
    """8 bytes that name it."""
    return hashlib.sha256(json.dumps(vocabulary.to_dict(), sort_keys=True).encode()).digest()[:8]
