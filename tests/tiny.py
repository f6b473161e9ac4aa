"""Helpers for tests of whole runs: flags of a run that takes a moment, and the scripts as a user calls them."""

import json
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from charlm.config import ModelConfig, UserError

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def typed(flags: str) -> list[str]:
    """Flags as they are typed, without spaces in their values."""
    return flags.split()


TINY = (
    *typed("--run.report=false --model.num_layers=2 --model.num_heads=2 --model.d_model=16 --model.d_ff=32"),
    *typed("--model.context_length=16 --train.steps=3 --train.batch_size=4 --train.mixed_precision=no"),
    *typed("--train.valid_symbols=100"),
)
"""Flags for scripts/train.py. Tests append their own, since later flags win."""


def small_model(**options) -> ModelConfig:
    """Two layers, unless the options say otherwise."""
    return ModelConfig(**({"num_layers": 2, "num_heads": 2, "d_model": 8, "d_ff": 16, "context_length": 8} | options))


@contextmanager
def refused(option: str | None, words: str | None = None) -> Iterator[None]:
    """Inside, an error for the user is raised that names `option`, and says `words`, a regular expression."""
    with pytest.raises(UserError, match=words) as caught:
        yield
    assert caught.value.option == option


def train(*flags: str) -> Path:
    """The folder of a run made with these flags."""
    import charlm

    return charlm.train(charlm.load_config(overrides=flags))


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def checkpoint_bytes(run: Path, step: int) -> list[bytes]:
    """Model and optimizer state of a checkpoint, as they are on disk."""
    return [(checkpoint_folder(run, step) / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")]


def training_rows(run: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl that record an update."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "terms" in row]


def losses(run: Path) -> list[float]:
    """The loss of each recorded update."""
    return [row["loss"] for row in training_rows(run)]


def history(run: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl, without time and memory, which differ between any two runs."""
    measured = {"seconds", "characters_per_second", "memory"}
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key not in measured} for row in rows]


def assert_ended_like(run: Path, whole: Path) -> None:
    """Assert that `run` recorded and learned what `whole` did."""
    (_, last) = (whole / "checkpoints" / "last").read_text().strip().split("-")
    assert checkpoint_bytes(run, int(last)) == checkpoint_bytes(whole, int(last))
    assert history(run) == history(whole)


def run_script(name: str | Path, *arguments: str) -> int:
    """The exit code of scripts/NAME.py, or of another program by its path without the suffix, run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"scripts/{name}.py", *arguments])
        patch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    return exit_info.value.code


def script_names(name: str) -> SimpleNamespace:
    """The names in scripts/NAME.py, without a run of it. As a module it would hide its options from `run_script`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("charlm.cli.script", lambda main: None)
        patch.setattr(sys, "path", list(sys.path))
        return SimpleNamespace(**runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__"))


def table_cells(text: str) -> list[list[str]]:
    """The cells of the Markdown tables in `text`: for each table the header, the rule, and the rows."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
