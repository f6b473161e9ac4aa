"""The folder of a run.

RUN/config.yaml        the resolved config
RUN/provenance.json    corpus and its hash, versions, git commit, command
RUN/metrics.jsonl      one JSON object per line: training rows and validation rows
RUN/checkpoints/       see `charlm.runs.checkpoints`
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from charlm.config import Config, UserError
from charlm.config_files import load_config, to_yaml

PACKAGES = ("torch", "accelerate", "numpy", "safetensors")


class Run:
    """Paths and small files of one run. The constructor only names the folder; `create` and `open` check it."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.config_path = self.path / "config.yaml"
        self.provenance_path = self.path / "provenance.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.checkpoints_path = self.path / "checkpoints"

    @classmethod
    def create(cls, config: Config, corpus: dict[str, Any]) -> "Run":
        """Make the folder of a new run.

        Raises:
            UserError: the folder holds something already, or cannot be made.
        """
        run = cls(config.run.dir)
        run.check_absent()
        try:
            run.checkpoints_path.mkdir(parents=True)
        except OSError as error:
            raise UserError(
                f"run.dir={run.path}: cannot be made ({error.strerror}); choose another --run.dir"
            ) from error
        write_whole(run.provenance_path, json.dumps({"corpus": corpus} | _environment(), indent=2) + "\n")
        write_whole(run.config_path, to_yaml(config))
        return run

    @classmethod
    def open(cls, path: Path | str) -> "Run":
        """The run in `path`.

        Raises:
            UserError: there is none.
        """
        run = cls(path)
        if not run.config_path.is_file() or not run.provenance_path.is_file():
            raise UserError(f"{run.path} is not a run: it has no config.yaml and provenance.json; give a run's folder")
        return run

    def check_absent(self) -> None:
        """Raise UserError if a new run cannot take this folder."""
        if self.config_path.exists():
            raise UserError(
                f"run.dir={self.path}: holds a run already; continue it with --run.resume=true, "
                "or choose another --run.dir"
            )
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UserError(f"run.dir={self.path}: exists and is not empty; choose another --run.dir")

    def config(self) -> Config:
        """The resolved config that the run was started with."""
        return load_config(self.config_path)

    def provenance(self) -> dict[str, Any]:
        """What the run was made from: its corpus, versions, git commit and command."""
        return read_json(self.provenance_path)

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl."""
        with self.metrics_path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The rows of metrics.jsonl; a last line that a kill cut short is left out."""
        if not self.metrics_path.exists():
            return
        for line in self.metrics_path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)

    def forget_metrics_after(self, step: int) -> None:
        """Drop the rows that a run resumed at `step` is about to write again."""
        kept = [row for row in self.metrics() if row["step"] <= step]
        write_whole(self.metrics_path, "".join(json.dumps(row) + "\n" for row in kept))


def write_whole(path: Path, text: str) -> None:
    """Write a file so that, whenever the process dies, it holds either its old or its new content."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """The content of a JSON file; UserError if it is damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error


def _environment() -> dict[str, Any]:
    return {
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
        "git_commit": _git_commit(),
        "command": sys.argv,
        "machine": {"processor": _processor(), "cores": os.cpu_count()},
    }


def _processor() -> str:
    """The processor's name where the system tells, else its architecture."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """That of the code, `-dirty` if it differs; None where there is no git, or the code is in no checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None
