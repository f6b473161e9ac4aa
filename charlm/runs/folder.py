"""The folder of a run.

RUN/config.yaml        the resolved config
RUN/provenance.json    corpus and its hash, versions, git commit, command
RUN/metrics.jsonl      one JSON object per line: training rows and validation rows
RUN/checkpoints/       see `charlm.runs.checkpoints`
RUN/.lock              held by the process that trains into the folder
"""

import errno
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from filelock import FileLock, Timeout
from pydantic import AfterValidator, BaseModel, Field, NonNegativeInt, PositiveFloat, PositiveInt

from charlm.config import Config, UserError
from charlm.config.errors import did_you_mean
from charlm.config.load import load_config, to_yaml
from charlm.config.run import OF_ONE_CALL
from charlm.data.sources import located
from charlm.files import parse_json, read_json, write_whole
from charlm.process import processor_name
from charlm.text import INSTALLED, visible

PACKAGES = ("torch", "accelerate", "numpy", "safetensors", *(["charlm"] if INSTALLED else []))
RECORDS = r"\.?(provenance\.json|config\.yaml)(\..+\.tmp)?"
UNTRAINED = re.compile(rf"\.lock|checkpoints|trackers(/.*)?|{RECORDS}", re.DOTALL)
"""Names in a run's folder before its first step."""
MAX_ROW_BYTES = 2**20
PATIENCE = 10.0
"""Seconds to wait for the lock: processes whose launcher was killed end after their step."""

Visible = Annotated[str, AfterValidator(visible)]


class Row(BaseModel, strict=True, extra="allow"):
    """A line of metrics.jsonl, as far as it is used."""

    step: NonNegativeInt
    seconds: Annotated[float, Field(ge=0, le=1e12)] = 0.0
    characters_per_second: PositiveFloat = 1.0
    valid: dict[str, float] = {}


class CorpusRecord(BaseModel, strict=True, extra="allow"):
    """A dumped `Corpus`, as far as it is used."""

    name: Visible
    sha256: Visible
    vocabulary: dict[str, Any] | None = None
    splits: dict[str, dict[str, PositiveInt]] | None = None
    sources: dict[str, "CorpusRecord"] = {}


class Provenance(BaseModel, strict=True, extra="allow"):
    """Content of provenance.json, as far as it is used."""

    corpus: CorpusRecord
    command: list[str] | None = None
    started_from: dict[str, Visible] = {}


