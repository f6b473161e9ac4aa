"""load_corpus: text -> verified ids in three splits, prepared once and memory-mapped from then on.

A prepared corpus is a folder in the cache: CACHE/KEY/{ids.bin, corpus.json}. The ids of train, valid and test follow
each other in ids.bin, a plain array.
"""

import codecs
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
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

FORMAT = 1
"""Of the folder; one of another format is prepared anew."""
SPLITS = ("train", "valid", "test")
LARGEST_RECORD = 1 << 26
"""Bytes that corpus.json may have: the characters of all of Unicode, or a model of them, and room."""


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
    """Where the text came from: an address, a path, a version of Python."""
    sha256: str
    """Of the whole text, in bytes."""
    vocabulary: Vocabulary
    splits: dict[str, Split]
    """train, valid and test, in the order of the text."""

    def to_dict(self) -> dict[str, Any]:
        """What JSON keeps: all but the ids."""
        sizes = {
            split.name: {"symbols": split.symbols, "characters": split.characters, "bytes": split.bytes}
            for split in self.splits.values()
        }
        return {
            "name": self.name,
            "source": self.source,
            "sha256": self.sha256,
            "vocabulary": self.vocabulary.to_dict(),
            "splits": sizes,
        }


def load_corpus(config: DataConfig, progress: bool = True) -> Corpus:
    """The corpus that the config asks for, prepared first if the cache does not hold it or its text has changed.

    enwik8 and text8 are split 90M / 5M / 5M bytes (Al-Rfou et al. 2018), datasets as they come. Of other texts the last
    data.valid_fraction + data.test_fraction of the bytes are held out; in UTF-8 both cuts fall between characters.
    Several processes may do so at once: one prepares, the others wait.

    Args:
        progress: show progress bars where stderr is a terminal.

    Raises:
        UserError: the text cannot be had, is not what it should be, is too short to split or cannot be expressed in
            the vocabulary, or the cache cannot be written. The cache then holds what it held before, and what came of a
            download.
    """
    cache_dir = absolute(config.cache_dir)
    source = find_source(config, cache_dir, progress)
    folder = cache_dir / _folder_name(config, source)
    if corpus := _cached(folder, source):
        return corpus
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        # Vocabularies of a text share its download, so one process prepares at a time whatever the vocabulary.
        with FileLock(cache_dir / f".{source.key}.lock"):
            if corpus := _cached(folder, source):  # prepared by another process in the meantime
                return corpus
            _prepare(config, source, folder, progress)
            return _open(folder, source)
    except OSError as error:
        raise UserError(f"data.cache_dir={cache_dir}: cannot be written ({error.strerror or error})") from error


def prepared_corpus(config: DataConfig) -> Corpus | None:
    """The corpus that the config asks for if the cache holds it; nothing is fetched or prepared."""
    cache_dir = absolute(config.cache_dir)
    try:
        source = find_source(config, cache_dir, progress=False)
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
    """The prepared corpus, or None if it is missing, damaged, or made from something else."""
    try:
        return _open(folder, source)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, UserError):
        return None


def _open(folder: Path, source: Source) -> Corpus:
    for path in (folder, folder / "corpus.json", folder / "ids.bin"):
        if path.is_symlink() or (path != folder and not path.is_file()):
            raise ValueError(f"{path} is a link or no file, which no prepared corpus has")
    if (folder / "corpus.json").stat().st_size > LARGEST_RECORD:
        raise ValueError("corpus.json is far too long")
    record = json.loads((folder / "corpus.json").read_text("utf-8"))
    if record["format"] != FORMAT or source.fingerprint not in (None, record["fingerprint"]):
        raise ValueError("made by another version, or from another text")
    vocabulary = vocabulary_from_dict(record["vocabulary"])
    if record["dtype"] != id_type(vocabulary.size).name:
        raise ValueError(f"ids of type {record['dtype']} for {vocabulary.size} symbols")
    if "ids_sha256" in record and _sha256(folder / "ids.bin") != record["ids_sha256"]:
        raise ValueError("ids.bin is damaged")
    ids = np.memmap(folder / "ids.bin", dtype=record["dtype"], mode="r")
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


