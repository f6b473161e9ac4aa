"""Sources of text: published files (downloaded or local), datasets, and the user's files and folders.

A source gives the same bytes each time, or an error: published files are verified, all others have a fingerprint.
"""

import gzip
import hashlib
import lzma
import os
import platform
import shutil
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import BinaryIO

from charlm.config import DataConfig, UserError
from charlm.config.errors import first_line
from charlm.data.hub import documents, open_dataset

CHUNK = 1 << 20
DOWNLOAD_RETRIES = 3


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published text in a zip archive."""

    url: str
    archive_sha256: str
    member: str
    algorithm: str
    digest: str
    """Checksum of the member, by `algorithm`."""
    size: int = 100_000_000
    split_sizes: tuple[int, int, int] = (90_000_000, 5_000_000, 5_000_000)
    """Bytes of train, valid and test."""
    mirror: str | None = None
    """A dataset on the hub whose splits train, validation and test are this text, in this order."""


PUBLISHED = {
    "enwik8": Published(
        url="http://mattmahoney.net/dc/enwik8.zip",
        archive_sha256="547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
        member="enwik8",
        algorithm="sha256",
        digest="2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
    ),
    "text8": Published(
        url="http://mattmahoney.net/dc/text8.zip",
        archive_sha256="a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
        member="text8",
        algorithm="md5",
        digest="3bea1919949baf155f99411df5fada7e",
        mirror="afmck/text8",
    ),
}

HUB_IDS = {"lm1b": "dvruette/lm1b"}
"""Datasets with a corpus name of their own. The hub's "lm1b" itself needs a loading script, so this is a copy."""
NOT_LIBRARY = frozenset({"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"})
"""Subfolders of the standard library that hold tests or installed packages."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A text that can be prepared."""

    key: str
    """Name of the prepared corpus in the cache."""
    origin: str
    """Origin of the text, for people: an address, a path, or a version."""
    option: str
    """The option that chose it, for errors: data.path=..."""
    fingerprint: str | None
    """Changes when the text at `origin` does; None for a text that never changes."""
    chunks: Callable[[], Generator[bytes]]
    """Yields the text and verifies it at its end; raises UserError if it cannot be fetched or read."""
    held_out: Mapping[str, Callable[[], Generator[bytes]]] = field(default_factory=dict)
    """Separate texts of valid and test; if one is missing or empty, the end of the main text is held out instead."""
    split_sizes: tuple[int, int, int] | None = None
    """Bytes of train, valid and test in the text; None if the config's fractions decide."""
    size: int | None = None
    """Bytes of the text, if known before it is read."""


def find_source(config: DataConfig, cache_dir: Path, show_progress: bool) -> Source:
    """The source the config asks for; nothing is fetched or read yet.

    Raises:
        UserError: data.path or a folder of data.hub_id does not exist, cannot be read, or is of the wrong kind.
    """
    if config.corpus in PUBLISHED:
        return _published(config, PUBLISHED[config.corpus], cache_dir / f"{config.corpus}.download", show_progress)
    if config.corpus == "python-stdlib":
        origin, option = f"Python {platform.python_version()}, standard library", "data.corpus=python-stdlib"
        return _files(config, Path(sysconfig.get_path("stdlib")), origin, option, suffix=".py", skip=NOT_LIBRARY)
    if config.corpus == "file":
        path = absolute(config.path)
        option = f"data.path={path}"
        _keep_apart(cache_dir, path, option)
        return _files(config, path, str(path), option)
    return _dataset(config, config.hub_id or HUB_IDS[config.corpus], cache_dir, show_progress)


def _published(config: DataConfig, published: Published, downloads: Path, show_progress: bool) -> Source:
    """A published text, from the user's own copy if there is one."""
    if config.path is None:
        option, origin, fingerprint = f"data.corpus={config.corpus}", published.url, None
        text = partial(_fetched, published, downloads, option, show_progress)
    else:
        path = absolute(config.path)
        option, origin = f"data.path={path}", str(path)
        with _reading(option):
            fingerprint = _fingerprint([path])
        if not path.is_file():
            raise UserError(f"{option}: not a file; give a copy of {published.member}, raw or as .zip, .gz or .xz")
        text = partial(_unpacked, path, published.member, option)
    return Source(
        key=config.corpus,
        origin=origin,
        option=option,
        fingerprint=fingerprint,
        chunks=lambda: _verified(text(), published, option),
        split_sizes=published.split_sizes,
        size=published.size,
    )


def _fetched(published: Published, downloads: Path, option: str, show_progress: bool) -> Generator[bytes]:
    """The text of the downloaded archive, which is removed after the last byte; of the mirror if that fails."""
    try:
        archive = _download(published, downloads, show_progress)
    except UserError as error:
        yield from _mirrored(published, option, show_progress, error)
    else:
        yield from _unpacked(archive, published.member, option)
    shutil.rmtree(downloads, ignore_errors=True)


