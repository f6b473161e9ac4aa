"""Lossless compression with a model: a range coder over its distribution of the next symbol.

What a file costs is what the model's predictions cost, so a file that decodes to the same bytes proves a score.
`charlm.compression.streams` says how the predictions are made, `charlm.compression.container` how the file is laid out.

Shapes: S streams, A of which still have symbols, V vocabulary, N symbols of a block, W words of 32 bits.
"""

import hashlib
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import constriction
import numpy as np
from torch import Tensor
from tqdm import tqdm

from charlm.compression.container import Header, Writer, open_regular, read_block, read_header, replacing
from charlm.compression.streams import (
    FAMILY,
    Protocol,
    Streams,
    arithmetic_of,
    check_protocol,
    choose_protocol,
    environment,
    model_digest,
    probabilities,
    probe,
    vocabulary_digest,
    walk,
)
from charlm.config import UserError
from charlm.data.corpus import Corpus
from charlm.data.vocabulary import id_type
from charlm.inference.evaluation import EvaluationPrecision, Score, check_options, score
from charlm.inference.reading import Text, blocks_of, measure, sha256_of
from charlm.runs.load import TrainedModel


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """What `compress` did."""

    bytes: int
    """Of the content."""
    symbols: int
    characters: int
    compressed_bytes: int
    """Of the whole file."""
    protocol: Protocol
    seconds: float
    """That coding took, without reading the file before and without verifying."""
    verify_seconds: float | None
    """That decoding took; None without."""

    @property
    def bits_per_character(self) -> float | None:
        """None where no character begins, as in an empty file."""
        return 8 * self.compressed_bytes / self.characters if self.characters else None

    @property
    def bits_per_byte(self) -> float | None:
        """None for an empty file."""
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
    """Write to `target` what `decompress` turns back into the bytes of `source`, with the same model and machine.

    Memory is bounded, whatever the file's size; `target` appears, or is replaced, only when it is whole.

    Args:
        verify: decode what was written, and compare, before it takes its place.
        show_progress: show bars on stderr if that is a terminal.
        options: those of `charlm.compression.streams.choose_protocol`: streams, context, stride, precision, threads.

    Raises:
        UserError: an option out of range, no such file, a text that the vocabulary cannot express, a disk that is full;
            or what was written does not decode to the same bytes.
    """
    source, target = Path(source), Path(target)
    with open_regular(source) as file:
        text = measure(file, source, trained.vocabulary)
        protocol = choose_protocol(trained, text.symbols, **options)
        with replacing(target, source) as written, arithmetic_of(protocol):
            header = _header(trained, protocol, text)
            started = time.perf_counter()
            blocks = blocks_of(file, source, trained.vocabulary, protocol.block)
            with _bar("compressing", text.symbols, show_progress) as bar:
                _encode(trained, protocol, header, blocks, written, bar)
            seconds = time.perf_counter() - started
            if sha256_of(file) != text.sha256:
                raise UserError(f"{source}: changed while it was compressed; begin anew")
            compressed_bytes = written.tell()
            started = time.perf_counter()
            if verify:
                _verify(trained, protocol, header, written, target, show_progress)
            verify_seconds = time.perf_counter() - started if verify else None
    return Compressed(
        bytes=text.bytes,
        symbols=text.symbols,
        characters=text.characters,
        compressed_bytes=compressed_bytes,
        protocol=protocol,
        seconds=seconds,
        verify_seconds=verify_seconds,
    )


def decompress(trained: TrainedModel, source: Path | str, target: Path | str, *, show_progress: bool = True) -> int:
    """Write to `target` the bytes that `compress` made `source` of; their number.

    Raises:
        UserError: a file that is damaged or not of `compress`; one of another model, vocabulary or format version, or
            of a machine whose arithmetic differs; no space. `target` is then as it was.
    """
    source, target = Path(source), Path(target)
    with open_regular(source) as file:
        header = read_header(file, str(source), trained.vocabulary.size)
        protocol = _check_model(trained, header, source)
        _check_space(target, header.length)
        with arithmetic_of(protocol), replacing(target, source) as written:
            if probe(trained, protocol) != header.probe:
                raise UserError(
                    f"{source}: here the model predicts otherwise in the last bits, though versions and processor are "
                    f"the same ({header.environment}); decompress it where it was compressed"
                )
            with _bar("decompressing", header.symbols, show_progress) as bar:
                for data in _decode(trained, protocol, header, file, source, bar):
                    written.write(data)
    return header.length


def compressed_nats(
    trained: TrainedModel, ids: np.ndarray, *, show_progress: bool = False, **options: Any
) -> tuple[np.ndarray, Protocol]:
    """What each symbol of `ids` costs as `compress` would code it, float64 nats [N], and the protocol.

    Args:
        options: those of `compress`.

    Raises:
        UserError: an option out of range.
    """
    protocol = choose_protocol(trained, len(ids), **options)
    nats = np.zeros(len(ids))
    streams = Streams(trained, protocol)
    with arithmetic_of(protocol), _bar("scoring", len(ids), show_progress) as bar:
        for begin in range(0, len(ids), protocol.block):
            own_ids, own_nats = ids[begin : begin + protocol.block], nats[begin : begin + protocol.block]

            def note(where_A: np.ndarray, logits_AV: Tensor, ids=own_ids, nats=own_nats) -> np.ndarray:
                costs_AV = -logits_AV.double().log_softmax(dim=-1).cpu().numpy()
                nats[where_A] = costs_AV[np.arange(len(where_A)), ids[where_A]]
                bar.update(len(where_A))
                return ids[where_A]

            walk(streams, protocol.streams, len(own_ids), note)
    return nats, protocol


