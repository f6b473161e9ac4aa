"""The variants that an ablation compares, and their runs."""

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from charlm.config import Config, Mark, UserError, differences, has_mark
from charlm.config.errors import shown
from charlm.config.load import load_config, typed
from charlm.data.sources import check_outside
from charlm.files import read_json, write_whole
from charlm.runs.folder import Run
from charlm.training.origin import resolved

PAPER_SGD_RATE = 0.3
"""Plain SGD's steps are then as long as the paper's with momentum: 0.003 / (1 - 0.99)."""


@dataclass(frozen=True)
class Variant:
    """A row of the table: files and, over them, options, on top of the shared ones."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    paper: float | None = None
    """Bits per character of T64 on text8's dev split, from Al-Rfou et al. 2018, table 4."""

    @property
    def folder(self) -> str:
        return re.sub(r"[^\w.,=+\-]+", "_", self.name).strip("._")


class Costs(BaseModel, strict=True):
    """The costs of a run's processes, as far as they are known."""

    peak_memory: int | float | None = None  # bytes
    cpu_seconds: float | None = None
    failure: str | None = None  # of the last process


@dataclass(frozen=True)
class VariantRun:
    """The training of one variant with one seed, and what it has left on disk."""

    variant: Variant
    seed: int
    config: Config

    def __str__(self) -> str:
        return f"{self.variant.name}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        return self.config.run.dir

    def beside(self, suffix: str) -> Path:
        """The config (.yaml), output (.log) or costs (.json) of the run."""
        return self.folder.with_name(self.folder.name + suffix)

    def check_unchanged(self) -> None:
        """Raise UserError if the run lies in its text, or was begun with other options."""
        check_outside(self.config.data, "run.dir", self.folder)
        run = Run(self.folder)
        found = {} if run.is_untrained() else differences(Run.open(run.path).config(), self.config)
        changed = "; ".join(
            f"{name}: {shown(old)} -> {shown(new)}"
            for name, (old, new) in found.items()
            if not has_mark(name, Mark.NO_EFFECT)
        )
        if changed:
            fault = f"{run.path} was made with another configuration ({changed})"
            raise UserError(f"{fault}: choose another --run.dir, or remove the folder")

    def fraction_done(self) -> float:
        """The share of the steps that the metrics show, from 0 to 1."""
        steps = [row["step"] for row in Run(self.folder).metrics()]
        return max(steps, default=0) / self.config.train.steps

    def result(self) -> dict[str, Any] | None:
        """The last validation, seconds_per_step and `costs`; None if unfinished or diverged."""
        train, rows = self.config.train, list(Run(self.folder).metrics())
        scores = [row["valid"] for row in rows if "valid" in row and row["step"] == train.steps]
        if not scores or not math.isfinite(scores[-1].get("bits_per_character", math.nan)):
            return None
        speed = seconds_per_step(rows, train.batch_size * self.config.model.context_length)
        costs = self.costs().model_dump() | {"seconds_per_step": speed}
        return {"bits_per_byte": math.nan} | scores[-1] | costs

    def costs(self) -> Costs:
        path = self.beside(".json")
        return read_json(path, kind=Costs) if path.exists() else Costs()

    def add_costs(self, peak_memory: int, cpu_seconds: float, failure: str | None) -> None:
        """Add those of a process."""
        costs = self.costs()
        costs.peak_memory = max(peak_memory, costs.peak_memory or 0)
        costs.cpu_seconds = cpu_seconds + (costs.cpu_seconds or 0.0)
        costs.failure = failure
        write_whole(self.beside(".json"), costs.model_dump_json() + "\n")


def seconds_per_step(rows: Sequence[dict[str, Any]], characters_per_step: int) -> float | None:
    """Mean time of a training step; None if fewer than two rows have a speed.

    A row's speed is measured since the row before; the first holds the warm-up.
    """
    steps, seconds = 0, 0.0
    logged = [row for row in rows if "characters_per_second" in row]
    for before, row in pairwise(logged):
        steps += row["step"] - before["step"]
        characters = (row["step"] - before["step"]) * characters_per_step
        seconds += characters / row["characters_per_second"]
    return seconds / steps if steps else None


