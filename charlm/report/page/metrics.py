"""What a run has written down, as its page needs it: curves, losses of the terms, speed, diagnostics."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from charlm.config import Config
from charlm.runs.folder import Run

Points = tuple[np.ndarray, np.ndarray]
"""Completed optimizer steps, and a value at each: both float64, of one length."""


@dataclass(frozen=True)
class Recorded:
    """A run's own records. Values that are missing or not finite are NaN."""

    run: Run
    name: str
    """Tells the runs of a page apart: the folder's name, or as much of its path as it takes."""
    config: Config
    provenance: dict[str, Any]
    train: list[dict[str, Any]] = field(default_factory=list)
    valid: list[dict[str, Any]] = field(default_factory=list)
    diagnostics: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    num_skipped: int = 0
    """Updates that were not made."""

    @property
    def symbols_per_character(self) -> float:
        """Of the training split; 1 where the run did not record it."""
        split = self.corpus_split("train")
        symbols, characters = number(split.get("symbols")), number(split.get("characters"))
        return symbols / characters if characters > 0 and symbols > 0 else 1.0

    @property
    def characters_per_step(self) -> float:
        """Characters that an optimizer step predicts, counted by position as the paper counts them."""
        return self.config.train.batch_size * self.config.model.context_length / self.symbols_per_character

    @property
    def step(self) -> int:
        """The newest that a row tells of."""
        return max((row["step"] for row in (*self.train, *self.valid)), default=0)

    @property
    def best(self) -> tuple[int, float] | None:
        """The best validation: its step, and bits per character."""
        steps, bits = self.validation()
        found = np.flatnonzero(np.isfinite(bits))
        if not len(found):
            return None
        place = found[np.argmin(bits[found])]
        return int(steps[place]), float(bits[place])

    def corpus_split(self, split: str) -> dict[str, Any]:
        """The sizes that were recorded of a split."""
        found = self.provenance["corpus"].get("splits")
        found = found.get(split) if isinstance(found, dict) else None
        return found if isinstance(found, dict) else {}

    def of_training(self, key: str) -> Points:
        """What the training rows have under a key."""
        return _points(self.train, (row.get(key) for row in self.train))

    def validation(self) -> Points:
        """Bits per character of the validations."""
        return _points(self.valid, (row["valid"].get("bits_per_character") for row in self.valid))

    def seconds(self, rows: Sequence[dict[str, Any]]) -> np.ndarray:
        """When the rows were written, in seconds of training."""
        return np.array([number(row.get("seconds")) for row in rows])

    def losses(self) -> dict[str, Points]:
        """The loss of each term, in nats per symbol, at the steps at which it was computed."""
        collected: dict[str, list[tuple[int, float]]] = {}
        for row in self.train:
            terms = row.get("terms")
            for name, part in terms.items() if isinstance(terms, dict) else ():
                loss = number(part.get("loss")) if isinstance(part, dict) else math.nan
                collected.setdefault(name, []).append((row["step"], loss))
        return {name: tuple(np.array(points, float).T) for name, points in collected.items()}

    def hedge(self) -> dict[str, Points]:
        """What aux.hedge has made of the layers' weights, {"layer3": ...}."""
        rows = [row for row in self.train if isinstance(row.get("hedge"), dict)]
        names = rows[0]["hedge"] if rows else ()
        return {name: _points(rows, (row["hedge"].get(name) for row in rows)) for name in names}


def read_runs(folders: Sequence[Path | str]) -> list[Recorded]:
    """The records of runs, finished or going on.

    Raises:
        UserError: a folder is no run, or a file of it is damaged.
    """
    runs = [Run.open(folder) for folder in folders]
    return [_read(run, name) for run, name in zip(runs, short_names([run.path for run in runs]), strict=True)]


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of some paths, as few as tell them apart, or all."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-count:]) for own in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def number(value: Any) -> float:
    """A number of a record that may hold anything; NaN for what is none, or not finite."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else math.nan


def _read(run: Run, name: str) -> Recorded:
    recorded = Recorded(run, name, run.config(), run.provenance())
    skipped = 0
    for row in run.metrics():
        if isinstance(row.get("valid"), dict):
            recorded.valid.append(row)
        elif isinstance(row.get("diagnostics"), dict):
            recorded.diagnostics.append((row["step"], row["diagnostics"]))
        elif "skipped" in row:
            skipped += 1
        else:
            recorded.train.append(row)
    return Recorded(**(vars(recorded) | {"num_skipped": skipped}))


def _points(rows: Iterable[dict[str, Any]], values: Iterable[Any]) -> Points:
    return np.array([float(row["step"]) for row in rows]), np.array([number(value) for value in values])
