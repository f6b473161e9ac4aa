"""Training windows as a pure function of (seed, step): there is no sampler whose state could be lost.

Shapes: B windows, W characters of a window (context_length + the largest offset).
"""

import numpy as np


def training_windows(ids: np.ndarray, *, seed: int, step: int, batch_size: int, window_length: int) -> np.ndarray:
    """The windows of one optimizer step, for the whole global batch.

    Their starts are drawn uniformly and independently from the text (Al-Rfou et al. 2018, section 4) by a
    counter-based generator keyed by (seed, step), whose raw stream numpy keeps the same between versions. Drawing a
    64-bit number modulo the number of starts is uneven by less than 2^-32 for texts below 4 billion symbols.

    Args:
        ids: the training split, 1-D.
        step: number of completed optimizer steps.

    Returns:
        int64 array [B, W].

    Raises:
        ValueError: the text is shorter than a window.
    """
    num_starts = len(ids) - window_length + 1
    if num_starts < 1:
        raise ValueError(f"a text of {len(ids)} symbols holds no window of {window_length}")
    starts = np.random.Philox(key=np.array([seed, step], dtype=np.uint64)).random_raw(batch_size) % num_starts
    return np.stack([ids[start : start + window_length] for start in starts.astype(np.int64)]).astype(np.int64)
