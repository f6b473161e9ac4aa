"""A corpus: the verified ids of three splits, prepared once and memory-mapped from then on.

A folder, CACHE/KEY/{ids.bin, corpus.json}: ids.bin has the ids of train, valid and test, in each source after source.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import accumulate, chain, product
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
from pydantic import BaseModel, Field, NonNegativeInt, PlainSerializer, PositiveInt
from tqdm import tqdm

from charlm.config import DataConfig, UserError
from charlm.data.sources import Choice, Source, absolute, find_source
from charlm.data.text_files import CHUNK, pack_listing, unpacked
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

FORMAT = 1  # a folder of another version is prepared again
SPLITS = ("train", "valid", "test")
UNITS = ("symbols", "characters", "bytes")


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
    """Names and checksums of the text's files, from `pack_listing`."""
    sources: dict[str, dict[str, Any]] = {}
    """Name, source, sha256 and sizes of each part of a mixture."""

    def texts(self, split: str, symbols: int | None = None) -> list[np.ndarray]:
        """The first ids of a split; of a mixture, as many of each source."""
        ends = accumulate(source["splits"][split]["symbols"] for source in self.sources.values())
        each = None if symbols is None else max(1, symbols // max(1, len(self.sources)))
        return [ids[:each] for ids in np.split(self.splits[split].ids, list(ends)[:-1])]

    def stretch(self, split: str, start: int, length: int) -> tuple[int, bytes]:
        """The whole characters in `length` symbols of a split from `start` on: where they begin, and their text."""
        ids = self.splits[split].ids
        end = min(start + length, len(ids))
        starts = start + np.flatnonzero(self.vocabulary.starts(ids[start : end + 1]))
        first, last = (int(starts[0]), int(starts[-1])) if len(starts) else (end, end)
        return first, self.vocabulary.decode(ids[first : end if end == len(ids) else last])


def load_corpus(config: DataConfig, show_progress: bool = True) -> Corpus:
    """The corpus that the config names, prepared if the cache lacks it or its text has changed.

    enwik8 and text8 are split 90M / 5M / 5M bytes (Al-Rfou et al. 2018); datasets keep their splits.
    Other texts hold out the last data.valid_fraction + data.test_fraction of their bytes; UTF-8 text is
    cut between characters. UserError if the text cannot be fetched, verified or encoded, or the cache be written.
    """
    source, folder = _place(config, show_progress)
    if corpus := _cached(folder, source):
        return corpus
    try:
        make_folder(folder.parent)
        # All vocabularies of a text share its download, so the lock is one per text.
        with locked(folder.with_name(f".{source.key}.lock")):
            if not _cached(folder, source):  # prepared by another process in the meantime
                _prepare(config, source, folder, show_progress)
            return _open(folder, source)
    except OSError as error:
        problem = f"cannot be written ({error}); name another with --data.cache_dir"
        raise Choice("data.cache_dir", folder.parent).error(problem) from error


def prepared_corpus(config: DataConfig) -> Corpus | None:
    """The corpus that the config names if the cache holds it; nothing is fetched or prepared."""
    with suppress(UserError):
        source, folder = _place(config, show_progress=False)
        return _cached(folder, source)
    return None


def _place(config: DataConfig, show_progress: bool) -> tuple[Source, Path]:
    """The source, and the corpus's folder in the cache."""
    cache_dir = absolute("data.cache_dir", config.cache_dir)
    source = (_mixture if config.mixture else find_source)(config, cache_dir, show_progress)
    coverage = f"-sentencepiece-{config.character_coverage}"
    ending = {"characters": "-characters", "sentencepiece": coverage}.get(config.vocabulary, "")
    if config.characters is not None:
        ending = f"-{config.vocabulary}-{hashlib.sha256(config.characters.encode()).hexdigest()}"
    return source, cache_dir / (source.key + ending)


def _mixture(config: DataConfig, cache_dir: Path, show_progress: bool) -> Source:
    """The sources of a mixture as one. Each is prepared by itself first, as bytes."""
    found = {name: find_source(text, cache_dir, show_progress) for name, text in config.texts.items()}
    keys = [(name, source.key) for name, source in found.items()]
    fingerprints = [source.fingerprint for source in found.values()]
    key, fingerprint = (hashlib.sha256(repr(own).encode()).hexdigest() for own in (keys, fingerprints))
    mixture = Source(
        choice=Choice("data.mixture", ", ".join(found)),
        key=f"mixture-{key[:16]}",
        origin="; ".join(source.origin for source in found.values()),
        parts={name: lambda name=name: text_of(name) for name in found},
        fingerprint=fingerprint,
    )

    def text_of(name: str) -> Iterator[bytes]:
        corpus = load_corpus(config.texts[name], show_progress)
        mixture.split_sizes[name] = tuple(split.bytes for split in corpus.splits.values())
        mixture.records[name] = corpus.model_dump(include={"name", "source", "sha256"})
        mixture.listing[name] = int(corpus.sha256[:4], 16)
        yield from unpacked(_place(config.texts[name], show_progress)[1] / "ids.bin", kinds={})

    return mixture


def _cached(folder: Path, source: Source) -> Corpus | None:
    """The prepared corpus, or None if it is missing, damaged, or made from another text."""
    with suppress(OSError, ValueError, LookupError, TypeError, UserError):
        return _open(folder, source)
    return None


def _open(folder: Path, source: Source) -> Corpus:
    record = read_json(folder / "corpus.json")
    if record["format"] != FORMAT or source.fingerprint not in (None, record["fingerprint"]):
        raise ValueError("made by another version, or from another text")
    if "files" not in record and record["name"] == "file":
        raise ValueError("made when packed files were taken as they are")
    vocabulary = vocabulary_from_dict(record["vocabulary"])
    path = folder / "ids.bin"
    *starts, end = accumulate(record["splits"][name]["symbols"] for name in SPLITS)
    is_whole = path.is_file() and path.stat().st_size == end * id_type(vocabulary.size).itemsize
    if not is_whole or path.is_symlink() or sha256_of(path) != record["ids_sha256"]:
        raise ValueError("ids.bin is damaged")
    ids = np.memmap(path, dtype=id_type(vocabulary.size), mode="r")
    parts = zip(SPLITS, np.split(ids, starts), strict=True)
    splits = {name: Split(ids=part, **record["splits"][name]) for name, part in parts}
    return Corpus(**record | {"vocabulary": vocabulary, "splits": splits})


def _prepare(config: DataConfig, source: Source, folder: Path, show_progress: bool) -> None:
    """Write the folder whole or not at all."""
    with replacing(folder) as temporary:
        free = shutil.disk_usage(folder.parent).free
        if source.size is not None and source.size > free:
            room = f"data.cache_dir={folder.parent} has only {free:,} bytes free"
            raise source.choice.error(f"has {source.size:,} bytes, but {room}; make room")
        make_folder(temporary)
        text = temporary / "text.bin"
        ids = temporary / "ids.bin"
        # The delay lets the bar of a download disappear first.
        bar = partial(tqdm, unit="B", unit_scale=True, delay=0.5, disable=None if show_progress else True)
        sha256, parts, not_utf8_at = _write_text(source, text, bar)
        utf8 = not_utf8_at is None
        if not utf8 and config.vocabulary != ByteVocabulary.name:
            problem = f"is not UTF-8 at byte {not_utf8_at:,}"
            raise source.choice.error(f"{problem}; convert it, or use --data.vocabulary=bytes")
        ranges = _cut(config, source, text, parts, utf8)
        pieces = partial(_pieces, text, bar)
        training = (pieces(own["train"], "reading train") for own in ranges.values())
        vocabulary = train_vocabulary(config, utf8, chain.from_iterable(training))
        sizes = {part: {} for part in ranges}
        with ids.open("wb") as file:
            for split, part in product(SPLITS, ranges):
                split_text = pieces(ranges[part][split], f"encoding {split}")
                sizes[part][split] = _encode(split_text, split, vocabulary, file, source)
        text.unlink()
        record = {
            "format": FORMAT,
            "name": config.corpus,
            "source": source.origin,
            "fingerprint": source.fingerprint,
            "sha256": sha256,
            "vocabulary": vocabulary.to_dict(),
            "ids_sha256": sha256_of(ids),
            "splits": {
                split: {unit: sum(own[split][unit] for own in sizes.values()) for unit in UNITS} for split in SPLITS
            },
            "files": pack_listing(source.listing),
            "sources": {part: own | {"splits": sizes[part]} for part, own in source.records.items()},
        }
        write_whole(temporary / "corpus.json", json.dumps(record, indent=2) + "\n")
        share(ids)
        share(temporary / "corpus.json")
        sync(ids)  # so that after a power cut no folder stands without its content
        remove(folder)  # damaged, or made from another text


def _write_text(source: Source, path: Path, bar: Callable[..., tqdm]) -> tuple[str, dict[str, range], int | None]:
    """Returns the SHA-256, each part's range in bytes, and the first byte that is not UTF-8."""
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
    config: DataConfig, source: Source, path: Path, parts: dict[str, range], utf8: bool
) -> dict[str, dict[str, range]]:
    """The range in bytes of each split, by part."""
    if source.split_sizes:
        bounds = {part: [*accumulate(sizes, initial=parts[part].start)] for part, sizes in source.split_sizes.items()}
        return {part: dict(zip(SPLITS, map(range, own, own[1:]), strict=True)) for part, own in bounds.items()}
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
            way_out = "give more text, or change data.valid_fraction and data.test_fraction"
            raise source.choice.error(f"{problem}; {way_out}")
    return {"train": ranges}


