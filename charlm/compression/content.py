"""The file to compress, in pieces, and the file to write."""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from charlm.config import UserError
from charlm.data.text_files import blocks
from charlm.data.vocabulary import EncodingError, Vocabulary, whole_characters
from charlm.files import replacing


def pieces_of(file: BinaryIO, digest: Any) -> Iterator[bytes]:
    """A whole file, cut between characters; `digest`, of hashlib, is updated with it."""
    file.seek(0)
    for piece in whole_characters(blocks(file)):
        digest.update(piece)
        yield piece


def scan(pieces: Iterable[bytes], name: Path, vocabulary: Vocabulary) -> dict[str, int]:
    """The size of a text in each unit; UserError if the vocabulary cannot express it."""
    length = symbols = characters = 0
    for piece in pieces:
        try:
            ids = vocabulary.encode(piece)
        except EncodingError as error:
            place = f"{name}: {error.problem} at byte {length + error.offset:,}"
            problem = f"and the model's vocabulary ({vocabulary.name}) cannot express it"
            raise UserError(f"{place}, {problem}; use a model of bytes") from None
        length += len(piece)
        symbols += len(ids)
        characters += vocabulary.count_characters(ids)
    return {"bytes": length, "symbols": symbols, "characters": characters}


def blocks_of(pieces: Iterable[bytes], vocabulary: Vocabulary, block: int) -> Iterator[np.ndarray]:
    """The ids of a text by blocks; the last may be shorter."""
    waiting = vocabulary.encode(b"")
    for piece in pieces:
        waiting = np.concatenate([waiting, vocabulary.encode(piece)])
        while len(waiting) >= block:
            yield waiting[:block]
            waiting = waiting[block:]
    if len(waiting):
        yield waiting


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; UserError if it is not a regular file or cannot be read."""
    if path.exists() and not path.is_file():  # a pipe without a writer would block
        raise UserError(f"{path}: is a folder, a pipe or a device; give a file")
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


@contextmanager
def output(path: Path, source: Path, size: int = 0) -> Iterator[BinaryIO]:
    """A file that becomes `path` when the context ends; UserError if it is `source` or cannot be written."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is not a regular file; name another output")
    if path.exists() and path.samefile(source):
        raise UserError(f"{path}: is the input; name another output")
    try:
        if size > (free := shutil.disk_usage(path.parent).free):
            problem = f"needs {size:,} bytes, and {free:,} are free"
            raise UserError(f"{path}: {problem}; free some space")
        with replacing(path) as temporary, temporary.open("w+b") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