def score_as_compressor(
    trained: TrainedModel,
    corpus: Corpus,
    *,
    split: str = "test",
    stride: int | None = None,
    limit: int | None = None,
    streams: int | None = None,
    precision: EvaluationPrecision = "fp32",
    show_progress: bool = True,
) -> Score:
    """Score a split of the corpus that the model was trained on as `compress` would code it, without writing a file.

    Args: as of `charlm.bits_per_character` and `compress`.

    Raises:
        UserError: a value out of range, or a corpus other than the run's.
    """
    check_options(trained, corpus, split, limit, None, precision)
    started = time.perf_counter()
    ids = corpus.splits[split].ids[:limit]
    options = {"stride": stride, "streams": streams, "precision": precision}
    nats, protocol = compressed_nats(trained, ids, show_progress=show_progress, **options)
    return score(
        trained,
        corpus,
        nats,
        split=split,
        stride=protocol.stride,
        precision=precision,
        seconds=time.perf_counter() - started,
        streams=protocol.streams,
        compressed_bytes=math.ceil(math.fsum(nats) / math.log(2) / 8),
    )


def _header(trained: TrainedModel, protocol: Protocol, text: Text) -> Header:
    return Header(
        length=text.bytes,
        symbols=text.symbols,
        content=text.sha256,
        model=model_digest(trained),
        vocabulary=vocabulary_digest(trained.vocabulary),
        probe=probe(trained, protocol),
        streams=protocol.streams,
        context=protocol.context,
        stride=protocol.stride,
        block=protocol.block,
        threads=protocol.threads,
        precision=protocol.precision,
        environment=environment(trained.device),
    )


def _encode(
    trained: TrainedModel,
    protocol: Protocol,
    header: Header,
    blocks: Iterator[np.ndarray],
    written: BinaryIO,
    bar: tqdm,
) -> None:
    writer, streams = Writer(written, header), Streams(trained, protocol)
    for ids in blocks:
        encoder = constriction.stream.queue.RangeEncoder()

        def encode(where_A: np.ndarray, logits_AV: Tensor, ids=ids, encoder=encoder) -> np.ndarray:
            encoder.encode(ids[where_A].astype(np.int32), FAMILY, probabilities(logits_AV))
            bar.update(len(where_A))
            return ids[where_A]

        walk(streams, protocol.streams, len(ids), encode)
        writer.add(encoder.get_compressed())
    writer.finish()


def _decode(
    trained: TrainedModel, protocol: Protocol, header: Header, file: BinaryIO, name: Path, bar: tqdm
) -> Iterator[bytes]:
    """The content, block by block, from a file that is at its first; UserError at the end if it is not the content."""
    digest, streams = hashlib.sha256(), Streams(trained, protocol)
    refused = UserError(f"{name}: does not decode to what it was made of; get a whole copy, or compress anew")
    length = 0
    for block in range(header.num_blocks):
        decoder = constriction.stream.queue.RangeDecoder(read_block(file))
        ids = np.zeros(header.symbols_of(block), id_type(trained.vocabulary.size))

        def decode(where_A: np.ndarray, logits_AV: Tensor, ids=ids, decoder=decoder) -> np.ndarray:
            symbols_A = decoder.decode(FAMILY, probabilities(logits_AV))
            if symbols_A.max() >= trained.vocabulary.size:  # of one symbol, see `probabilities`
                raise refused
            ids[where_A] = symbols_A
            bar.update(len(where_A))
            return symbols_A

        try:
            walk(streams, protocol.streams, len(ids), decode)
            data = trained.vocabulary.decode(ids)
        except (AssertionError, ValueError) as error:  # the coder's, at words that no encoder writes
            raise refused from error
        if not decoder.maybe_exhausted():
            raise refused
        digest.update(data)
        length += len(data)
        yield data
    if length != header.length or digest.digest() != header.content:
        raise refused


def _verify(
    trained: TrainedModel, protocol: Protocol, header: Header, written: BinaryIO, target: Path, show_progress: bool
) -> None:
    read_header(written, str(target), trained.vocabulary.size)
    with _bar("verifying", header.symbols, show_progress) as bar:
        try:
            for _ in _decode(trained, protocol, header, written, target, bar):
                pass
        except UserError as error:
            raise UserError(
                f"{target}: decoding gives other bytes than were compressed, so nothing was kept: this machine does "
                "not compute the same twice; try --threads 1, --precision fp32, or a CPU"
            ) from error


def _check_model(trained: TrainedModel, header: Header, source: Path) -> Protocol:
    """The protocol of a file that this model, on this machine, can decode."""
    if vocabulary_digest(trained.vocabulary) != header.vocabulary:
        raise UserError(f"{source}: was compressed by a model with another vocabulary; name the run that made it")
    if model_digest(trained) != header.model:
        raise UserError(
            f"{source}: was compressed by another model than {trained.checkpoint} of this run; "
            "name the run and checkpoint that made it"
        )
    protocol = Protocol(
        streams=header.streams,
        context=header.context,
        stride=header.stride,
        block=header.block,
        precision=header.precision,
        threads=header.threads,
    )
    try:
        check_protocol(trained, protocol)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    here = environment(trained.device)
    if header.environment != here:
        raise UserError(
            f"{source}: was compressed with {header.environment}; here it is {here}, whose last bits may differ; "
            "decompress it where it was compressed"
        )
    return protocol


def _check_space(target: Path, length: int) -> None:
    try:
        free = shutil.disk_usage(target.parent).free
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from error
    if length > free:
        raise UserError(f"{target}: needs {length:,} bytes, and {free:,} are free; free some space")


def _bar(what: str, num_symbols: int, show_progress: bool) -> tqdm:
    return tqdm(total=num_symbols, desc=what, unit="ch", unit_scale=True, disable=None if show_progress else True)
