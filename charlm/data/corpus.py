"""load_corpus: text -> verified ids in three splits, prepared once and memory-mapped from then on.

A prepared corpus is a folder in the cache: CACHE/KEY/{ids.bin, corpus.json}. ids.bin is a plain array: the ids of
train, then those of valid, then those of test.
"""

import codecs
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from charlm.config import DataConfig, UserError
from charlm.data.sources import CHUNK, Source, absolute, find_source
from charlm.data.vocabulary import (
    ByteVocabulary,
    EncodingError,
    Vocabulary,
    id_type,
    train_vocabulary,
    vocabulary_from_dict,
)
from charlm.files import read_json, sha256_of, sync

FORMAT = 1
"""Version of the folder's layout; a folder of another version is prepared anew."""
SPLITS = ("train", "valid", "test")
MAX_RECORD_BYTES = 2**26
"""Upper bound on the size of corpus.json, which may hold all characters of Unicode or a sentencepiece model."""


@dataclass(frozen=True)
class Split:
    """One of the three parts of a corpus."""

    name: str
    ids: np.memmap
    """1-D, read-only."""
    symbols: int
    characters: int
    bytes: int


@dataclass(frozen=True)
class Corpus:
    """A text in three splits."""

    name: str
    source: str
    """Origin of the text: an address, a path, or a version of Python."""
    sha256: str
    """SHA-256 of the whole text, in bytes."""
    vocabulary: Vocabulary
    splits: dict[str, Split]
    """train, valid and test, in the order of the text."""

    def to_dict(self) -> dict[str, Any]:
        """Everything but the ids, JSON-able."""
        return {
            "name": self.name,
            "source": self.source,
            "sha256": self.sha256,
            "vocabulary": self.vocabulary.to_dict(),
            "splits": {
                split.name: {"symbols": split.symbols, "characters": split.characters, "bytes": split.bytes}
                for split in self.splits.values()
            },
        }


def load_corpus(config: DataConfig, show_progress: bool = True) -> Corpus:
    """The corpus the config asks for. It is prepared first if the cache lacks it or its text has changed.

    enwik8 and text8 are split 90M / 5M / 5M bytes (Al-Rfou et al. 2018); datasets keep their own splits. For other
    texts, the last data.valid_fraction + data.test_fraction of the bytes are held out; in UTF-8 text both cuts fall
    between characters. When several processes call this at once, one prepares and the others wait.

    Args:
        show_progress: show progress bars where stderr is a terminal.

    Raises:
        UserError: the text cannot be fetched or read, fails verification, is too short to split or cannot be expressed
            in the vocabulary, or the cache cannot be written. The cache then holds what it held before, plus any
            completed download.
    """
    cache_dir = absolute(config.cache_dir)
    source = find_source(config, cache_dir, show_progress)
    folder = cache_dir / _folder_name(config, source)
    if corpus := _cached(folder, source):
        return corpus
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        # All vocabularies of a text share its download, so the lock is one per text.
        with FileLock(cache_dir / f".{source.key}.lock"):
            if corpus := _cached(folder, source):  # prepared by another process in the meantime
                return corpus
            _prepare(config, source, folder, show_progress)
            return _open(folder, source)
    except OSError as error:
        raise UserError(f"data.cache_dir={cache_dir}: cannot be written ({error.strerror or error})") from error


def prepared_corpus(config: DataConfig) -> Corpus | None:
    """The corpus the config asks for if the cache holds it; nothing is fetched or prepared."""
    cache_dir = absolute(config.cache_dir)
    try:
        source = find_source(config, cache_dir, show_progress=False)
    except UserError:
        return None
    return _cached(cache_dir / _folder_name(config, source), source)


def _folder_name(config: DataConfig, source: Source) -> str:
    suffix = {
        "bytes": "",
        "characters": "-characters",
        "sentencepiece": f"-sentencepiece-{config.character_coverage}",
    }
    return source.key + suffix[config.vocabulary]


def _cached(folder: Path, source: Source) -> Corpus | None:
    """The prepared corpus, or None if it is missing, damaged, or made from another text."""
    try:
        return _open(folder, source)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, UserError):
        return None


