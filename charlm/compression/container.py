"""The file that compression writes: a header, blocks of coded symbols, and a checksum over all of it.

    charlm, format version      6 bytes, uint16
    header                      see `Header`; its last field is a text of up to 255 bytes
    blocks                      each: uint32 W, then W words of 32 bits from the range coder
    checksum                    the first 8 bytes of the SHA-256 of everything before

All numbers are little-endian. The checksum finds damage before anything is decoded, the SHA-256 of the content in the
header proves what was decoded, and what a header may claim is limited (see `read_header`), so that a file made to hurt
costs no more memory and time than the text that it could hold.
"""

import errno
import hashlib
import math
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from charlm.config import UserError
from charlm.runs.folder import sync

MAGIC = b"charlm"
VERSION = 3
PRECISIONS = ("fp32", "bf16", "fp16")
CODER_BITS = 24
"""The range coder counts probabilities in units of 2^-24, and gives every symbol one unit at least."""
MAX_STREAMS = 2**14
MAX_BLOCK = 2**26
MAX_THREADS = 2**10
MAX_SYMBOL_BYTES = 4
"""A symbol of any vocabulary is a byte or a character."""
_FIELDS = struct.Struct("<QQ32s16s8s8sIIIIHBB")
_PREFIX = struct.Struct("<6sH")
_COUNT = struct.Struct("<I")
_CHECKSUM_BYTES = 8
_PIECE = 2**20


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a decoder must know, and what it must have in common with the encoder."""

    length: int
    """Bytes of the content."""
    symbols: int
    """Symbols of the vocabulary that the content was coded as."""
    content: bytes
    """SHA-256 of the content."""
    model: bytes
    """The first 16 bytes of a SHA-256 over the model."""
    vocabulary: bytes
    """The first 8 bytes of a SHA-256 over the vocabulary."""
    probe: bytes
    """The first 8 bytes of a SHA-256 over what model and coder make of a fixed text."""
    streams: int
    context: int
    stride: int
    block: int
    """Symbols that are coded together; the last block may have fewer."""
    threads: int
    precision: str
    environment: str
    """Versions of the libraries, device and processor."""

    @property
    def num_blocks(self) -> int:
        """Blocks in the file."""
        return math.ceil(self.symbols / self.block)

    def symbols_of(self, block: int) -> int:
        """Symbols in the block of this number, from 0."""
        return min(self.block, self.symbols - block * self.block)

    def pack(self) -> bytes:
        """The file up to its first block."""
        environment = self.environment.encode()[:255]
        fields = _FIELDS.pack(
            self.length,
            self.symbols,
            self.content,
            self.model,
            self.vocabulary,
            self.probe,
            self.streams,
            self.context,
            self.stride,
            self.block,
            self.threads,
            PRECISIONS.index(self.precision),
            len(environment),
        )
        return _PREFIX.pack(MAGIC, VERSION) + fields + environment


class Writer:
    """Writes header and blocks to a file, and the checksum when told that this was all."""

    def __init__(self, file: BinaryIO, header: Header):
        self._file, self._digest = file, hashlib.sha256()
        self._write(header.pack())

    def add(self, words: np.ndarray) -> None:
        """One more block: uint32 [W]."""
        self._write(_COUNT.pack(len(words)) + words.astype("<u4").tobytes())

    def finish(self) -> None:
        """The checksum."""
        self._write(self._digest.digest()[:_CHECKSUM_BYTES])

    def _write(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)


def read_header(file: BinaryIO, name: str, vocabulary_size: int) -> Header:
    """The header of a whole, undamaged file; the file is left at its first block.

    Its claims are held against the file's size: the coder gives no symbol more than all but V - 1 of its 2^24 units, so
    each costs a little at least, and few words cannot stand for many symbols; nor does one cost more than 24 bits.

    Args:
        name: of the file, for messages.
        vocabulary_size: V, of the model that is to decode it.

    Raises:
        UserError: not such a file, another format version, damaged, or with a header that cannot be true.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    prefix = file.read(_PREFIX.size)
    if not prefix.startswith(MAGIC) or len(prefix) < _PREFIX.size:
        raise UserError(f"{name}: not a file that charlm has compressed ({size:,} bytes); give one that it has")
    _, version = _PREFIX.unpack(prefix)
    if version != VERSION:
        raise UserError(f"{name}: its format has version {version}, and this charlm reads {VERSION}; use the other one")
    if not _checksum_matches(file, size):
        raise UserError(f"{name}: is damaged or cut short, its checksum does not match; get a whole copy")
    file.seek(_PREFIX.size)
    header = _unpack(file, size, name)
    first_block = file.tell()
    _check_blocks(file, size - _CHECKSUM_BYTES, header, name, max(2, vocabulary_size))
    file.seek(first_block)
    return header


