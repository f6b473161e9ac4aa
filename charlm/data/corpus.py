"""A corpus: the verified ids of three splits, prepared once and memory-mapped from then on.

A prepared corpus is a folder in the cache: CACHE/KEY/{ids.bin, corpus.json}. ids.bin is a plain array of
the ids of train, valid and test, in this order.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
from pydantic import BaseModel, Field, NonNegativeInt, PlainSerializer, PositiveInt
from tqdm import tqdm

from charlm.config import DataConfig, UserError
from charlm.data.sources import Choice, Source, absolute, find_source
from charlm.data.text_files import CHUNK, changes, is_plain, pack_listing, some, text_files
from charlm.data.vocabulary import (
    ByteVocabulary,
    EncodingError,
    Vocabulary,
    id_type,
    last_start,
    train_vocabulary,
    vocabulary_from_dict,
    whole_characters,
)
from charlm.files import locked, make_folder, read_json, remove, replacing, sha256_of, share, sync, write_whole
from charlm.text import visible

FORMAT = 1
"""Version of the folder's layout; a folder of another version is prepared again."""
SPLITS = ("train", "valid", "test")


class Split(BaseModel, arbitrary_types_allowed=True, frozen=True, strict=True):
    """One of the three parts of a corpus."""

    ids: np.ndarray = Field(exclude=True)
    """1-D, memory-mapped, read-only."""
    symbols: PositiveInt
    characters: NonNegativeInt
    bytes: PositiveInt


class Corpus(BaseModel, arbitrary_types_allowed=True, frozen=True, strict=True):
    """A text in three splits; `model_dump` gives everything but the ids, JSON-able."""

    name: str
    source: str
    """Origin of the text: an address, a path, or a version of Python."""
    sha256: str
    """SHA-256 of the whole text."""
    vocabulary: Annotated[Vocabulary, PlainSerializer(lambda vocabulary: vocabulary.to_dict())]
    splits: dict[str, Split]
    """train, valid and test, in this order."""
    files: str | None = None
    """Names and checksums of the files of the text, from `pack_listing`."""


def load_corpus(config: DataConfig, show_progress: bool = True) -> Corpus:
    """The corpus that the config names, prepared if the cache lacks it or its text has changed.

    enwik8 and text8 are split 90M / 5M / 5M bytes (Al-Rfou et al. 2018); datasets keep their own splits.
    Other texts hold out the last data.valid_fraction + data.test_fraction of their bytes; UTF-8 text is
    cut between characters. When several processes call this at once, one prepares and the others wait.
    Progress bars are shown only on a terminal.

    Raises UserError if the text cannot be fetched or read, fails verification, is too short to split, cannot
    be expressed in the vocabulary, or the cache cannot be written. The cache then holds what it held before,
    plus any completed download.
    """
    cache_dir = absolute("data.cache_dir", config.cache_dir)
    source = find_source(config, cache_dir, show_progress)
    folder = cache_dir / _folder_name(config, source)
    if corpus := _cached(folder, source):
        return corpus
    try:
        make_folder(cache_dir)
        # All vocabularies of a text share its download, so the lock is one per text.
        with locked(cache_dir / f".{source.key}.lock"):
            if corpus := _cached(folder, source):  # prepared by another process in the meantime
                return corpus
            _prepare(config, source, folder, show_progress)
            return _open(folder, source)
    except OSError as error:
        problem = f"cannot be written ({error}); name another with --data.cache_dir"
        raise Choice("data.cache_dir", cache_dir).error(problem) from error


def prepared_corpus(config: DataConfig) -> Corpus | None:
    """The corpus that the config names if the cache holds it; nothing is fetched or prepared."""
    with suppress(UserError):
        cache_dir = absolute("data.cache_dir", config.cache_dir)
        source = find_source(config, cache_dir, show_progress=False)
        return _cached(cache_dir / _folder_name(config, source), source)
    return None


