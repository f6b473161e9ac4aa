"""Lossless compression with a model: a range coder over its distribution of the next symbol.

A file takes as many bits as its predictions cost: one that decodes to its text proves a score.

Shapes: A streams that still have symbols, V vocabulary, N symbols of a text or a block.
"""

import hashlib
import math
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import constriction
import numpy as np
from pydantic import BaseModel, computed_field
from tqdm import tqdm

from charlm.compression.container import (
    Header,
    checksum,
    environment,
    model_digest,
    pack_block,
    probe,
    read_block,
    read_header,
    vocabulary_digest,
)
from charlm.compression.streams import (
    FAMILY,
    CodingSettings,
    Streams,
    check_settings,
    choose_settings,
    probabilities,
    threads_set,
)
from charlm.config import Precision, UserError
from charlm.data.corpus import Corpus
from charlm.data.text_files import blocks
from charlm.data.vocabulary import EncodingError, Vocabulary, id_type, whole_characters
from charlm.files import replacing
from charlm.hardware import in_float64
from charlm.inference.evaluation import Score, Scorer
from charlm.inference.scoring import progress_bar
from charlm.runs.trained import TrainedModel

SAME_MACHINE = "decompress it on the machine that compressed it"


class Compressed(BaseModel, frozen=True):
    """The result of `compress`; rates are None for an empty file."""

    bytes: int
    symbols: int
    characters: int
    compressed_bytes: int
    protocol: CodingSettings
    seconds: float
    """Time for coding."""
    verify_seconds: float | None
    """Time for decoding; None if the result was not verified."""

    @computed_field
    @property
    def bits_per_character(self) -> float | None:
        return 8 * self.compressed_bytes / self.characters if self.characters else None

    @computed_field
    @property
    def bits_per_byte(self) -> float | None:
        return 8 * self.compressed_bytes / self.bytes if self.bytes else None


def compress(
    trained: TrainedModel,
    source: Path | str,
    target: Path | str,
    *,
    verify: bool = True,
    show_progress: bool = True,
    **options: Any,
) -> Compressed:
    """Compress a file into `target`, for the same model on the same machine to `decompress`.

    Memory is bounded. `target` appears only when it is complete.

    Args:
        verify: decode the result and compare before it takes its place.
        show_progress: show bars on stderr if that is a terminal.
        options: fields of `CodingSettings`; those left out, or None, have defaults.

    Raises UserError for an option out of range, a file that cannot be read, written or spelled, or a
    result that decodes to other bytes.
    """
    source, target = Path(source), Path(target)
    with open_regular(source) as file:
        scanned, coded = hashlib.sha256(), hashlib.sha256()
        content = scan(pieces_of(file, scanned), source, trained.vocabulary)
        settings = choose_settings(trained, content["symbols"], **options)
        with output(target, source) as written, threads_set(settings.threads):
            header = Header(
                length=content["bytes"],
                symbols=content["symbols"],
                content=scanned.digest(),
                model=model_digest(trained),
                vocabulary=vocabulary_digest(trained.vocabulary),
                probe=probe(trained, settings),
                settings=settings,
                environment=environment(trained.device, settings.experts),
            )
            started = time.perf_counter()
            pieces = pieces_of(file, coded)
            ids = blocks_of(pieces, trained.vocabulary, settings.block)
            with progress_bar(content["symbols"], "compressing", show_progress) as bar:
                _encode(trained, header, ids, written, bar)
            seconds = time.perf_counter() - started
            if coded.digest() != scanned.digest():
                raise UserError(f"{source}: changed while it was compressed; compress it again")
            compressed_bytes = written.tell()
            started = time.perf_counter()
            if verify:
                with progress_bar(content["symbols"], "verifying", show_progress) as bar:
                    _verify(trained, written, target, bar)
    return Compressed(
        **content,
        compressed_bytes=compressed_bytes,
        protocol=settings,
        seconds=seconds,
        verify_seconds=time.perf_counter() - started if verify else None,
    )


