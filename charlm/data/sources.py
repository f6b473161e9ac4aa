"""Where the text comes from: published files, fetched or local, datasets, and files and folders of the user's.

A source is the same bytes each time, or an error: published files are verified, and the others have a fingerprint.
"""

import gzip
import hashlib
import lzma
import os
import platform
import struct
import sysconfig
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import BinaryIO

from charlm.config import DataConfig, UserError
from charlm.data.download import download
from charlm.data.hub import documents, open_dataset

CHUNK = 1 << 20
LONGEST_END, LONGEST_DIRECTORY = 22 + 0xFFFF, 1 << 20
"""Bytes that the end of a zip archive takes with its comment, and that the list of its members may take."""
_DAMAGED = (
    OSError,
    EOFError,
    MemoryError,  # an xz header may ask for gigabytes
    RuntimeError,  # the member is encrypted, or packed in a way that zipfile does not know
    ValueError,
    OverflowError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)
"""What reading an archive may raise."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A text that is the same everywhere, in a zip archive."""

    url: str
    archive_size: int
    archive_sha256: str
    member: str
    size: int
    algorithm: str
    digest: str
    """Of the member, by `algorithm`."""
    split_sizes: tuple[int, int, int]
    """Bytes of train, valid and test."""
    mirror: str | None = None
    """A dataset on the hub whose splits train, validation and test are this text, in this order."""


PUBLISHED = {
    "enwik8": Published(
        url="http://mattmahoney.net/dc/enwik8.zip",
        archive_size=36_445_475,
        archive_sha256="547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
        member="enwik8",
        size=100_000_000,
        algorithm="sha256",
        digest="2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
        split_sizes=(90_000_000, 5_000_000, 5_000_000),
    ),
    "text8": Published(
        url="http://mattmahoney.net/dc/text8.zip",
        archive_size=31_344_016,
        archive_sha256="a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
        member="text8",
        size=100_000_000,
        algorithm="md5",
        digest="3bea1919949baf155f99411df5fada7e",
        split_sizes=(90_000_000, 5_000_000, 5_000_000),
        mirror="afmck/text8",
    ),
}

HUB_IDS = {"lm1b": "dvruette/lm1b"}
"""Datasets with a name of their own. The first one of this name needs a loading script."""
NOT_LIBRARY = frozenset({"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"})
"""Folders inside the standard library's that hold its tests or installed packages."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Text that can be prepared."""

    key: str
    """Names the prepared corpus in the cache."""
    origin: str
    """For people: an address, a path, a version."""
    option: str
    """The option that chose it, for errors: data.path=..."""
    fingerprint: str | None
    """Changes when what is at `origin` does; None: it never does."""
    chunks: Callable[[], Generator[bytes]]
    """The text, verified once it has come to its end; raises UserError where it cannot be had."""
    held_out: Mapping[str, Callable[[], Generator[bytes]]] = field(default_factory=dict)
    """Texts of valid and test, kept apart from it; where one is missing or empty, the text's end is held out."""
    split_sizes: tuple[int, int, int] | None = None
    """Bytes of train, valid and test in the text; None: the config's fractions decide."""
    size: int | None = None
    """Bytes of the text, where they are known before it is read."""


def find_source(config: DataConfig, cache_dir: Path, progress: bool) -> Source:
    """The source that the config asks for; nothing is fetched or read yet.

    Raises:
        UserError: data.path or a folder of data.hub_id does not exist, cannot be read, or is of the wrong kind.
    """
    if config.corpus in PUBLISHED:
        published = PUBLISHED[config.corpus]
        return _local_copy(config, published) if config.path else _fetched(config, published, cache_dir, progress)
    if config.corpus == "python-stdlib":
        origin, option = f"Python {platform.python_version()}, standard library", "data.corpus=python-stdlib"
        return _files(config, Path(sysconfig.get_path("stdlib")), origin, option, suffix=".py", skip=NOT_LIBRARY)
    if config.corpus == "file":
        path = absolute(config.path)
        option = f"data.path={path}"
        _keep_apart(cache_dir, path, option)
        return _files(config, path, str(path), option)
    return _dataset(config, config.hub_id or HUB_IDS[config.corpus], cache_dir, progress)


