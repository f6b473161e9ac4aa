"""Windows: those of training from a published generator, those of evaluation over every symbol once.

Shapes: B windows, W their length.
"""

from collections import Counter

import numpy as np
import pytest

from charlm.config import UserError
from charlm.data.windows import ROUNDS, epoch_starts, evaluation_windows, permuted, training_windows

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
    return training_windows([np.arange(num_symbols)], **arguments)[:, 0].tolist()


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
    windows_BW = training_windows([text], seed=1, step=2, batch_size=5, window_length=20)
    assert windows_BW.shape == (5, 20)
    assert windows_BW.dtype == np.int64
    begins = starts(300, seed=1, step=2, batch_size=5, window_length=20)
    for window_W, begin in zip(windows_BW, begins, strict=True):
        assert window_W.tolist() == text[begin : begin + 20].tolist()


def test_nothing_is_remembered_between_calls():
    """Windows that depend on what was drawn before, or on global random state: no exact resuming."""
    arguments = {"seed": 3, "batch_size": 4, "window_length": 10}
    in_order = {step: starts(1000, step=step, **arguments) for step in range(20)}
    for step in (19, 0, 7, 7):
        np.random.seed(step)
        assert starts(1000, step=step, **arguments) == in_order[step]


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


def test_texts_are_drawn_by_weight():
    """Guards against shares given to other texts, a text that is never drawn, a place that depends on the text, and
    draws that depend on other windows. Texts are told apart by their size: symbols are positions, plus 1,000 each."""
    texts, shares = [np.arange(size) + 1000 * text for text, size in enumerate((40, 500, 90))], (0.25, 0.7, 0.05)
    counts = Counter()
    for seed, step in [(0, 0), (7, 11), (2**63 - 1, 8_000_000), *((1, step) for step in range(300))]:
        arguments = {"shares": shares, "seed": seed, "step": step, "window_length": 19}
        found = training_windows(texts, batch_size=8, **arguments)
        places = philox4x64([1, 0, 0, 0], [seed, step]) + philox4x64([2, 0, 0, 0], [seed, step])
        chances = philox4x64([1, 0, 0, 1], [seed, step]) + philox4x64([2, 0, 0, 1], [seed, step])
        for window, place, chance in zip(found.tolist(), places, chances, strict=True):
            text = (chance >= 0.25 * 2**64) + (chance >= 0.95 * 2**64)
            start = 1000 * text + place % (len(texts[text]) - 19 + 1)
            assert window == list(range(start, start + 19))
            counts[text] += 1
        assert training_windows(texts, batch_size=3, **arguments).tolist() == found[:3].tolist()
    for text, share in enumerate(shares):  # within four standard deviations
        assert abs(counts[text] - 2424 * share) < 4 * (2424 * share * (1 - share)) ** 0.5


def permutation(size: int, keys: list[int]) -> list[int]:
    """Where a Feistel network over two digits takes 0, 1, ...; numbers outside the range walk until they are back."""

    def mixed(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
        return x ^ (x >> 31)

    def walk(number: int) -> int:
        left, right = divmod(number, base)
        for key in keys:
            left, right = right, (left + mixed(right ^ key)) % base
        number = left * base + right
        return number if number < size else walk(number)

    assert mixed(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # the first number of SplitMix64 from seed 0
    base = next(base for base in range(1, size + 1) if base * base >= size)
    return [walk(number) for number in range(size)]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9, 10, 100, 1009])
