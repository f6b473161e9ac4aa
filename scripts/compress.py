# PYTHON_ARGCOMPLETE_OK
"""Compress a file with a run's model: python scripts/compress.py RUN FILE -o FILE.clm

python scripts/compress.py RUN FILE -o FILE.clm --report --picture sizes.png
python scripts/decompress.py RUN FILE.clm -o FILE
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout works without being installed

import charlm
from charlm import cli
from charlm.config import Section
from charlm.config.adapt import AdaptConfig, ExpertName
from charlm.files import OutputPath
from charlm.process import keep_freed_memory
from charlm.text import command, say


class Options(Section):
    """Compress a file with a run's model, and decode it again to check that nothing is lost."""

    run: Annotated[Path, cli.Flag("run", metavar="RUN")]
    """The run's folder."""
    file: Annotated[Path, cli.Flag("file", metavar="FILE")]
    """The file to compress."""
    output: Annotated[OutputPath, cli.Flag("--output", "-o")]
    """The compressed file to write. An existing file is replaced."""
    checkpoint: str = "best"
    """best, last or a step. Decompressing needs the same one."""
    streams: int | None = None
    """Parts of the file that are coded side by side. More are faster, up to a point, and each costs some bytes. The
    default depends on the file's size."""
    context: int | None = None
    """The most symbols that a prediction sees. The default is the model's context."""
    stride: int | None = None
    """Symbols forgotten at once when the context is full, as in evaluate.py. The default is about half of it."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the matrix products."""
    threads: int | None = None
    """Threads of the processor; decompressing uses as many. The default is torch's choice."""
    adapting: Annotated[bool, cli.Flag("--adapt", dest="adapting")] = False
    """Learn from what was coded, as evaluate.py --adapt --as-compressor does; decompressing does the same."""
    adapt: AdaptConfig = AdaptConfig()
    experts: tuple[ExpertName, ...] = ()
    """Mix the model's predictions with these, such as counts,match. heads: those of lower layers; counts: counts of the
    text so far; match: what followed its longest match; train: the training split is counted before, and before
    decompressing. Needs charlm[counts]."""
    verify: bool = True
    """Decode the result and compare it with the file before the compressed file is written."""
    report: bool = False
    """Also print the sizes that gzip, bzip2 and xz reach, and the size of the model itself."""
    speeds: tuple[int, ...] = ()
    """Also measure characters per second with these numbers of streams, such as 1,16,64. Each takes a while."""
    picture: OutputPath | None = None
    """Also draw the report into this file (.png, .svg, .pdf)."""
    as_json: Annotated[bool, cli.Flag("--json", dest="as_json")] = False
    """Print one JSON document."""


def main() -> None:
    options = cli.parse(Options)
    from charlm.compression import report as compression  # not before --help and mistakes were answered
    from charlm.data.sources import check_outside
    from charlm.report.style import check_suffix

    adapt = cli.adapt_of(options.adapt, options.adapting)
    if options.picture is not None:
        check_suffix(options.picture)
    keep_freed_memory()
    trained = charlm.load(options.run, options.checkpoint)
    check_outside(trained.config.data, "output", options.output)
    if options.picture is not None:
        check_outside(trained.config.data, "picture", options.picture)
    compressed = charlm.compress(
        trained,
        options.file,
        options.output,
        verify=options.verify,
        adapt=adapt,
        **{
            name: getattr(options, name) for name in ("streams", "context", "stride", "precision", "threads", "experts")
        },
    )
    report = compression.weigh(
        trained,
        options.file,
        compressed,
        others=options.report or options.picture is not None,
        speeds=options.speeds,
    )
    say(json.dumps(report.model_dump(), indent=2) if options.as_json else report.to_text())
    if options.picture is not None:
        compression.draw(report, options.picture)
    if not options.as_json:
        words = [options.run, options.output, "-o", options.output.with_suffix(".copy")]
        words += [] if options.checkpoint == "best" else ["--checkpoint", options.checkpoint]
        say("Next:", command("decompress.py", *words))


if __name__ == "__main__":
    cli.script(main)