def _fetched(config: DataConfig, published: Published, cache_dir: Path, progress: bool) -> Source:
    option = f"data.corpus={config.corpus}"

    def chunks() -> Generator[bytes]:
        archive, size, sha256 = cache_dir / f"{config.corpus}.zip", published.archive_size, published.archive_sha256
        try:
            download(published.url, archive, size=size, sha256=sha256, progress=progress)
        except UserError as error:
            yield from _verified(_mirrored(published, option, progress, error), published, option)
        else:
            yield from _verified(_unpacked(archive, published.member, option), published, option)
            archive.unlink()

    return Source(
        key=config.corpus,
        origin=published.url,
        option=option,
        fingerprint=None,
        chunks=chunks,
        split_sizes=published.split_sizes,
        size=published.size,
    )


def _mirrored(published: Published, option: str, progress: bool, why: UserError) -> Generator[bytes]:
    """The text from its second source, `why` if there is none."""
    if published.mirror is None:
        raise why
    try:
        splits = open_dataset(published.mirror, None, None, f"{option} from {published.mirror}", progress)
        for split in ("train", "validation", "test"):
            yield from documents(splits, split, "text", "", option)
    except UserError as error:
        raise UserError(f"{why}\nIts mirror fails, too: {error}") from error


def _local_copy(config: DataConfig, published: Published) -> Source:
    path = absolute(config.path)
    option = f"data.path={path}"
    with _reading(option):
        fingerprint = _fingerprint([path])
    if not path.is_file():
        raise UserError(f"{option}: not a file; give a copy of {published.member}, raw or as .zip, .gz or .xz")
    return Source(
        key=config.corpus,
        origin=str(path),
        option=option,
        fingerprint=fingerprint,
        chunks=lambda: _verified(_unpacked(path, published.member, option), published, option),
        split_sizes=published.split_sizes,
        size=published.size,
    )


def _files(
    config: DataConfig, root: Path, origin: str, option: str, suffix: str = "", skip: frozenset[str] = frozenset()
) -> Source:
    """A file as it is, or all files of a folder in the order of their relative paths with nothing put between them."""
    with _reading(option):
        listed = _list_files(root, suffix, skip)
        fingerprint, size = _fingerprint(listed), sum(file.stat().st_size for file in listed)
    if not os.path.isfile(root) and not os.path.isdir(root):
        raise UserError(f"{option}: neither a file nor a folder")

    def chunks() -> Generator[bytes]:
        with _reading(option):
            for file in _list_files(root, suffix, skip):
                with file.open("rb") as stream:
                    yield from _blocks(stream)
            _check_unchanged(fingerprint, _list_files(root, suffix, skip), option)

    return Source(
        key=_key(config, str(root)),
        origin=origin,
        option=option,
        fingerprint=fingerprint,
        chunks=chunks,
        size=size,
    )


def _dataset(config: DataConfig, hub_id: str, cache_dir: Path, progress: bool) -> Source:
    """The documents of a dataset, of the hub or of a folder's parquet files."""
    where, fingerprint = hub_id, None
    if os.path.isdir(os.path.expanduser(hub_id)) or hub_id.startswith(("/", "./", "../", "~")):
        where = absolute(Path(hub_id))
    option = f"data.hub_id={where}"
    if isinstance(where, Path):
        _keep_apart(cache_dir, where, option)
        with _reading(option):
            fingerprint = _fingerprint(_list_files(where))
    opened = cache(partial(open_dataset, where, config.hub_config, config.hub_revision, option, progress))
    named = (config.train_split, config.valid_split, config.test_split)

    def chunks(split: str | None, default: str) -> Generator[bytes]:
        if split is None and default in opened() and default not in named:
            split = default
        if split is not None:
            yield from documents(opened(), split, config.text_column, config.separator, option)
        if fingerprint is not None:
            with _reading(option):
                _check_unchanged(fingerprint, _list_files(where), option)

    return Source(
        key=_key(
            config, str(where), config.hub_config, config.hub_revision, config.text_column, config.separator, *named
        ),
        origin=f"{where}@{config.hub_revision}" if config.hub_revision else str(where),
        option=option,
        fingerprint=fingerprint,
        chunks=partial(chunks, config.train_split, "train"),
        held_out={
            "valid": partial(chunks, config.valid_split, "validation"),
            "test": partial(chunks, config.test_split, "test"),
        },
    )


def _key(config: DataConfig, *identity: str | None) -> str:
    """A name that no text has but the one so identified, split as the config says."""
    everything = repr((*identity, config.valid_fraction, config.test_fraction))
    return f"{config.corpus}-{hashlib.sha256(os.fsencode(everything)).hexdigest()[:16]}"


