import numpy as np
import pytest

from charlm.config import UserError
from charlm.data.windows import evaluation_windows


def targets(windows):
    """The symbols that count, window by window, by the definition of the fields."""
    return [
        [start + position + 1 for position in range(first, windows.length)]
        for start, first in zip(windows.starts.tolist(), windows.first_scored.tolist(), strict=True)
    ]


def test_by_hand():
    """Guards against an off-by-one in starts, in scored positions or in the tail that is moved back."""
    windows = evaluation_windows(num_symbols=12, context_length=4, stride=3)
    assert windows.length == 4
    assert windows.starts.tolist() == [0, 3, 6, 7]
    assert targets(windows) == [[1, 2, 3, 4], [5, 6, 7], [8, 9, 10], [11]]


@pytest.mark.parametrize("num_symbols", [1, 2, 3, 7, 8, 9, 10, 40])
@pytest.mark.parametrize("stride", [1, 2, 3, 8])
def test_every_symbol_but_the_first_is_scored_once_and_in_order(num_symbols, stride):
    """Guards against dropped tails and double counting, and windows that leave the text."""
    windows = evaluation_windows(num_symbols, context_length=8, stride=stride)
    assert [target for window in targets(windows) for target in window] == list(range(1, num_symbols))
    assert np.all(windows.starts >= 0)
    assert np.all(windows.starts + windows.length <= num_symbols - 1)
    assert all(targets(windows))


def test_stride_one_gives_every_symbol_the_whole_context():
    """Guards against a protocol that is not the paper's: from symbol T on, exactly T symbols of context each."""
    windows = evaluation_windows(num_symbols=30, context_length=8, stride=1)
    assert windows.length == 8
    assert windows.starts.tolist() == list(range(22))
    assert windows.first_scored.tolist() == [0] + [7] * 21


def test_short_text_is_one_short_window():
    """Guards against padding, or no score at all, where the text is shorter than the context."""
    windows = evaluation_windows(num_symbols=5, context_length=8, stride=4)
    assert (windows.starts.tolist(), windows.first_scored.tolist(), windows.length) == ([0], [0], 4)


@pytest.mark.parametrize("stride", [0, -1, 9])
def test_a_stride_out_of_range_is_refused(stride):
    """Guards against strides that would skip symbols (above the context) or never advance."""
    with pytest.raises(UserError, match=rf"stride={stride}: must lie between 1 and the model's context of 8"):
        evaluation_windows(100, context_length=8, stride=stride)
