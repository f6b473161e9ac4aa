"""The user's own files: which are read, unpacked or refused, and which have changed."""

import base64
import bz2
import gzip
import hashlib
import json
import lzma
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import TypeAdapter

from charlm.config import UserError
from charlm.config.errors import first_line, shown
from charlm.files import MAX_JSON_BYTES, parse_json

CHUNK = 1 << 20
HIDDEN = r"\..*|.*~|#.*#"
"""Names that are left out: hidden ones, and editors' copies."""
HEAD = 8192  # bytes by which the kind of a file is known
PACKED = {
    rb"\x1f\x8b": gzip.open,
    rb"BZh[1-9](1AY&SY|\x17rE8P)": bz2.open,
    rb"\xfd7zXZ\x00": lzma.open,
    rb"PK(\x03\x04|\x05\x06)": zipfile.ZipFile,
}
"""First bytes of what is unpacked."""
REFUSED = {
    rb"\xff\xfe|\xfe\xff|\x00\x00\xfe\xff": "is UTF-16 or UTF-32; convert it to UTF-8",
    rb"PAR1": "is a parquet file; give its folder as --data.corpus=hub --data.hub_id=FOLDER",
    rb"\(\xb5/\xfd|7z\xbc\xaf|Rar!\x1a|\x04\x22M\x18|\x1f\x9d|LZIP|.{257}ustar": "is packed; unpack it",
    b"|".join(PACKED): "is packed twice; unpack it",
    rb"%PDF-|\x89PNG|\xff\xd8\xff|GIF8[79]a": "is a PDF or an image; give plain text",
    rb".*\x00": "is binary: it has NUL bytes; give plain text",
}


def text_files(root: Path, skipped: str = HIDDEN, suffix: str = "") -> list[Path]:
    """The files below `root`, sorted; links are followed. Raises UserError for a pipe or a broken link."""
    if not root.is_dir():
        return [root]
    files, folders, links, seen = [], [root], [], set()
    while folders or links:  # links last: a folder is read at its own place, if that is below the root
        folder = (folders or links).pop(0)
        info = folder.stat()
        if (info.st_dev, info.st_ino) in seen:
            continue
        seen.add((info.st_dev, info.st_ino))
        for entry in sorted(os.scandir(folder), key=attrgetter("name")):
            if re.fullmatch(skipped, entry.name, re.DOTALL):
                continue
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(Path(entry))
            elif entry.name.endswith(suffix):
                if not entry.is_file():
                    raise UserError(f"{shown(entry.path)} is neither a file nor a folder; mend or remove it")
                files.append(Path(entry))
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def fingerprint_of(files: Iterable[Path]) -> str:
    """Hash of paths, sizes and times of change, which is faster than one of the content."""
    infos = ((os.fsencode(file), file.stat()) for file in files)
    entries = ((name, info.st_size, info.st_mtime_ns, info.st_ctime_ns) for name, info in infos)
    return hashlib.sha256("".join(map(repr, entries)).encode()).hexdigest()


def blocks(stream: BinaryIO) -> Iterator[bytes]:
    """The rest of a file, in pieces of at most CHUNK bytes."""
    return iter(partial(stream.read, CHUNK), b"")


def unpacked(path: Path, member: str | None = None, kinds: dict[bytes, Callable] = PACKED) -> Generator[bytes]:
    """The content of a file of these kinds (of a .zip `member`, or its only file), else its bytes."""
    with path.open("rb") as file:
        head = file.read(HEAD)
        file.seek(0)
        opener = next((opener for magic, opener in kinds.items() if re.match(magic, head)), lambda file: file)
        try:
            with opener(file) as opened:
                is_zip = opener is zipfile.ZipFile
                yield from blocks(opened.open(member or _only_member(opened)) if is_zip else opened)
        except Exception as error:  # each format has its own
            if isinstance(error, UserError) or getattr(error, "errno", None):
                raise
            raise UserError(f"cannot be read to its end ({first_line(error)}); fetch it again") from error


def _only_member(archive: zipfile.ZipFile) -> str:
    names = [name for name in archive.namelist() if not re.fullmatch(rf"(.*/)?({HIDDEN})?", name)]
    if len(names) != 1:
        raise UserError(f"holds {len(names):,} files; unpack it into a folder")
    return names[0]


def plain_text(path: Path) -> Generator[bytes]:
    """The text of a file, unpacked. Raises UserError for a kind in REFUSED."""
    chunks = unpacked(path)
    head = next(chunks, b"")
    for magic, problem in REFUSED.items():
        if re.match(magic, head[:HEAD], re.DOTALL):
            raise UserError(f"{problem}, or take its bytes as they are with --data.as_is=true")
    yield head
    yield from chunks


def joined(root: Path, files: Callable[[], list[Path]], read: Callable, listing: dict[str, int]) -> Generator[bytes]:
    """The output of `read` for each file; adds a checksum of each to `listing`."""
    for file in files():
        name = file.relative_to(root.parent if file == root else root).as_posix()
        checksum = 0
        try:
            for block in read(file):
                checksum = zlib.crc32(block, checksum)
                yield block
        except UserError as error:
            raise error if file == root else UserError(f"{shown(name)} {error}") from None
        listing[name] = checksum & 0xFFFF  # enough, and short


def pack_listing(listing: dict[str, int]) -> str | None:
    """A listing in a few bytes per file; None if it is too long."""
    text = json.dumps(listing).encode()
    return base64.b64encode(zlib.compress(text)).decode() if len(text) < MAX_JSON_BYTES else None


def changes(before: Any, now: Any) -> str:
    """The differences of two packed listings, as the end of a message; empty if one is unreadable."""
    try:
        old, new = map(_unpack_listing, (before, now))
    except (ValueError, TypeError, zlib.error):
        return ""
    groups = {
        "added": new.keys() - old.keys(),
        "removed": old.keys() - new.keys(),
        "changed": {name for name in new.keys() & old.keys() if new[name] != old[name]},
    }
    return "".join(f"; {what}: {_first(names)}" for what, names in groups.items() if names)


def _unpack_listing(packed: str) -> dict[str, int]:
    text = zlib.decompressobj().decompress(base64.b64decode(packed), MAX_JSON_BYTES)
    return TypeAdapter(dict[str, int]).validate_python(parse_json(text))


def _first(names: set[str], most: int = 5) -> str:
    text = ", ".join(map(shown, sorted(names)[:most]))
    return text if len(names) <= most else f"{text} and {len(names) - most:,} more"
