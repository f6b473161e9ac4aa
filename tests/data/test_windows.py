"""Training windows: a pure function of (seed, step), uniform over the text. Shapes: B windows, W their length."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from charlm.data.windows import training_windows

MASK = 2**64 - 1


def philox4x64(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")."""
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * counter[0], 2**64)
        high1, low1 = divmod(0xCA5A826395121157 * counter[2], 2**64)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B97F4A7C15) & MASK, (key[1] + 0xBB67AE8584CAA73B) & MASK]
    return counter


def starts(num_symbols: int, **arguments) -> list[int]:
    """Where the windows of a text of `num_symbols` begin: its symbols are their own positions."""
    return training_windows(np.arange(num_symbols), **arguments)[:, 0].tolist()


def test_starts_come_from_the_published_generator():
    """Another stream, after an upgrade or a change here: every recorded run would see other text than before."""
    # Known answers of the generator's authors, for the reference above.
    assert philox4x64([0] * 4, [0] * 2)[:2] == [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC]
    assert philox4x64([MASK] * 4, [MASK] * 2)[:2] == [0x87B092C3013FE90B, 0x438C3C67BE8D0224]
    for seed, step in [(0, 0), (7, 11), (2**63 - 1, 8_000_000)]:
        numbers = philox4x64([1, 0, 0, 0], [seed, step]) + philox4x64([2, 0, 0, 0], [seed, step])
        expected = [number % (100_003 - 19 + 1) for number in numbers]
        assert starts(100_003, seed=seed, step=step, batch_size=8, window_length=19) == expected


def test_windows_are_stretches_of_the_text():
    """Symbols skipped, repeated, wrapped around or cut to the type of the file."""
    text = np.random.default_rng(0).integers(256, size=300).astype(np.uint8)
    windows_BW = training_windows(text, seed=1, step=2, batch_size=5, window_length=20)
    assert windows_BW.shape == (5, 20)
    assert windows_BW.dtype == np.int64
    begins = starts(300, seed=1, step=2, batch_size=5, window_length=20)
    for window_W, begin in zip(windows_BW, begins, strict=True):
        assert window_W.tolist() == text[begin : begin + 20].tolist()


def test_nothing_is_remembered_between_calls():
    """Windows that depend on what was drawn before, on global random state or on the process: no exact resuming."""
    arguments = {"batch_size": 4, "window_length": 10}
    in_order = {step: starts(1000, seed=3, step=step, **arguments) for step in range(20)}
    for step in (19, 0, 7, 7):
        np.random.seed(step)
        assert starts(1000, seed=3, step=step, **arguments) == in_order[step]
    code = (
        "import numpy as np; from charlm.data.windows import training_windows as windows;"
        "print(windows(np.arange(1000), seed=3, step=7, batch_size=4, window_length=10)[:, 0].tolist())"
    )
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert elsewhere.stdout.strip() == str(in_order[7])


def test_every_step_and_seed_has_its_own_windows():
    """The same batch again and again, or seed 1 that repeats seed 0 a step later."""
    batches = {
        tuple(starts(100_003, seed=seed, step=step, batch_size=4, window_length=10))
        for seed in range(10)
        for step in range(10)
    }
    assert len(batches) == 10 * 10


def test_a_window_does_not_depend_on_the_batch_it_is_in():
    """Processes that take slices of the global batch must agree on it, whatever the size of their slices."""
    whole = starts(1000, seed=5, step=6, batch_size=16, window_length=10)
    for size in (1, 3, 8, 15):
        assert starts(1000, seed=5, step=6, batch_size=size, window_length=10) == whole[:size]


@pytest.mark.parametrize("num_starts", [1, 2, 7])
def test_first_and_last_window_are_drawn_and_none_beyond(num_starts):
    """A text whose last symbols are never predicted, or a window that ends beyond it."""
    drawn = starts(20 + num_starts - 1, seed=0, step=0, batch_size=200, window_length=20)
    assert set(drawn) == set(range(num_starts))


def test_starts_are_uniform():
    """Starts that favour a part of the text: chi-square over 50 bins, within its central 99.8 %."""
    drawn = [
        start for step in range(200) for start in starts(50_009, seed=0, step=step, batch_size=50, window_length=10)
    ]
    counts = Counter(start // 1000 for start in drawn)
    statistic = sum((counts[part] - 200) ** 2 / 200 for part in range(50))
    assert 23.98 < statistic < 85.35  # quantiles of chi-square with 49 degrees of freedom


def test_a_text_shorter_than_a_window_is_refused():
    """A negative number of starts, taken modulo."""
    with pytest.raises(ValueError, match="a text of 19 symbols holds no window of 20"):
        starts(19, seed=0, step=0, batch_size=1, window_length=20)