def decompress(trained: TrainedModel, source: Path | str, target: Path | str, *, show_progress: bool = True) -> int:
    """Restore the file that `compress` made `source` of; returns its size in bytes.

    Raises UserError if `source` is damaged, or needs another model or machine.
    """
    source, target = Path(source), Path(target)
    with open_regular(source) as file:
        header = read_header(file, str(source), trained.vocabulary.size)
        _check_decodable(trained, header, source)
        with (
            output(target, source, header.length) as written,
            threads_set(header.settings.threads),
            progress_bar(header.symbols, "decompressing", show_progress) as bar,
        ):
            for data in _decode(trained, header, file, source, bar):
                written.write(data)
    return header.length


def compressed_nats(
    trained: TrainedModel, ids: np.ndarray, *, show_progress: bool = False, **options: Any
) -> tuple[np.ndarray, CodingSettings]:
    """Cost of each symbol as `compress` codes it, in float64 nats [N], and the settings."""
    settings = choose_settings(trained, len(ids), **options)
    nats_N, streams = np.zeros(len(ids)), Streams(trained, settings)
    with threads_set(settings.threads), progress_bar(len(ids), "scoring", show_progress) as bar:
        for begin in range(0, len(ids), settings.block):
            own = slice(begin, begin + settings.block)
            block = ids[own]
            for where_A, logits_AV in streams.walk(block, bar):
                costs_AV = -in_float64(logits_AV).log_softmax(dim=-1).cpu().numpy()
                nats_N[own][where_A] = costs_AV[np.arange(len(where_A)), block[where_A]]
    return nats_N, settings


def score_as_compressor(
    trained: TrainedModel,
    corpus: Corpus,
    *,
    split: str = "test",
    limit: int | None = None,
    precision: Precision = "fp32",
    show_progress: bool = True,
    **options: Any,
) -> Score:
    """Score a split as `compress` would code it; options are those of `Scorer` and `compress`."""
    scorer = Scorer(trained, corpus, split, limit=limit, precision=precision)
    options |= {"precision": precision, "show_progress": show_progress}
    nats_N, settings = compressed_nats(trained, scorer.ids, **options)
    return scorer.score(
        nats_N,
        stride=settings.stride,
        streams=settings.streams,
        adapt=settings.adapt and dict(settings.adapt),
        experts=settings.experts or None,
        compressed_bytes=math.ceil(math.fsum(nats_N) / math.log(2) / 8),
    )


def _encode(
    trained: TrainedModel, header: Header, ids_by_block: Iterator[np.ndarray], written: BinaryIO, bar: tqdm
) -> None:
    written.write(header.pack())
    streams = Streams(trained, header.settings)
    for ids in ids_by_block:
        encoder = constriction.stream.queue.RangeEncoder()
        for where_A, logits_AV in streams.walk(ids, bar):
            encoder.encode(ids[where_A].astype(np.int32), FAMILY, probabilities(logits_AV))
        written.write(pack_block(encoder.get_compressed()))
    written.write(checksum(written, written.tell()))


def _decode(trained: TrainedModel, header: Header, file: BinaryIO, name: Path, bar: tqdm) -> Iterator[bytes]:
    """The content by blocks; UserError if it is not what was encoded."""
    problem = "does not decode to the content it was made of"
    refused = UserError(f"{name}: {problem}; get a whole copy")
    digest, length = hashlib.sha256(), 0
    streams = Streams(trained, header.settings)
    V = trained.vocabulary.size
    for symbols in header.block_sizes():
        decoder = constriction.stream.queue.RangeDecoder(read_block(file))
        ids = np.zeros(symbols, id_type(V))
        try:
            for where_A, logits_AV in streams.walk(ids, bar):
                symbols_A = decoder.decode(FAMILY, probabilities(logits_AV))
                if symbols_A.max() >= V:  # in a vocabulary of one symbol, see `probabilities`
                    raise ValueError("no such symbol")
                ids[where_A] = symbols_A
            data = trained.vocabulary.decode(ids)
        except (AssertionError, ValueError, UserError) as error:  # words that no encoder writes
            raise refused from error
        if not decoder.maybe_exhausted():
            raise refused
        digest.update(data)
        length += len(data)
        yield data
    if (length, digest.digest()) != (header.length, header.content):
        raise refused


