"""Windows of a text.

Training windows are a pure function of (seed, step): there is no sampler whose state could be lost.
Evaluation windows are placed so that every symbol is scored exactly once.

Shapes: B windows of a batch, W symbols of a training window (context_length + the largest offset),
N windows of an evaluation.
"""

from typing import NamedTuple

import numpy as np

from charlm.config import UserError


def training_windows(
    ids: np.ndarray,
    *,
    seed: int,
    step: int,
    batch_size: int,
    window_length: int,
) -> np.ndarray:
    """The windows of one optimizer step, for the whole global batch.

    Their starts are drawn uniformly and independently (Al-Rfou et al. 2018, section 4) by a counter-based
    generator keyed by (seed, step), whose raw stream numpy keeps the same between versions. A 64-bit
    number modulo the number of starts is uneven by less than 2^-32 for texts below 4 billion symbols.

    Args:
        ids: the training split, 1-D.
        step: number of completed optimizer steps.

    Returns int64 [B, W]. Raises ValueError if the text is shorter than a window.
    """
    num_starts = len(ids) - window_length + 1
    if num_starts < 1:
        raise ValueError(f"a text of {len(ids)} symbols holds no window of {window_length}")
    generator = np.random.Philox(key=np.array([seed, step], dtype=np.uint64))
    starts_B = (generator.random_raw(batch_size) % num_starts).astype(np.int64)
    windows = [ids[start : start + window_length] for start in starts_B]
    return np.stack(windows).astype(np.int64)


def default_stride(context_length: int) -> int:
    """Half the context: the stride of every score unless the user sets another."""
    return max(1, context_length // 2)


class EvaluationWindows(NamedTuple):
    """Windows that together predict every symbol of a text but the first exactly once.

    Window w reads the symbols starts[w] ... starts[w] + length - 1. Its position p predicts symbol
    starts[w] + p + 1, and this prediction is scored if p >= first_scored[w].
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
    last `stride` predictions, which have at least context_length - stride + 1 symbols of context. The last
    window is moved back to end with the text, and scores what is left. Stride 1 is the evaluation of
    Al-Rfou et al. 2018.

    Raises UserError if the stride is not in [1, context_length].
    """
    if not 1 <= stride <= context_length:
        raise UserError(f"stride={stride}: must lie in [1, {context_length}], the model's context", "stride")
    last_symbol = num_symbols - 1
    length = min(context_length, last_symbol)
    if length < 1:
        return EvaluationWindows(np.empty(0, np.int64), np.empty(0, np.int64), 0)
    last_targets = np.append(np.arange(length, last_symbol, stride), last_symbol)
    starts = last_targets - length
    scored_before = np.append(0, last_targets[:-1])
    return EvaluationWindows(starts, scored_before - starts, length)