def read_block(file: BinaryIO) -> np.ndarray:
    """The next block's words, uint32 [W], in the processor's byte order."""
    (count,) = _COUNT.unpack(file.read(_COUNT.size))
    return np.frombuffer(file.read(4 * count), "<u4").astype(np.uint32)


def largest_claim(words: int, vocabulary_size: int) -> int:
    """The most symbols that so many words can stand for; the coder's last words may say less than 64 bits."""
    bits_per_symbol = -math.log2(1 - (vocabulary_size - 1) / 2**CODER_BITS)
    return math.floor((32 * words + 64) / bits_per_symbol)


def open_regular(path: Path) -> BinaryIO:
    """A file to read from its beginning and again; UserError if it is none, or cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # or a pipe that nobody writes to would hang
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            os.close(descriptor)
            raise UserError(f"{path}: is {'a folder' if stat.S_ISDIR(mode) else 'a pipe or a device'}; give a file")
        return os.fdopen(descriptor, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


@contextmanager
def replacing(path: Path, source: Path) -> Iterator[BinaryIO]:
    """A file to write and read, which takes its place at `path` when the block ends well, and else leaves nothing.

    Raises:
        UserError: `source` or something that is no file is there, the disk is full, or the folder cannot be written.
    """
    if path.exists() and (not path.is_file() or path.samefile(source)):
        raise UserError(f"{path}: is {'the input' if path.is_file() else 'no file'}; name another output")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        way_out = "; free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise UserError(f"{path}: cannot be written ({error.strerror or error}){way_out}") from error


def _checksum_matches(file: BinaryIO, size: int) -> bool:
    digest, left = hashlib.sha256(), size - _CHECKSUM_BYTES
    file.seek(0)
    while left > 0 and (piece := file.read(min(_PIECE, left))):
        digest.update(piece)
        left -= len(piece)
    return left == 0 and file.read(_CHECKSUM_BYTES + 1) == digest.digest()[:_CHECKSUM_BYTES]


def _unpack(file: BinaryIO, size: int, name: str) -> Header:
    """The header, each of its fields within its limits."""
    packed = file.read(_FIELDS.size)
    if len(packed) < _FIELDS.size or _PREFIX.size + _FIELDS.size + packed[-1] + _CHECKSUM_BYTES > size:
        raise _lie(name, "is longer than the file")
    *fields, precision, environment_bytes = _FIELDS.unpack(packed)
    length, symbols, content, model, vocabulary, probe, streams, context, stride, block, threads = fields
    try:
        environment = file.read(environment_bytes).decode()
    except UnicodeDecodeError:
        raise _lie(name, "names the machine in something other than UTF-8") from None
    if not symbols <= length <= MAX_SYMBOL_BYTES * symbols:
        raise _lie(name, f"claims {length:,} bytes in {symbols:,} symbols")
    if not 1 <= streams <= MAX_STREAMS or not streams <= block <= MAX_BLOCK:
        raise _lie(name, f"claims {streams:,} streams, and blocks of {block:,} symbols")
    if not 1 <= stride <= context:
        raise _lie(name, f"claims a context of {context:,} and a stride of {stride:,}")
    if not 1 <= threads <= MAX_THREADS or precision >= len(PRECISIONS):
        raise _lie(name, f"claims {threads:,} threads and a precision of number {precision}")
    return Header(
        length=length,
        symbols=symbols,
        content=content,
        model=model,
        vocabulary=vocabulary,
        probe=probe,
        streams=streams,
        context=context,
        stride=stride,
        block=block,
        threads=threads,
        precision=PRECISIONS[precision],
        environment=environment,
    )


def _check_blocks(file: BinaryIO, end: int, header: Header, name: str, vocabulary_size: int) -> None:
    if header.num_blocks * _COUNT.size > end:
        raise _lie(name, f"claims {header.symbols:,} symbols, more than a file of its size can hold")
    for block in range(header.num_blocks):
        packed = file.read(_COUNT.size)
        count = _COUNT.unpack(packed)[0] if len(packed) == _COUNT.size else end
        if file.tell() + 4 * count > end:
            raise _lie(name, f"claims {header.symbols:,} symbols, and the file ends before them")
        symbols = header.symbols_of(block)
        if symbols > largest_claim(count, vocabulary_size) or 32 * count > CODER_BITS * symbols + 64:
            raise _lie(name, f"claims {symbols:,} symbols in {4 * count:,} bytes")
        file.seek(4 * count, os.SEEK_CUR)
    if file.tell() != end:
        raise _lie(name, f"claims {header.symbols:,} symbols, and the file goes on after them")


def _lie(name: str, problem: str) -> UserError:
    return UserError(f"{name}: its header {problem}, which cannot be; get a whole copy")
