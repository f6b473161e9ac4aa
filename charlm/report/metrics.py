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
    name: str
    """The end of the folder's path that tells the runs of a page apart."""
    config: Config
    provenance: dict[str, Any]
    """What the run was made from, by path such as "corpus/splits/valid/symbols"."""
    series: dict[str, np.ndarray]
    """The finite numbers in metrics.jsonl by path, such as "terms/layer1/offset1/all/loss": steps, seconds
    of training (NaN if unknown) and values, float64 [3, N]."""

    @property
    def symbols_per_character(self) -> float:
        """In the training split; 1 if the run did not record it."""
        symbols = self.provenance.get("corpus/splits/train/symbols", 1)
        characters = self.provenance.get("corpus/splits/train/characters", 1)
        return number(symbols) / number(characters)

    @property
    def characters_per_step(self) -> float:
        """Characters that an optimizer step predicts, one for each position."""
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
        """The series with a term's name, or its beginning, between `before` and `after`."""
        paths = [path for path in self.series if path.startswith(before) and path.endswith(after)]
        names = {path: Term.parse(path.removeprefix(before).removesuffix(after)) for path in paths}
        layers = range(1, self.config.model.num_layers + 1)
        return {name: self.points(path) for path, name in names.items() if name is not None and name.layer in layers}


def read_runs(folders: Sequence[Path | str]) -> list[Metrics]:
    """The records of runs; raises UserError if a folder is not a run, or a file of it is damaged."""
    runs = [Run.open(folder) for folder in folders]
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
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def _series(run: Run) -> dict[str, np.ndarray]:
    found: dict[str, list[tuple[float, float, float]]] = {}
    for row in run.metrics():
        for path, value in flatten(row, "/").items():
            if abs(number(value)) < LARGEST:  # not NaN
                found.setdefault(path, []).append((row["step"], number(row.get("seconds")), value))
    return {path: np.array(points, float).T for path, points in found.items()}
