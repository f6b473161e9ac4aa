"""The size of a compressed file beside those of other compressors."""

import bz2
import lzma
import textwrap
import time
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import constriction
import numpy as np
from pydantic import BaseModel

from charlm.compression.coder import Compressed
from charlm.compression.container import predicting_tensors
from charlm.compression.streams import FAMILY, CodingSettings, Streams, check_settings, probabilities, threads_set
from charlm.config.errors import shown
from charlm.data.text_files import blocks
from charlm.inference.generation import generate
from charlm.report.style import PICTURE, TRAIN, VALID, new_figure, save
from charlm.runs.trained import TrainedModel
from charlm.text import counted, markdown_table, visible

XZ_MEMORY = 2**26
"""Bytes of the dictionary of `xz -9`."""
XZ = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}
COMPRESSORS = {
    "gzip -9": lambda size: zlib.compressobj(9, wbits=31),  # within 0.2 % of the program's size
    "bzip2 -9": lambda size: bz2.BZ2Compressor(9),
    "xz -9e": lambda size: lzma.LZMACompressor(filters=[XZ | {"dict_size": min(max(4096, size), XZ_MEMORY)}]),
}


class CompressionReport(BaseModel, frozen=True):
    """The output of `scripts/compress.py`."""

    file: str
    compressed: Compressed
    others: dict[str, int] | None = None
    """Bytes that other compressors need for the file."""
    model: dict[str, int] | None = None
    speeds: dict[int, float] = {}
    """Characters per second of encoding, by number of streams."""
    generation_speed: float | None = None
    """Characters per second of generating one text."""

    def to_text(self) -> str:
        """Lines for people: the file and its settings, then whatever was asked for."""
        made, settings = self.compressed, self.compressed.protocol
        rate = f", {made.bits_per_character:.4f} bits per character" if made.characters else ""
        verified = "not verified"
        if made.verify_seconds is not None:
            verified = f"verified in {made.verify_seconds:,.1f} s"
        speed = made.symbols / max(made.seconds, 1e-9)
        lines = [
            f"{self.file}: {made.bytes:,} bytes in {made.compressed_bytes:,}{rate}",
            f"  {made.symbols:,} symbols in {counted(settings.streams, 'stream')}, "
            f"context {settings.context:,}, stride {settings.stride:,}",
            f"  {settings.precision}, {counted(settings.threads, 'thread')}, "
            f"{speed:,.0f} characters per second, {made.seconds:,.1f} s; {verified}",
        ]
        if settings.adapt is not None:
            adapt = f"adaptive: {shown(dict(settings.adapt))}"
            lines += textwrap.wrap(adapt, 80, initial_indent="  ", subsequent_indent="  ")
        if settings.experts:
            lines.append(f"  mixed with experts: {', '.join(settings.experts)}")
        if self.model is not None and made.characters:
            sizes = {"the file": made.bytes} | self.sizes()
            whole = made.compressed_bytes + self.model["compressed_bytes"]
            sizes["charlm with its model"] = whole
            rows = []
            for name, size in sizes.items():
                rate = f"{8 * size / made.characters:.4f}"
                rows.append((name, f"{size:,}", rate, f"{100 * size / made.bytes:.2f} %"))
            columns = ("", "bytes", "bits per character", "of the file")
            parameters = f"{self.model['parameters']:,} parameters in 16 bits each"
            model = f"The model: {parameters}, compressed by xz."
            lines += ["", markdown_table(columns, rows), "", model]
        if self.speeds:
            speeds = {"generation, one text": self.generation_speed}
            for streams, speed in self.speeds.items():
                speeds[counted(streams, "stream")] = speed
            columns = ("", "characters per second", "of generation's")
            unit = self.generation_speed
            rows = [(name, f"{speed:,.0f}", f"{speed / unit:.1f}") for name, speed in speeds.items()]
            lines += ["", markdown_table(columns, rows)]
        return "\n".join(lines)

    def sizes(self) -> dict[str, int]:
        """Bytes of the content by compressor, the smallest last, without the model."""
        sizes = (self.others or {}) | {"charlm": self.compressed.compressed_bytes}
        return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def weigh(
    trained: TrainedModel, file: Path, compressed: Compressed, others: bool, speeds: Sequence[int]
) -> CompressionReport:
    """The report of a compressed file: with `others`, and the speeds of so many streams."""
    protocol = compressed.protocol
    with file.open("rb") as content:
        return CompressionReport(
            file=str(file),
            compressed=compressed,
            others=compressed_sizes(blocks(content)) if others else None,
            model=model_size(trained) if others else None,
            speeds={streams: _encoding_speed(trained, protocol, streams) for streams in speeds},
            generation_speed=_generation_speed(trained, protocol) if speeds else None,
        )


