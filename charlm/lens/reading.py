"""A text as a model reads it.

Shapes: N symbols of a text, P pairs of layer and offset, L layers, V vocabulary.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from charlm.compression.report import compressed_sizes
from charlm.config import UserError
from charlm.data.vocabulary import Vocabulary


class Expected(NamedTuple):
    """The likeliest symbol for each place and its probability, [N]; -1 and NaN where nothing is known."""

    symbol: np.ndarray
    probability: np.ndarray


@dataclass(frozen=True)
class Reading:
    """A text as a model reads it. Position n has seen the symbols 0 to n."""

    vocabulary: Vocabulary
    pairs: tuple[tuple[int, int], ...]
    """Layer and offset of each head."""
    ids: np.ndarray
    """[N]."""
    bits: np.ndarray
    """The cost of each symbol by the last layer, float64 [N]; the first has equal probabilities."""
    symbols: np.ndarray
    """The symbol that each head holds likeliest after each position, int32 [P, N]."""
    probabilities: np.ndarray
    """Their probabilities, float32 [P, N]."""
    next_logits: np.ndarray | None
    """Log-probabilities of the symbol after the text, float64 [V]; None if reading was cancelled."""

    def grid(self, offset: int = 1) -> dict[int, Expected]:
        """The symbol that each layer with such a head expected for each place, `offset` symbols before it.

        Raises UserError if no layer has one.
        """
        rows = [row for row, (_, own) in enumerate(self.pairs) if own == offset]
        if not rows:
            choices = ", ".join(map(str, sorted({own for _, own in self.pairs})))
            raise UserError(f"offset={offset}: no layer has such a head; choose one of {choices}", "offset")
        known = max(0, len(self.ids) - offset)
        unknown = (0, 0), (len(self.ids) - known, 0)
        symbols_LN = np.pad(self.symbols[rows, :known], unknown, constant_values=-1)
        probabilities_LN = np.pad(self.probabilities[rows, :known], unknown, constant_values=np.nan)
        layers = [self.pairs[row][0] for row in rows]
        return dict(zip(layers, map(Expected, symbols_LN, probabilities_LN), strict=True))

    def decided(self, offset: int = 1) -> np.ndarray:
        """The lowest layer from which up all expect what the highest expects, int [N]; -1 if nothing is known."""
        grid = self.grid(offset)
        symbols_LN = np.stack([own.symbol for own in grid.values()])
        agree_LN = np.logical_and.accumulate((symbols_LN == symbols_LN[-1])[::-1])[::-1]
        return np.where(symbols_LN[-1] < 0, -1, np.array(list(grid))[agree_LN.argmax(axis=0)])

    @cached_property
    def starts(self) -> np.ndarray:
        """The places at which a character starts, and the first place."""
        return np.flatnonzero(self.vocabulary.starts(self.ids) | (np.arange(len(self.ids)) == 0))

    def pieces(self, since: int = 0) -> list[str]:
        """The character that starts at each place from `since` on, "" where one goes on; joined they are the text.

        Stray bytes are lone surrogates, as in Python's "surrogateescape".
        """
        found = [""] * len(self.ids)
        for first, end in pairwise([*self.starts[self.starts >= since].tolist(), len(self.ids)]):
            found[first] = self.vocabulary.decode(self.ids[first:end]).decode("utf-8", "surrogateescape")
        return found[since:]

    def bits_by_character(self) -> np.ndarray:
        """The cost of each character, float64 [characters]."""
        return np.add.reduceat(self.bits, self.starts) if len(self.ids) else self.bits

    def sizes(self) -> dict[str, int]:
        """The bytes that charlm, without the model, `gzip -9` and `xz -9e` take for the text."""
        data = self.vocabulary.decode(self.ids)
        others = compressed_sizes([data], len(data))
        return {"charlm": math.ceil(self.bits.sum() / 8), "gzip": others["gzip -9"], "xz": others["xz -9e"]}
