"""The rows of an ablation: what each changes, and the runs that this makes."""

import itertools
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from charlm.config import Config, UserError
from charlm.config_files import load_config
from charlm.values import LONGEST

PAPER_SGD_RATE = 0.3
"""Plain SGD takes the paper's steps at its learning rate over 1 minus its momentum: 0.003 / (1 - 0.99)."""
SECTIONS = tuple(field.name for field in fields(Config))


@dataclass(frozen=True)
class Row:
    """One line of the table: files and flags on top of what all rows share."""

    name: str
    files: tuple[Path, ...] = ()
    flags: tuple[str, ...] = ()
    """Such as `--aux.layers.enabled=false`."""
    paper: float | None = None
    """What Al-Rfou et al. 2018 (table 4) report for T64: bits per character on text8's dev split."""

    @property
    def folder(self) -> str:
        """The name of the row's folder."""
        return re.sub(r"[^\w.,=+\-]+", "_", self.name).strip("._")


@dataclass(frozen=True)
class Job:
    """One run of a row: its seed, what is trained, and where."""

    row: str
    seed: int
    config: Config

    @property
    def folder(self) -> Path:
        """The run's folder; beside it lie its config to begin with, what it printed, and what it took."""
        return self.config.run.dir

    def beside(self, suffix: str) -> Path:
        """A file beside the run's folder: seed-0.yaml, .log or .json."""
        return self.folder.with_name(self.folder.name + suffix)

    def __str__(self) -> str:
        return f"{self.row}, seed {self.seed}"


def paper_rows(base: Config) -> list[Row]:
    """The paper's ablation, and its figures.

    "Momentum" is the optimizer of the base; SGD without it gets the rate at which its steps are as long.
    """
    momentum, rate = base.train.momentum, base.train.learning_rate
    sgd_rate = rate / (1 - momentum) if base.train.optimizer == "sgd" else PAPER_SGD_RATE
    sgd = ("--train.optimizer=sgd", "--train.momentum=0", f"--train.learning_rate={sgd_rate:.6g}")
    return [
        Row("full", paper=1.062),
        Row("without positions", flags=("--aux.positions.enabled=false",), paper=2.482),
        Row("without intermediate layers", flags=("--aux.layers.enabled=false",), paper=1.158),
        Row("without extra targets", flags=("--aux.targets.enabled=false",), paper=1.068),
        Row("without per-layer positions", flags=("--model.positions=input",), paper=1.069),
        Row("SGD in place of momentum", flags=sgd, paper=1.065),
    ]


def given_row(text: str) -> Row:
    """The row that `--row` describes: `name: --section.field=value ...`, or the flags alone, which then are its name.

    Raises:
        UserError: it is neither.
    """
    name, has_name, changes = text.partition(": ") if not text.lstrip().startswith("--") else ("", "", text)
    try:
        flags = shlex.split(changes)
    except ValueError as error:
        raise UserError(f"row {text!r}: {error}") from None
    if (has_name and not name.strip()) or not all(re.match(r"--[\w.-]+=", flag) for flag in flags):
        raise UserError(f"row {text!r}: give it as 'name: --section.field=value ...'")
    if not has_name and not flags:
        raise UserError(f"row {text!r}: changes nothing; give it as 'name: --section.field=value ...'")
    return Row(name.strip() or " ".join(flag[2:] for flag in flags), flags=tuple(flags))


def sweep_rows(sweeps: Sequence[str]) -> list[Row]:
    """A row for every value of one sweep, `section.field=a,b,c`; of several, for every combination of their values.

    Raises:
        UserError: a sweep without values.
    """
    if not sweeps:
        return []
    axes = [_sweep_axis(sweep) for sweep in sweeps]
    if len({name for name, _ in axes}) < len(axes):
        raise UserError(f"sweep={' '.join(sweeps)}: an option is swept twice; give all its values to one sweep")
    return [
        Row(" ".join(changes), flags=tuple(f"--{change}" for change in changes))
        for changes in itertools.product(*([f"{name}={value}" for value in values] for name, values in axes))
    ]


def method_rows(paths: Sequence[Path]) -> list[Row]:
    """A row for every YAML file, and for every one in a folder, by its name.

    Raises:
        UserError: a folder without such files.
    """
    rows = []
    for path in paths:
        files = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
        if not files:
            raise UserError(f"methods={path}: the folder holds no YAML file")
        rows += [Row(file.stem, files=(file,)) for file in files]
    return rows


def config_flags(arguments: Sequence[str]) -> list[str]:
    """Those of a command line's `arguments` that set an option of the configuration, each in one piece."""
    flags = []
    for index, token in enumerate(arguments):
        if token.startswith("--") and token[2:].partition(".")[0] in SECTIONS and "." in token:
            flags.append(token if "=" in token else f"{token}={arguments[index + 1]}")
    return flags


def plan(rows: Sequence[Row], files: Sequence[Path], flags: Sequence[str], seeds: int) -> list[Job]:
    """The runs, all rows with one seed before the next: a table that is stopped early is still whole.

    A row's files come on top of the shared `files`, then the shared `flags`, then its own flags. The shared run.dir is
    the folder of them all, the shared train.seed is the first seed.

    Raises:
        UserError: a configuration that cannot work, with the row's name; two rows of one name.
        ConfigError: the same, of an option's value.
    """
    if seeds < 1:
        raise UserError(f"seeds={seeds}: must be at least 1")
    if seeds * len(rows) > LONGEST:
        raise UserError(f"seeds={seeds}: {len(rows)} rows make {seeds * len(rows):,} runs, more than {LONGEST:,}")
    base = load_config(files, flags)
    folders: dict[str, str] = {}
    for row in rows:
        if not row.folder or row.folder in folders:
            taken = f"; so has row {folders[row.folder]!r}" if row.folder else ""
            raise UserError(f"row {row.name!r}: would be kept in the folder {row.folder!r}{taken}; name it otherwise")
        folders[row.folder] = row.name
    configs = {row.name: _resolve(row, files, flags) for row in rows}
    return [
        _job(row, seed, configs[row.name], base.run.dir)
        for seed in range(base.train.seed, base.train.seed + seeds)
        for row in rows
    ]


def _resolve(row: Row, files: Sequence[Path], flags: Sequence[str]) -> Config:
    for flag in row.flags:
        name = flag[2:].partition("=")[0].replace("-", "_")
        if name == "train.seed" or name.startswith("run."):
            raise UserError(f"row {row.name!r}: {name} is not for a row to set, every run has its own")
    try:
        return load_config([*files, *row.files], [*flags, *row.flags])
    except UserError as error:
        raise type(error)(f"row {row.name!r}: {error}") from None


def _job(row: Row, seed: int, config: Config, folder: Path) -> Job:
    run = replace(
        config.run,
        dir=folder / row.folder / f"seed-{seed}",
        resume=False,
        resume_from=None,
        auto_resume=True,
        report=False,  # its time would count
    )
    return Job(row.name, seed, replace(config, train=replace(config.train, seed=seed), run=run))


def _sweep_axis(sweep: str) -> tuple[str, list[str]]:
    """The option and its values; commas inside of brackets belong to a value."""
    name, _, text = sweep.removeprefix("--").partition("=")
    values = list(_split(text))
    if not name or not all(values):
        raise UserError(f"sweep={sweep}: give it as section.field=value,value,...")
    if len(set(values)) < len(values):
        raise UserError(f"sweep={sweep}: a value is given twice")
    return name, values


def _split(text: str) -> Iterator[str]:
    depth, value = 0, ""
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            yield value.strip()
            value = ""
        else:
            value += character
    yield value.strip()
