# PYTHON_ARGCOMPLETE_OK
"""Compare variants of one run: python scripts/ablate.py --config configs/ablation_cpu.yaml --seeds 3 --jobs 2

Results are kept in run.dir. After a stop, the same command continues and trains only what is missing.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout works without being installed

from charlm import cli  # first: it answers Ctrl-C

# isort: split
from pydantic import Field, field_validator

from charlm.config import Stopped, UserError
from charlm.config.types import Count
from charlm.text import say


class Options(cli.WithConfig):
    """Train every row with every seed and compare them: Markdown, CSV and a picture in run.dir.

    Without --row, --sweep and --methods the rows are the paper's: without each loss, without per-layer positions, SGD.
    All rows are compared with the first. Flags of the configuration apply to all rows.
    """

    seeds: Annotated[Count, Field(le=1000)] = 3
    """Runs of each row. Their seeds count up from train.seed."""
    jobs: Count = 1
    """Runs at the same time; they share the cores of the processor. On a CPU one run per core is fastest."""
    row: Annotated[tuple[str, ...], cli.Flag("--row", action="append", metavar="NAME: FLAGS")] = ()
    """A row: 'name: --section.field=value ...'. May be given several times."""
    sweep: Annotated[tuple[str, ...], cli.Flag("--sweep", action="append", metavar="OPTION=VALUE,VALUE")] = ()
    """A row for every value: section.field=value,value. Several sweeps make a row for every combination."""
    methods: Annotated[tuple[Path, ...], cli.Flag("--methods", nargs="+", metavar="FILE")] = ()
    """A row for each of these YAML files of options; a folder stands for the YAML files in it."""

    @field_validator("methods", mode="before")
    @classmethod
    def _split(cls, texts: Sequence[str]) -> list[str]:
        return [path for text in texts for path in text.split(",") if path]


def main() -> None:
    options = cli.parse(Options)
    if not hasattr(os, "wait4"):
        raise UserError("ablate.py needs the signals of Unix, which Windows lacks; train the rows with train.py")
    from charlm.ablation import variants  # not before --help and mistakes were answered
    from charlm.ablation.runner import Runner
    from charlm.ablation.table import draw, write_tables

    rows = [variants.parse_row(text) for text in options.row]
    rows += variants.parse_sweeps(options.sweep)
    rows += variants.read_methods(options.methods)
    rows = rows or variants.paper_variants(options.config)
    runs = variants.plan(rows, options.config_files, options.flags, options.seeds)
    folder = options.config.run.dir
    runner = Runner(
        command=[sys.executable, Path(__file__).with_name("train.py")],
        at_once=options.jobs,
        threads=max(1, num_cores() // options.jobs),
        after_each=lambda: write_tables(runs, folder),
    )
    runner.run(runs, folder)
    table = write_tables(runs, folder)
    say((folder / "table.md").read_text(), end="")
    if runner.done:
        say(f"table: {folder / 'table.md'}, table.csv, {draw(table, folder / 'table.png').name}", file=sys.stderr)
    if runner.signals:
        raise Stopped(f"stopped with {runner.done} of {len(runs)} runs done; the same command continues")
    if runner.failed:
        raise UserError(f"{len(runner.failed)} of {len(runs)} runs failed; the same command tries them again")


def num_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    cli.script(main)