def compressed_sizes(pieces: Iterable[bytes], size: int = XZ_MEMORY) -> dict[str, int]:
    """The bytes that each of `COMPRESSORS` needs for the concatenated pieces: sooner if their `size` is known."""
    packers = {name: make(size) for name, make in COMPRESSORS.items()}
    sizes = dict.fromkeys(COMPRESSORS, 0)
    for piece in pieces:
        for name, packer in packers.items():
            sizes[name] += len(packer.compress(piece))
    return {name: size + len(packers[name].flush()) for name, size in sizes.items()}


def model_size(trained: TrainedModel) -> dict[str, int]:
    """The number of parameters that predict, and the size of their 16-bit values by xz."""
    # xz then finds what signs and exponents have in common
    two_bytes = {"id": lzma.FILTER_LZMA2, "preset": 1, "lp": 1, "lc": 3, "pb": 1}
    packer = lzma.LZMACompressor(filters=[two_bytes])
    parameters = size = 0
    for tensor in predicting_tensors(trained).values():
        parameters += tensor.numel()
        halves = tensor.detach().half().cpu().numpy()
        size += len(packer.compress(halves.tobytes()))
    return {"parameters": parameters, "compressed_bytes": size + len(packer.flush())}


def draw(report: CompressionReport, path: Path) -> Path:
    """Draw sizes as bars, and speeds against streams; returns and raises as `save`."""
    sizes, speeds = report.sizes(), report.speeds
    height = 1.2 + 0.3 * len(sizes) + (2.2 if speeds else 0)
    with new_figure(PICTURE, height) as figure:
        above, *below = figure.subplots(2 if speeds else 1, squeeze=False)[:, 0]
        colours = [VALID if name == "charlm" else TRAIN for name in sizes]
        bars = above.barh(list(sizes), list(sizes.values()), color=colours)
        above.bar_label(bars, [f"{size:,}" for size in sizes.values()], padding=3)
        above.grid(False)
        above.margins(x=0.15)
        above.set_xlabel("bytes")
        title = f"{visible(Path(report.file).name)}, {report.compressed.bytes:,} bytes"
        if report.model:
            title += f" (the model by itself: {report.model['compressed_bytes']:,})"
        above.set_title(title)
        for axes in below:
            axes.plot(list(speeds), list(speeds.values()), "o-", color=VALID, label="encoding")
            axes.axhline(report.generation_speed, color=TRAIN, label="generation of one text")
            axes.set(xscale="log", yscale="log", xlabel="streams", ylabel="characters per second")
            axes.set_xticks(list(speeds), [f"{streams:,}" for streams in speeds], minor=False)
            axes.minorticks_off()
            axes.legend()
    return save(figure, path)


def _encoding_speed(trained: TrainedModel, settings: CodingSettings, num_streams: int) -> float:
    """Random symbols encoded per second, from one full context to the next."""
    settings = settings.replace(streams=num_streams, block=max(settings.block, num_streams))
    check_settings(trained, settings)
    streams = Streams(trained, settings)
    encoder = constriction.stream.queue.RangeEncoder()
    shape = (settings.context, num_streams)
    random_NS = np.random.default_rng(0).integers(0, trained.vocabulary.size, shape)
    with threads_set(settings.threads):
        for symbols_S in random_NS:
            streams.append(symbols_S)
        started = time.perf_counter()
        for symbols_S in random_NS[: settings.stride]:
            logits_SV = streams.append(symbols_S)
            encoder.encode(symbols_S.astype(np.int32), FAMILY, probabilities(logits_SV))
        return settings.stride * num_streams / (time.perf_counter() - started)


def _generation_speed(trained: TrainedModel, settings: CodingSettings) -> float:
    """Symbols per second of one text, from one full context to the next."""
    prompt = trained.vocabulary.symbols[-1] * settings.context
    with threads_set(settings.threads):
        generate(trained, prompt, length=1)
        started = time.perf_counter()
        generate(trained, prompt, length=settings.stride)
        return settings.stride / (time.perf_counter() - started)