def _keep_apart(cache_dir: Path, path: Path, option: str) -> None:
    """Raise UserError where the cache would become part of the text."""
    if cache_dir.is_relative_to(path):
        raise UserError(f"{option}: data.cache_dir={cache_dir} lies inside; move one of them")


def _list_files(root: Path, suffix: str = "", skip: frozenset[str] = frozenset()) -> list[Path]:
    """Links to files are followed; links to folders are not, as they could lead in circles."""

    def refuse(error: OSError) -> None:
        raise error

    if not root.is_dir():
        return [root]
    files = []
    for parent, folders, names in os.walk(root, onerror=refuse):
        folders[:] = (name for name in folders if name not in skip)
        files += (Path(parent, name) for name in names if name.endswith(suffix))
    return sorted(filter(Path.is_file, files), key=lambda file: file.relative_to(root).as_posix())


def _fingerprint(files: Iterable[Path]) -> str:
    """Of paths, sizes and times of change: it is computed at every start, and the text may be gigabytes."""
    digest = hashlib.sha256()
    for file in files:
        info = file.stat()
        digest.update(repr((os.fsencode(file), info.st_size, info.st_mtime_ns, info.st_ctime_ns)).encode())
    return digest.hexdigest()


def _check_unchanged(fingerprint: str, files: Iterable[Path], option: str) -> None:
    if _fingerprint(files) != fingerprint:
        raise UserError(f"{option}: changed while it was read; try again when nothing writes to it")


def absolute(path: Path) -> Path:
    """Without ~, links or the working folder: the same file has one name."""
    return Path(os.path.realpath(os.path.expanduser(path)))


@contextmanager
def _reading(option: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{option}: cannot read {error.filename or 'it'} ({error.strerror}); give a file or folder that can be read"
        ) from error


def _blocks(stream: BinaryIO) -> Iterator[bytes]:
    return iter(partial(stream.read, CHUNK), b"")


def _unpacked(path: Path, member: str, option: str) -> Generator[bytes]:
    """The named member of a .zip, the content of a .gz or .xz, or the file itself: told apart by their first bytes."""
    try:
        with ExitStack() as stack:
            stream = stack.enter_context(_open(path, member, stack))
            yield from _blocks(stream)
    except KeyError as error:
        raise UserError(f"{option}: the archive has no member named {member}") from error
    except _DAMAGED as error:
        why = str(error) or type(error).__name__
        raise UserError(f"{option}: cannot be read to its end ({why}); fetch it again") from error


def _open(path: Path, member: str, stack: ExitStack) -> BinaryIO:
    with path.open("rb") as file:
        magic = file.read(6)
    if magic.startswith(b"PK"):
        _check_directory(path)
        return stack.enter_context(zipfile.ZipFile(path)).open(member)
    if magic.startswith(b"\x1f\x8b"):
        return gzip.open(path)
    return lzma.open(path) if magic == b"\xfd7zXZ\0" else path.open("rb")


def _check_directory(path: Path) -> None:
    """Raise BadZipFile where zipfile would read a list of members that fills the memory.

    The record at the end of an archive says how long the list is; one of 64 bits before it (zip64) says it again.
    """
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LONGEST_END))
        end = file.read()
    record = end.rfind(b"PK\5\6")
    length = int.from_bytes(end[record + 12 : record + 16], "little") if record >= 0 else 0
    if length > LONGEST_DIRECTORY or end[max(0, record - 20) :].startswith(b"PK\6\7"):
        raise zipfile.BadZipFile("it has far too many members for a copy of one text")


def _verified(chunks: Iterator[bytes], published: Published, option: str) -> Generator[bytes]:
    """Pass chunks on as long as they fit; raise UserError unless they turn out to be the published text."""
    digest = hashlib.new(published.algorithm, usedforsecurity=False)
    size = 0
    for chunk in chunks:
        size += len(chunk)
        if size > published.size:
            break
        digest.update(chunk)
        yield chunk
    if size != published.size:
        found = f"{size:,} bytes" if size < published.size else f"more than {published.size:,} bytes"
    elif digest.hexdigest() != published.digest:
        found = f"{published.algorithm} {digest.hexdigest()}"
    else:
        return
    raise UserError(
        f"{option}: has {found}; {published.member} has {published.size:,} bytes and {published.algorithm} "
        f"{published.digest}. Get it from {published.url}"
    )
