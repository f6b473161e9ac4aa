"""Bring back what a run's model has compressed: python scripts/decompress.py RUN FILE.clm -o FILE"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout works without being installed

import charlm
from charlm import cli
from charlm.process import keep_freed_memory


@dataclass(frozen=True, kw_only=True)
class Options:
    """Bring back what a run's model has compressed, on the machine where it was; checked by the content's SHA-256."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The run's folder."""
    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """What compress.py wrote."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
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
