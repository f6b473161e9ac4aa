"""Results of an ablation's runs, read from their folders."""

import json
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from charlm.ablation.table import Result, Row, protocols, to_csv, to_markdown
from charlm.ablation.variants import Variant, VariantRun
from charlm.config import Mark, UserError, differences, has_mark
from charlm.files import read_json, write_whole
from charlm.runs.folder import Run


def check_unchanged(runs: Iterable[VariantRun]) -> None:
    """Raise UserError if a run was begun with other options, apart from those that do not affect its result."""
    for planned in runs:
        run = Run(planned.folder)
        if run.config_path.exists():
            changed = [
                f"{name}: {before} -> {now}"
                for name, (before, now) in differences(run.config(), planned.config).items()
                if not has_mark(name, Mark.NO_EFFECT)
            ]
            if changed:
                raise UserError(
                    f"{run.path} was made with another configuration ({'; '.join(changed)}): restore it, choose "
                    "another --run.dir, or remove the folder to train this run again"
                )


def read_result(run: VariantRun) -> Result | None:
    """The result of a finished run; None if it has not finished, or diverged."""
    folder, train = Run(run.folder), run.config.train
    rows = list(folder.metrics())
    scores = [row["valid"] for row in rows if "valid" in row and row["step"] == train.steps]
    if not scores or not math.isfinite(scores[-1]["bits_per_character"]):
        return None
    costs = read_costs(run)
    return Result(
        bits_per_character=scores[-1]["bits_per_character"],
        bits_per_byte=scores[-1]["bits_per_byte"],
        seconds_per_step=seconds_per_step(rows, train.batch_size * run.config.model.context_length),
        cpu_seconds=costs["cpu_seconds"],
        peak_memory=costs["peak_memory"],
    )


def seconds_per_step(rows: Sequence[dict[str, Any]], characters_per_step: int) -> float | None:
    """Mean time of a training step, without validation; None if fewer than two rows of metrics have a speed.

    A row's characters per second are measured since the row before. The first row is left out: it holds the warm-up.
    """
    logged = [(row["step"], row["characters_per_second"]) for row in rows if "characters_per_second" in row]
    spans = [(step - before, speed) for (before, _), (step, speed) in pairwise(logged)]
    if not spans:
        return None
    seconds = sum(steps * characters_per_step / speed for steps, speed in spans)
    return seconds / sum(steps for steps, _ in spans)


def fraction_done(run: VariantRun) -> float:
    """The share of a run's steps that its metrics show, from 0 to 1."""
    return max((row["step"] for row in Run(run.folder).metrics()), default=0) / run.config.train.steps


def read_costs(run: VariantRun) -> dict[str, Any]:
    """The costs that `add_costs` wrote: peak_memory in bytes, cpu_seconds, failure."""
    path = run.beside(".json")
    return read_json(path) if path.exists() else {"peak_memory": None, "cpu_seconds": None, "failure": None}


def add_costs(run: VariantRun, *, peak_memory: int, cpu_seconds: float, failure: str | None) -> None:
    """Record what a process of the run took, on top of earlier ones, and why it failed if it did."""
    old = read_costs(run)
    costs = {
        "peak_memory": max(peak_memory, old["peak_memory"] or 0),
        "cpu_seconds": cpu_seconds + (old["cpu_seconds"] or 0.0),
        "failure": failure,
    }
    write_whole(run.beside(".json"), json.dumps(costs) + "\n")


def read_rows(variants: Sequence[Variant], runs: Sequence[VariantRun]) -> list[Row]:
    """The table's rows, from what is on disk. The first is the reference of the others."""
    rows: list[Row] = []
    for variant in variants:
        results, failures = {}, []
        for run in runs:
            if run.variant == variant:
                if (result := read_result(run)) is not None:
                    results[run.seed] = result
                elif failure := read_costs(run)["failure"]:
                    failures.append(f"{run}: {failure}")
        rows.append(Row(variant, results, rows[0] if rows else None, failures))
    return rows


def write_tables(variants: Sequence[Variant], runs: Sequence[VariantRun], folder: Path) -> list[Row]:
    """Write table.md and table.csv, and return their rows."""
    rows = read_rows(variants, runs)
    write_whole(folder / "table.md", to_markdown(rows, protocols(runs)))
    write_whole(folder / "table.csv", to_csv(rows))
    return rows