def _encode(
    pieces: Iterable[bytes], split: str, vocabulary: Vocabulary, file: BinaryIO, source: Source
) -> dict[str, int]:
    """Write the ids of a split; return its sizes."""
    sizes = dict.fromkeys(UNITS, 0)
    for piece in pieces:
        try:
            ids = vocabulary.encode(piece)
        except EncodingError as error:
            place = f"at byte {sizes['bytes'] + error.offset:,} of its {split} split"
            way_out = "use --data.vocabulary=sentencepiece or bytes (also in the model of run.init_from)"
            raise source.choice.error(f"{place}, {error.problem}; {way_out}") from error
        file.write(ids)
        sizes["symbols"] += len(ids)
        sizes["characters"] += vocabulary.count_characters(ids)
        sizes["bytes"] += len(piece)
    return sizes


def _pieces(path: Path, bar: Callable[..., tqdm], part: range, description: str) -> Iterator[bytes]:
    """A part of the file, cut between characters; read, not mapped, to save memory."""
    with bar(desc=description, total=len(part)) as shown, path.open("rb") as file:
        file.seek(part.start)
        chunks = iter(lambda: file.read(min(CHUNK, part.stop - file.tell())), b"")
        for piece in whole_characters(chunks):
            yield piece
            shown.update(len(piece))
