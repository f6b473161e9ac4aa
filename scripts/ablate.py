"""Compare variants of one run: python scripts/ablate.py --config configs/ablation_cpu.yaml --seeds 3 --jobs 2

What is done is kept in run.dir: the same command goes on where it was stopped, and makes only what is missing.
"""

import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout works without being installed

from charlm import cli
from charlm.config import Stopped, UserError


@dataclass(frozen=True, kw_only=True)
class Ablate(cli.WithConfig):
    """Train every row with every seed and compare them: Markdown, CSV and a picture in run.dir.

    Without --row, --sweep and --methods the rows are the paper's: without each loss, without per-layer positions, SGD.
    With them the first row is what the others are compared with. Flags of the configuration hold for all rows.
    """

    seeds: int = 3
    """Runs of each row; the first has train.seed, the next ones those after it."""
    jobs: int = 1
    """Runs at once; they share the processor's cores. On a CPU one per core takes the least time for all."""
    row: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A row, several times if you like: 'name: --section.field=value ...'."""
    sweep: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A row for every value: section.field=value,value. Several sweeps: a row for every combination."""
    methods: tuple[Path, ...] = ()
    """A row for every YAML file of options, or for each in a folder."""


def main() -> None:
    arguments = gathered(sys.argv[1:], "--methods")
    options = cli.parse(Ablate, arguments)
    from charlm.ablation import variants  # not before --help and mistakes were answered
    from charlm.ablation.results import write_tables
    from charlm.ablation.runner import Runner
    from charlm.ablation.table import draw

    if options.jobs < 1:
        raise UserError(f"jobs={options.jobs}: must be at least 1")
    rows = [variants.parse_row(text) for text in options.row]
    rows += variants.parse_sweeps(options.sweep) + variants.read_methods(options.methods)
    rows = rows or variants.paper_variants(options.settings)
    runs = variants.plan(rows, options.config, variants.config_flags(arguments), options.seeds)
    folder = options.settings.run.dir
    runner = Runner(
        command=[sys.executable, Path(__file__).with_name("train.py")],
        at_once=options.jobs,
        threads=max(1, num_cores() // options.jobs),
        after_each=lambda: write_tables(rows, runs, folder),
    )
    outcome = runner.run(runs, folder)
    table = write_tables(rows, runs, folder)
    print((folder / "table.md").read_text(), end="")
    if outcome.done:
        print(f"table: {folder / 'table.md'}, table.csv, {draw(table, folder / 'table.png').name}", file=sys.stderr)
    if outcome.stopped:
        raise Stopped(f"stopped with {outcome.done} of {outcome.total} runs done; the same command continues")
    if outcome.failed:
        raise UserError(f"{outcome.failed} of {outcome.total} runs failed; the same command tries them again")


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gathered(arguments: Sequence[str], flag: str) -> list[str]:
    """The files that a shell has put behind `flag` in place of a pattern, as one value."""
    if flag not in arguments:
        return list(arguments)
    start = arguments.index(flag) + 1
    files = list(itertools.takewhile(lambda token: not token.startswith("-"), arguments[start:]))
    return [*arguments[:start], *([",".join(files)] if files else []), *arguments[start + len(files) :]]


if __name__ == "__main__":
    cli.script(main)
