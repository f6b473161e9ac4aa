"""The size of a compressed file beside those of other compressors, as a table and a picture.

Shapes: S streams, V vocabulary, N steps.
"""

import lzma
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import constriction
import numpy as np

from charlm.compression.coder import Compressed
from charlm.compression.container import open_regular
from charlm.compression.fingerprint import predicting_tensors
from charlm.compression.reading import bytes_of
from charlm.compression.settings import CodingSettings, check_settings
from charlm.compression.streams import FAMILY, Streams, probabilities, threads_set
from charlm.compression.yardsticks import compressed_sizes
from charlm.config import UserError
from charlm.inference.generation import generate
from charlm.report.style import GREY, STYLE, TRAIN, VALID, WIDTH, save
from charlm.runs.trained import TrainedModel


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Size of the model, which a decompressor has to bring along."""

    parameters: int
    """Parameters that predict the next symbol."""
    compressed_bytes: int
    """Their values in 16 bits, compressed by xz. The code, which is small, is not counted."""


@dataclass(frozen=True, kw_only=True)
class CompressionReport:
    """The output of `scripts/compress.py`."""

    file: str
    compressed: Compressed
    others: dict[str, int] | None
    """Bytes that other compressors need for the same file; None if not asked for, as `model`."""
    model: ModelSize | None
    speeds: dict[int, float]
    """Characters per second of encoding, by number of streams."""
    generation_speed: float | None
    """Characters per second that the same model writes as a single text."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        made = self.compressed
        rates = {"bits_per_character": made.bits_per_character, "bits_per_byte": made.bits_per_byte}
        return {**asdict(self), "compressed": asdict(made) | rates}

    def to_text(self) -> str:
        """Lines for people: the file and its settings, then whatever was asked for."""
        made, settings = self.compressed, self.compressed.protocol
        rate = "" if made.bits_per_character is None else f", {made.bits_per_character:.4f} bits per character"
        verified = "not verified" if made.verify_seconds is None else f"verified in {made.verify_seconds:,.1f} s"
        lines = [
            f"{self.file}: {made.bytes:,} bytes in {made.compressed_bytes:,}{rate}",
            f"  {made.symbols:,} symbols in {_counted(settings.streams, 'stream')}, context {settings.context:,}, "
            f"stride {settings.stride:,}",
            f"  {settings.precision}, {_counted(settings.threads, 'thread')}, "
            f"{made.symbols / max(made.seconds, 1e-9):,.0f} characters per second, {made.seconds:,.1f} s; {verified}",
        ]
        if self.model is not None:
            lines += ["", *_table(("", "bytes", "bits per character", "of the file"), self._size_rows())]
            lines += [
                f"The model: {self.model.parameters:,} parameters in 16 bits each, compressed by xz;",
                "contests that count the decompressor count it.",
            ]
        if self.speeds:
            speeds = {"generation, one text": self.generation_speed}
            speeds |= {_counted(streams, "stream"): speed for streams, speed in self.speeds.items()}
            rows = [(name, f"{speed:,.0f}", f"{speed / self.generation_speed:.1f}") for name, speed in speeds.items()]
            lines += ["", *_table(("", "characters per second", "of generation's"), rows)]
        return "\n".join(lines)

    def bytes_by_name(self) -> dict[str, int]:
        """Sizes of the compressed content, the smallest last, without the model."""
        sizes = dict(self.others or {}) | {"charlm": self.compressed.compressed_bytes}
        return dict(sorted(sizes.items(), key=lambda item: -item[1]))

    def _size_rows(self) -> list[tuple[str, ...]]:
        made = self.compressed
        sizes = {"the file": made.bytes} | self.bytes_by_name()
        sizes["charlm with its model"] = made.compressed_bytes + self.model.compressed_bytes
        return [
            (
                name,
                f"{size:,}",
                f"{8 * size / made.characters:.4f}" if made.characters else "",
                f"{100 * size / made.bytes:.2f} %" if made.bytes else "",
            )
            for name, size in sizes.items()
        ]


def weigh(
    trained: TrainedModel, file: Path, compressed: Compressed, *, others: bool = True, speeds: Sequence[int] = ()
) -> CompressionReport:
    """The report of a file that was compressed.

    Args:
        others: also measure what other compressors make of the file, and the size of the model.
        speeds: also measure the speed of encoding with each of these numbers of streams, and of generation.

    Raises:
        UserError: the file cannot be read, or is too short to measure speeds.
    """
    with open_regular(file) as content:
        return CompressionReport(
            file=str(file),
            compressed=compressed,
            others=compressed_sizes(bytes_of(content)) if others else None,
            model=model_size(trained) if others else None,
            speeds={streams: _encoding_speed(trained, compressed.protocol, streams) for streams in speeds},
            generation_speed=_generation_speed(trained, file, compressed.protocol) if speeds else None,
        )


def model_size(trained: TrainedModel) -> ModelSize:
    """Size of the parameters that predict the next symbol."""
    # Told that numbers take two bytes, xz finds what the bytes of their signs and exponents have in common.
    packer = lzma.LZMACompressor(filters=[{"id": lzma.FILTER_LZMA2, "preset": 1, "lp": 1, "lc": 3, "pb": 1}])
    tensors = predicting_tensors(trained).values()
    size = sum(len(packer.compress(tensor.detach().half().cpu().numpy().tobytes())) for tensor in tensors)
    return ModelSize(parameters=sum(tensor.numel() for tensor in tensors), compressed_bytes=size + len(packer.flush()))


def draw(report: CompressionReport, path: Path | str) -> Path:
    """Draw the sizes as bars, and speeds against streams if they were measured; returns the file's path.

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


def _encoding_speed(trained: TrainedModel, settings: CodingSettings, num_streams: int) -> float:
    """Symbols per second of encoding random ones, from one full context to the next."""
    settings = replace(settings, streams=num_streams, block=max(settings.block, num_streams))
    check_settings(trained, settings)
    streams, encoder = Streams(trained, settings), constriction.stream.queue.RangeEncoder()
    random_NS = np.random.default_rng(0).integers(0, trained.vocabulary.size, (settings.context, num_streams))
    with threads_set(settings.threads):
        for symbols_S in random_NS:
            streams.append(symbols_S)
        started = time.perf_counter()
        for symbols_S in random_NS[: settings.stride]:
            logits_SV = streams.append(symbols_S)
            encoder.encode(symbols_S.astype(np.int32), FAMILY, probabilities(logits_SV))
        return settings.stride * num_streams / (time.perf_counter() - started)


def _generation_speed(trained: TrainedModel, file: Path, settings: CodingSettings) -> float:
    """Symbols per second of one text that continues the beginning of the file."""
    with open_regular(file) as content:
        data = content.read(settings.context)
    # In a vocabulary of characters as many bytes are no more symbols, so the prompt fits into the context.
    prompt = data if trained.vocabulary.name == "bytes" else data.decode(errors="ignore")
    if not prompt:
        raise UserError(f"{file}: is too short to measure generation, which continues it; leave out --speeds")
    with threads_set(settings.threads):
        generate(trained, prompt, length=1)
        started = time.perf_counter()
        generate(trained, prompt, length=settings.stride)
        return settings.stride / (time.perf_counter() - started)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table for a terminal, the first column flush left."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in (head, *rows)
    ]


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("s" if count > 1 else "")
