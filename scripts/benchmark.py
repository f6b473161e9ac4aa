# PYTHON_ARGCOMPLETE_OK
"""Measure charlm beside its peers: python scripts/benchmark.py train --shape S

Install the peers with pip install -r requirements-benchmark.txt, and run nothing else on the machine meanwhile.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout works without being installed

from charlm import cli
from charlm.config import Section, UserError
from charlm.config.types import Count, Positive
from charlm.files import OutputPath
from charlm.text import say

Benchmark = Literal["train", "evaluate", "generate", "drafts", "auxiliary", "scaling", "quality", "lens", "pretend"]


class Options(Section):
    """Measure charlm beside its peers, which take turns in one run.

    train: training steps against x-transformers, transformers' GPT-2 and Llama, and torch's TransformerEncoder;
    evaluate: sliding-window evaluation against a plain loop over the same model; generate: cached generation against
    the peers that have a cache; drafts: how much faster a trained run writes with drafts from extra heads and from
    exits; auxiliary: the cost of intermediate layers and extra targets in time and memory, at several depths; scaling:
    time per character and memory by context, depth and batch, with and without activation checkpointing; quality:
    charlm's recipe and the peers train for the same minutes on the same text; lens: how soon the page of a trained run
    answers a key and a text; pretend: what the shipped configs would ask of a GPU, counted without one.
    """

    benchmark: Annotated[Benchmark, cli.Flag("benchmark", metavar="BENCHMARK")]
    """The benchmark to run: train, evaluate, generate, drafts, auxiliary, scaling, quality, lens or pretend."""
    shape: Literal["S", "P", "D"] = "S"
    """S: 6 layers of 256, batch 8; P: the paper's 12 layers, batch 2, on a GPU 64; D: its 64 layers, on a GPU."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of charlm and of tuned peers. auto: bf16 in training if the hardware has it, else fp32."""
    rounds: Count | None = None
    """Timed turns of each contestant. The default depends on the benchmark."""
    steps: Count | None = None
    """Timed training steps in a turn. The default is 3, on a GPU 5."""
    threads: Count | None = None
    """Threads of every contestant. The default is torch's choice."""
    compile: Literal["auto", "yes", "no"] = "auto"
    """Whether to measure charlm and tuned peers with torch.compile, too. auto: on a GPU only."""
    peers: tuple[str, ...] = ()
    """Peers to measure, separated by commas. The default is all that are installed."""
    minutes: Positive = 4.0
    """quality: time of each contestant, one after the other; each peer comes three times."""
    marks: tuple[Positive, ...] = (3.5, 3.0, 2.5, 2.0)
    """quality: bits per byte; the table has the seconds that each contestant needs to reach them."""
    path: Path | None = None
    """quality: a copy of enwik8 (raw, .zip, .gz, .bz2, .xz). The default is a download."""
    run: Path | None = None
    """drafts, lens: the folder of the trained run, which also determines the shape."""
    as_json: Annotated[bool, cli.Flag("--json", dest="as_json")] = False
    """Print one JSON document. The tables go to stderr."""
    picture: OutputPath | None = None
    """Also draw the result into this file (.png, .svg, .pdf)."""


def main() -> None:
    options = cli.parse(Options)
    tell = partial(say, file=sys.stderr, flush=True)
    if options.benchmark == "pretend":
        return pretend(options, tell)
    if options.benchmark == "quality":
        return quality(options, tell)
    if options.benchmark == "lens":
        return lens(options, tell)
    from benchmarks import pictures, report, suites  # not before --help and mistakes were answered
    from benchmarks.shapes import named_shape, shape_of

    from charlm.data.sources import check_outside
    from charlm.report.style import check_suffix
    from charlm.runs.folder import Run

    device = device_of(options)
    on_gpu = device == "cuda"
    is_training = options.benchmark not in ("evaluate", "generate", "drafts")
    settings = suites.Settings(
        benchmark=options.benchmark,
        shape=shape_of(options.run) if options.run else named_shape(options.shape, gpu=on_gpu),
        device=device,
        precision=precision_of(options, is_training),
        rounds=options.rounds or suites.ROUNDS[options.benchmark],
        steps=options.steps or suites.STEPS[device],
        threads=options.threads,
        compile=options.compile == "yes" or (options.compile == "auto" and on_gpu),
        peers=options.peers,
        run=options.run,
    )
    if options.picture is not None:
        check_suffix(options.picture)
        if options.run is not None:
            check_outside(Run.open(options.run).config().data, "picture", options.picture)

    result = suites.run(settings, tell)
    draw = partial(pictures.draw, settings, result)
    show(options, report.to_markdown(settings, result), report.document(settings, result), draw)


def device_of(options: Options) -> str:
    """The type of device to measure. Raises UserError for others than CPUs and CUDA."""
    from benchmarks.suites import STEPS

    from charlm.hardware import default_device
    from charlm.training.device import on_cpu

    device = "cpu" if on_cpu() else default_device().type
    if device not in STEPS:
        way_out = "put ACCELERATE_USE_CPU=true before the command"
        raise UserError(f"benchmark={options.benchmark}: measures CPUs and CUDA, not {device}; {way_out}", "benchmark")
    return device


def precision_of(options: Options, is_training: bool) -> str:
    """The precision that was asked for, or the automatic one."""
    from charlm.training.device import has_fast_bf16

    automatic = "bf16" if is_training and has_fast_bf16() else "fp32"
    return automatic if options.precision == "auto" else options.precision


def show(options: Options, markdown: str, document: dict[str, Any], draw: Callable[[Path], Path] | None = None) -> None:
    """Print a result as asked, and draw it."""
    say(markdown, file=sys.stderr if options.as_json else sys.stdout)
    if options.as_json:
        say(json.dumps(document, indent=2))
    if options.picture is not None:
        say(f"picture: {draw(options.picture)}", file=sys.stderr, flush=True)


def pretend(options: Options, tell: Callable[[str], None]) -> None:
    """Count on a pretended GPU, which no other option concerns."""
    from benchmarks.pretend import guard, table

    if options.picture is not None:
        raise UserError(f"picture={options.picture}: `pretend` draws none; leave it out", "picture")
    guard.compiled_guard()
    found = table.document(tell)
    show(options, table.to_markdown(found), found)


def quality(options: Options, tell: Callable[[str], None]) -> None:
    """Train by `configs/enwik8_small.yaml` and with the peers, for the same time each."""
    from benchmarks import quality

    from charlm.config.load import load_config
    from charlm.report.style import check_suffix

    if options.picture is not None:
        check_suffix(options.picture)
    overrides = {
        "train.time": f"{round(60 * options.minutes)}s",
        "train.valid_symbols": 50_000,
        "data.path": options.path,
    }
    config = load_config(Path(__file__).resolve().parents[1] / "configs/enwik8_small.yaml", overrides)
    found = quality.run(config, device_of(options), precision_of(options, True), options.peers, tell)
    show(options, quality.to_markdown(found, options.marks), found, partial(quality.draw, found))


def lens(options: Options, tell: Callable[[str], None]) -> None:
    """Time the answers to a page about a run, which has no peers."""
    import torch
    from benchmarks import lens

    if options.run is None or options.picture is not None:
        raise UserError(f"run={options.run}, picture={options.picture}: `lens` needs a run, and draws none", "run")
    torch.set_num_threads(options.threads or torch.get_num_threads())
    found = lens.run(options.run, device_of(options), tell)
    show(options, lens.to_markdown(found), found)


if __name__ == "__main__":
    cli.script(main)