def how_it_differs(recorded: Mapping[str, Any], corpus: Corpus) -> str:
    """The files that differ from those of a run's record, as the end of a message; empty if that is not known."""
    if "files" in recorded or corpus.name != "file":
        return changes(recorded.get("files"), corpus.files)
    root = Path(corpus.source)
    hidden = set()
    with suppress(UserError, OSError):  # a broken link that is hidden
        hidden = {file.relative_to(root).as_posix() for file in {*text_files(root, "(?!)")} - {*text_files(root)}}
    names = f" ({some(hidden)})" if hidden else ""
    text = f"earlier versions took packed and hidden files{names} as they are, which --data.as_is=true does"
    return f"; {text}, and left out linked folders"


def _folder_name(config: DataConfig, source: Source) -> str:
    endings = {"characters": "-characters", "sentencepiece": f"-sentencepiece-{config.character_coverage}"}
    return source.key + endings.get(config.vocabulary, "")


def _cached(folder: Path, source: Source) -> Corpus | None:
    """The prepared corpus, or None if it is missing, damaged, or made from another text."""
    with suppress(OSError, ValueError, LookupError, TypeError, UserError):
        return _open(folder, source)
    return None


def _open(folder: Path, source: Source) -> Corpus:
    record = read_json(folder / "corpus.json")
    if record["format"] != FORMAT or source.fingerprint not in (None, record["fingerprint"]):
        raise ValueError("made by another version, or from another text")
    if "files" not in record and record["name"] == "file" and not all(map(is_plain, source.files())):
        raise ValueError("made when packed files were taken as they are")
    vocabulary = vocabulary_from_dict(record["vocabulary"])
    ids_path = folder / "ids.bin"
    is_file = ids_path.is_file() and not ids_path.is_symlink()
    size = id_type(vocabulary.size).itemsize * sum(record["splits"][name]["symbols"] for name in SPLITS)
    if not is_file or ids_path.stat().st_size != size or sha256_of(ids_path) != record["ids_sha256"]:
        raise ValueError("ids.bin is damaged")
    ids = np.memmap(ids_path, dtype=id_type(vocabulary.size), mode="r")
    splits, start = {}, 0
    for name in SPLITS:
        sizes = record["splits"][name]
        end = start + sizes["symbols"]
        splits[name] = Split(ids=ids[start:end], **sizes)
        start = end
    return Corpus(**record | {"vocabulary": vocabulary, "splits": splits})


def _prepare(config: DataConfig, source: Source, folder: Path, show_progress: bool) -> None:
    """Write the folder whole or not at all."""
    with replacing(folder) as temporary:
        free = shutil.disk_usage(folder.parent).free
        if source.size is not None and source.size > free:
            room = f"data.cache_dir={folder.parent} has {free:,} bytes free"
            raise source.choice.error(f"has {source.size:,} bytes, but {room}; make room, or choose another")
        make_folder(temporary)
        text = temporary / "text.bin"
        ids = temporary / "ids.bin"
        # The delay lets the bar of a download disappear first.
        bar = partial(tqdm, unit="B", unit_scale=True, delay=0.5, disable=None if show_progress else True)
        sha256, parts, not_utf8_at = _write_text(source, text, bar)
        utf8 = not_utf8_at is None
        if not utf8 and config.vocabulary != ByteVocabulary.name:
            problem = f"not UTF-8 at byte {not_utf8_at:,}, which data.vocabulary={config.vocabulary} needs"
            raise source.choice.error(f"{problem}; convert it, or use --data.vocabulary=bytes")
        ranges = _cut(config, source, text, parts, utf8)
        pieces = partial(_pieces, text, bar)
        training_text = pieces(ranges["train"], "reading the training split")
        vocabulary = train_vocabulary(config, utf8, training_text)
        splits = {}
        with ids.open("wb") as file:
            for split in SPLITS:
                split_text = pieces(ranges[split], f"encoding {split}")
                splits[split] = _encode(split_text, split, vocabulary, file, source)
        text.unlink()
        record = {
            "format": FORMAT,
            "name": config.corpus,
            "source": source.origin,
            "fingerprint": source.fingerprint,
            "sha256": sha256,
            "vocabulary": vocabulary.to_dict(),
            "dtype": id_type(vocabulary.size).name,
            "ids_sha256": sha256_of(ids),
            "splits": splits,
            "files": pack_listing(source.listing),
        }
        write_whole(temporary / "corpus.json", json.dumps(record, indent=2) + "\n")
        share(ids)
        share(temporary / "corpus.json")
        sync(ids)  # so that after a power cut no folder stands without its content
        remove(folder)  # damaged, or made from another text


