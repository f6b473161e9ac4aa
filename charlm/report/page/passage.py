"""A passage of text as the page shows it: characters with their cost, and the likeliest in their place.

Shapes: N symbols of the passage, K candidates.
"""

import unicodedata
from codecs import getincrementaldecoder
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from charlm.data.vocabulary import Vocabulary

LEVELS = 9
"""Number of shades; the last stands for 8 bits and more."""
SIGNS = {"\n": "↵", "\t": "⇥", "\r": "␍"}


@dataclass(frozen=True)
class Piece:
    """A character, or a symbol that spells several."""

    text: str
    """As shown, by `visible`."""
    bits: float
    """The cost of all symbols that spell it."""
    likeliest: tuple[tuple[str, float], ...]
    """The likeliest symbols in place of its first, with their probabilities."""
    breaks: bool = False
    """Whether a line ends after it."""
    num_symbols: int = 1

    @property
    def level(self) -> int:
        """The shade, from 0: whole bits."""
        return min(int(self.bits), LEVELS - 1)


def pieces_of(
    vocabulary: Vocabulary, ids_N: np.ndarray, bits_N: np.ndarray, probabilities_NK: np.ndarray, symbols_NK: np.ndarray
) -> list[Piece]:
    """The pieces of a passage; symbols that together spell one character are one piece."""
    symbols = [vocabulary.decode(ids_N[place : place + 1]) for place in range(len(ids_N))]
    pieces = []
    for first, end in pairwise([0, *_ends(symbols)]):
        data = b"".join(symbols[first:end])
        candidates = [visible(vocabulary.decode(symbol)) for symbol in symbols_NK[first][:, None]]
        likeliest = tuple(zip(candidates, probabilities_NK[first].tolist(), strict=True))
        bits = float(bits_N[first:end].sum())
        pieces.append(Piece(visible(data), bits, likeliest, data.endswith(b"\n"), end - first))
    return pieces


def visible(data: bytes) -> str:
    """Text with a sign for every control character; stray bytes read \\xE2.

    Marks that change the direction of writing are spelled out, so that none reorders the text around it.
    """
    return "".join(map(_visible, data.decode("utf-8", "surrogateescape")))


def _visible(character: str) -> str:
    if character in SIGNS:
        return SIGNS[character]
    if 0xDC80 <= ord(character) <= 0xDCFF:
        return f"\\x{ord(character) - 0xDC00:02X}"
    if ord(character) < 0x20:
        return chr(0x2400 + ord(character))
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return f"\\u{ord(character):04X}"
    return character


def _ends(symbols: Sequence[bytes]) -> Iterator[int]:
    """The index after the last symbol of each character."""
    decoder = getincrementaldecoder("utf-8")("surrogateescape")
    for place, symbol in enumerate(symbols, start=1):
        decoder.decode(symbol)
        unfinished, _ = decoder.getstate()
        if not unfinished or place == len(symbols):
            yield place