def _download(published: Published, folder: Path, show_progress: bool) -> Path:
    """The archive in `folder`, fetched unless it is there already, and verified. Two processes must not do so at once.

    Raises:
        UserError: it cannot be fetched, or is not the file it should be.
    """
    import pooch  # takes a moment to import, and most runs download nothing
    from requests.exceptions import ConnectionError, RequestException

    pooch.get_logger().setLevel("ERROR")
    name = f"{published.member}.zip"
    fetcher = pooch.create(
        folder,
        "",
        registry={name: published.archive_sha256},
        urls={name: published.url},
        retry_if_failed=DOWNLOAD_RETRIES,
    )
    downloader = pooch.HTTPDownloader(
        progressbar=show_progress and sys.stderr.isatty(), headers={"User-Agent": "charlm"}
    )
    try:
        return Path(fetcher.fetch(name, downloader=downloader))
    except (RequestException, ValueError) as error:  # a ValueError is a wrong checksum
        why = "no connection" if isinstance(error, ConnectionError) else first_line(error)
        raise UserError(
            f"{published.url}: cannot be fetched ({why}). Fetch this file elsewhere "
            f"(SHA-256 {published.archive_sha256}) and give it as --data.path=FILE"
        ) from error


def _mirrored(published: Published, option: str, show_progress: bool, why: UserError) -> Generator[bytes]:
    """The text from its mirror on the hub; raises `why` if there is none."""
    if published.mirror is None:
        raise why
    try:
        splits = open_dataset(published.mirror, None, None, f"{option} from {published.mirror}", show_progress)
        for split in ("train", "validation", "test"):
            yield from documents(splits, split, "text", "", option)
    except UserError as error:
        raise UserError(f"{why}\nIts mirror fails, too: {error}") from error


def _files(
    config: DataConfig, root: Path, origin: str, option: str, suffix: str = "", skip: frozenset[str] = frozenset()
) -> Source:
    """One file, or all files of a folder, joined in the order of their relative paths with nothing between them."""
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


def _dataset(config: DataConfig, hub_id: str, cache_dir: Path, show_progress: bool) -> Source:
    """The documents of a dataset on the hub, or of a folder of parquet files."""
    where, fingerprint = hub_id, None
    if os.path.isdir(os.path.expanduser(hub_id)) or hub_id.startswith(("/", "./", "../", "~")):
        where = absolute(Path(hub_id))
    option = f"data.hub_id={where}"
    if isinstance(where, Path):
        _keep_apart(cache_dir, where, option)
        with _reading(option):
            fingerprint = _fingerprint(_list_files(where))
    opened = cache(partial(open_dataset, where, config.hub_config, config.hub_revision, option, show_progress))
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
    """A name for the prepared corpus, unique to a text's identity and the fractions by which it is split."""
    everything = repr((*identity, config.valid_fraction, config.test_fraction))
    return f"{config.corpus}-{hashlib.sha256(os.fsencode(everything)).hexdigest()[:16]}"


def _keep_apart(cache_dir: Path, path: Path, option: str) -> None:
    """Raise UserError if the cache would become part of the text."""
    if cache_dir.is_relative_to(path):
        raise UserError(f"{option}: data.cache_dir={cache_dir} lies inside; move one of them")


def _list_files(root: Path, suffix: str = "", skip: frozenset[str] = frozenset()) -> list[Path]:
    """All files below `root`. Links to files are followed; links to folders are not, as they could form a circle."""

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
    """Hash of paths, sizes and times of change; the content may be gigabytes, and this is computed at every start."""
    digest = hashlib.sha256()
    for file in files:
        info = file.stat()
        digest.update(repr((os.fsencode(file), info.st_size, info.st_mtime_ns, info.st_ctime_ns)).encode())
    return digest.hexdigest()


def _check_unchanged(fingerprint: str, files: Iterable[Path], option: str) -> None:
    if _fingerprint(files) != fingerprint:
        raise UserError(f"{option}: changed while it was read; try again when nothing writes to it")


def absolute(path: Path) -> Path:
    """`path` without ~, links or the working folder, so that a file has one name."""
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
    """The named member of a .zip, the content of a .gz or .xz, or the file itself, told apart by the first bytes."""
    try:
        with ExitStack() as stack:
            stream = stack.enter_context(_open(path, member, stack))
            yield from _blocks(stream)
    except KeyError as error:
        raise UserError(f"{option}: the archive has no member named {member}") from error
    except Exception as error:  # every format has its own, and an xz header may ask for gigabytes: MemoryError
        why = str(error) or type(error).__name__
        raise UserError(f"{option}: cannot be read to its end ({why}); fetch it again") from error


def _open(path: Path, member: str, stack: ExitStack) -> BinaryIO:
    with path.open("rb") as file:
        magic = file.read(6)
    if magic.startswith(b"PK"):
        return stack.enter_context(zipfile.ZipFile(path)).open(member)
    if magic.startswith(b"\x1f\x8b"):
        return gzip.open(path)
    return lzma.open(path) if magic == b"\xfd7zXZ\0" else path.open("rb")


def _verified(chunks: Iterator[bytes], published: Published, option: str) -> Generator[bytes]:
    """Pass chunks on; raise UserError if they are longer than the published text, or at the end do not equal it."""
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