def _write_text(source: Source, path: Path, bar: Callable[..., tqdm]) -> tuple[str, dict[str, range], int | None]:
    """Returns the SHA-256, the range of each part in bytes, and the first byte that is not UTF-8."""
    digest = hashlib.sha256()
    parts = {}
    not_utf8_at = None
    written = 0
    with bar(desc=f"preparing {visible(source.origin)}", total=source.size) as shown, path.open("wb") as file:
        for part in source.parts:
            start = written
            for block in whole_characters(source.chunks(part)):
                try:
                    block.decode()
                except UnicodeDecodeError as error:
                    if not_utf8_at is None:
                        not_utf8_at = written + error.start
                file.write(block)
                digest.update(block)
                written += len(block)
                shown.update(len(block))
            parts[part] = range(start, written)
    return digest.hexdigest(), parts, not_utf8_at


def _cut(
    config: DataConfig,
    source: Source,
    path: Path,
    parts: dict[str, range],
    utf8: bool,
) -> dict[str, range]:
    """The range of each split in the text, in bytes."""
    if source.split_sizes:
        bounds = [0, *accumulate(source.split_sizes)]
        return dict(zip(SPLITS, map(range, bounds, bounds[1:]), strict=True))
    size = len(parts["train"])
    if not size:
        raise source.choice.error("holds no text, apart from hidden files; give some")
    text = np.memmap(path, np.uint8, mode="r")
    fractions = {"test": config.test_fraction, "valid": config.valid_fraction}
    ranges = {}
    cut = upper = size
    for split, fraction in fractions.items():
        ranges[split] = parts.get(split)
        if not ranges[split]:
            cut -= round(size * fraction)
            lower = last_start(text[: cut + 1]) if utf8 and cut < size else cut
            ranges[split] = range(lower, upper)
            upper = lower
    ranges["train"] = range(upper)
    for split in SPLITS:
        if not ranges[split]:
            problem = f"its {size:,} bytes leave the {split} split empty"
            options = [f"data.{name}_fraction={fractions[name]}" for name in ("valid", "test")]
            raise source.choice.error(f"{problem}; give more text or change {' and '.join(options)}")
    return ranges


def _encode(
    pieces: Iterable[bytes], split: str, vocabulary: Vocabulary, file: BinaryIO, source: Source
) -> dict[str, int]:
    """Write the ids of a split; return its symbols, characters and bytes."""
    sizes = {"symbols": 0, "characters": 0, "bytes": 0}
    for piece in pieces:
        try:
            ids = vocabulary.encode(piece)
        except EncodingError as error:
            place = f"at byte {sizes['bytes'] + error.offset:,} of its {split} split"
            problem = f"{place}, {error.problem}; it has those of the training split"
            way_out = "use --data.vocabulary=sentencepiece or bytes"
            raise source.choice.error(f"{problem}; {way_out}") from error
        file.write(ids)
        sizes["symbols"] += len(ids)
        sizes["characters"] += vocabulary.count_characters(ids)
        sizes["bytes"] += len(piece)
    return sizes


def _pieces(path: Path, bar: Callable[..., tqdm], part: range, description: str) -> Iterator[bytes]:
    """A part of the file, cut between characters. It is read, not mapped, so that memory stays small."""
    with bar(desc=description, total=len(part)) as shown, path.open("rb") as file:
        file.seek(part.start)
        chunks = iter(lambda: file.read(min(CHUNK, part.stop - file.tell())), b"")
        for piece in whole_characters(chunks):
            yield piece
            shown.update(len(piece))