def _verify(trained: TrainedModel, written: BinaryIO, target: Path, bar: tqdm) -> None:
    header = read_header(written, str(target), trained.vocabulary.size)
    try:
        for _ in _decode(trained, header, written, target, bar):
            pass
    except UserError as error:
        problem = "decodes to other bytes: arithmetic here is not repeatable, and nothing was kept"
        raise UserError(f"{target}: {problem}; try --threads 1, or a CPU") from error


def _check_decodable(trained: TrainedModel, header: Header, source: Path) -> None:
    """Raise UserError unless this model can decode the file on this machine."""
    compressed, own = f"{source}: was compressed", "name the run and checkpoint that made it"
    if vocabulary_digest(trained.vocabulary) != header.vocabulary:
        raise UserError(f"{compressed} by a model with another vocabulary; {own}")
    if model_digest(trained) != header.model:
        raise UserError(f"{compressed} by another model; {own}")
    if header.environment != (here := environment(trained.device, header.settings.experts)):
        with_other = f"with {header.environment}; here it is {here}"
        raise UserError(f"{compressed} {with_other}; {SAME_MACHINE}")
    try:
        check_settings(trained, header.settings)
        with threads_set(header.settings.threads):
            probed = probe(trained, header.settings)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    if probed != header.probe:
        raise UserError(f"{source}: predictions differ here in their last bits; {SAME_MACHINE}")


def pieces_of(file: BinaryIO, digest: Any) -> Iterator[bytes]:
    """A whole file, cut between characters; `digest`, of hashlib, is updated with it."""
    file.seek(0)
    for piece in whole_characters(blocks(file)):
        digest.update(piece)
        yield piece


def scan(pieces: Iterable[bytes], name: Path, vocabulary: Vocabulary) -> dict[str, int]:
    """The size of a text in each unit; UserError if the vocabulary cannot express it."""
    length = symbols = characters = 0
    for piece in pieces:
        try:
            ids = vocabulary.encode(piece)
        except EncodingError as error:
            place = f"{name}: {error.problem} at byte {length + error.offset:,}"
            problem = f"and the model's vocabulary ({vocabulary.name}) cannot express it"
            raise UserError(f"{place}, {problem}; use a model of bytes") from None
        length += len(piece)
        symbols += len(ids)
        characters += vocabulary.count_characters(ids)
    return {"bytes": length, "symbols": symbols, "characters": characters}


def blocks_of(pieces: Iterable[bytes], vocabulary: Vocabulary, block: int) -> Iterator[np.ndarray]:
    """The ids of a text by blocks; the last may be shorter."""
    waiting = vocabulary.encode(b"")
    for piece in pieces:
        waiting = np.concatenate([waiting, vocabulary.encode(piece)])
        while len(waiting) >= block:
            yield waiting[:block]
            waiting = waiting[block:]
    if len(waiting):
        yield waiting


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; UserError if it is not a regular file or cannot be read."""
    if path.exists() and not path.is_file():  # a pipe without a writer would block
        raise UserError(f"{path}: is a folder, a pipe or a device; give a file")
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


@contextmanager
def output(path: Path, source: Path, size: int = 0) -> Iterator[BinaryIO]:
    """A file that becomes `path`, which must not be `source`, when the context ends."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is not a regular file; name another output")
    if path.exists() and path.samefile(source):
        raise UserError(f"{path}: is the input; name another output")
    try:
        if size > (free := shutil.disk_usage(path.parent).free):
            problem = f"needs {size:,} bytes, and {free:,} are free"
            raise UserError(f"{path}: {problem}; free some space")
        with replacing(path) as temporary, temporary.open("w+b") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
