"""Streams of text that a model reads side by side, for encoder, decoder and scorer; their settings.

A block of text is cut into S streams of equal lengths, or longer by one symbol. Every step computes the
next symbol's logits in all streams, so that the decoder does exactly the encoder's arithmetic.

A stream begins without context. When `context` symbols were read, the newest `context - stride + 1` are
read again in one pass: in one stream every symbol has the context that `evaluate --stride` gives it. A model that
adapts learns at that moment from the symbols that were coded since the last.

Shapes: S streams, H heads of the layers asked for, A of which still have symbols, T symbols read at once, V vocabulary.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Self

import constriction
import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from tqdm import tqdm

from charlm.config import Precision, Section, UserError
from charlm.config.adapt import AdaptConfig, ExpertName, fixed
from charlm.config.types import Count
from charlm.data.corpus import load_corpus
from charlm.data.windows import default_stride
from charlm.hardware import device_memory, in_float64
from charlm.inference.adaptation import Learner
from charlm.inference.evaluation import Scorer
from charlm.inference.scoring import AUTOCAST_DTYPES, check_precision
from charlm.model.cache import KVCache
from charlm.model.kernels_cpu import full_fp32_matmul
from charlm.runs.trained import TrainedModel, exit_layers

FAMILY = constriction.stream.model.Categorical(perfect=False)
"""Gives each symbol one unit of 2^-24 and its share of the rest, in float64."""
READ_AT_ONCE = 2**13
"""Symbols of all streams together; bounds the memory that reading again needs."""
MAX_BLOCK = 2**26
SYMBOLS_PER_STREAM = 2**13
"""Default minimum: shorter streams, which begin without context, cost a few per cent. Four times as many where
something is learned: what is new to all streams is new to each of them."""
BLOCK_PER_STREAM = 2**16


class CodingSettings(Section):
    """Settings that the header of a compressed file holds for the decoder."""

    streams: Annotated[Count, Field(le=2**14)]
    """Parts of a block that are read side by side."""
    context: Count
    """The most symbols that a prediction sees."""
    stride: Count
    """Predictions between two times that the oldest symbols are forgotten."""
    block: Annotated[Count, Field(le=MAX_BLOCK)]
    """Symbols that are coded together; the last block may have fewer."""
    threads: Annotated[Count, Field(le=2**10)]
    precision: Precision
    adapt: AdaptConfig | None = None
    """How the model learns from what was coded, whenever the context is full."""
    experts: Annotated[tuple[ExpertName, ...], Field(max_length=4)] = ()
    """Experts that the last layer is mixed with, see `charlm.inference.experts`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stride > self.context:
            raise self.mistake("stride", f"exceeds the context of {self.context:,}", "context")
        if fixed(self.experts):
            raise self.mistake("experts", "a file needs experts that learn from it; name counts or match as well")
        if self.block < self.streams:
            raise self.mistake("block", f"is less than the {self.streams:,} streams", "streams")
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The type of keys and values."""
        return AUTOCAST_DTYPES[self.precision] or torch.float32


def choose_settings(trained: TrainedModel, num_symbols: int, **options: Any) -> CodingSettings:
    """The given `options`, with defaults in place of None; UserError if they cannot be."""
    given = {name: value for name, value in options.items() if value is not None}
    most = 64 if trained.device.type == "cpu" else 512
    each = SYMBOLS_PER_STREAM * (4 if "adapt" in given or given.get("experts") else 1)
    streams = given.get("streams", min(max(1, num_symbols // each), most))
    context = given.get("context", trained.config.model.context_length)
    defaults = {
        "streams": streams,
        "context": context,
        "stride": max(1, context - default_stride(context) + 1),  # as in generation
        "block": min(BLOCK_PER_STREAM * max(1, streams), MAX_BLOCK),
        "threads": torch.get_num_threads(),
        "precision": "fp32",
    }
    settings = CodingSettings.read(defaults | given)
    check_settings(trained, settings)
    return settings


def check_settings(trained: TrainedModel, settings: CodingSettings) -> None:
    """Raise UserError if the model or the machine does not allow these settings."""
    model = trained.config.model
    if settings.context > model.context_length:
        problem = f"the model's is {model.context_length:,}"
        raise UserError(f"context={settings.context}: {problem}; give no more", "context")
    check_precision(settings.precision, trained.device)
    memory = device_memory(trained.device)
    symbols = settings.streams * model.context_length
    needed = 2 * symbols * model.num_layers * model.d_model * settings.dtype.itemsize
    if settings.adapt is not None:
        needed += 8 * settings.streams * settings.context * trained.vocabulary.size  # logits of a window, twice
    if settings.experts:
        needed += 8 * settings.streams * trained.vocabulary.size * (model.num_layers + 18)  # features
    if needed > memory:
        problem = f"their keys and values take {needed / 1e9:,.0f} GB of {memory / 1e9:,.0f} GB"
        raise UserError(f"streams={settings.streams}: {problem}; take fewer", "streams")


class Streams:
    """The model's state in all streams; use it inside `threads_set`."""

    def __init__(self, trained: TrainedModel, settings: CodingSettings):
        self.trained, self.settings = trained, settings
        dtype = AUTOCAST_DTYPES[settings.precision]
        self._learner = Learner(trained.transformer, trained.heads, settings.adapt, autocast_dtype=dtype)
        self._layers = exit_layers(trained) if "heads" in settings.experts else [trained.config.model.num_layers]
        self._experts = None
        if settings.experts:
            from charlm.inference.experts import Experts  # not without need: it compiles for seconds

            self._experts = Experts(settings.experts, trained.vocabulary.size, len(self._layers), settings.streams)
            if "train" in settings.experts:
                self._experts.read(Scorer(trained, load_corpus(trained.config.data), "train").ids)
        with torch.inference_mode():
            self._cache = KVCache(trained.config.model, settings.streams, trained.device, settings.dtype)
        self.begin()

    @torch.inference_mode()
    def begin(self) -> Tensor:
        """Begin all streams without context; returns the logits [S, V] of the first symbols."""
        self._cache.lengths.zero_()
        self._unlearned = self.settings.context
        if self._experts is not None:
            self._experts.restart()
        shape = (self.settings.streams, len(self._layers), self.trained.vocabulary.size)
        return self._mixed(torch.zeros(shape, device=self.trained.device))

    @torch.inference_mode()
    def walk(self, ids_N: np.ndarray, bar: tqdm) -> Iterator[tuple[np.ndarray, Tensor]]:
        """The indices [A] of the streams' next symbols and their logits [A, V], step by step.

        A decoder fills in the symbols before it asks for more.
        """
        S = self.settings.streams
        each, longer = divmod(len(ids_N), S)
        starts_S = np.arange(S) * each + np.minimum(np.arange(S), longer)
        symbols_S = np.zeros(S, np.int64)
        logits_SV = self.begin()
        steps = math.ceil(len(ids_N) / S)
        for step in range(steps):
            num_active = S if step < each else longer
            where_A = starts_S[:num_active] + step
            yield where_A, logits_SV[:num_active]
            symbols_S[:num_active] = ids_N[where_A]
            bar.update(num_active)
            if step + 1 < steps:
                logits_SV = self.append(symbols_S)

    @torch.inference_mode()
    def append(self, symbols_S: np.ndarray) -> Tensor:
        """Read a symbol of each stream; returns the logits [S, V] of the next."""
        start, ids_SC = self._cache.length, self._cache.ids
        if start == self.settings.context:
            if self.settings.adapt is not None:
                self._learn(symbols_S)
            self._cache.lengths.zero_()
            earlier = self.settings.context - self.settings.stride
            ids_SC[:, :earlier] = ids_SC[:, start - earlier : start].clone()
            start = earlier
        ids_SC[:, start] = torch.from_numpy(symbols_S.astype(np.int64))
        at_once = max(1, READ_AT_ONCE // self.settings.streams)
        for ids_ST in ids_SC[:, self._cache.length : start + 1].split(at_once, dim=1):
            logits_SHV = self._read(ids_ST)
        if self._experts is not None:
            self._experts.update(symbols_S)
        return self._mixed(logits_SHV)

    def _mixed(self, logits_SHV: Tensor) -> Tensor:
        """The last layer's logits or, where there are experts, the logarithms of their mixture: [S, V]."""
        if self._experts is None:
            return logits_SHV[:, -1]
        log_probabilities = in_float64(logits_SHV).log_softmax(dim=-1)
        return torch.from_numpy(np.log(self._experts.predict(log_probabilities.cpu().numpy())))

    @torch.inference_mode(False)
    def _learn(self, symbols_S: np.ndarray) -> None:
        """Learn from the symbols that a full context, and then `symbols_S`, has added."""
        newest_S1 = torch.from_numpy(symbols_S.astype(np.int64))[:, None].to(self.trained.device)
        windows_SW = torch.cat([self._cache.ids[:, : self.settings.context], newest_S1], dim=1)
        counts_SQ = torch.ones_like(windows_SW[:, -self._unlearned :], dtype=torch.bool)
        self._learner.learn(windows_SW, counts_SQ)
        self._unlearned = self.settings.stride

    def _read(self, ids_ST: Tensor) -> Tensor:
        device, dtype = self.trained.device, self.settings.dtype
        autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        with full_fp32_matmul(device, ids_ST.numel()), autocast:
            hidden = self._learner.transformer(ids_ST, layers=self._layers, cache=self._cache, num_last=1)
        with full_fp32_matmul(device, len(ids_ST)):
            logits = [self._learner.heads(hidden[layer].float(), layer)[:, 0, 0] for layer in self._layers]
        return torch.stack(logits, dim=1)


@contextmanager
def threads_set(num_threads: int) -> Iterator[None]:
    """Use this number of threads inside the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)  # even the same, to keep MKL from choosing fewer
    try:
        yield
    finally:
        torch.set_num_threads(before)


def probabilities(logits_AV: Tensor) -> np.ndarray:
    """The coder's probabilities, float64 [A, max(V, 2)]; UserError if they are not finite."""
    probabilities_AV = in_float64(logits_AV).softmax(dim=-1).cpu().numpy()
    if not np.isfinite(probabilities_AV).all():
        raise UserError("the model's probabilities are not finite; use another model, or lower rates of adapt")
    if probabilities_AV.shape[1] == 1:
        probabilities_AV = np.pad(probabilities_AV, ((0, 0), (0, 1)))
    return probabilities_AV
