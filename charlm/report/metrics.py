"""The records of runs: config, provenance and metrics.jsonl as series of points."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from charlm.config import Config
from charlm.objective.terms import Term, TermName
from charlm.runs.folder import Run

Points = tuple[np.ndarray, np.ndarray]
"""x and y of a line, float64 of the same length; as a rule completed optimizer steps and a value at each."""


@dataclass(frozen=True)
class Metrics:
    """The records of a run. Values that are missing or not finite are NaN."""

    folder: Run
    name: str
    """The folder's name, or as much of its path as tells the runs of a page apart."""
    config: Config
    provenance: dict[str, Any]
    train: list[dict[str, Any]] = field(default_factory=list)
    valid: list[dict[str, Any]] = field(default_factory=list)
    diagnostics: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    """A row for each skipped update."""

    @property
    def symbols_per_character(self) -> float:
        """In the training split; 1 if the run did not record it."""
        split = self.corpus_split("train")
        symbols, characters = number(split.get("symbols")), number(split.get("characters"))
        return symbols / characters if characters > 0 and symbols > 0 else 1.0

    @property
    def characters_per_step(self) -> float:
        """Characters that an optimizer step predicts: one for each position, as in the paper."""
        return self.config.train.batch_size * self.config.model.context_length / self.symbols_per_character

    @property
    def step(self) -> int:
        """The newest step on record."""
        return max((row["step"] for row in (*self.train, *self.valid)), default=0)

    @property
    def longest(self) -> float:
        """Seconds of training up to the newest row; 0 if not recorded."""
        seconds = self.seconds([*self.train, *self.valid])
        return float(np.nanmax(seconds)) if np.isfinite(seconds).any() else 0.0

    @property
    def best(self) -> tuple[int, float] | None:
        """The step and the bits per character of the best validation."""
        steps, bits = self.validation()
        if not np.isfinite(bits).any():
            return None
        place = np.nanargmin(bits)
        return int(steps[place]), float(bits[place])

    @property
    def has_bits(self) -> bool:
        """Whether any bits per character are on record."""
        return any(np.isfinite(bits).any() for _, bits in (self.of_training("bits_per_character"), self.validation()))

    def corpus_split(self, split: str) -> dict[str, Any]:
        """The recorded sizes of a split."""
        return _part(_part(self.provenance["corpus"], "splits"), split)

    def of_training(self, key: str) -> Points:
        """The values of the training rows under a key."""
        return _points((row["step"], row.get(key)) for row in self.train)

    def validation(self) -> Points:
        """Bits per character of the validations."""
        return _points((row["step"], row["valid"].get("bits_per_character")) for row in self.valid)

    def seconds(self, rows: Sequence[dict[str, Any]]) -> np.ndarray:
        """The times at which the rows were written, in seconds of training."""
        return np.array([number(row.get("seconds")) for row in rows])

    def losses(self) -> dict[TermName, Points]:
        """The loss of each term in nats per symbol, at the steps at which it was computed."""
        return _by_name((row["step"], _losses(row)) for row in self.train)

    def hedge(self) -> dict[TermName, Points]:
        """The weights that aux.hedge gives the layers."""
        return _by_name((row["step"], _part(row, "hedge")) for row in self.train)

    def diagnostic(self, kind: str) -> dict[TermName, Points]:
        """A diagnostic by layer; bits per character by layer and offset."""
        return _by_name((step, _part(record, kind)) for step, record in self.diagnostics)


def read_runs(folders: Sequence[Path | str]) -> list[Metrics]:
    """The records of runs, finished or going on.

    Raises:
        UserError: a folder is no run, or a file of it is damaged.
    """
    runs = [Run.open(folder) for folder in folders]
    return [_read(run, name) for run, name in zip(runs, short_names([run.path for run in runs]), strict=True)]


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as few as tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-count:]) for own in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def number(value: Any) -> float:
    """A number from a record that may hold anything; NaN if it is not a finite number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else math.nan


def _read(run: Run, name: str) -> Metrics:
    metrics = Metrics(run, name, run.config(), run.provenance())
    for row in run.metrics():
        if _part(row, "valid"):
            metrics.valid.append(row)
        elif _part(row, "diagnostics"):
            metrics.diagnostics.append((row["step"], row["diagnostics"]))
        else:
            (metrics.skipped if "skipped" in row else metrics.train).append(row)
    return metrics


def _part(record: dict[str, Any], key: str) -> dict[str, Any]:
    found = record.get(key)
    return found if isinstance(found, dict) else {}


def _losses(row: dict[str, Any]) -> dict[str, Any]:
    terms = _part(row, "terms")
    return {name: _part(terms, name).get("loss") for name in terms}


def _by_name(rows: Iterable[tuple[int, dict[str, Any]]]) -> dict[TermName, Points]:
    """Values of rows, each a step and {name of a term or a layer: value}, without those that are not finite."""
    found: dict[TermName, list[tuple[int, Any]]] = {}
    for step, values in rows:
        for name, value in values.items():
            if (term := Term.parse(name)) and math.isfinite(number(value)):
                found.setdefault(term, []).append((step, value))
    return {term: _points(points) for term, points in found.items()}


def _points(pairs: Iterable[tuple[int, Any]]) -> Points:
    pairs = list(pairs)
    return np.array([float(step) for step, _ in pairs]), np.array([number(value) for _, value in pairs])
