"""Checkpoints: written whole or not at all, verified when read, and free of pickle.

RUN/checkpoints/step-00001000/model.safetensors       parameters of transformer and heads, by name; its metadata hold
                                                      a digest of the vocabulary
                              optimizer.safetensors   optimizer state, by parameter name and state key; where losses
                                                      have an optimizer each, `layer4/` and the like comes first
                              state.json              step, best validation so far, gradient scaler
                              manifest.json           size and SHA-256 of the three, and of its own text without this
                                                      last entry
RUN/checkpoints/last, best    text files that name one of the folders
RUN/checkpoints/.*.tmp        being written or removed; rubbish after a kill
RUN/checkpoints/.step-*.old   a whole checkpoint that is being replaced by another of the same step
RUN/checkpoints/.step-*.damaged   could not be read when the run continued from an older one; never looked at again

Reading changes nothing on disk, so a run can be evaluated while it trains. Saving and `rewind` clear away what a kill
has left.
"""

import hashlib
import json
import os
import re
import shutil
import stat
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from charlm.config import UserError
from charlm.files import read_json, sha256_of, sync, write_whole
from charlm.runs.folder import Run
from charlm.runs.snapshot import Snapshot
from charlm.runs.tensors import check_model, check_space, load_tensors, opened, save_tensors, shown

MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
FILES = (MODEL, OPTIMIZER, STATE)
STEP = r"step-(\d{8}|[1-9]\d{8,17})"
FOLDER = re.compile(rf"{STEP}|\.{STEP}\.old", re.ASCII)
MAX_JSON_BYTES = 2**20


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    state: dict[str, Any]

    @property
    def name(self) -> str:
        """The name that `last` and `best` use, `step-00001000`."""
        return _name(self.step)

    @property
    def step(self) -> int:
        """Number of completed optimizer steps."""
        return self.state["step"]

    def tensors(self) -> dict[str, Tensor]:
        """The model's parameters by name, on the CPU."""
        return load_tensors(self.path / MODEL)

    def snapshot(self) -> Snapshot:
        """Parameters, optimizer state and training state."""
        return Snapshot(self.tensors(), load_tensors(self.path / OPTIMIZER), self.state)

    def check_vocabulary(self, vocabulary: Any) -> None:
        """Raise UserError if the parameters name another vocabulary than `vocabulary`, the run's record of one."""
        with opened(self.path / MODEL) as file:
            expected = (file.metadata() or {}).get("vocabulary")
        if expected not in (None, _digest(vocabulary)):
            raise UserError(
                f"{self.path}: was trained with another vocabulary than provenance.json has; restore that file"
            )

    def check_tensors(self, expected: Mapping[str, Tensor], owned: Iterable[Collection[str]] = ()) -> None:
        """Raise UserError, naming file and tensor, unless the tensors are those of a model with this `state_dict`.

        Names, shapes and types are compared. Optimizer state must be a scalar, or have the
        shape and type of its parameter. `owned` holds, for each optimizer, its parameters by the names used for their
        state (see `owned_parameters`): each has either complete optimizer state or none (it never received a gradient),
        and there is no other state.
        """
        check_model(self.path / MODEL, expected, "config.yaml and provenance.json")
        path, owned = self.path / OPTIMIZER, list(owned)
        owners = set().union(*owned)
        keys = defaultdict(set)
        for name, tensor in load_tensors(path).items():
            parameter, _, key = name.rpartition(".")
            keys[parameter].add(key)
            owner = expected.get(parameter.rpartition("/")[2])  # behind the prefix of a loss
            if owner is None or (owned and parameter not in owners):
                raise UserError(f"{path} has a tensor {name}, which belongs to no parameter")
            if tensor.ndim > 0 and shown(tensor) != shown(owner):
                raise UserError(f"{path}: its tensor {name} is {shown(tensor)}, and its parameter {shown(owner)}")
        for parameters in owned:
            complete = set().union(*(keys[name] for name in parameters))
            for name in parameters:
                if keys[name] and (missing := complete - keys[name]):
                    raise UserError(f"{path} has no tensor {name}.{min(missing)}, and other parameters have one")


