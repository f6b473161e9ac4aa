"""What a compressed file weighs beside others, as a table and a picture.

Shapes: S streams, V vocabulary, N steps.
"""

import bz2
import lzma
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import constriction
import numpy as np

from charlm.compression.coder import Compressed
from charlm.compression.container import open_regular
from charlm.compression.streams import (
    FAMILY,
    Protocol,
    Streams,
    arithmetic_of,
    choose_protocol,
    predicting_tensors,
    probabilities,
)
from charlm.config import UserError
from charlm.inference.generation import generate
from charlm.inference.reading import PIECE
from charlm.report.figures import GREY, STYLE, TRAIN, VALID, WIDTH, save
from charlm.runs.load import TrainedModel


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What a decompressor has to bring along."""

    parameters: int
    """Those that predict the next symbol."""
    compressed_bytes: int
    """Of their values in 16 bits, compressed by xz; the code comes on top, and is small."""


@dataclass(frozen=True, kw_only=True)
class CompressionReport:
    """What `scripts/compress.py` prints."""

    file: str
    compressed: Compressed
    others: dict[str, int] | None
    """Bytes that other compressors need for the same file, where asked."""
    model: ModelSize | None
    speeds: dict[int, float]
    """Characters per second of encoding, by number of streams."""
    generation_speed: float | None
    """Characters per second that the same model writes as a single text."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        rates = {
            "bits_per_character": self.compressed.bits_per_character,
            "bits_per_byte": self.compressed.bits_per_byte,
        }
        return {**asdict(self), "compressed": asdict(self.compressed) | rates}

    def to_text(self) -> str:
        """Lines for people: the file, how it was made, then what was asked for."""
        made, protocol = self.compressed, self.compressed.protocol
        rate = "" if made.bits_per_character is None else f", {made.bits_per_character:.4f} bits per character"
        streams = f"{protocol.streams:,} stream" + ("s" if protocol.streams > 1 else "")
        threads = f"{protocol.threads} thread" + ("s" if protocol.threads > 1 else "")
        lines = [
            f"{self.file}: {made.bytes:,} bytes in {made.compressed_bytes:,}{rate}",
            f"  {made.symbols:,} symbols in {streams}, context {protocol.context:,}, stride {protocol.stride:,}",
            f"  {protocol.precision}, {threads}, {_pace(made.symbols, made.seconds)}"
            + ("; not verified" if made.verify_seconds is None else f"; verified in {made.verify_seconds:,.1f} s"),
        ]
        if self.others is not None and self.model is not None:
            lines += ["", *_table(("", "bytes", "bits per character", "of the file"), self._weights())]
            lines += [
                f"The model: {self.model.parameters:,} parameters in 16 bits each, compressed by xz;",
                "contests that count the decompressor count it.",
            ]
        if self.speeds:
            rows = [
                (
                    f"{streams:,} stream{'s' if streams > 1 else ''}",
                    f"{speed:,.0f}",
                    f"{speed / self.generation_speed:.1f}",
                )
                for streams, speed in self.speeds.items()
            ]
            rows.insert(0, ("generation, one text", f"{self.generation_speed:,.0f}", "1.0"))
            lines += ["", *_table(("", "characters per second", "of generation's"), rows)]
        return "\n".join(lines)

    def bytes_by_name(self) -> dict[str, int]:
        """Sizes of the same content, smallest last; the model apart."""
        sizes = dict(self.others or {}) | {"charlm": self.compressed.compressed_bytes}
        return dict(sorted(sizes.items(), key=lambda item: -item[1]))

    def _weights(self) -> list[tuple[str, ...]]:
        sizes = {"the file": self.compressed.bytes} | self.bytes_by_name()
        if self.model is not None:
            sizes["charlm with its model"] = self.compressed.compressed_bytes + self.model.compressed_bytes
        return [(name, f"{size:,}", *self._rates(size)) for name, size in sizes.items()]

    def _rates(self, size: int) -> tuple[str, str]:
        characters, num_bytes = self.compressed.characters, self.compressed.bytes
        return (
            f"{8 * size / characters:.4f}" if characters else "",
            f"{100 * size / num_bytes:.2f} %" if num_bytes else "",
        )


def weigh(
    trained: TrainedModel, file: Path, compressed: Compressed, *, others: bool = True, speeds: Sequence[int] = ()
) -> CompressionReport:
    """The report of a file that was compressed.

    Args:
        others: also weigh what other compressors make of the file, and the model.
        speeds: also measure encoding with so many streams each, and generation of a single text.

    Raises:
        UserError: the file cannot be read, or is too short to measure speeds.
    """
    protocol = compressed.protocol
    return CompressionReport(
        file=str(file),
        compressed=compressed,
        others=compressed_sizes(file) if others else None,
        model=model_size(trained) if others else None,
        speeds={streams: _encoding_speed(trained, protocol, streams) for streams in speeds},
        generation_speed=_generation_speed(trained, file, protocol) if speeds else None,
    )


