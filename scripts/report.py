# PYTHON_ARGCOMPLETE_OK
"""Draw runs as one page: python scripts/report.py RUN [RUN ...] -o report.html

The page is one HTML file that needs no others. Several runs are drawn over each other.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout works without being installed

from charlm import cli  # first: it answers Ctrl-C

# isort: split
from pydantic import Field

import charlm
from charlm.config import Section
from charlm.files import OutputPath
from charlm.process import keep_freed_memory
from charlm.text import say

if TYPE_CHECKING:
    from charlm.config import DataConfig
    from charlm.data.corpus import Corpus


class Options(Section):
    """Draw runs, finished or in progress, as one HTML page that needs no other files."""

    runs: Annotated[tuple[Path, ...], cli.Flag("runs", nargs="+", metavar="RUN")]
    """The folders of the runs."""
    output: Annotated[OutputPath, cli.Flag("--output", "-o"), Field(validate_default=True)] = Path("report.html")
    """The file to write."""
    characters: Annotated[int, Field(ge=2)] = 20_000
    """Characters of the valid split to score for bits by layer and by position. More are more exact and take longer."""
    records_only: bool = False
    """Leave out all that needs the model and its corpus: bits by layer and position, the passage, samples."""
    data: cli.MovedCorpus = cli.MovedCorpus()


def main() -> None:
    options = cli.parse(Options)
    from charlm.data.sources import check_outside  # not before --help and mistakes were answered
    from charlm.report.metrics import read_runs
    from charlm.report.page.probe import measure
    from charlm.report.page.render import write_report
    from charlm.runs.folder import Run

    for folder in options.runs:
        check_outside(options.data.where(Run.open(folder).config().data), "output", options.output)
    measured = None
    if not options.records_only:
        keep_freed_memory()
        measured = []
        for run in read_runs(options.runs):
            if sys.stderr.isatty():  # over its bars
                say(f"{run.folder.path}:", file=sys.stderr)
            corpus = corpus_of(options.data.where(run.config.data))
            measured.append(measure(run.folder, corpus, characters=options.characters))
    path = write_report(options.runs, options.output, measured)
    say(f"{path}: {path.stat().st_size / 1e6:.1f} MB; open it in a browser")


def corpus_of(config: "DataConfig") -> "Corpus | charlm.UserError":
    """The corpus, or the error that explains why it cannot be loaded."""
    try:
        return charlm.load_corpus(config)
    except charlm.UserError as error:
        return error


if __name__ == "__main__":
    cli.script(main)