def _prepare(config: DataConfig, source: Source, folder: Path, progress: bool) -> None:
    """Written under another name first, the folder is there as a whole or not at all."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    if source.size is not None and source.size > (free := shutil.disk_usage(folder.parent).free):
        raise UserError(
            f"data.cache_dir={folder.parent}: has {free:,} bytes free, and {source.option} has {source.size:,}; "
            "make room, or choose another"
        )
    temporary.mkdir()
    try:
        text = _write_text(source, temporary / "text.bin", progress)
        if config.vocabulary != ByteVocabulary.name and text.not_utf8_at is not None:
            raise UserError(
                f"{source.option}: not UTF-8 at byte {text.not_utf8_at:,}, and data.vocabulary={config.vocabulary} "
                "needs characters; convert it, or use --data.vocabulary=bytes"
            )
        ranges = _cut(config, source, text)
        training_text = _pieces(text.path, ranges["train"], "reading the training split", progress)
        vocabulary = train_vocabulary(config, text.not_utf8_at is None, training_text)
        splits = _encode(source, text.path, ranges, vocabulary, temporary / "ids.bin", progress)
        text.path.unlink(missing_ok=True)
        record = {
            "format": FORMAT,
            "name": config.corpus,
            "source": source.origin,
            "fingerprint": source.fingerprint,
            "sha256": text.sha256,
            "vocabulary": vocabulary.to_dict(),
            "dtype": id_type(vocabulary.size).name,
            "ids_sha256": _sha256(temporary / "ids.bin"),
            "splits": splits,
        }
        (temporary / "corpus.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # damaged, or made from something else
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class Range(NamedTuple):
    """Bytes of a file."""

    start: int
    end: int


class _Text(NamedTuple):
    path: Path
    sha256: str
    parts: dict[str, Range]
    """Where in the file the text lies (train), and what the source holds out of its own."""
    not_utf8_at: int | None
    """The first byte at which it is not UTF-8."""


def _write_text(source: Source, path: Path, progress: bool) -> _Text:
    digest, parts, not_utf8_at, written = hashlib.sha256(), {}, None, 0
    with _bar(f"preparing {source.origin}", progress, source.size) as bar, path.open("wb") as file:
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
        _sync(file)
    return _Text(path, digest.hexdigest(), parts, not_utf8_at)


def _cut(config: DataConfig, source: Source, text: _Text) -> dict[str, Range]:
    """Where each split lies in the file."""
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
    """The last position up to this one at which a UTF-8 character starts; the end of the text is one."""
    while position < len(text) and text[position] & 0b11000000 == 0b10000000:
        position -= 1
    return position


def _encode(
    source: Source, text_path: Path, ranges: dict[str, Range], vocabulary: Vocabulary, ids_path: Path, progress: bool
) -> dict[str, dict[str, int]]:
    """Write the ids; return symbols, characters and bytes of each split."""
    in_order = ranges["train"] < ranges["valid"] < ranges["test"]
    if in_order and isinstance(vocabulary, ByteVocabulary):  # the ids are the text: their file is there already
        text_path.rename(ids_path)
        text_path, ids_path = ids_path, Path(os.devnull)
    measures = {}
    with ids_path.open("wb") as file:
        for split in SPLITS:
            symbols = characters = num_bytes = 0
            for piece in _pieces(text_path, ranges[split], f"encoding {split}", progress):
                try:
                    ids = vocabulary.encode(piece)
                except EncodingError as error:
                    raise UserError(
                        f"{source.option}: at byte {num_bytes + error.offset:,} of its {split} split, "
                        f"{error.problem}, those of the training split; use --data.vocabulary=sentencepiece or bytes"
                    ) from error
                file.write(ids)
                symbols += len(ids)
                characters += vocabulary.count_characters(ids)
                num_bytes += len(piece)
            measures[split] = {"symbols": symbols, "characters": characters, "bytes": num_bytes}
        _sync(file)
    return measures


def _pieces(path: Path, part: Range, description: str, progress: bool) -> Iterator[bytes]:
    """A part of the file, cut between characters. Read rather than mapped, so that memory stays small."""
    with _bar(description, progress, part.end - part.start) as bar, path.open("rb") as file:
        file.seek(part.start)
        rest = b""
        while block := file.read(min(CHUNK, part.end - file.tell())):
            piece = rest + block
            whole = len(piece) if file.tell() == part.end else _end_of_characters(piece)
            rest = piece[whole:]
            yield piece[:whole]
            bar.update(whole)


def _end_of_characters(piece: bytes) -> int:
    """Where the last character of UTF-8 begins, which may not be whole; at the end if none begins in the last bytes."""
    for position in range(len(piece) - 1, max(len(piece) - 5, 0), -1):
        if piece[position] & 0b11000000 != 0b10000000:
            return position
    return len(piece)


def _bar(description: str, progress: bool, total: int | None = None) -> tqdm:
    return tqdm(
        desc=description,
        total=total,
        unit="B",
        unit_scale=True,
        delay=0.5,  # shown with the first bytes, so not before the bar of a download is gone
        disable=None if progress else True,
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(file: BinaryIO) -> None:
    """The name must not outlive a power cut that the bytes do not."""
    if file.name != os.devnull:
        file.flush()
        os.fsync(file.fileno())
