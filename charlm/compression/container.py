"""The file that compression writes: a header, blocks of coded symbols, and a checksum over all of it.

    charlm, format version      6 bytes, uint16
    header                      see `Header`; its last field is a text of up to 255 bytes
    blocks                      each: uint32 W, then W words of 32 bits from the range coder
    checksum                    the first 8 bytes of the SHA-256 of everything before

All numbers are little-endian. The checksum finds damage before anything is decoded; the SHA-256 of the content, in the
header, proves that the decoded bytes are right. The header's claims are checked against the file's size (see
`read_header`), so that a malicious file costs no more memory and time than an honest file of its size.
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

from charlm.compression.settings import PRECISIONS, CodingSettings
from charlm.config import UserError
from charlm.files import sync

MAGIC = b"charlm"
VERSION = 3
CODER_BITS = 24
"""The range coder counts probabilities in units of 2^-24 and gives every symbol at least one unit."""
MAX_SYMBOL_BYTES = 4
"""A symbol of any vocabulary is a byte or a character."""
_FACTS = ("length", "symbols", "content", "model", "vocabulary", "probe")
_SETTINGS = ("streams", "context", "stride", "block", "threads")
_FIELDS = struct.Struct("<QQ32s16s8s8sIIIIHBB")
"""Lengths of the header, of its settings, of the precision and of the environment, in bytes."""
_PREFIX = struct.Struct("<6sH")
_COUNT = struct.Struct("<I")
_CHECKSUM_BYTES = 8
_PIECE = 2**20


@dataclass(frozen=True, kw_only=True)
class Header:
    """Settings and environment that a decoder must share with the encoder; see `charlm.compression.fingerprint`."""

    length: int
    """Bytes of the content."""
    symbols: int
    """Symbols of the content in the model's vocabulary."""
    content: bytes
    """SHA-256 of the content."""
    model: bytes
    vocabulary: bytes
    probe: bytes
    settings: CodingSettings
    environment: str

    @property
    def num_blocks(self) -> int:
        """Blocks in the file."""
        return math.ceil(self.symbols / self.settings.block)

    def symbols_of(self, block: int) -> int:
        """Symbols in the block of this number, from 0."""
        return min(self.settings.block, self.symbols - block * self.settings.block)

    def pack(self) -> bytes:
        """The file up to its first block."""
        environment = self.environment.encode()[:255]
        facts = (getattr(self, name) for name in _FACTS)
        sizes = (getattr(self.settings, name) for name in _SETTINGS)
        fields = _FIELDS.pack(*facts, *sizes, PRECISIONS.index(self.settings.precision), len(environment))
        return _PREFIX.pack(MAGIC, VERSION) + fields + environment


def pack_block(words: np.ndarray) -> bytes:
    """A block of uint32 [W] as it stands in the file."""
    return _COUNT.pack(len(words)) + words.astype("<u4").tobytes()


def seal(file: BinaryIO) -> None:
    """Write the checksum behind the blocks."""
    file.write(_checksum(file, file.tell()))


