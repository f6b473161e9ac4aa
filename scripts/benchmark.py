# PYTHON_ARGCOMPLETE_OK
"""Measure charlm beside its peers: python scripts/benchmark.py train --shape S

The peers: pip install -r requirements-benchmark.txt. Let nothing else run on the machine meanwhile.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout works without being installed

from charlm import cli
from charlm.config import Section


class Options(Section):
    """Measure charlm beside its peers, who take turns in one run.

    train: training steps against x-transformers, transformers' GPT-2 and Llama, and torch's TransformerEncoder.
    evaluate: sliding-window evaluation against a plain loop over the same model.
    generate: generation with a cache against the peers that have one.
    drafts: what drafts from extra heads and from exits save a trained run in generation.
    auxiliary: what intermediate layers and extra targets cost, in time and memory, at several depths.
    scaling: time per character against context, depth and batch; memory with and without activation checkpointing.
    """

    benchmark: Annotated[str, cli.Flag("benchmark", metavar="BENCHMARK")]
    """What to measure: train, evaluate, generate, drafts, auxiliary or scaling."""
    shape: Literal["S", "P", "D"] = "S"
    """S: 6 layers of 256, batch 8; P: the paper's 12 layers, batch 2, on a GPU 64; D: its 64 layers, on a GPU."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of charlm and of tuned peers; auto: bf16 in training where the hardware has it, else fp32."""
    rounds: int | None = None
    """How often each contestant takes its turn; default by benchmark."""
    steps: int | None = None
    """Timed training steps of a turn; default 3, on a GPU 5."""
    threads: int | None = None
    """Of every contestant; default torch's own choice."""
    compile: Literal["auto", "yes", "no"] = "auto"
    """Also measure charlm and tuned peers with torch.compile; auto: on a GPU."""
    peers: tuple[str, ...] = ()
    """Only these, separated by commas."""
    run: Path | None = None
    """drafts: the trained run that writes; --shape has no meaning then."""
    as_json: Annotated[bool, cli.Flag("--json")] = False
    """Print one JSON document; the tables go to stderr."""
    picture: Path | None = None
    """Also draw the result into this file (.png, .svg, .pdf)."""


def main() -> None:
    options = cli.parse(Options)
    from benchmarks import pictures, report, suites  # not before --help and mistakes were answered
    from benchmarks.shapes import named_shape, shape_of

    from charlm.report.style import check_suffix
    from charlm.training.device import has_fast_bf16, on_cpu

    is_training = options.benchmark not in ("evaluate", "generate", "drafts")
    automatic = "bf16" if is_training and has_fast_bf16() else "fp32"
    settings = suites.Settings(
        benchmark=options.benchmark,
        shape=shape_of(options.run) if options.run else named_shape(options.shape, gpu=not on_cpu()),
        device="cpu" if on_cpu() else "cuda",
        precision=automatic if options.precision == "auto" else options.precision,
        rounds=options.rounds,
        steps=options.steps,
        threads=options.threads,
        compile=options.compile == "yes" or (options.compile == "auto" and not on_cpu()),
        peers=options.peers,
        run=options.run,
    )
    if options.picture is not None:
        check_suffix(options.picture)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    result = suites.run(settings, say)
    print(report.to_markdown(settings, result), file=sys.stderr if options.as_json else sys.stdout)
    if options.as_json:
        print(json.dumps(report.document(settings, result), indent=2))
    if options.picture is not None:
        say(f"picture: {pictures.draw(settings, result, options.picture)}")


if __name__ == "__main__":
    cli.script(main)
