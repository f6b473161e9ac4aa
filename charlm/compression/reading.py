"""Reads a file as symbols of a vocabulary, in pieces, so that its size does not matter."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np

from charlm.config import UserError
from charlm.data.vocabulary import EncodingError, Vocabulary

PIECE = 2**20
"""Bytes that are read at once."""


@dataclass(frozen=True, kw_only=True)
class Content:
    """Facts from one pass over a file."""

    bytes: int
    symbols: int
    characters: int
    sha256: bytes


def scan(file: BinaryIO, name: Path, vocabulary: Vocabulary) -> Content:
    """Read a file once; UserError if the vocabulary cannot express it."""
    symbols = characters = 0
    for ids in _pieces(file, name, vocabulary):
        symbols += len(ids)
        characters += vocabulary.count_characters(ids)
    return Content(bytes=file.tell(), symbols=symbols, characters=characters, sha256=sha256_of(file))


def blocks_of(file: BinaryIO, name: Path, vocabulary: Vocabulary, block: int) -> Iterator[np.ndarray]:
    """The ids of a file, `block` of them at a time; the last array may be shorter."""
    waiting, held = [], 0
    for ids in _pieces(file, name, vocabulary):
        while held + len(ids) >= block:
            yield np.concatenate([*waiting, ids[: block - held]])
            ids, waiting, held = ids[block - held :], [], 0
        waiting.append(ids)
        held += len(ids)
    if held:
        yield np.concatenate(waiting)


def sha256_of(file: BinaryIO) -> bytes:
    """The digest of the whole file."""
    file.seek(0)
    return hashlib.file_digest(file, "sha256").digest()


def bytes_of(file: BinaryIO) -> Iterator[bytes]:
    """The whole file, `PIECE` bytes at a time."""
    file.seek(0)
    return iter(lambda: file.read(PIECE), b"")


def _pieces(file: BinaryIO, name: Path, vocabulary: Vocabulary) -> Iterator[np.ndarray]:
    """The ids of a file, cut between UTF-8 characters."""
    offset, rest = 0, b""
    for piece in chain(bytes_of(file), [b""]):
        data = rest + piece
        end = _start_of_last_character(data) if piece else len(data)
        try:
            yield vocabulary.encode(data[:end])
        except EncodingError as error:
            raise UserError(
                f"{name}: {error.problem} at byte {offset + error.offset:,}, and the model's vocabulary "
                f"({vocabulary.name}) cannot express it; use a model of bytes"
            ) from None
        rest = data[end:]
        offset += end


def _start_of_last_character(data: bytes) -> int:
    """Index at which the last UTF-8 character starts, complete or not; the end if none starts in the last 4 bytes."""
    for start in range(len(data) - 1, max(len(data) - 5, -1), -1):
        if data[start] & 0b11000000 != 0b10000000:
            return start
    return len(data)