def read_header(file: BinaryIO, name: str, vocabulary_size: int) -> Header:
    """The header of a whole, undamaged file, which is left at its first block.

    The number of symbols that it claims must suit the number of words: every symbol costs a little, as the coder leaves
    V - 1 of its 2^24 units to the others, and none costs more than 24 bits.

    Args:
        name: the file's, for messages.
        vocabulary_size: V, of the model that is to decode it.

    Raises:
        UserError: not such a file, another format version, a damaged file, or a header that cannot be true.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    prefix = file.read(_PREFIX.size)
    if not prefix.startswith(MAGIC) or len(prefix) < _PREFIX.size:
        raise UserError(f"{name}: not a file that charlm has compressed ({size:,} bytes)")
    _, version = _PREFIX.unpack(prefix)
    if version != VERSION:
        raise UserError(f"{name}: has format version {version}, and this charlm reads {VERSION}; use the one it is of")
    if _checksum(file, size - _CHECKSUM_BYTES) != file.read(_CHECKSUM_BYTES):
        raise UserError(f"{name}: is damaged or cut short, its checksum does not match; get a whole copy")
    file.seek(_PREFIX.size)
    try:
        header = _unpack(file, size)
        first_block = file.tell()
        _check_blocks(file, size - _CHECKSUM_BYTES, header, max(2, vocabulary_size))
    except ValueError as error:
        raise UserError(f"{name}: its header {error}, which is impossible; get a whole copy") from None
    file.seek(first_block)
    return header


def read_block(file: BinaryIO) -> np.ndarray:
    """The next block's words, uint32 [W], in the processor's byte order."""
    (count,) = _COUNT.unpack(file.read(_COUNT.size))
    return np.frombuffer(file.read(4 * count), "<u4").astype(np.uint32)


def largest_claim(words: int, vocabulary_size: int) -> int:
    """The most symbols that a number of words can hold; up to 64 bits of the coder's last words may go unused."""
    bits_per_symbol = -math.log2(1 - (vocabulary_size - 1) / 2**CODER_BITS)
    return math.floor((32 * words + 64) / bits_per_symbol)


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; UserError if it is no regular file or cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer would block
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            os.close(descriptor)
            raise UserError(f"{path}: is {'a folder' if stat.S_ISDIR(mode) else 'a pipe or a device'}; give a file")
        return os.fdopen(descriptor, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


@contextmanager
def replacing(path: Path, source: Path) -> Iterator[BinaryIO]:
    """A file to write and read that moves to `path` when the block ends without an error, and otherwise vanishes.

    Raises:
        UserError: `path` is `source` or no regular file, the disk is full, or the folder cannot be written.
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


def _checksum(file: BinaryIO, size: int) -> bytes:
    """The checksum of the first `size` bytes; the file is left behind them."""
    digest, left = hashlib.sha256(), size
    file.seek(0)
    while left > 0 and (piece := file.read(min(_PIECE, left))):
        digest.update(piece)
        left -= len(piece)
    return digest.digest()[:_CHECKSUM_BYTES]


def _unpack(file: BinaryIO, size: int) -> Header:
    """The header; ValueError, whose text goes on from "its header", if a field is beyond its limits."""
    packed = file.read(_FIELDS.size)
    if len(packed) < _FIELDS.size or _PREFIX.size + _FIELDS.size + packed[-1] + _CHECKSUM_BYTES > size:
        raise ValueError("is longer than the file")
    *values, precision, environment_bytes = _FIELDS.unpack(packed)
    if precision >= len(PRECISIONS):
        raise ValueError(f"claims a precision of number {precision}")
    try:
        sizes = dict(zip(_SETTINGS, values[len(_FACTS) :], strict=True))
        settings = CodingSettings(**sizes, precision=PRECISIONS[precision])
    except UserError as error:
        raise ValueError(f"claims {error}") from None
    environment = file.read(environment_bytes).decode(errors="backslashreplace")
    header = Header(**dict(zip(_FACTS, values, strict=False)), settings=settings, environment=environment)
    if not header.symbols <= header.length <= MAX_SYMBOL_BYTES * header.symbols:
        raise ValueError(f"claims {header.length:,} bytes in {header.symbols:,} symbols")
    return header


def _check_blocks(file: BinaryIO, end: int, header: Header, vocabulary_size: int) -> None:
    """Raise ValueError, as `_unpack` does, unless the blocks up to `end` can hold the symbols that are claimed."""
    claim = f"claims {header.symbols:,} symbols"
    if header.num_blocks * _COUNT.size > end:
        raise ValueError(f"{claim}, more than a file of its size can hold")
    for block in range(header.num_blocks):
        packed = file.read(_COUNT.size)
        count = _COUNT.unpack(packed)[0] if len(packed) == _COUNT.size else end
        if file.tell() + 4 * count > end:
            raise ValueError(f"{claim}, and the file ends before them")
        symbols = header.symbols_of(block)
        if symbols > largest_claim(count, vocabulary_size) or 32 * count > CODER_BITS * symbols + 64:
            raise ValueError(f"claims {symbols:,} symbols in {4 * count:,} bytes")
        file.seek(4 * count, os.SEEK_CUR)
    if file.tell() != end:
        raise ValueError(f"{claim}, and more bytes follow")