def save_checkpoint(run: Run, snapshot: Snapshot, *, best: bool, keep: int) -> Checkpoint:
    """Write a checkpoint beside the others, point `last` (and `best`) at it, then prune to `keep` and the best.

    Raises:
        OSError: the disk is full or fails. The older checkpoints are left as they were.
    """
    target = run.checkpoints_path / _name(snapshot.state["step"])
    temporary = _beside(target, "tmp")
    _tidy(run)
    tensors = (*snapshot.model.values(), *snapshot.optimizer.values())
    check_space(run.checkpoints_path, sum(tensor.nbytes for tensor in tensors))
    try:
        temporary.mkdir()
        write_whole(temporary / STATE, json.dumps(snapshot.state, indent=2) + "\n")
        metadata = {"vocabulary": _digest(run.provenance()["corpus"].get("vocabulary"))}
        save_tensors(snapshot.model, temporary / MODEL, temporary / STATE, metadata)
        save_tensors(snapshot.optimizer, temporary / OPTIMIZER, temporary / STATE)
        write_whole(temporary / MANIFEST, _manifest({name: _fingerprint(temporary / name) for name in FILES}))
        if run.metrics_path.exists():
            sync(run.metrics_path)  # the history must survive whatever the checkpoint survives
        if target.exists():
            target.rename(_beside(target, "old"))
        temporary.rename(target)
        sync(run.checkpoints_path)
    finally:
        _tidy(run)
    for pointer in ("last", "best") if best else ("last",):
        write_whole(run.checkpoints_path / pointer, target.name + "\n")
    _prune(run, keep)
    return Checkpoint(target, snapshot.state)


def find_checkpoint(run: Run, which: str | int = "best") -> Checkpoint:
    """The checkpoint named by `which`: best, last, or a step. It is verified.

    Raises:
        UserError: it does not exist, or one of its files is damaged; the message lists the whole ones.
    """
    if re.fullmatch(r"\d{1,18}", str(which), re.ASCII):
        name = _name(int(which))
    else:
        name = _pointed(run, which) if which in ("best", "last") else str(which)
    folders = {_name(step_of(path)): path for path in checkpoint_folders(run)}
    if name not in folders:
        there = ", ".join(str(step_of(path)) for path in folders.values()) or "none yet"
        raise UserError(f"{run.path} has no checkpoint {which!r}; its steps are: {there}")
    try:
        return _read(folders[name])
    except UserError as error:
        whole = ", ".join(str(step_of(path)) for other, path in folders.items() if other != name and _is_whole(path))
        raise UserError(f"{error}; whole checkpoints are at the steps: {whole or 'none'}") from None


def newest_whole_checkpoint(run: Run) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, if there is one, and a warning for each newer one that is damaged.

    `last` is ignored: a kill may have come before it was set, or it may be damaged.
    """
    warnings = []
    for path in reversed(checkpoint_folders(run)):
        try:
            return _read(path), warnings
        except UserError as error:
            warnings.append(f"checkpoint of step {step_of(path):,} skipped: {error}")
    return None, warnings


def checkpoint_folders(run: Run) -> list[Path]:
    """The folders of the run's checkpoints, oldest first. Of one that a kill left half replaced, the old folder."""
    by_step = {}
    if run.checkpoints_path.is_dir():
        for path in sorted(run.checkpoints_path.iterdir()):  # .step-00000001.old before step-00000001
            if FOLDER.fullmatch(path.name):
                by_step[step_of(path)] = path
    return [by_step[step] for step in sorted(by_step)]


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder."""
    step, replaced_step = FOLDER.fullmatch(folder.name).groups()
    return int(step or replaced_step)


def rewind(run: Run, checkpoint: Checkpoint, *, discard: bool = False) -> list[str]:
    """Make `checkpoint` the run's newest: drop the metrics and checkpoints that come after it.

    With `discard`, later whole checkpoints are removed. All other later ones are put aside, because the disk may have
    failed only for a moment. `best` becomes the best that the checkpoint's state names; if that is gone, the one that
    `best` named before; else the checkpoint itself.

    Returns:
        Warnings about checkpoints put aside and damaged rows of metrics dropped.
    """
    warnings = []
    _tidy(run)
    folders = {step_of(path): path for path in checkpoint_folders(run)}
    known, pointed = checkpoint.state.get("best_step"), _pointed(run, "best")
    steps = [step for step in folders if step == known] + [step for step in folders if _name(step) == pointed]
    best = next((step for step in steps if step <= checkpoint.step), checkpoint.step)
    write_whole(run.checkpoints_path / "last", checkpoint.name + "\n")
    write_whole(run.checkpoints_path / "best", _name(best) + "\n")
    for step in sorted(folders, reverse=True):  # newest first: a kill leaves a run that can continue
        if step > checkpoint.step and discard and _is_whole(folders[step]):
            _remove(folders[step])
        elif step > checkpoint.step:
            warnings.append(f"checkpoint of step {step:,} put aside as {_put_aside(folders[step])}")
    return warnings + run.forget_metrics_after(checkpoint.step, checkpoint.state.get("validated_step"))


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _beside(folder: Path, suffix: str) -> Path:
    """The hidden place beside a checkpoint's folder, such as .step-00001000.tmp."""
    return folder.with_name(f".{_name(step_of(folder))}.{suffix}")


