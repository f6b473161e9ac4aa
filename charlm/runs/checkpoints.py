"""Checkpoints: written whole or not at all, verified when read, and free of pickle.

RUN/checkpoints/step-00001000/model.safetensors       parameters of transformer and heads, by name; its metadata name
                                                      the vocabulary that they belong to
                              optimizer.safetensors   optimizer state, by parameter name and state key
                              state.json              step, best validation so far, gradient scaler
                              manifest.json           size and SHA-256 of the three
RUN/checkpoints/last, best    text files that name one of the folders
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from charlm.config import UserError
from charlm.runs.folder import Run, read_json, write_whole
from charlm.runs.snapshot import Snapshot

MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    state: dict[str, Any]

    @property
    def name(self) -> str:
        """Its folder's name, `step-00001000`."""
        return self.path.name

    @property
    def step(self) -> int:
        """Completed optimizer steps."""
        return self.state["step"]

    def tensors(self) -> dict[str, Tensor]:
        """The model's parameters by name, on the CPU."""
        return load_file(self.path / MODEL)

    def snapshot(self) -> Snapshot:
        """All that it holds."""
        return Snapshot(self.tensors(), load_file(self.path / OPTIMIZER), self.state)

    def check_vocabulary(self, vocabulary: Any) -> None:
        """Raise UserError if the parameters belong to another vocabulary than the run's record of one.

        Those that do not name theirs are taken at their word.
        """
        with safe_open(self.path / MODEL, "pt") as file:
            expected = (file.metadata() or {}).get("vocabulary")
        if expected not in (None, _digest(vocabulary)):
            raise UserError(
                f"{self.path}: was trained with another vocabulary than provenance.json has; restore that file"
            )


def save_checkpoint(run: Run, snapshot: Snapshot, *, best: bool, keep: int) -> Checkpoint:
    """Write a checkpoint beside the others, point `last` (and `best`) at it, then prune to `keep` and the best."""
    target = run.checkpoints_path / f"step-{snapshot.state['step']:08d}"
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        metadata = {"vocabulary": _digest(run.provenance()["corpus"].get("vocabulary"))}
        save_file(snapshot.model, temporary / MODEL, metadata)
        save_file(snapshot.optimizer, temporary / OPTIMIZER)
        write_whole(temporary / STATE, json.dumps(snapshot.state, indent=2) + "\n")
        manifest = {name: _fingerprint(temporary / name) for name in (MODEL, OPTIMIZER, STATE)}
        write_whole(temporary / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        for path in (temporary / MODEL, temporary / OPTIMIZER, temporary):
            _sync(path)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        _sync(run.checkpoints_path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for pointer in ("last", "best") if best else ("last",):
        write_whole(run.checkpoints_path / pointer, target.name + "\n")
    _prune(run, keep)
    return Checkpoint(target, snapshot.state)


def find_checkpoint(run: Run, which: str | int = "best") -> Checkpoint:
    """The checkpoint that `which` names: best, last, or a step. Its manifest is verified.

    Raises:
        UserError: there is none, or a file of it is damaged.
    """
    if isinstance(which, int) or which.isdigit():
        name = f"step-{int(which):08d}"
    elif (pointer := run.checkpoints_path / which).is_file() and which in ("best", "last"):
        name = pointer.read_text().strip()
    else:
        name = which
    path = run.checkpoints_path / name
    if path not in checkpoint_folders(run):
        there = ", ".join(str(int(folder.name[5:])) for folder in checkpoint_folders(run)) or "none yet"
        raise UserError(f"{run.path} has no checkpoint {which!r}; its steps are: {there}")
    _verify(path)
    return Checkpoint(path, read_json(path / STATE))


def checkpoint_folders(run: Run) -> list[Path]:
    """The folders of the run's checkpoints, oldest first."""
    return sorted(path for path in run.checkpoints_path.glob("step-*") if path.name[5:].isdigit())


def rewind(run: Run, checkpoint: Checkpoint) -> None:
    """Make `checkpoint` the run's newest: forget the metrics and checkpoints that come after it.

    `best` falls back on it where the best checkpoint came later.
    """
    write_whole(run.checkpoints_path / "last", checkpoint.name + "\n")
    best = run.checkpoints_path / "best"
    if not best.exists() or best.read_text().strip() > checkpoint.name:
        write_whole(best, checkpoint.name + "\n")
    run.forget_metrics_after(checkpoint.step)
    for folder in checkpoint_folders(run):
        if folder.name > checkpoint.name:
            shutil.rmtree(folder)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _digest(record: Any) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _verify(path: Path) -> None:
    for name, expected in read_json(path / MANIFEST).items():
        if not (path / name).is_file() or _fingerprint(path / name) != expected:
            raise UserError(f"{path / name} is damaged: it does not match manifest.json; use another checkpoint")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(run: Run, keep: int) -> None:
    best = run.checkpoints_path / "best"
    best_name = best.read_text().strip() if best.exists() else None
    for folder in checkpoint_folders(run)[:-keep]:
        if folder.name != best_name:
            shutil.rmtree(folder)
