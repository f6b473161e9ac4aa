"""The records of runs: config, provenance, and metrics.jsonl as series of points."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from charlm.config import Config, flatten
from charlm.objective.terms import Term, TermName
from charlm.runs.folder import Run
from charlm.text import visible

LARGEST = 1e30  # number in a figure
Points = tuple[np.ndarray, np.ndarray]
"""x and y of a line, float64 of the same length."""


@dataclass(frozen=True)
class Metrics:
    """The records of a run."""

    folder: Run
    name: str  # the end of the path that tells the runs of a page apart
    config: Config
    provenance: dict[str, Any]
    """What the run was made from, by path such as "corpus/splits/valid/symbols"."""
    series: dict[str, np.ndarray]
    """Steps, seconds (or NaN) and finite values, float64 [3, N], by path."""

    @property
    def symbols_per_character(self) -> float:
        """In the training split; 1 if the run did not record it."""
        split = "corpus/splits/train"
        symbols = number(self.provenance.get(f"{split}/symbols", 1))
        return symbols / number(self.provenance.get(f"{split}/characters", 1))

    @property
    def characters_per_step(self) -> float:
        """Characters that an optimizer step predicts."""
        symbols = self.config.train.batch_size * self.config.model.context_length
        return symbols / self.symbols_per_character

    @property
    def step(self) -> int:
        return int(self.points("step")[1].max(initial=0))

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and bits per character of the best validation."""
        steps, bits = self.points("valid/bits_per_character")
        return (int(steps[bits.argmin()]), float(bits.min())) if len(bits) else None

    @property
    def has_bits(self) -> bool:
        return not self.series.keys().isdisjoint(("bits_per_character", "valid/bits_per_character"))

    def points(self, path: str, timed: bool = False) -> Points:
        """A series over optimizer steps, or over seconds of training if `timed`."""
        steps, seconds, values = self.series.get(path, np.empty((3, 0)))
        known = np.isfinite(seconds)
        return (seconds[known], values[known]) if timed else (steps, values)

    def by_term(self, before: str, after: str = "") -> dict[TermName, Points]:
        """The series with a term's name between `before` and `after`."""
        found = {}
        for path in self.series:
            if path.startswith(before) and path.endswith(after):
                name = Term.parse(path.removeprefix(before).removesuffix(after))
                if name and 1 <= name.layer <= self.config.model.num_layers:
                    found[name] = self.points(path)
        return found


def read_runs(folders: Sequence[Path | str]) -> list[Metrics]:
    """The records of runs; raises UserError if a folder is no run, or damaged."""
    runs = list(map(Run.open, folders))
    names = short_names([run.path for run in runs])
    return [
        Metrics(run, name, run.config(), flatten(run.provenance(), "/"), _series(run))
        for run, name in zip(runs, names, strict=True)
    ]


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as few as tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = [visible("/".join(own[-count:])) for own in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def number(value: Any) -> float:
    """A number from a record that may hold anything; NaN if it is none or infinite."""
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if is_number else math.nan


def _series(run: Run) -> dict[str, np.ndarray]:
    found: dict[str, list[tuple[float, float, float]]] = {}
    for row in run.metrics():
        for path, value in flatten(row, "/").items():
            if abs(number(value)) < LARGEST:  # not NaN
                point = (row["step"], number(row.get("seconds")), value)
                found.setdefault(path, []).append(point)
    return {path: np.array(points, float).T for path, points in found.items()}