def _pointed(run: Run, pointer: str) -> str | None:
    """The content of `last` or `best`, which may be damaged."""
    path = run.checkpoints_path / pointer
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return file.read(100).decode(errors="replace").strip()


def _manifest(files: dict[str, Any]) -> str:
    text = json.dumps(files, indent=2) + "\n"
    own = {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return json.dumps(files | {MANIFEST: own}, indent=2) + "\n"


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _digest(record: Any) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _read(folder: Path) -> Checkpoint:
    """The checkpoint in a folder. Raises UserError if it is damaged, or cannot be read now."""
    try:
        _verify(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror})") from error
    state = read_json(folder / STATE, MAX_JSON_BYTES)
    if not isinstance(state, dict) or type(state.get("step")) is not int or state["step"] != step_of(folder):
        raise UserError(f"{folder / STATE} is damaged: its step is not that of its folder")
    return Checkpoint(folder, state)


def _is_whole(folder: Path) -> bool:
    try:
        return bool(_read(folder))
    except UserError:
        return False


def _verify(folder: Path) -> None:
    """Raise UserError unless the folder holds the three files, a manifest that describes them, and nothing else.

    The paths that are read do not depend on any file's content, and sizes are compared before anything is hashed.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise UserError(f"{folder} is damaged: it is no folder")
    for name in (*FILES, MANIFEST):
        path = folder / name
        if not os.path.lexists(path):
            raise UserError(f"{path} is damaged: it is missing")
        if not stat.S_ISREG(path.lstat().st_mode):
            raise UserError(f"{path} is damaged: it is a link or no file at all")
    if extra := sorted(set(os.listdir(folder)) - {*FILES, MANIFEST}):
        raise UserError(f"{folder / extra[0]} is in the way: no checkpoint has such a file; remove it")
    for name, expected in _read_manifest(folder / MANIFEST).items():
        path = folder / name
        if path.stat().st_size != expected["bytes"] or _fingerprint(path) != expected:
            raise UserError(f"{path} is damaged: it does not match manifest.json")


def _read_manifest(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of the three files; UserError unless the manifest is, to the byte, the one written for them."""
    record = read_json(path, MAX_JSON_BYTES)
    files = {}
    for name in FILES if isinstance(record, dict) else ():
        match record.get(name):
            case {"bytes": int(size), "sha256": str(digest)}:
                files[name] = {"bytes": size, "sha256": digest}
    if len(files) < len(FILES) or path.read_bytes() != _manifest(files).encode():
        raise UserError(f"{path} is damaged: it does not match its own SHA-256")
    return files


def _tidy(run: Run) -> None:
    """Remove what a kill or a failure left, and restore a checkpoint whose replacement was not finished."""
    for path in run.checkpoints_path.glob(".*"):
        if path.suffix == ".tmp":
            _discard(path)
        elif FOLDER.fullmatch(path.name):  # .old
            target = path.with_name(_name(step_of(path)))
            _discard(path) if target.exists() else path.rename(target)


def _remove(folder: Path) -> None:
    """Remove a checkpoint; a part of it never stands under its name."""
    _discard(folder.rename(_beside(folder, "tmp")))


def _put_aside(folder: Path) -> Path:
    """Rename a checkpoint so that it is no longer looked at; return the new path."""
    aside = _beside(folder, "damaged")
    _discard(aside)  # an earlier one of the same step
    return folder.rename(aside)


def _discard(path: Path) -> None:
    """Remove a file or folder; what cannot be removed now is left to the next time."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _prune(run: Run, keep: int) -> None:
    best_name = _pointed(run, "best")
    for folder in checkpoint_folders(run)[:-keep]:
        if folder.name != best_name:
            _remove(folder)
