"""A file as symbols of a vocabulary, in pieces, so that its size does not matter."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from charlm.config import UserError
from charlm.data.vocabulary import ByteVocabulary, EncodingError, Vocabulary

PIECE = 2**20
"""Bytes that are read at once."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """What one pass over a file tells."""

    bytes: int
    symbols: int
    characters: int
    sha256: bytes


def measure(file: BinaryIO, name: Path, vocabulary: Vocabulary) -> Text:
    """Read a file once; UserError if the vocabulary lacks a symbol for it."""
    symbols = characters = 0
    for ids in _pieces(file, name, vocabulary):
        symbols += len(ids)
        characters += vocabulary.count_characters(ids)
    return Text(bytes=file.tell(), symbols=symbols, characters=characters, sha256=sha256_of(file))


def blocks_of(file: BinaryIO, name: Path, vocabulary: Vocabulary, block: int) -> Iterator[np.ndarray]:
    """The ids of a file, `block` of them at a time, in the last what is left."""
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
    """That of the whole file."""
    file.seek(0)
    return hashlib.file_digest(file, "sha256").digest()


def _pieces(file: BinaryIO, name: Path, vocabulary: Vocabulary) -> Iterator[np.ndarray]:
    """The ids of a file, cut anywhere between symbols."""
    file.seek(0)
    offset, left = 0, b""
    while data := file.read(PIECE):
        data = left + data
        whole = len(data) if vocabulary.name == ByteVocabulary.name else _end_of_characters(data)
        data, left = data[:whole], data[whole:]
        yield _encode(data, offset, name, vocabulary)
        offset += len(data)
    if left:
        yield _encode(left, offset, name, vocabulary)


def _end_of_characters(data: bytes) -> int:
    """Where the last UTF-8 character of `data` begins if it is not whole, else the end."""
    for back in range(1, min(3, len(data)) + 1):
        first = data[-back]
        if first & 0b11000000 != 0b10000000:
            length = 1 if first < 0xC0 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
            return len(data) - back if back < length else len(data)
    return len(data)


def _encode(data: bytes, offset: int, name: Path, vocabulary: Vocabulary) -> np.ndarray:
    try:
        return vocabulary.encode(data)
    except EncodingError as error:
        raise UserError(
            f"{name}: {error.problem} at byte {offset + error.offset:,}, and the model's vocabulary "
            f"({vocabulary.name}) cannot express it; use a model of bytes"
        ) from None
