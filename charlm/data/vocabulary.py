"""Text <-> ids."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from charlm.config import UserError


class Vocabulary(Protocol):
    """What every vocabulary can do. Ids are 1-D arrays; text is bytes, so that nothing is lost."""

    name: ClassVar[str]

    @property
    def size(self) -> int:
        """V, the number of symbols."""

    def encode(self, data: bytes) -> np.ndarray:
        """The ids of a text, in the smallest unsigned type that holds them."""

    def decode(self, ids: np.ndarray) -> bytes:
        """The text of some ids; the inverse of `encode`."""

    def count_characters(self, ids: np.ndarray) -> int:
        """Characters in the text of some ids. Counts of consecutive pieces add up to that of the whole."""

    def to_dict(self) -> dict[str, Any]:
        """What JSON keeps, for `vocabulary_from_dict`."""


@dataclass(frozen=True)
class ByteVocabulary:
    """The 256 byte values, for any text (Al-Rfou et al. 2018 use it for text8 and enwik8 alike)."""

    name: ClassVar[str] = "bytes"
    size: ClassVar[int] = 256

    utf8: bool = True
    """Whether the text is UTF-8. If not, every byte counts as one character."""

    def encode(self, data: bytes) -> np.ndarray:
        """Bytes as uint8 ids."""
        return np.frombuffer(data, np.uint8).copy()  # PyTorch warns about arrays that cannot be written to

    def decode(self, ids: np.ndarray) -> bytes:
        """Ids as bytes.

        Raises:
            ValueError: an id is not in [0, 256).
        """
        ids = np.asarray(ids)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.size:
            raise ValueError(f"ids run from {ids.min()} to {ids.max()}; those of bytes lie in [0, {self.size})")
        return ids.astype(np.uint8).tobytes()

    def count_characters(self, ids: np.ndarray) -> int:
        """UTF-8 characters, counted at their first byte: all bytes but the continuation bytes 0b10xxxxxx."""
        ids = np.asarray(ids)
        return int(np.count_nonzero(ids & 0b11000000 != 0b10000000)) if self.utf8 else ids.size

    def to_dict(self) -> dict[str, Any]:
        """What JSON keeps, for `vocabulary_from_dict`."""
        return {"name": self.name} | asdict(self)


def vocabulary_from_dict(record: dict[str, Any]) -> Vocabulary:
    """The vocabulary that `to_dict` described.

    Raises:
        UserError: the record is not that of a vocabulary.
    """
    match record:
        case {"name": ByteVocabulary.name, "utf8": bool(utf8), **rest} if not rest:
            return ByteVocabulary(utf8)
    raise UserError(f"vocabulary {record!r}: not one that this version of charlm knows")