def test_a_permutation_is_computed_number_by_number(size):
    """Guards against a start that comes twice or never, and against arithmetic that overflows."""
    keys = philox4x64([1, 0, 0, 0], [size, 0]) + philox4x64([2, 0, 0, 0], [size, 0])
    whole = permuted(np.arange(size), size, keys)
    assert sorted(whole) == list(range(size))
    assert whole.tolist() == permutation(size, keys)
    for index in {0, size // 2, size - 1}:
        assert permuted(np.array([index]), size, keys) == whole[index]


def test_all_orders_are_equally_likely():
    """Guards against rounds that hardly mix: neighbours that stay neighbours, epochs that begin alike. Of 6 orders of
    three windows, each comes in a sixth of 6000 epochs, within four standard deviations."""
    starts = [tuple(epoch_starts(30, 10, seed=1, first=3 * epoch, count=3) // 10) for epoch in range(6000)]
    counts = Counter(starts)
    assert len(counts) == 6 and all(abs(count - 1000) < 4 * (1000 * 5 / 6) ** 0.5 for count in counts.values())
    many = epoch_starts(100_000, 10, seed=1, first=0, count=10_000)
    assert abs(np.corrcoef(many[1:], many[:-1])[0, 1]) < 0.04 and abs(np.corrcoef(many, range(10_000))[0, 1]) < 0.04


def test_epochs_come_from_the_published_generator():
    """Another order, after an upgrade or a change here: a run that is resumed would read some windows twice."""
    assert ROUNDS == 8
    seed, num_starts, stride = 7, 128, 10  # twelve strides, and room for another 8 places
    for epoch in (0, 1, 123_456):
        place, *keys = [n for counter in (1, 2, 3) for n in philox4x64([counter, 0, 0, 0], [seed, epoch])][: 1 + ROUNDS]
        expected = [place % 18 + stride * index for index in permutation(12, keys)]
        assert epoch_starts(num_starts, stride, seed=seed, first=12 * epoch, count=12).tolist() == expected


EPOCHS = [
    pytest.param(1, 4, id="full windows"),
    pytest.param(4, 4, id="quarters"),
    pytest.param(3, 5, id="uneven parts"),  # of 3 symbols: one in 10 is left out
    pytest.param(1, 29, id="many epochs in a step"),
]


@pytest.mark.parametrize(("divisor", "strides"), EPOCHS)
def test_every_start_comes_once_an_epoch(divisor, strides):
    """Guards against starts that come twice or never in an epoch, windows that overlap or leave the text, and the same
    grid or the same order in all epochs. The text is 137 symbols, of which an epoch reads twelve strides of 10."""
    length = 10 // divisor
    arguments = {"seed": 3, "batch_size": strides * divisor, "window_length": length + 2, "stride": 10}
    steps = [starts(137, step=step, divisor=divisor, **arguments) for step in range(60)]
    windows = np.concatenate(steps)[: 120 * divisor]
    assert windows.min() >= 0 and windows.max() + length + 2 <= 137
    epochs = np.split(windows, 10)
    begins = [epoch.min() for epoch in epochs]
    for epoch, begin in zip(epochs, begins, strict=True):
        read = Counter(symbol for start in epoch for symbol in range(start, start + length))
        assert set(read.values()) == {1}
        assert set(read) <= set(range(begin, begin + 120)) and len(read) == 12 * length * divisor
    assert len(set(begins)) > 1
    assert len({tuple(epoch - begin) for epoch, begin in zip(epochs, begins, strict=True)}) == 10


def test_growing_windows_go_on_in_the_same_epoch():
    """Guards against an epoch that begins anew, or jumps, where windows become longer or the run does: a step reads the
    same strides at every length of its windows."""
    for step in range(40):
        whole = starts(137, seed=3, step=step, batch_size=5, window_length=12, stride=10)
        for divisor in (2, 5, 10, 20):
            parts = {"divisor": divisor, "window_length": max(1, 10 // divisor) + 2}
            short = starts(137, seed=3, step=step, batch_size=5 * divisor, stride=10, **parts)
            assert short[::divisor] == whole
            assert all(0 <= start - whole[index // divisor] < 10 for index, start in enumerate(short))


@pytest.mark.parametrize(("num_symbols", "places"), [(12, {0}), (15, {0, 1, 2, 3}), (41, set(range(30)))])
def test_epochs_reach_both_ends_of_the_text(num_symbols, places):
    """Guards against text before the first or behind the last stride that is never read, and a text of one window."""
    drawn = {
        start
        for step in range(99)
        for start in starts(num_symbols, seed=0, step=step, batch_size=8, window_length=12, stride=10)
    }
    assert drawn == places


def targets(windows):
    """The symbols that count, window by window, by the definition of the fields."""
    return [
        [start + position + 1 for position in range(first, windows.length)]
        for start, first in zip(windows.starts.tolist(), windows.first_scored.tolist(), strict=True)
    ]


@pytest.mark.parametrize(
    ("num_symbols", "stride", "starts", "scored"),
    [
        (12, 3, [0, 3, 6, 7], [[1, 2, 3, 4], [5, 6, 7], [8, 9, 10], [11]]),
        (9, 1, [0, 1, 2, 3, 4], [[1, 2, 3, 4], [5], [6], [7], [8]]),  # the paper's: from symbol 4 on, 4 of context
    ],
)
def test_evaluation_windows_by_hand(num_symbols, stride, starts, scored):
    """Guards against an off-by-one in starts, in scored positions or in the tail that is moved back."""
    windows = evaluation_windows(num_symbols, context_length=4, stride=stride)
    assert windows.length == 4
    assert windows.starts.tolist() == starts
    assert targets(windows) == scored


@pytest.mark.parametrize("num_symbols", [1, 2, 3, 7, 8, 9, 10, 40])
@pytest.mark.parametrize("stride", [1, 2, 3, 8])
def test_every_symbol_but_the_first_is_scored_once_and_in_order(num_symbols, stride):
    """Guards against dropped tails and double counting, and windows that leave the text."""
    windows = evaluation_windows(num_symbols, context_length=8, stride=stride)
    assert [target for window in targets(windows) for target in window] == list(range(1, num_symbols))
    assert np.all(windows.starts >= 0)
    assert np.all(windows.starts + windows.length <= num_symbols - 1)
    assert all(targets(windows))


@pytest.mark.parametrize("stride", [0, -1, 9])
def test_a_stride_out_of_range_is_refused(stride):
    """Guards against strides that would skip symbols (above the context) or never advance."""
    with pytest.raises(UserError, match=f"stride={stride}:") as refused:
        evaluation_windows(100, context_length=8, stride=stride)
    assert refused.value.option == "stride"
