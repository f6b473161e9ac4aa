"""load_corpus: text -> verified ids in three splits, prepared once and memory-mapped from then on.

A prepared corpus is a folder in the cache: CACHE/KEY/{ids.bin, corpus.json}. The ids of train, valid and test follow
each other in ids.bin, a plain array.
"""

import codecs
import hashlib
import json
import os
import shutil
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from charlm.config import DataConfig, UserError
from charlm.data.sources import CHUNK, Source, absolute, find_source
from charlm.data.vocabulary import ByteVocabulary, Vocabulary, vocabulary_from_dict

FORMAT = 1
"""Of the folder; one of another format is prepared anew."""
SPLITS = ("train", "valid", "test")


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
    """Of the whole text."""
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

    enwik8 and text8 are split 90M / 5M / 5M bytes (Al-Rfou et al. 2018). Of other texts the last
    data.valid_fraction + data.test_fraction of the bytes are held out; in UTF-8 both cuts fall between characters.
    Several processes may do so at once: one prepares, the others wait.

    Args:
        progress: show progress bars where stderr is a terminal.

    Raises:
        UserError: the text cannot be had, is not what it should be or is too short to split, or the cache cannot be
            written. The cache then holds what it held before, and what came of a download.
    """
    cache_dir = absolute(config.cache_dir)
    source = find_source(config, cache_dir, progress)
    folder = cache_dir / source.key
    if corpus := _cached(folder, source):
        return corpus
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(cache_dir / f".{source.key}.lock"):
            if corpus := _cached(folder, source):  # prepared by another process in the meantime
                return corpus
            _prepare(config, source, folder, progress)
            return _open(folder, source)
    except OSError as error:
        raise UserError(f"data.cache_dir={cache_dir}: cannot be written ({error.strerror or error})") from error


def _cached(folder: Path, source: Source) -> Corpus | None:
    """The prepared corpus, or None if it is missing, damaged, or made from something else."""
    try:
        return _open(folder, source)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, UserError):
        return None


def _open(folder: Path, source: Source) -> Corpus:
    record = json.loads((folder / "corpus.json").read_text("utf-8"))
    if record["format"] != FORMAT or source.fingerprint not in (None, record["fingerprint"]):
        raise ValueError("made by another version, or from another text")
    ids = np.memmap(folder / "ids.bin", dtype=record["dtype"], mode="r")
    splits, start = {}, 0
    for name in SPLITS:
        sizes = record["splits"][name]
        splits[name] = Split(name, ids[start : start + sizes["symbols"]], **sizes)
        start += sizes["symbols"]
    if start != len(ids):
        raise ValueError(f"{len(ids)} ids, but splits of {start}")
    vocabulary = vocabulary_from_dict(record["vocabulary"])
    return Corpus(record["name"], record["source"], record["sha256"], vocabulary, splits)


def _prepare(config: DataConfig, source: Source, folder: Path, progress: bool) -> None:
    """Written under another name first, the folder is there as a whole or not at all."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    temporary.mkdir()
    try:
        ids_path = temporary / "ids.bin"
        sha256, utf8 = _write_bytes(source, ids_path, progress)
        vocabulary = ByteVocabulary(utf8)
        record = {
            "format": FORMAT,
            "name": config.corpus,
            "source": source.origin,
            "fingerprint": source.fingerprint,
            "sha256": sha256,
            "vocabulary": vocabulary.to_dict(),
            "dtype": "uint8",
            "splits": _measure(ids_path, _cut(config, source, ids_path, utf8), vocabulary),
        }
        (temporary / "corpus.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # damaged, or made from something else
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_bytes(source: Source, path: Path, progress: bool) -> tuple[str, bool]:
    """Write the text; return its SHA-256 and whether it is UTF-8."""
    digest, decoder, utf8 = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")(), True
    bar = tqdm(
        desc=f"preparing {source.origin}",
        unit="B",
        unit_scale=True,
        delay=0.5,  # shown with the first bytes, so not before the bar of a download is gone
        disable=None if progress else True,
    )
    with bar, closing(source.chunks()) as chunks, path.open("wb") as file:
        for chunk in chain(chunks, [b""]):
            file.write(chunk)
            digest.update(chunk)
            if utf8:
                try:
                    decoder.decode(chunk, final=not chunk)
                except UnicodeDecodeError:
                    utf8 = False
            bar.update(len(chunk))
        file.flush()
        os.fsync(file.fileno())  # the name must not outlive a power cut that the bytes do not
    return digest.hexdigest(), utf8


def _cut(config: DataConfig, source: Source, path: Path, utf8: bool) -> list[int]:
    """Bytes of each split."""
    if source.split_sizes:
        return list(source.split_sizes)
    size = path.stat().st_size
    if not size:
        raise UserError(f"{source.option}: there is no text in it; give some")
    num_test, num_valid = round(size * config.test_fraction), round(size * config.valid_fraction)
    cuts = [size - num_test - num_valid, size - num_test]
    if utf8:
        text = np.memmap(path, np.uint8, mode="r")
        cuts = [_start_of_character(text, cut) for cut in cuts]
    sizes = np.diff([0, *cuts, size]).tolist()
    if 0 in sizes:
        raise UserError(
            f"{source.option}: its {size:,} bytes leave the {SPLITS[sizes.index(0)]} split empty; give more text or "
            f"change data.valid_fraction={config.valid_fraction} and data.test_fraction={config.test_fraction}"
        )
    return sizes


def _start_of_character(text: np.ndarray, position: int) -> int:
    """The last position up to this one at which a UTF-8 character starts; the end of the text is one."""
    while position < len(text) and text[position] & 0b11000000 == 0b10000000:
        position -= 1
    return position


def _measure(path: Path, sizes: list[int], vocabulary: Vocabulary) -> dict[str, dict[str, int]]:
    """Symbols, characters and bytes of each split. Read rather than mapped, so that memory stays small."""
    measures = {}
    with path.open("rb") as file:
        for name, size in zip(SPLITS, sizes, strict=True):
            blocks = (file.read(min(CHUNK, size - start)) for start in range(0, size, CHUNK))
            characters = sum(vocabulary.count_characters(vocabulary.encode(block)) for block in blocks)
            measures[name] = {"symbols": size, "characters": characters, "bytes": size}
    return measures