def _open(folder: Path, source: Source) -> Corpus:
    record, ids_path = read_json(folder / "corpus.json", MAX_RECORD_BYTES), folder / "ids.bin"
    if record["format"] != FORMAT or source.fingerprint not in (None, record["fingerprint"]):
        raise ValueError("made by another version, or from another text")
    vocabulary = vocabulary_from_dict(record["vocabulary"])
    if ids_path.is_symlink() or not ids_path.is_file() or sha256_of(ids_path) != record["ids_sha256"]:
        raise ValueError("ids.bin is damaged")
    ids = np.memmap(ids_path, dtype=id_type(vocabulary.size), mode="r")
    splits, start = {}, 0
    for name in SPLITS:
        sizes = record["splits"][name]
        if not all(type(size) is int and size > 0 for size in sizes.values()):
            raise ValueError(f"sizes of {name}: {sizes}")
        splits[name] = Split(name, ids[start : start + sizes["symbols"]], **sizes)
        start += sizes["symbols"]
    if start != len(ids):
        raise ValueError(f"{len(ids)} ids, but splits of {start}")
    return Corpus(record["name"], record["source"], record["sha256"], vocabulary, splits)


def _prepare(config: DataConfig, source: Source, folder: Path, show_progress: bool) -> None:
    """Write the folder under another name and rename it, so that it is there as a whole or not at all."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    if source.size is not None and source.size > (free := shutil.disk_usage(folder.parent).free):
        raise UserError(
            f"data.cache_dir={folder.parent}: has {free:,} bytes free, and {source.option} has {source.size:,}; "
            "make room, or choose another"
        )
    temporary.mkdir()
    try:
        text = _write_text(source, temporary / "text.bin", show_progress)
        if config.vocabulary != ByteVocabulary.name and text.not_utf8_at is not None:
            raise UserError(
                f"{source.option}: not UTF-8 at byte {text.not_utf8_at:,}, and data.vocabulary={config.vocabulary} "
                "needs characters; convert it, or use --data.vocabulary=bytes"
            )
        ranges = _cut(config, source, text)
        pieces = partial(_pieces, text.path, show_progress=show_progress)
        training_text = pieces(ranges["train"], "reading the training split")
        vocabulary = train_vocabulary(config, text.not_utf8_at is None, training_text)
        splits = {}
        with (temporary / "ids.bin").open("wb") as file:
            for split in SPLITS:
                splits[split] = _encode(
                    pieces(ranges[split], f"encoding {split}"), split, vocabulary, file, source.option
                )
        text.path.unlink()
        record = {
            "format": FORMAT,
            "name": config.corpus,
            "source": source.origin,
            "fingerprint": source.fingerprint,
            "sha256": text.sha256,
            "vocabulary": vocabulary.to_dict(),
            "dtype": id_type(vocabulary.size).name,
            "ids_sha256": sha256_of(temporary / "ids.bin"),
            "splits": splits,
        }
        (temporary / "corpus.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")
        sync(temporary / "ids.bin")  # the folder's name must not survive a power cut that its content does not
        shutil.rmtree(folder, ignore_errors=True)  # damaged, or made from another text
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class Range(NamedTuple):
    """A range of bytes in a file."""

    start: int
    end: int


class _Text(NamedTuple):
    path: Path
    sha256: str
    parts: dict[str, Range]
    """Range of the main text ("train"), and of each split that the source holds out itself."""
    not_utf8_at: int | None
    """Position of the first byte that is not UTF-8."""


def _write_text(source: Source, path: Path, show_progress: bool) -> _Text:
    digest, parts, not_utf8_at, written = hashlib.sha256(), {}, None, 0
    with _bar(f"preparing {source.origin}", show_progress, source.size) as bar, path.open("wb") as file:
        for split, open_chunks in {"train": source.chunks, **source.held_out}.items():
            decoder, start = codecs.getincrementaldecoder("utf-8")(), written
            with closing(open_chunks()) as chunks:
                for chunk in chain(chunks, [b""]):
                    file.write(chunk)
                    digest.update(chunk)
                    written += len(chunk)
                    if not_utf8_at is None:
                        try:
                            decoder.decode(chunk, final=not chunk)
                        except UnicodeDecodeError as error:
                            not_utf8_at = written - len(error.object) + error.start
                    bar.update(len(chunk))
            parts[split] = Range(start, written)
    return _Text(path, digest.hexdigest(), parts, not_utf8_at)


def _cut(config: DataConfig, source: Source, text: _Text) -> dict[str, Range]:
    """The range of each split in the file."""
    if source.split_sizes:
        bounds = np.cumsum([0, *source.split_sizes]).tolist()
        return dict(zip(SPLITS, map(Range._make, pairwise(bounds)), strict=True))
    size = cut = end = text.parts["train"].end
    if not size:
        raise UserError(f"{source.option}: there is no text in it; give some")
    written, ranges = np.memmap(text.path, np.uint8, mode="r"), {}
    for split, fraction in {"test": config.test_fraction, "valid": config.valid_fraction}.items():
        own = text.parts.get(split)
        if own and own.end > own.start:
            ranges[split] = own
        else:
            cut -= round(size * fraction)
            start = _start_of_character(written, cut) if text.not_utf8_at is None else cut
            ranges[split], end = Range(start, end), start
    ranges["train"] = Range(0, end)
    for split in SPLITS:
        if ranges[split].start == ranges[split].end:
            raise UserError(
                f"{source.option}: its {size:,} bytes leave the {split} split empty; give more text or "
                f"change data.valid_fraction={config.valid_fraction} and data.test_fraction={config.test_fraction}"
            )
    return ranges


def _start_of_character(text: np.ndarray, position: int) -> int:
    """The last position up to `position` where a UTF-8 character starts, or the text ends."""
    while position < len(text) and text[position] & 0b11000000 == 0b10000000:
        position -= 1
    return position


def _encode(pieces: Iterable[bytes], split: str, vocabulary: Vocabulary, file: BinaryIO, option: str) -> dict[str, int]:
    """Write the ids of a split; return its symbols, characters and bytes."""
    symbols = characters = num_bytes = 0
    for piece in pieces:
        try:
            ids = vocabulary.encode(piece)
        except EncodingError as error:
            raise UserError(
                f"{option}: at byte {num_bytes + error.offset:,} of its {split} split, {error.problem}, those of the "
                "training split; use --data.vocabulary=sentencepiece or bytes"
            ) from error
        file.write(ids)
        symbols += len(ids)
        characters += vocabulary.count_characters(ids)
        num_bytes += len(piece)
    return {"symbols": symbols, "characters": characters, "bytes": num_bytes}


def _pieces(path: Path, part: Range, description: str, show_progress: bool) -> Iterator[bytes]:
    """A part of the file, cut between characters."""
    with _bar(description, show_progress, part.end - part.start) as bar, path.open("rb") as file:
        file.seek(part.start)
        for piece in whole_characters(file, part.end):
            yield piece
            bar.update(len(piece))


def whole_characters(file: BinaryIO, end: int) -> Iterator[bytes]:
    """The rest of a file up to `end`, cut between UTF-8 characters. It is read, not mapped: memory stays small."""
    rest = b""
    while block := file.read(min(CHUNK, end - file.tell())):
        piece = rest + block
        whole = len(piece) if file.tell() == end else _end_of_characters(piece)
        rest = piece[whole:]
        yield piece[:whole]


def _end_of_characters(piece: bytes) -> int:
    """Start of the last, perhaps incomplete, UTF-8 character; the end if none starts in the last four bytes."""
    for position in range(len(piece) - 1, max(len(piece) - 5, 0), -1):
        if piece[position] & 0b11000000 != 0b10000000:
            return position
    return len(piece)


def _bar(description: str, show_progress: bool, total: int | None = None) -> tqdm:
    return tqdm(
        desc=description,
        total=total,
        unit="B",
        unit_scale=True,
        delay=0.5,  # shown with the first bytes, when the bar of a download is gone
        disable=None if show_progress else True,
    )
