"""Sources of text: published files, datasets, and the user's files and folders."""

import hashlib
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from charlm.config import Config, DataConfig, TextConfig, UserError
from charlm.config.errors import first_line
from charlm.config.types import expanded
from charlm.data.hub import documents, open_dataset
from charlm.data.text_files import HIDDEN, fingerprint_of, joined, plain_text, text_files, unpacked
from charlm.files import make_folder, share

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
    mirror: str | None = None
    """A dataset on the hub whose train, validation and test, joined, are this text."""


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
"""Copies of datasets that need code of their own."""


class Choice(NamedTuple):
    """The option that chose a text, and its value."""

    option: str
    value: Path | str

    def error(self, problem: object, option: str | None = None) -> UserError:
        return UserError(f"{self.option}={self.value}: {problem}", option or self.option)

    @contextmanager
    def named_in_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            problem = f"cannot read {error.filename or 'it'} ({error.strerror})"
            raise self.error(f"{problem}; give a file or folder that can be read") from error
        except UserError as error:
            raise self.error(error, error.option) from error


@dataclass(frozen=True, kw_only=True)
class Source:
    """A text that can be prepared."""

    choice: Choice
    key: str
    """Name of the prepared corpus in the cache."""
    origin: str
    parts: Mapping[str, Callable[[], Generator[bytes]]]
    """Readers of the text ("train"), and of further ones for valid and test, which may be empty."""
    fingerprint: str | None = None
    """Changes when the text at `origin` does; None for a text that never changes."""
    files: Callable[[], list[Path]] | None = None
    """Lists the files that must not change while they are read."""
    listing: dict[str, int] = field(default_factory=dict)
    """A checksum of each, complete when all were read."""
    split_sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Bytes of train, valid and test in each part; empty if the config's fractions decide."""
    size: int | None = None
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name, source and sha256 of each part of a mixture, complete when all were read."""

    def chunks(self, part: str = "train") -> Generator[bytes]:
        """The text of a part. Raises UserError if it cannot be fetched or read."""
        with self.choice.named_in_errors():
            yield from self.parts[part]()
            if self.files and fingerprint_of(self.files()) != self.fingerprint:
                raise UserError("changed while it was read; try again when nothing writes to it")


def find_source(config: DataConfig, cache_dir: Path, show_progress: bool) -> Source:
    """The source the config asks for, not read yet. Raises UserError for an unfit path."""
    check_outside(config, "data.cache_dir", cache_dir)
    choice = _choice(config)
    with choice.named_in_errors():
        if config.corpus in PUBLISHED:
            return _published(config, choice, cache_dir / f"{config.corpus}.download", show_progress)
        if choice.option == "data.hub_id":
            return _dataset(config, choice, show_progress)
        return _files(config, choice)


def check_outside(config: DataConfig, option: str, folder: Path) -> None:
    """Raise UserError if `folder`, the value of `option`, lies inside that of the text."""
    for text in config.texts.values():
        check_outside(text, option, folder)
    choice, place = _choice(config), absolute(option, folder)
    if config.corpus in PUBLISHED or not isinstance(choice.value, Path):
        return
    folders = {choice.value}
    if config.corpus == "file" and os.path.isdir(choice.value):
        with suppress(UserError, OSError):  # `find_source` names what is broken
            folders |= {parent.resolve() for parent in {file.parent for file in text_files(choice.value)}}
    if any(place.is_relative_to(one) for one in folders):
        problem = f"{option}={folder} lies inside and would become part of the text"
        raise choice.error(f"{problem}; move one of them")


def _choice(config: TextConfig) -> Choice:
    if config.path is not None:
        return Choice("data.path", absolute("data.path", config.path))
    if config.corpus in (*PUBLISHED, "python-stdlib", "mixture"):
        return Choice("data.corpus", config.corpus)
    name = config.hub_id or HUB_IDS[config.corpus]
    local = name.startswith(("/", "./", "../", "~")) or os.path.isdir(name)
    return Choice("data.hub_id", absolute("data.hub_id", name) if local else name)


def _published(config: DataConfig, choice: Choice, downloads: Path, show_progress: bool) -> Source:
    published = PUBLISHED[config.corpus]
    is_local = isinstance(path := choice.value, Path)
    fingerprint = fingerprint_of([path]) if is_local else None
    text = partial(_fetched, published, downloads, show_progress)
    if is_local:
        text = partial(unpacked, path, published.member)
        if not path.is_file():
            raise UserError(f"not a file; give a copy of {published.member}")
    return Source(
        choice=choice,
        key=config.corpus,
        origin=str(path) if is_local else published.url,
        parts={"train": lambda: _verified(text(), published)},
        fingerprint=fingerprint,
        split_sizes={"train": published.split_sizes},
        size=published.size,
    )


def _fetched(published: Published, downloads: Path, show_progress: bool) -> Generator[bytes]:
    """The text from the archive, which is removed afterwards, or else from the mirror."""
    try:
        archive = _download(published, downloads, show_progress)
    except UserError as error:
        if published.mirror is None:
            raise
        try:
            splits = open_dataset(published.mirror, None, None, show_progress)
            for split in ("train", "validation", "test"):
                yield from documents(splits, split, "text", "")
        except UserError as another:
            raise UserError(f"{error}\nIts mirror {published.mirror}: {another}") from another
    else:
        yield from unpacked(archive, published.member)
    shutil.rmtree(downloads, ignore_errors=True)


def _download(published: Published, folder: Path, show_progress: bool) -> Path:
    """The verified archive, fetched unless `folder` has it."""
    import pooch  # takes a moment to import, and most runs download nothing
    from requests.exceptions import ConnectionError

    pooch.get_logger().setLevel("ERROR")
    name = f"{published.member}.zip"
    known = {"registry": {name: published.archive_sha256}, "urls": {name: published.url}}
    fetcher = pooch.create(folder, "", **known, retry_if_failed=DOWNLOAD_RETRIES)
    show = show_progress and sys.stderr.isatty()
    downloader = pooch.HTTPDownloader(show, headers={"User-Agent": "charlm"})
    try:
        make_folder(folder)
        share(archive := Path(fetcher.fetch(name, downloader=downloader)))
        return archive
    except (OSError, ValueError) as error:  # the network, a full disk, or a wrong checksum
        why = "no connection" if isinstance(error, ConnectionError) else first_line(error)
        way_out = f"fetch it elsewhere (SHA-256 {published.archive_sha256})"
        problem = f"{published.url} cannot be fetched ({why}); {way_out}"
        raise UserError(f"{problem} and give it as --data.path=FILE") from error


def _files(config: DataConfig, choice: Choice) -> Source:
    """A file, or the files of a folder, joined with nothing in between."""
    root, origin = choice.value, str(choice.value)
    skipped, suffix = "(?!)" if config.as_is else HIDDEN, ""
    read = partial(unpacked, kinds={}) if config.as_is else plain_text
    if config.corpus == "python-stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        origin = f"Python {platform.python_version()}, standard library"
        skipped += r"|__pycache__|dist-packages|idle_test|site-packages|tests?"
        suffix, read = ".py", partial(unpacked, kinds={})
    files = partial(text_files, root, skipped, suffix)
    found = files()
    fingerprint = fingerprint_of(found)
    listing: dict[str, int] = {}
    if not root.is_file() and not root.is_dir():
        raise UserError("neither a file nor a folder")
    return Source(
        choice=choice,
        key=_key(config, str(root)),
        origin=origin,
        parts={"train": partial(joined, root, files, read, listing)},
        fingerprint=fingerprint,
        files=files,
        listing=listing,
        size=sum(file.stat().st_size for file in found),
    )


def _dataset(config: DataConfig, choice: Choice, show_progress: bool) -> Source:
    where = choice.value
    revision = config.hub_revision
    opened = cache(partial(open_dataset, where, config.hub_config, revision, show_progress))
    how = (config.text_column, config.separator, config.skip_null)
    named = (config.train_split, config.valid_split, config.test_split)

    def text(split: str | None, default: str) -> Generator[bytes]:
        if split or (default in opened() and default not in named):
            yield from documents(opened(), split or default, *how)

    files = partial(text_files, where) if isinstance(where, Path) else None
    found = files() if files else []
    for file in found:
        if file.parent.resolve() != file.parent:
            text = f"{file.parent} lies behind a link, which the library passes over"
            raise UserError(f"{text}; link its files")
    return Source(
        choice=choice,
        key=_key(config, str(where), config.hub_config, revision, config.text_column, config.separator, *named),
        origin=f"{where}@{revision}" if revision else str(where),
        parts={
            "train": partial(text, config.train_split, "train"),
            "valid": partial(text, config.valid_split, "validation"),
            "test": partial(text, config.test_split, "test"),
        },
        fingerprint=fingerprint_of(found) if files else None,
        files=files,
        listing={file.relative_to(where).as_posix(): file.stat().st_size for file in found},
    )


def _key(config: DataConfig, *identity: str | None) -> str:
    others = [name for name in ("as_is", "skip_null") if getattr(config, name)]
    everything = repr((*identity, *others, config.valid_fraction, config.test_fraction))
    digest = hashlib.sha256(os.fsencode(everything)).hexdigest()
    return f"{config.corpus}-{digest[:16]}"


def absolute(option: str, path: Path | str) -> Path:
    """The full name of an option's path, without ~ or links. UserError if there is no home for ~."""
    try:
        return Path(os.path.realpath(expanded(path)))
    except ValueError as error:
        raise UserError(f"{option}={path}: {error}", option) from None


def located(config: Config) -> Config:
    """The config with places that are the same from every folder, but the default cache."""
    mixture = {name: _located(source) for name, source in config.data.mixture.items()}
    data = _located(config.data).replace(mixture=mixture)
    if not str(data.cache_dir).startswith("~"):
        data = data.replace(cache_dir=absolute("data.cache_dir", data.cache_dir))
    run = config.run.replace(dir=absolute("run.dir", config.run.dir))
    return config.replace(data=data, run=run)


def _located(config: TextConfig) -> TextConfig:
    choice = _choice(config)
    is_local = isinstance(choice.value, Path)
    return config.replace(**{choice.option.removeprefix("data."): str(choice.value)}) if is_local else config


def _verified(chunks: Iterator[bytes], published: Published) -> Generator[bytes]:
    """Pass chunks on; raise UserError at their end if they are not the published text."""
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
    expected = f"{published.size:,} bytes and {published.algorithm} {published.digest}"
    raise UserError(f"has {found}; {published.member} has {expected}. Get it from {published.url}")
