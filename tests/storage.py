"""Helpers for tests of checkpoints: a run, snapshots that can be told apart, and the files on disk."""

import hashlib
import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from operator import getitem
from pathlib import Path

import torch
from safetensors.torch import save_file

from charlm.config import Config, RunConfig
from charlm.files import HOST
from charlm.runs.checkpoints import Checkpoint, checkpoint_folders, save_checkpoint
from charlm.runs.folder import Run
from charlm.runs.tensors import Snapshot, load_tensors

CORPUS = {"name": "none", "sha256": "0"}
"""A run's record of a corpus that no test reads."""
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


def left_of(path: Path, host: str = HOST, process: int = 999_999_999) -> Path:
    """The hidden path at which a process, by default one that has ended, has written `path`."""
    return path.with_name(f".{path.name}.{host}-{process}-01234567.tmp")


def make_run(path: Path) -> Run:
    return Run.create(Config(run=RunConfig(dir=path)), CORPUS)


def snapshot_of(step: int, number: float | None = None, **state) -> Snapshot:
    """A snapshot of which every tensor holds `number`, by default the step."""
    number = float(step if number is None else number)
    parameters = {"layer.weight": torch.full((5, 4), number), "layer.bias": torch.full((5,), number)}
    moments = {f"{name}.exp_avg": tensor.clone() for name, tensor in parameters.items()}
    return Snapshot(parameters, moments, {"step": step, "number": number} | state)


def save(run: Run, step: int, number: float | None = None, *, best: bool = False, keep: int = 9, **state) -> Checkpoint:
    return save_checkpoint(run, snapshot_of(step, number, **state), best=best, keep=keep)


def number_of(checkpoint: Checkpoint) -> float:
    """The number that every tensor of a checkpoint holds."""
    files = [checkpoint.path / f"{name}.safetensors" for name in ("model", "optimizer")]
    tensors = [tensor for file in files for tensor in load_tensors(file)[0].values()]
    (number,) = {float(value) for tensor in tensors for value in tensor.flatten()}
    assert number == checkpoint.state["number"]
    return number


def steps(run: Run) -> list[int]:
    return list(checkpoint_folders(run))


def names(run: Run) -> set[str]:
    """The names in the folder of checkpoints, hidden ones included."""
    return {path.name for path in run.checkpoints_path.iterdir()}


def content(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: files with their content, folders with None."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def manifest_for(folder: Path) -> str:
    """A manifest that fits the files of a folder, as someone who tampers with them would write it."""
    entries = {}
    for name in FILES:
        size = (folder / name).stat().st_size
        is_huge = size > 1 << 30
        entries[name] = {"bytes": size, "sha256": "0" * 64} if is_huge else _entry((folder / name).read_bytes())
    entries["manifest.json"] = _entry((json.dumps(entries, indent=2) + "\n").encode())
    return json.dumps(entries, indent=2) + "\n"


def _entry(content: bytes) -> dict:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def forge(folder: Path, change: Callable[[Path], object]) -> None:
    """Change the files of a checkpoint, of which the manifest then knows."""
    change(folder)
    (folder / "manifest.json").write_text(manifest_for(folder))


# Damage to a folder, for tables of cases.


def written(name: str, content: bytes | str) -> Callable[[Path], object]:
    """Another content of a file."""
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def replaced(name: str, put: Callable[[Path], object]) -> Callable[[Path], object]:
    """`put` makes something in the place of a file."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        put(folder / name)

    return change


def missing(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def entries(name: str, **changes: object) -> Callable[[Path], object]:
    """Other entries of a JSON file; an entry is named by its path, with two underscores between the parts."""

    def change(folder: Path) -> None:
        record = json.loads((folder / name).read_text())
        for entry, value in changes.items():
            *path, last = entry.split("__")
            reduce(getitem, path, record)[last] = value
        (folder / name).write_text(json.dumps(record))

    return change


def tensors(name: str, **changes: torch.Tensor | None) -> Callable[[Path], object]:
    """Other tensors in a file, by name with two underscores for each dot; None removes one."""

    def change(folder: Path) -> None:
        held = {key: tensor.clone() for key, tensor in load_tensors(folder / name)[0].items()}
        held |= {key.replace("__", "."): tensor for key, tensor in changes.items()}
        save_file({key: tensor for key, tensor in held.items() if tensor is not None}, folder / name)

    return change
