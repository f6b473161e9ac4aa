"""Streams of text that a model reads side by side, for encoder, decoder and scorer alike.

A block of text is cut into S streams whose lengths differ by one symbol at most. Every step computes the
next symbol's logits in all streams, so that the decoder does exactly the encoder's arithmetic.

A stream begins without context. When `context` symbols have been read, the newest `context - stride + 1`
are read again in one pass: in one stream every symbol has the context that `evaluate --stride` gives it.

Shapes: S streams, A of which still have symbols, T symbols read at once, V vocabulary.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import constriction
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from charlm.compression.settings import CodingSettings
from charlm.config import UserError
from charlm.model.cache import KVCache
from charlm.model.kernels_cpu import full_fp32_matmul
from charlm.runs.trained import TrainedModel

FAMILY = constriction.stream.model.Categorical(perfect=False)
"""Gives each symbol one unit of 2^-24 and its share of the rest, in float64."""
READ_AT_ONCE = 2**13
"""Symbols of all streams together; bounds the memory that reading again needs."""


class Streams:
    """The model's state in all streams; use it inside `threads_set`."""

    def __init__(self, trained: TrainedModel, settings: CodingSettings):
        self.trained, self.settings = trained, settings
        with torch.inference_mode():
            self._cache = KVCache(trained.config.model, settings.streams, trained.device, settings.dtype)

    @torch.inference_mode()
    def walk(self, ids_N: np.ndarray, bar: tqdm) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Go through a block step by step; a decoder fills in the symbols before it asks for more.

        Yields the indices [A] of the streams' next symbols, and their logits [A, V].
        """
        S = self.settings.streams
        each, longer = divmod(len(ids_N), S)
        starts_S = np.arange(S) * each + np.minimum(np.arange(S), longer)
        symbols_S = np.zeros(S, np.int64)
        self._cache.lengths.zero_()
        logits_SV = torch.zeros(S, self.trained.vocabulary.size, device=self.trained.device)
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
            self._cache.lengths.zero_()
            earlier = self.settings.context - self.settings.stride
            ids_SC[:, :earlier] = ids_SC[:, start - earlier : start].clone()
            start = earlier
        ids_SC[:, start] = torch.from_numpy(symbols_S.astype(np.int64))
        at_once = max(1, READ_AT_ONCE // self.settings.streams)
        for ids_ST in ids_SC[:, self._cache.length : start + 1].split(at_once, dim=1):
            logits_SV = self._read(ids_ST)
        return logits_SV

    def _read(self, ids_ST: Tensor) -> Tensor:
        last = self.trained.config.model.num_layers
        device, dtype = self.trained.device, self.settings.dtype
        autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        with full_fp32_matmul(device, ids_ST.numel()), autocast:
            hidden_S1D = self.trained.transformer(ids_ST, cache=self._cache, num_last=1)[last]
        with full_fp32_matmul(device, len(ids_ST)):
            return self.trained.heads(hidden_S1D.float(), last)[:, 0, 0]


@contextmanager
def threads_set(num_threads: int) -> Iterator[None]:
    """Use this number of threads inside the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)  # even if it is the same, to keep MKL from choosing fewer
    try:
        yield
    finally:
        torch.set_num_threads(before)


def probabilities(logits_AV: Tensor) -> np.ndarray:
    """The coder's probabilities, float64 [A, max(V, 2)]; UserError if they are not finite."""
    probabilities_AV = logits_AV.double().softmax(dim=-1).cpu().numpy()
    if not np.isfinite(probabilities_AV).all():
        raise UserError("the model's probabilities are not finite; use another model")
    if probabilities_AV.shape[1] == 1:
        probabilities_AV = np.pad(probabilities_AV, ((0, 0), (0, 1)))
    return probabilities_AV
