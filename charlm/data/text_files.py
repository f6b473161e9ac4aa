"""The user's own files: which of a folder are read, which are unpacked or refused, and which have changed."""

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
HEAD = 8192
"""First bytes of a file by which its kind is known."""
PACKED = {
    rb"\x1f\x8b": gzip.open,
    rb"BZh[1-9](1AY&SY|\x17rE8P)": bz2.open,
    rb"\xfd7zXZ\x00": lzma.open,
    rb"PK(\x03\x04|\x05\x06)": zipfile.ZipFile,
}
"""First bytes of the kinds that are unpacked."""
REFUSED = {
    rb"\xff\xfe|\xfe\xff|\x00\x00\xfe\xff": "is UTF-16 or UTF-32; convert it to UTF-8",
    rb"PAR1": "is a parquet file; give its folder as --data.corpus=hub --data.hub_id=FOLDER",
    rb"\(\xb5/\xfd|7z\xbc\xaf|Rar!\x1a|\x04\x22M\x18|\x1f\x9d|LZIP|.{257}ustar": "is packed; unpack it",
    b"|".join(PACKED): "is packed twice; unpack it",
    rb"%PDF-|\x89PNG|\xff\xd8\xff|GIF8[79]a": "is a PDF or an image; give plain text",
    rb".*\x00": "is binary: it has NUL bytes; give plain text",
}


def text_files(root: Path, skipped: str = HIDDEN, suffix: str = "") -> list[Path]:
    """The files below `root` whose names match no `skipped` pattern, in the order of relative paths.

    Links are followed, and every folder is read once. Raises UserError for a name that is neither a file
    nor a folder, such as a broken link.
    """
    if not root.is_dir():
        return [root]
    files, folders, links, seen = [], [root], [], set()
    while folders or links:  # a folder is read at its own place, if that is below the root
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
    """Hash of paths, sizes and times of change; reading gigabytes at every start would take too long."""
    infos = ((os.fsencode(file), file.stat()) for file in files)
    entries = ((name, info.st_size, info.st_mtime_ns, info.st_ctime_ns) for name, info in infos)
    return hashlib.sha256("".join(map(repr, entries)).encode()).hexdigest()


def blocks(stream: BinaryIO) -> Iterator[bytes]:
    """The rest of a file, in pieces of at most CHUNK bytes."""
    return iter(partial(stream.read, CHUNK), b"")


def unpacked(path: Path, member: str | None = None, kinds: dict[bytes, Callable] = PACKED) -> Generator[bytes]:
    """The content of a file of these kinds, else the file itself; of a .zip `member`, or its only file."""
    with path.open("rb") as file:
        head = file.read(HEAD)
        file.seek(0)
        opener = next((opener for magic, opener in kinds.items() if re.match(magic, head)), lambda file: file)
        try:
            with opener(file) as opened:
                is_zip = opener is zipfile.ZipFile
                yield from blocks(opened.open(member or _only_member(opened)) if is_zip else opened)
        except Exception as error:  # each format has its own, and an xz header can cause a MemoryError
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


def is_plain(path: Path) -> bool:
    """True for a file that is of no kind in PACKED or REFUSED."""
    with path.open("rb") as file:
        return not re.match(b"|".join([*PACKED, *REFUSED]), file.read(HEAD), re.DOTALL)


def joined(root: Path, files: Callable[[], list[Path]], read: Callable, listing: dict[str, int]) -> Generator[bytes]:
    """The output of `read` for the files, one after another; adds a checksum of each to `listing`."""
    for file in files():
        name = file.relative_to(root.parent if file == root else root).as_posix()
        checksum = 0
        try:
            for block in read(file):
                checksum = zlib.crc32(block, checksum)
                yield block
        except UserError as error:
            raise error if file == root else UserError(f"{shown(name)} {error}") from None
        listing[name] = checksum & 0xFFFF  # more would make the listing longer, and differences no clearer


def pack_listing(listing: dict[str, int]) -> str | None:
    """A listing in a few bytes per file; None if it is too long."""
    text = json.dumps(listing).encode()
    return base64.b64encode(zlib.compress(text)).decode() if len(text) < MAX_JSON_BYTES else None


def changes(before: Any, now: Any) -> str:
    """The files that differ between two packed listings, as the end of a message; empty if one cannot be read."""
    try:
        packed = [zlib.decompressobj().decompress(base64.b64decode(one), MAX_JSON_BYTES) for one in (before, now)]
        old, new = (TypeAdapter(dict[str, int]).validate_python(parse_json(text)) for text in packed)
    except (ValueError, TypeError, zlib.error):
        return ""
    groups = {
        "added": new.keys() - old.keys(),
        "removed": old.keys() - new.keys(),
        "changed": {name for name in new.keys() & old.keys() if new[name] != old[name]},
    }
    return "".join(f"; {what}: {some(names)}" for what, names in groups.items() if names)


def some(names: set[str], most: int = 5) -> str:
    """The first names, and how many there are more."""
    text = ", ".join(map(shown, sorted(names)[:most]))
    return text if len(names) <= most else f"{text} and {len(names) - most:,} more"
