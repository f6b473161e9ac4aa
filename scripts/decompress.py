# PYTHON_ARGCOMPLETE_OK
"""Bring back what a run's model has compressed: python scripts/decompress.py RUN FILE.clm -o FILE"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout works without being installed

import charlm
from charlm import cli
from charlm.config import Section
from charlm.process import keep_freed_memory


class Options(Section):
    """Bring back what a run's model has compressed, on the machine where it was; checked by the content's SHA-256."""

    run: Annotated[Path, cli.Flag("run", metavar="RUN")]
    """The run's folder."""
    file: Annotated[Path, cli.Flag("file", metavar="FILE")]
    """What compress.py wrote."""
    output: Annotated[Path, cli.Flag("--output", "-o")]
    """Where the content goes; it is replaced if it is there."""
    checkpoint: str = "best"
    """best, last, or a step: the one that it was compressed by."""


def main() -> None:
    options = cli.parse(Options)
    keep_freed_memory()
    trained = charlm.load(options.run, options.checkpoint)
    length = charlm.decompress(trained, options.file, options.output)
    print(f"{options.output}: {length:,} bytes, as they were compressed")


if __name__ == "__main__":
    cli.script(main)
