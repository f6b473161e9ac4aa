# PYTHON_ARGCOMPLETE_OK
"""Compress a file with a run's model: python scripts/compress.py RUN FILE -o FILE.clm

python scripts/compress.py RUN FILE -o FILE.clm --report --picture sizes.png
python scripts/decompress.py RUN FILE.clm -o FILE
"""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout works without being installed

import charlm
from charlm import cli
from charlm.config import Section
from charlm.process import keep_freed_memory


class Options(Section):
    """Compress a file with a run's model, and decode it again to see that nothing is lost."""

    run: Annotated[Path, cli.Flag("run", metavar="RUN")]
    """The run's folder."""
    file: Annotated[Path, cli.Flag("file", metavar="FILE")]
    """What to compress."""
    output: Annotated[Path, cli.Flag("--output", "-o")]
    """The compressed file; it is replaced if it is there."""
    checkpoint: str = "best"
    """best, last, or a step; decompressing needs the same."""
    streams: int | None = None
    """Parts of the file that are read side by side: more are faster, up to a point, and cost some bytes each. Default
    by the file's size."""
    context: int | None = None
    """Symbols that a prediction sees at most; default the model's context."""
    stride: int | None = None
    """Symbols that are forgotten at once when the context is full, as in evaluate; default about half of it."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the matrix products."""
    threads: int | None = None
    """Of the processor; decompressing uses as many. Default torch's own choice."""
    verify: bool = True
    """Decode the result and compare before it takes its place."""
    report: bool = False
    """Also print the sizes that gzip, bzip2 and xz reach, and the size of the model itself."""
    speeds: tuple[int, ...] = ()
    """Also measure characters per second with so many streams: 1,16,64. Takes a while each."""
    picture: Path | None = None
    """Also draw the report into this file (.png, .svg, .pdf)."""
    as_json: Annotated[bool, cli.Flag("--json")] = False
    """Print one JSON document."""


def main() -> None:
    options = cli.parse(Options)
    from charlm.compression import report as compression  # not before --help and mistakes were answered
    from charlm.report import figures

    if options.picture is not None:
        figures.check_suffix(options.picture)
    keep_freed_memory()
    trained = charlm.load(options.run, options.checkpoint)
    compressed = charlm.compress(
        trained,
        options.file,
        options.output,
        verify=options.verify,
        **{name: getattr(options, name) for name in ("streams", "context", "stride", "precision", "threads")},
    )
    report = compression.weigh(
        trained,
        options.file,
        compressed,
        others=options.report or options.picture is not None,
        speeds=options.speeds,
    )
    sys.stdout.reconfigure(errors="replace")
    print(json.dumps(report.as_dict(), indent=2) if options.as_json else report.to_text())
    if options.picture is not None:
        compression.draw(report, options.picture)
    if not options.as_json:
        words = ["scripts/decompress.py", options.run, options.output, "-o", f"{options.file}.copy"]
        words += [] if options.checkpoint == "best" else ["--checkpoint", options.checkpoint]
        print("Next: python", shlex.join(map(str, words)))


if __name__ == "__main__":
    cli.script(main)
