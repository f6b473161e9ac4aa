"""A passage as it is shown: characters with their surprise, and what was likeliest in their place.

Shapes: N symbols of the passage, K candidates.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from charlm.data.vocabulary import Vocabulary

LEVELS = 9
"""Shades; the last is for all that cost so many bits and more."""


@dataclass(frozen=True)
class Piece:
    """A character, or a symbol of several."""

    text: str
    """As it is shown: nothing in it moves or hides other text."""
    bits: float
    """Of all symbols that spell it."""
    likeliest: tuple[tuple[str, float], ...]
    """In place of its first symbol, with their probabilities."""
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
    """A passage in pieces: symbols that spell one character together are one piece."""
    symbols = [vocabulary.decode(ids_N[place : place + 1]) for place in range(len(ids_N))]
    pieces = []
    for first, end in _characters(symbols):
        data = b"".join(symbols[first:end])
        likeliest = (
            (visible(vocabulary.decode(symbols_NK[first, place : place + 1])), float(probability))
            for place, probability in enumerate(probabilities_NK[first])
        )
        pieces.append(
            Piece(
                text=visible(data),
                bits=float(bits_N[first:end].sum()),
                likeliest=tuple(likeliest),
                breaks=data.endswith(b"\n"),
                num_symbols=end - first,
            )
        )
    return pieces


def visible(data: bytes) -> str:
    """Text in which every character can be seen: ends of lines, tabs and other controls as signs, lone bytes as \\xE2.

    Marks that turn the direction of writing are spelled out, so that none can reorder what stands around it.
    """
    return "".join(map(_visible, data.decode("utf-8", "surrogateescape")))


def _visible(character: str) -> str:
    signs = {"\n": "↵", "\t": "⇥", "\r": "␍"}
    if character in signs:
        return signs[character]
    if 0xDC80 <= ord(character) <= 0xDCFF:
        return f"\\x{ord(character) - 0xDC00:02X}"
    if ord(character) < 0x20:
        return chr(0x2400 + ord(character))
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return f"\\u{ord(character):04X}"
    return character


def _characters(symbols: Sequence[bytes]) -> Iterator[tuple[int, int]]:
    """The first symbol of each character, and the one after its last."""
    starts = [0]
    for place in range(1, len(symbols)):
        so_far = b"".join(symbols[starts[-1] : place])
        continues = symbols[place][:1] and 0x80 <= symbols[place][0] <= 0xBF
        if not (continues and _is_unfinished(so_far)):
            starts.append(place)
    return pairwise([*starts, len(symbols)]) if len(symbols) else iter(())


def _is_unfinished(data: bytes) -> bool:
    """Whether a character of UTF-8 is cut short at the end."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False
