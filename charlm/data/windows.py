"""Windows of a text. In training, a pure function of (seed, step): there is no sampler whose state could be lost.

Shapes: B windows of a batch, W symbols of a training window (context_length + the largest offset),
N windows of an evaluation.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from charlm.config import UserError

ROUNDS = 8  # with fewer, not all orders of a few windows are equally likely


def training_windows(
    texts: Sequence[np.ndarray],
    *,
    shares: Sequence[float] = (1.0,),
    seed: int,
    step: int,
    batch_size: int,
    window_length: int,
    stride: int | None = None,
    divisor: int = 1,
) -> np.ndarray:
    """The windows [B, W], int64, of the whole global batch after `step` completed optimizer steps.

    Each is from one of `texts`, drawn with probabilities `shares`, and starts anywhere in it (Al-Rfou et al.
    2018, section 4). The generator is keyed by (seed, step); numpy keeps its raw stream between versions.
    Starts are uneven by less than 2^-32 for texts below 4 billion symbols.

    With a `stride` they come in epochs of one text instead, see `epoch_starts`; so many as `divisor` share one.
    """
    offsets = np.minimum(-(-(stride or 0) * np.arange(divisor) // divisor), (stride or 1) - 1)
    span = window_length + int(offsets[-1])
    num_starts = np.array(list(map(len, texts)), np.uint64) - span + 1
    texts_B = np.zeros(batch_size, np.int64)
    if stride is None:
        key = np.array([seed, step], dtype=np.uint64)
        # Far behind the draws of the starts, which count from 0.
        chances_B = np.random.Philox(key=key, counter=1 << 192).random_raw(batch_size) / 2.0**64
        texts_B = np.searchsorted(np.cumsum(shares)[:-1], chances_B, side="right")
        starts_B = np.random.Philox(key=key).random_raw(batch_size) % num_starts[texts_B]
    else:
        count = batch_size // divisor
        strides = epoch_starts(int(num_starts[0]), stride, seed=seed, first=step * count, count=count)
        starts_B = np.add.outer(strides, offsets).ravel()
    places = zip(texts_B, starts_B.tolist(), strict=True)
    return np.stack([texts[text][start : start + window_length] for text, start in places]).astype(np.int64)


def epoch_starts(num_starts: int, stride: int, *, seed: int, first: int, count: int) -> np.ndarray:
    """Starts number `first`, `first` + 1, ... of a run that draws without replacement: int64 [count].

    In each epoch every start of a grid comes once, in an order keyed by (seed, epoch). The grid's starts
    are `stride` apart; where it begins is drawn anew, so that in time windows start everywhere.
    """
    size = max(1, num_starts // stride)
    places = num_starts - (size - 1) * stride
    starts, end = [], first + count
    while first < end:
        epoch, index = divmod(first, size)
        generator = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
        place, *keys = generator.random_raw(1 + ROUNDS).tolist()
        indices = np.arange(index, min(size, index + end - first))
        starts.append(place % places + stride * permuted(indices, size, keys))
        first += len(indices)
    return np.concatenate(starts)


def permuted(indices: np.ndarray, size: int, keys: Sequence[int]) -> np.ndarray:
    """The images of `indices` under a keyed permutation of range(size); no others are computed.

    A Feistel network over two digits, a round per key of 64 bits; what leaves the range goes through
    again until it is back (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    base = math.isqrt(size - 1) + 1
    found = indices.astype(np.uint64)
    outside = np.full(len(found), True)
    while outside.any():
        left, right = np.divmod(found[outside], base)
        for key in keys:
            left, right = right, (left + _mixed(right ^ key) % base) % base
        found[outside] = left * base + right
        outside = found >= size
    return found.astype(np.int64)


def _mixed(bits: np.ndarray) -> np.ndarray:
    """The last step of SplitMix64 (Steele et al. 2014), in which each of 64 bits depends on all."""
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    return bits ^ (bits >> 31)


def default_stride(context_length: int) -> int:
    """Half the context: the stride of every score unless the user sets another."""
    return max(1, context_length // 2)


class EvaluationWindows(NamedTuple):
    """Windows that together predict every symbol of a text but the first exactly once.

    Window w reads `length` symbols from starts[w] on. Its position p predicts symbol
    starts[w] + p + 1, which is scored if p >= first_scored[w].
    """

    starts: np.ndarray
    """int64 [N], ascending."""
    first_scored: np.ndarray
    """int64 [N], each in [0, length)."""
    length: int
    """Symbols of a window: context_length, unless the text is shorter."""


def evaluation_windows(num_symbols: int, context_length: int, stride: int) -> EvaluationWindows:
    """Sliding windows over a text; its first symbol has no context and is not scored.

    Window 0 scores all its predictions. Each later window starts `stride` symbols further and scores its
    last `stride` predictions. The last window is moved back to end with the text, and scores what is
    left. Stride 1 is the evaluation of Al-Rfou et al. 2018.

    Raises UserError if the stride is not in [1, context_length].
    """
    if not 1 <= stride <= context_length:
        raise UserError(f"stride={stride}: must lie in [1, {context_length}]", "stride")
    last_symbol = num_symbols - 1
    length = min(context_length, last_symbol)
    if length < 1:
        return EvaluationWindows(np.empty(0, np.int64), np.empty(0, np.int64), 0)
    last_targets = np.append(np.arange(length, last_symbol, stride), last_symbol)
    starts = last_targets - length
    scored_before = np.append(0, last_targets[:-1])
    return EvaluationWindows(starts, scored_before - starts, length)