class Run:
    """Paths and small files of one run. The constructor does not touch the disk."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.config_path = self.path / "config.yaml"
        self.provenance_path = self.path / "provenance.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.checkpoints_path = self.path / "checkpoints"
        self._locked: tuple[int, int] | None = None
        """The lock's file, while this object holds it."""

    @classmethod
    def create(cls, config: Config, corpus: dict[str, Any], started_from: Mapping[str, str] = {}) -> "Run":
        """Make the folder of a new run; UserError if it is taken or cannot be made."""
        run = cls(config.run.dir)
        run.check_absent()
        with run.os_errors_explained(cannot_be="made"):
            run.checkpoints_path.mkdir(parents=True, exist_ok=True)
            provenance = {"corpus": corpus, "started_from": started_from, "command": sys.argv} | environment()
            write_whole(run.provenance_path, json.dumps(provenance, indent=2) + "\n")
            run.write_config(config)
        return run

    @classmethod
    def open(cls, path: Path | str) -> "Run":
        """The run in `path`; UserError if there is none."""
        run = cls(path)
        if not run.config_path.is_file() or not run.provenance_path.is_file():
            fault = "there is no such folder"
            if run.path.exists():
                fault = "it lacks config.yaml or provenance.json"
            names = [path.parent.name for path in run.path.parent.glob("*/provenance.json")]
            way_out = did_you_mean(run.path.name, names) or "; give a run's folder"
            raise UserError(f"{run.path} is not a run: {fault}{way_out}")
        return run

    def check_absent(self) -> None:
        """Raise UserError if a new run cannot take this folder."""
        if not self.is_untrained():
            problem = "exists and is not empty;"
            if self.config_path.exists():
                problem += " continue it with --run.resume=true or"
            raise self._refusal(problem)

    def is_untrained(self) -> bool:
        """Whether the folder is missing or empty, or its run ended before its first step."""
        if self.config_path.exists() and not self.provenance_path.exists():
            return False  # the config is the user's own
        names = (path.relative_to(self.path).as_posix() for path in self.path.rglob("*"))
        can_be_folder = self.path.is_dir() or not self.path.exists()
        return can_be_folder and all(map(UNTRAINED.fullmatch, names))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from training into the folder; make it if it does not exist.

        A new one in which nothing was trained is removed after an error. Raises UserError if in use.
        """
        lock = FileLock(self.path / ".lock")
        is_new = not self.path.exists()
        with self.os_errors_explained(cannot_be="written"):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=PATIENCE)
            except Timeout:
                raise self._refusal("another process is training into it; let it end or") from None
            self._locked = self._lock_file() or (0, 0)  # it may be gone already
        try:
            yield
        except BaseException:
            if is_new and self._locked == self._lock_file() and self.is_untrained():
                shutil.rmtree(self.path, ignore_errors=True)
            raise
        finally:
            self._locked = None
            lock.release()

    def check_held(self) -> None:
        """Raise UserError if the folder was removed or replaced inside `lock`."""
        if self._locked not in (None, self._lock_file()):
            raise self._refusal("was removed, moved or replaced while in use; restore it or")

    def _lock_file(self) -> tuple[int, int] | None:
        """Device and number of the lock's file, which no other has while it is open."""
        with suppress(FileNotFoundError, NotADirectoryError):
            found = os.stat(self.path / ".lock")
            return found.st_dev, found.st_ino
        return None

    @contextmanager
    def os_errors_explained(self, *, cannot_be: str) -> Iterator[None]:
        """Turn an OSError raised inside into a UserError: the folder `cannot_be` "read"."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise self._refusal(f"cannot be {cannot_be} ({reason}); fix that or") from error

    def write_config(self, config: Config) -> None:
        """Write config.yaml, which `--config` takes, too. Raises OSError, or UserError as `check_held`."""
        self.check_held()
        write_whole(self.config_path, to_yaml(located(config), exclude={"run": OF_ONE_CALL}))

    def config(self) -> Config:
        """The resolved config of the run."""
        return load_config(self.config_path)

    def provenance(self) -> dict[str, Any]:
        """Content of provenance.json."""
        found = read_json(self.provenance_path, kind=Provenance)
        return found.model_dump(exclude_unset=True)

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl, or raise OSError, or UserError as `check_held`."""
        self.check_held()
        line = json.dumps(row).encode() + b"\n"
        with self.metrics_path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.metrics_path)
            except OSError:
                file.truncate(end)  # or the next row would continue this line
                raise

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The rows of metrics.jsonl, but not a last one cut short; UserError for damage."""
        for number, row in self._numbered_metrics():
            if row is None:
                place = f"{self.metrics_path}, line {number}"
                raise UserError(f"{place} is damaged; remove that line")
            yield row

    def forget_metrics_after(self, step: int, validated_step: int | None = None) -> list[str]:
        """Drop damaged rows and those after `step`, or `validated_step`; return warnings."""
        known = step if validated_step is None else min(step, validated_step)
        kept = []
        warnings = []
        for number, row in self._numbered_metrics():
            if row is None:
                place = f"{self.metrics_path}, line {number}"
                warnings.append(f"{place} was damaged and has been dropped")
            elif row["step"] <= (known if "valid" in row else step):
                kept.append(row)
        write_whole(self.metrics_path, "".join(json.dumps(row) + "\n" for row in kept))
        return warnings

    def _numbered_metrics(self) -> Iterator[tuple[int, dict[str, Any] | None]]:
        """Line numbers and rows of metrics.jsonl; the row of a damaged line is None."""
        if not self.metrics_path.exists():
            return
        if not self.metrics_path.is_file():
            raise UserError(f"{self.metrics_path} is not a regular file; remove it")
        with self.metrics_path.open("rb") as file:
            lines = iter(lambda: file.readline(MAX_ROW_BYTES), b"")
            for number, line in enumerate(lines, 1):
                if line.endswith(b"\n") or len(line) == MAX_ROW_BYTES:
                    row = None
                    with suppress(ValueError):
                        parsed = parse_json(line)
                        Row.model_validate(parsed)
                        row = parsed  # not the model's dump, whose fields have another order
                    yield number, row
                if not line.strip(b"\0"):
                    return  # a hole in the file, which may have no end

    def _refusal(self, text: str) -> UserError:
        return UserError(f"run.dir={self.path}: {text} choose another --run.dir", "run.dir")


def environment() -> dict[str, Any]:
    """Versions, commit of the code, and machine."""
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "git_commit": None if INSTALLED else _git_commit(),
        "machine": {"processor": processor_name(), "cores": os.cpu_count()},
    }


def _git_commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError):
        place = Path(__file__).parent
        done = subprocess.run(command, cwd=place, capture_output=True, text=True)
        return done.stdout.strip() or None
    return None
