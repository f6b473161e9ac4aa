"""The variants that an ablation compares: what each changes in the configuration, and the runs to train."""

import itertools
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charlm.config import Config, UserError
from charlm.config.load import load_config

PAPER_SGD_RATE = 0.3
"""Learning rate of plain SGD whose steps are as long as the paper's with momentum: 0.003 / (1 - 0.99)."""


@dataclass(frozen=True)
class Variant:
    """One row of the table: files and flags on top of the configuration that all rows share."""

    name: str
    files: tuple[Path, ...] = ()
    flags: tuple[str, ...] = ()
    """Such as `--aux.layers.enabled=false`."""
    paper: float | None = None
    """Bits per character of T64 on text8's dev split, from Al-Rfou et al. 2018, table 4."""

    @property
    def folder(self) -> str:
        """Name of the folder that holds the variant's runs."""
        return re.sub(r"[^\w.,=+\-]+", "_", self.name).strip("._")


@dataclass(frozen=True)
class VariantRun:
    """The training of one variant with one seed."""

    variant: Variant
    seed: int
    config: Config

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.config.run.dir

    def beside(self, suffix: str) -> Path:
        """A file beside the run's folder: its config (.yaml), its output (.log) or its costs (.json)."""
        return self.folder.with_name(self.folder.name + suffix)

    def __str__(self) -> str:
        return f"{self.variant.name}, seed {self.seed}"


def paper_variants(base: Config) -> list[Variant]:
    """The rows of the paper's ablation, with its figures.

    "SGD in place of momentum" takes the base's learning rate over 1 minus its momentum, so that steps stay as long.
    """
    train = base.train
    sgd_rate = train.learning_rate / (1 - train.momentum) if train.optimizer == "sgd" else PAPER_SGD_RATE
    sgd = ("--train.optimizer=sgd", "--train.momentum=0", f"--train.learning_rate={sgd_rate:.6g}")
    return [
        Variant("full", paper=1.062),
        Variant("without positions", flags=("--aux.positions.enabled=false",), paper=2.482),
        Variant("without intermediate layers", flags=("--aux.layers.enabled=false",), paper=1.158),
        Variant("without extra targets", flags=("--aux.targets.enabled=false",), paper=1.068),
        Variant("without per-layer positions", flags=("--model.position_encoding=input",), paper=1.069),
        Variant("SGD in place of momentum", flags=sgd, paper=1.065),
    ]


def parse_row(text: str) -> Variant:
    """The variant that `--row` describes: `name: --section.field=value ...`, or flags alone, which then are its name.

    Raises:
        UserError: the text has another form or changes nothing.
    """
    name, has_name, changes = text.partition(": ") if not text.lstrip().startswith("--") else ("", "", text)
    try:
        flags = shlex.split(changes)
    except ValueError as error:
        raise UserError(f"row {text!r}: {error}") from None
    if not (name.strip() if has_name else flags) or not all(re.match(r"--[\w.-]+=", flag) for flag in flags):
        raise UserError(f"row {text!r}: give it as 'name: --section.field=value ...'")
    return Variant(name.strip() or " ".join(flag[2:] for flag in flags), flags=tuple(flags))


def parse_sweeps(sweeps: Sequence[str]) -> list[Variant]:
    """A variant for every combination of the values in `sweeps`, each of the form `section.field=a,b,c`.

    Raises:
        UserError: a sweep has no values, or an option has two sweeps.
    """
    axes: dict[str, list[str]] = {}
    for sweep in sweeps:
        name, _, text = sweep.removeprefix("--").partition("=")
        values = re.split(r",(?![^\[{]*[\]}])", text)  # commas inside brackets belong to a value
        if not name or not all(value.strip() for value in values):
            raise UserError(f"sweep={sweep}: give it as section.field=value,value,...")
        if name in axes:
            raise UserError(f"sweep={sweep}: an option is swept twice; give all its values to one sweep")
        axes[name] = [f"{name}={value.strip()}" for value in values]
    return [
        Variant(" ".join(changes), flags=tuple(f"--{change}" for change in changes))
        for changes in itertools.product(*axes.values())
        if changes
    ]


def read_methods(paths: Sequence[Path]) -> list[Variant]:
    """A variant for every YAML file, named after it; a folder stands for the YAML files in it.

    Raises:
        UserError: a folder holds no YAML file.
    """
    variants = []
    for path in paths:
        files = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
        if not files:
            raise UserError(f"methods={path}: the folder holds no YAML file")
        variants += [Variant(file.stem, files=(file,)) for file in files]
    return variants


def plan(variants: Sequence[Variant], files: Sequence[Path], flags: Mapping[str, Any], seeds: int) -> list[VariantRun]:
    """The runs in the order of training: all variants with the first seed, then all with the next.

    So a table that is stopped early still has every row. Later options win: the shared `files`, the variant's files,
    the shared `flags`, the variant's flags. The shared run.dir holds all runs; the shared train.seed is the first seed.

    Raises:
        UserError: a configuration cannot work (the message names the row), or two rows would share a folder.
    """
    base = load_config(files, flags)
    folders = [variant.folder for variant in variants]
    for variant, folder in zip(variants, folders, strict=True):
        if not folder or folders.count(folder) > 1:
            shared = " like another row's" if folder else ""
            raise UserError(f"row {variant.name!r}: its folder would be {folder!r}{shared}; choose another name")
    configs = [_config_of(variant, files, flags) for variant in variants]
    # Without a report: its time would count.
    own = {"resume": False, "resume_from": None, "auto_resume": True, "report": False}
    return [
        VariantRun(
            variant,
            seed,
            config.replace(
                train=config.train.replace(seed=seed),
                run=config.run.replace(dir=base.run.dir / variant.folder / f"seed-{seed}", **own),
            ),
        )
        for seed in range(base.train.seed, base.train.seed + seeds)
        for variant, config in zip(variants, configs, strict=True)
    ]


def _config_of(variant: Variant, files: Sequence[Path], flags: Mapping[str, Any]) -> Config:
    changes = {name.replace("-", "_"): text for name, _, text in (flag[2:].partition("=") for flag in variant.flags)}
    for name in changes:
        if name == "train.seed" or name.startswith("run."):
            raise UserError(f"row {variant.name!r}: a row cannot set {name}, since every run has its own")
    try:
        return load_config([*files, *variant.files], {**flags, **changes})
    except UserError as error:
        raise type(error)(f"row {variant.name!r}: {error}", error.option) from None
