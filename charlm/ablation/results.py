"""What the runs of an ablation came to, read from their folders."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from charlm.ablation.rows import Job, Row
from charlm.ablation.table import Line, Measurement, protocols, summarise, to_csv, to_markdown
from charlm.config import UserError, flatten
from charlm.runs.folder import Run, read_json, write_whole

NO_MATTER = {"data.path", "data.cache_dir", "data.hub_id", "train.checkpoint_every", "train.keep_checkpoints"}
"""Options, beside those of `run`, that do not touch the result."""


def check_unchanged(jobs: Iterable[Job]) -> None:
    """Raise UserError for a run that has been made, or begun, with other options than it would be now."""
    for job in jobs:
        run = Run(job.folder)
        if run.config_path.exists():
            before, now = (flatten(asdict(config), ".") for config in (run.config(), job.config))
            changed = [
                f"{name}: {before.get(name)} -> {now.get(name)}"
                for name in sorted(before.keys() | now.keys())
                if before.get(name) != now.get(name) and not name.startswith("run.") and name not in NO_MATTER
            ]
            if changed:
                raise UserError(
                    f"{run.path} was made with another configuration ({'; '.join(changed)}): put that back, choose "
                    "another --run.dir, or remove the folder to make the run anew"
                )


def measure(job: Job) -> Measurement | None:
    """The result of a finished run; None if it has not come to its end."""
    run, train = Run(job.folder), job.config.train
    if not run.config_path.exists():
        return None
    rows = list(run.metrics())
    scores = [row["valid"] for row in rows if "valid" in row and row["step"] == train.steps]
    if not scores or not math.isfinite(scores[-1]["bits_per_character"]):
        return None
    record = read_record(job)
    return Measurement(
        row=job.row,
        seed=job.seed,
        bits_per_character=scores[-1]["bits_per_character"],
        bits_per_byte=scores[-1]["bits_per_byte"],
        seconds_per_step=seconds_per_step(rows, train.batch_size * job.config.model.context_length),
        cpu_seconds=record.get("cpu_seconds"),
        peak_memory=record.get("peak_memory"),
    )


def seconds_per_step(rows: Sequence[dict[str, Any]], characters_per_step: int) -> float | None:
    """The mean over training, validation left out; None if too little was logged.

    A row's characters per second are those since the row before it. The first row is left out: it holds the warm-up.
    """
    logged = [(row["step"], row["characters_per_second"]) for row in rows if "characters_per_second" in row]
    spans = [(step - before, speed) for (before, _), (step, speed) in pairwise(logged)]
    if not spans:
        return None
    seconds = sum(steps * characters_per_step / speed for steps, speed in spans)
    return seconds / sum(steps for steps, _ in spans)


def progress(job: Job) -> float:
    """How far a run under way has come, from 0 to 1, as far as it has been logged."""
    try:
        with Run(job.folder).metrics_path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 2**16))
            lines = file.read().split(b"\n")[:-1]  # what follows the last newline is not written yet
        return min(1.0, json.loads(lines[-1])["step"] / job.config.train.steps)
    except (OSError, ValueError, IndexError, KeyError, TypeError):
        return 0.0


def read_record(job: Job) -> dict[str, Any]:
    """What the runs' keeper knows of a run: peak_memory in bytes, cpu_seconds, failure."""
    path = job.beside(".json")
    record = read_json(path) if path.exists() else {}
    return record if isinstance(record, dict) else {}


def write_record(job: Job, *, peak_memory: int, cpu_seconds: float, failure: str | None) -> None:
    """Remember what a run's process took, on top of those before it, and why it failed if it did."""
    old = read_record(job)
    record = {
        "peak_memory": max(peak_memory, old.get("peak_memory") or 0),
        "cpu_seconds": cpu_seconds + (old.get("cpu_seconds") or 0.0),
        "failure": failure,
    }
    write_whole(job.beside(".json"), json.dumps(record) + "\n")


def table(rows: Sequence[Row], jobs: Sequence[Job]) -> list[Line]:
    """The lines, from what is on disk."""
    measured = [result for job in jobs if (result := measure(job)) is not None]
    done = {(result.row, result.seed) for result in measured}
    failures = [
        (job.row, job.seed, failure)
        for job in jobs
        if (job.row, job.seed) not in done and (failure := read_record(job).get("failure"))
    ]
    paper = {row.name: row.paper for row in rows if row.paper is not None}
    return summarise([row.name for row in rows], measured, paper, failures)


def write_tables(rows: Sequence[Row], jobs: Sequence[Job], folder: Path) -> list[Line]:
    """Write table.md and table.csv, and return their lines."""
    lines = table(rows, jobs)
    write_whole(folder / "table.md", markdown(lines, jobs))
    write_whole(folder / "table.csv", to_csv(lines))
    return lines


def markdown(lines: Sequence[Line], jobs: Sequence[Job]) -> str:
    """The Markdown table under its protocol."""
    return to_markdown(lines, protocols({job.row: job.config for job in jobs}))
