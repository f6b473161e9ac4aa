# PYTHON_ARGCOMPLETE_OK
"""Restore a file that compress.py wrote: python scripts/decompress.py RUN FILE.clm -o FILE"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout works without being installed

import charlm
from charlm import cli
from charlm.config import Section
from charlm.files import OutputPath
from charlm.process import keep_freed_memory
from charlm.text import say


class Options(Section):
    """Restore a compressed file, on the machine that compressed it, and check its SHA-256."""

    run: Annotated[Path, cli.Flag("run", metavar="RUN")]
    """The run's folder."""
    file: Annotated[Path, cli.Flag("file", metavar="FILE")]
    """The compressed file."""
    output: Annotated[OutputPath, cli.Flag("--output", "-o")]
    """The file to write. An existing file is replaced."""
    checkpoint: str = "best"
    """best, last or a step: the one that compressed the file."""


def main() -> None:
    options = cli.parse(Options)
    from charlm.data.sources import check_outside  # not before --help and mistakes were answered

    keep_freed_memory()
    trained = charlm.load(options.run, options.checkpoint)
    check_outside(trained.config.data, "output", options.output.parent)  # the text itself may be restored
    length = charlm.decompress(trained, options.file, options.output)
    say(f"{options.output}: {length:,} bytes, restored")


if __name__ == "__main__":
    cli.script(main)