def paper_variants(base: Config) -> list[Variant]:
    """The paper's rows; the steps of plain SGD are as long as the base's."""
    rate = PAPER_SGD_RATE
    if base.train.optimizer == "sgd":
        rate = base.train.learning_rate / (1 - base.train.momentum)
    sgd = {"train.optimizer": "sgd", "train.momentum": 0, "train.learning_rate": f"{rate:.6g}"}
    return [
        Variant("full", paper=1.062),
        Variant("without positions", {"aux.positions.enabled": False}, paper=2.482),
        Variant("without intermediate layers", {"aux.layers.enabled": False}, paper=1.158),
        Variant("without extra targets", {"aux.targets.enabled": False}, paper=1.068),
        Variant("without per-layer positions", {"model.position_encoding": "input"}, paper=1.069),
        Variant("SGD in place of momentum", sgd, paper=1.065),
    ]


def parse_row(text: str) -> Variant:
    """The variant of `name: --section.field=value ...`, or of flags, which then name it."""
    name = re.match(r"\s*(?!--)(\S.*?)\s*: ", text)
    try:
        flags = shlex.split(text[name.end() :] if name else text)
        if not (name or flags) or not all(re.match(r"--[\w.-]+=", flag) for flag in flags):
            raise ValueError("give it as 'name: --section.field=value ...'")
    except ValueError as error:
        raise UserError(f"row {text!r}: {error}", "row") from None
    changes = [flag.removeprefix("--") for flag in flags]
    options = dict(change.split("=", 1) for change in changes)
    return Variant(name[1] if name else " ".join(changes), options)


def parse_sweeps(sweeps: Sequence[str]) -> list[Variant]:
    """A variant for every combination of values of `section.field=a,b,c`."""
    axes: dict[str, list[str]] = {}
    for sweep in sweeps:
        name, _, text = sweep.removeprefix("--").partition("=")
        parts = re.split(r",(?![^\[{]*[\]}])", text)  # not at commas inside brackets
        values = [part.strip() for part in parts]
        if not name or not all(values):
            raise UserError(f"sweep={sweep}: give it as section.field=value,value,...", "sweep")
        if name in axes:
            raise UserError(f"sweep={sweep}: swept twice; join the values", "sweep")
        axes[name] = values
    combinations = product(*axes.values()) if axes else []
    rows = [dict(zip(axes, values, strict=True)) for values in combinations]
    return [Variant(" ".join(map("=".join, options.items())), options) for options in rows]


def read_methods(paths: Sequence[Path]) -> list[Variant]:
    """A variant for every YAML file, or those in a folder, named after it."""
    variants = []
    for path in paths:
        files = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
        if not files:
            raise UserError(f"methods={path}: the folder holds no YAML file", "methods")
        variants += [Variant(file.stem, files=(file,)) for file in files]
    return variants


def plan(
    variants: Sequence[Variant],
    files: Sequence[Path],
    flags: Mapping[str, Any],
    seeds: int,
) -> list[VariantRun]:
    """The runs in order: all variants with the first seed, then all with the next.

    Later options win: `files`, the variant's files, `flags`, the variant's options. Raises
    UserError if a configuration cannot work, or two rows would share a folder.
    """
    base = load_config(files, flags)
    folders = [variant.folder for variant in variants]
    for variant, folder in zip(variants, folders, strict=True):
        if not folder or folders.count(folder) > 1:
            fault = f"row {variant.name!r}: its folder would be {folder!r}"
            raise UserError(f"{fault}; choose another name")
    configs = [_config_of(variant, files, flags) for variant in variants]
    # Without a report: its time would count.
    own = {"resume": False, "resume_from": None, "auto_resume": True, "report": False}
    runs = []
    for seed in range(base.train.seed, base.train.seed + seeds):
        for variant, config in zip(variants, configs, strict=True):
            folder = base.run.dir / variant.folder / f"seed-{seed}"
            train, run = config.train.replace(seed=seed), config.run.replace(dir=folder, **own)
            runs.append(VariantRun(variant, seed, config.replace(train=train, run=run)))
    return runs


def _config_of(variant: Variant, files: Sequence[Path], flags: Mapping[str, Any]) -> Config:
    for name in variant.options:
        if name == "train.seed" or name.startswith("run."):
            raise UserError(f"row {variant.name!r}: {name} is each run's own", name)
    try:
        config = load_config([*files, *variant.files], {**flags, **typed(variant.options)})
        if config.train.time is not None:
            text = f"train.time={config.train.time}: rows are compared after equal steps; give --train.steps"
            raise UserError(text, "train.time")
        return resolved(config, continues=False)
    except UserError as error:
        raise type(error)(f"row {variant.name!r}: {error}", error.option) from None
