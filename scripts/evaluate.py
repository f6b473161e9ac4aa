"""Score a run: python scripts/evaluate.py RUN --stride 1

On several GPUs: accelerate launch --multi_gpu scripts/evaluate.py RUN --split valid --json
"""

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout works without being installed

import charlm
from charlm import cli

if TYPE_CHECKING:
    from charlm.inference.evaluation import Score


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where the run's corpus is, if no longer where it was in training."""

    path: Path | None = None
    """A local copy of the corpus, or the file or folder it was made from."""
    hub_id: str | None = None
    """Another copy of a dataset, such as a folder of its parquet files."""
    cache_dir: Path | None = None
    """Where prepared corpora are kept."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Score a run: bits per character and per byte of a split, each symbol once."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The run's folder."""
    split: Literal["valid", "test"] = "test"
    """Which part of the corpus."""
    stride: int | None = None
    """Symbols from one window to the next: 1 is the paper's; default half the context."""
    limit: int | None = None
    """Score the first so many symbols only."""
    checkpoint: str = "best"
    """best, last, or a step."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the matrix products."""
    batch_size: int | None = None
    """Windows that one process runs at once; default by the device."""
    all_layers: bool = False
    """Score every layer that has a head."""
    yardsticks: bool = False
    """Also compress the scored bytes with gzip, bzip2 and xz."""
    json: bool = False
    """Print one JSON document."""
    data: DataOptions = field(default_factory=DataOptions)


def main() -> None:
    options = cli.parse(Options)
    from accelerate import PartialState  # not before --help and mistakes were answered

    from charlm.inference.evaluation import compressor_bits_per_byte
    from charlm.training.hardware import on_cpu

    processes = PartialState(cpu=on_cpu())
    trained = charlm.load(options.run, options.checkpoint, device=processes.device)
    moved = {name: value for name, value in vars(options.data).items() if value is not None}
    corpus = charlm.load_corpus(replace(trained.config.data, **moved), progress=processes.is_main_process)
    score = charlm.bits_per_character(
        trained,
        corpus,
        split=options.split,
        stride=options.stride,
        limit=options.limit,
        batch_size=options.batch_size,
        precision=options.precision,
        all_layers=options.all_layers,
    )
    if processes.is_main_process:
        yardsticks = {}
        if options.yardsticks:
            text = corpus.vocabulary.decode(corpus.splits[options.split].ids[: options.limit])
            yardsticks = compressor_bits_per_byte(text)
        if options.json:
            print(json.dumps(score.as_dict() | ({"yardsticks": yardsticks} if yardsticks else {}), indent=2))
        else:
            sys.stdout.reconfigure(errors="replace")
            print("\n".join(describe(score, yardsticks)))
    processes.destroy_process_group()


def describe(score: "Score", yardsticks: dict[str, float]) -> list[str]:
    """Lines for people: the figures, then the protocol."""
    error = score.standard_error or 0.0
    lines = [
        f"{score.bits_per_character:.4f} ± {error:.4f} bits per character, "
        f"{score.bits_per_byte:.4f} ± {error * score.characters / score.bytes:.4f} bits per byte",
        f"  {score.split} split of {score.corpus} (sha256 {score.corpus_sha256[:12]}), {score.checkpoint}",
        f"  {score.symbols:,} symbols, {score.characters:,} characters, {score.bytes:,} bytes",
        f"  stride {score.stride}, context {score.context_length}, {score.precision}, {score.seconds:,.1f} s",
    ]
    if yardsticks:
        figures = ", ".join(f"{name} {bits:.4f}" for name, bits in yardsticks.items())
        lines.append(f"  the same bytes compressed: {figures} bits per byte")
    return lines + [
        f"  layer {layer:>2}: {bits:.4f} bits per character" for layer, bits in (score.layers or {}).items()
    ]


if __name__ == "__main__":
    cli.script(main)