def compressed_sizes(file: Path) -> dict[str, int]:
    """Bytes that gzip -9, bzip2 -9, xz -9e and zstd -19 make of a file, which is read in pieces.

    gzip's is zlib's, which is within 0.2 % of the program's.
    """
    xz = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)
    return {
        "gzip -9": _size(file, zlib.compressobj(9, wbits=31)),
        "bzip2 -9": _size(file, bz2.BZ2Compressor(9)),
        "zstd -19": _size(file, _zstd(19)),
        "xz -9e": _size(file, xz),
    }


def model_size(trained: TrainedModel) -> ModelSize:
    """What the parameters that predict the next symbol weigh."""
    # Told that numbers take two bytes, xz finds what the bytes of their signs and exponents have in common.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 1, "lp": 1, "lc": 3, "pb": 1}]
    packer = lzma.LZMACompressor(filters=filters)
    count = size = 0
    for tensor in predicting_tensors(trained).values():
        count += tensor.numel()
        size += len(packer.compress(tensor.detach().half().cpu().numpy().tobytes()))
    return ModelSize(parameters=count, compressed_bytes=size + len(packer.flush()))


def draw(report: CompressionReport, path: Path | str) -> Path:
    """Sizes as bars, and speeds against streams if they were measured, in a file, whose path is returned.

    Raises:
        UserError: a suffix that matplotlib does not write, or a place where nothing can be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    sizes = report.bytes_by_name()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.2 + 0.3 * len(sizes) + (2.2 if report.speeds else 0)), layout="constrained")
        axes = figure.subplots(2 if report.speeds else 1, squeeze=False)[:, 0]
        colours = [VALID if name == "charlm" else TRAIN for name in sizes]
        bars = axes[0].barh(list(sizes), list(sizes.values()), color=colours)
        axes[0].bar_label(bars, [f"{size:,}" for size in sizes.values()], padding=3)
        axes[0].margins(x=0.15)
        axes[0].spines["top"].set_visible(False)
        axes[0].set_xlabel("bytes")
        title = f"{Path(report.file).name}, {report.compressed.bytes:,} bytes"
        if report.model is not None:
            title += f" (the model by itself: {report.model.compressed_bytes:,})"
        axes[0].set_title(title, loc="left", fontsize=9, color=GREY)
        if report.speeds:
            axes[1].plot(list(report.speeds), list(report.speeds.values()), "o-", color=VALID, label="encoding")
            axes[1].axhline(report.generation_speed, color=TRAIN, label="generation of one text")
            axes[1].set(xscale="log", yscale="log", xlabel="streams", ylabel="characters per second")
            axes[1].set_xticks(list(report.speeds), [f"{streams:,}" for streams in report.speeds], minor=False)
            axes[1].minorticks_off()
            axes[1].spines["top"].set_visible(False)
            axes[1].grid(True)
            axes[1].legend()
        return save(figure, Path(path))


def _zstd(level: int) -> Any:
    try:
        from compression import zstd  # Python 3.14 and later

        return zstd.ZstdCompressor(level=level)
    except ImportError:
        import zstandard

        return zstandard.ZstdCompressor(level=level).compressobj()


def _size(file: Path, packer: Any) -> int:
    with open_regular(file) as content:
        size = sum(len(packer.compress(piece)) for piece in iter(lambda: content.read(PIECE), b""))
    return size + len(packer.flush())


def _encoding_speed(trained: TrainedModel, protocol: Protocol, num_streams: int) -> float:
    """Symbols per second, from where the context is full to where it is full again. What they are matters not."""
    options = {"context": protocol.context, "stride": protocol.stride, "precision": protocol.precision}
    chosen = choose_protocol(trained, 1, streams=num_streams, threads=protocol.threads, **options)
    streams, encoder = Streams(trained, chosen), constriction.stream.queue.RangeEncoder()
    random_NS = np.random.default_rng(0).integers(0, trained.vocabulary.size, (chosen.context, num_streams))
    with arithmetic_of(chosen):
        streams.restart()
        for symbols_S in random_NS:
            streams.append(symbols_S)
        started = time.perf_counter()
        for symbols_S in random_NS[: chosen.stride]:
            logits_SV = streams.append(symbols_S)
            encoder.encode(symbols_S.astype(np.int32), FAMILY, probabilities(logits_SV))
        return chosen.stride * num_streams / (time.perf_counter() - started)


def _generation_speed(trained: TrainedModel, file: Path, protocol: Protocol) -> float:
    """Symbols per second of one text that goes on from where the file begins."""
    with open_regular(file) as content:
        data = content.read(protocol.context)
    # Of a vocabulary of characters, no more than the context holds if each were spelled in bytes.
    prompt = data if trained.vocabulary.name == "bytes" else data.decode(errors="ignore")
    if not prompt:
        raise UserError(f"{file}: is too short to measure generation, which goes on from it; leave out --speeds")
    with arithmetic_of(protocol):
        generate(trained, prompt, length=1)
        started = time.perf_counter()
        generate(trained, prompt, length=protocol.stride)
        return protocol.stride / (time.perf_counter() - started)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines, the first column flush left."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in (head, *rows)
    ]


def _pace(symbols: int, seconds: float) -> str:
    return f"{symbols / max(seconds, 1e-9):,.0f} characters per second, {seconds:,.1f} s"
