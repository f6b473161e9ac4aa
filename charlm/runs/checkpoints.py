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
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn
from torch.optim import Optimizer

from charlm.config import UserError
from charlm.files import read_json, remove, replacing, sha256_of, sync, write_whole
from charlm.runs.folder import Run
from charlm.runs.tensors import (
    Snapshot,
    check_space,
    check_tensors,
    load_tensors,
    owned_parameters,
    placed,
    save_tensors,
)

MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
FILES = (MODEL, OPTIMIZER, STATE)
STEP = r"step-(\d{8}|[1-9]\d{8,17})"
FOLDER = re.compile(rf"{STEP}|\.{STEP}\.old", re.ASCII)
MAX_JSON_BYTES = 2**20


class State(BaseModel, strict=True, extra="allow"):
    """Content of state.json, as far as it is used here."""

    step: int
    best_step: int | None = None
    best_bits: float | None = None
    validated_step: int | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    state: dict[str, Any]

    @property
    def name(self) -> str:
        """`step-00001000`, as in `last` and `best`."""
        return _name(self.step)

    @property
    def step(self) -> int:
        """Number of completed optimizer steps."""
        return self.state["step"]

    def tensors(self) -> dict[str, Tensor]:
        """The model's parameters by name, on the CPU."""
        return load_tensors(self.path / MODEL)[0]

    def restore(self, model: nn.Module, optimizers: Iterable[Optimizer] = ()) -> None:
        """Put parameters and optimizer state back, on each parameter's device and in its shards.

        Raises:
            UserError: names, shapes or types of tensors are not those of this model, or a parameter has some of its
                optimizer's state and not all.
        """
        tensors, expected = self.tensors(), model.state_dict()
        check_tensors(self.path / MODEL, tensors, expected, "the model of config.yaml and provenance.json")
        model.load_state_dict({name: placed(tensor, expected[name]) for name, tensor in tensors.items()})
        found, _ = load_tensors(self.path / OPTIMIZER)
        owners = {}
        for optimizer in optimizers:
            owned = owned_parameters(model, optimizer)
            held = [name.rpartition(".") for name in found if name.rpartition(".")[0] in owned]
            for name, key in product({name for name, _, _ in held}, {key for _, _, key in held}):
                owners[f"{name}.{key}"] = (optimizer, owned[name], key)
        expected = {name: parameter for name, (_, parameter, _) in owners.items()}
        expected |= {name: tensor for name, tensor in found.items() if name in owners and tensor.ndim == 0}
        check_tensors(self.path / OPTIMIZER, found, expected, "the optimizer of config.yaml")
        for name, (optimizer, parameter, key) in owners.items():
            value = found[name]
            if value.ndim > 0:
                value = placed(value, parameter)
            elif value.dtype == torch.int64:
                value = value.item()  # SparseAdam counts its steps in a Python int; a tensor would change its results
            elif optimizer.param_groups[0].get("fused"):
                value = value.to(parameter.device)  # other optimizers read their step counters on the CPU
            optimizer.state[parameter][key] = value


def save_checkpoint(run: Run, snapshot: Snapshot, *, best: bool, keep: int) -> Checkpoint:
    """Write a checkpoint beside the others, point `last` (and `best`) at it, then prune to `keep` and the best.

    Raises:
        OSError: the disk is full or fails. The older checkpoints are left as they were.
    """
    target = run.checkpoints_path / _name(snapshot.state["step"])
    _tidy(run)
    check_space(run.checkpoints_path, [*snapshot.model.values(), *snapshot.optimizer.values()])
    metadata = {"vocabulary": digest(run.provenance()["corpus"].get("vocabulary"))}
    try:
        with replacing(target) as temporary:
            temporary.mkdir()
            write_whole(temporary / STATE, json.dumps(snapshot.state, indent=2) + "\n")
            save_tensors(snapshot.model, temporary / MODEL, temporary / STATE, metadata)
            save_tensors(snapshot.optimizer, temporary / OPTIMIZER, temporary / STATE)
            write_whole(temporary / MANIFEST, _manifest({name: _fingerprint(temporary / name) for name in FILES}))
            if run.metrics_path.exists():
                sync(run.metrics_path)  # the history must survive whatever the checkpoint survives
            if target.exists():
                target.rename(_beside(target, "old"))
    finally:
        _tidy(run)
    for pointer in ("last", "best") if best else ("last",):
        write_whole(run.checkpoints_path / pointer, target.name + "\n")
    best_step = _pointed(run, "best")
    for step, folder in list(checkpoint_folders(run).items())[:-keep]:
        if step != best_step:
            _remove(folder)
    return Checkpoint(target, snapshot.state)


def find_checkpoint(run: Run, which: str | int = "best") -> Checkpoint:
    """The checkpoint named by `which`: best, last, or a step. It is verified.

    Raises:
        UserError: it does not exist, or one of its files is damaged; the message lists the whole ones.
    """
    step = _pointed(run, which) if which in ("best", "last") else _step_of(f"step-{which:>08}")
    folders = checkpoint_folders(run)
    if step not in folders:
        there = ", ".join(map(str, folders)) or "none yet"
        raise UserError(f"{run.path} has no checkpoint {which!r}; its steps are: {there}", "checkpoint")
    try:
        return _read(folders.pop(step))
    except UserError as error:
        whole = ", ".join(str(step) for step, path in folders.items() if _is_whole(path))
        raise UserError(f"{error}; whole checkpoints are at the steps: {whole or 'none'}") from None


def newest_whole_checkpoint(run: Run) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, if there is one, and a warning for each newer one that is damaged.

    `last` is ignored: a kill may have come before it was set, or it may be damaged.
    """
    warnings = []
    for step, path in reversed(checkpoint_folders(run).items()):
        try:
            return _read(path), warnings
        except UserError as error:
            warnings.append(f"checkpoint of step {step:,} skipped: {error}")
    return None, warnings


def checkpoint_folders(run: Run) -> dict[int, Path]:
    """The folders of the run's checkpoints by step, in order; the old one where a kill left two of a step."""
    folders = {}
    if run.checkpoints_path.is_dir():
        for path in sorted(run.checkpoints_path.iterdir()):  # .step-00000001.old before step-00000001
            if (step := _step_of(path.name)) is not None:
                folders[step] = path
    return dict(sorted(folders.items()))


def rewind(run: Run, checkpoint: Checkpoint, *, discard: bool = False) -> list[str]:
    """Make `checkpoint` the run's newest: drop the metrics and checkpoints that come after it.

    With `discard`, whole ones are removed; all others are put aside, because the disk may have failed only for a
    moment. `best` becomes the best that the checkpoint's state names, if it is there, else the one that `best` named
    before, else the checkpoint itself.

    Returns:
        Warnings about checkpoints put aside and damaged rows of metrics dropped.
    """
    warnings = []
    _tidy(run)
    folders = checkpoint_folders(run)
    candidates = (checkpoint.state.get("best_step"), _pointed(run, "best"))
    best = next((step for step in candidates if step in folders and step <= checkpoint.step), checkpoint.step)
    write_whole(run.checkpoints_path / "last", checkpoint.name + "\n")
    write_whole(run.checkpoints_path / "best", _name(best) + "\n")
    for step in sorted(folders, reverse=True):  # newest first: a kill leaves a run that can continue
        if step > checkpoint.step and discard and _is_whole(folders[step]):
            _remove(folders[step])
        elif step > checkpoint.step:
            aside = _beside(folders[step], "damaged")
            remove(aside)  # an earlier one of the same step
            warnings.append(f"checkpoint of step {step:,} put aside as {folders[step].rename(aside)}")
    return warnings + run.forget_metrics_after(checkpoint.step, checkpoint.state.get("validated_step"))


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _step_of(name: str) -> int | None:
    """The step of a folder, or None if no checkpoint's folder is called that."""
    match = FOLDER.fullmatch(name)
    return int(match[1] or match[2]) if match else None


def _beside(folder: Path, suffix: str) -> Path:
    """The hidden place beside a checkpoint's folder, such as .step-00001000.tmp."""
    return folder.with_name(f".{_name(_step_of(folder.name))}.{suffix}")


def _pointed(run: Run, pointer: str) -> int | None:
    """The step that `last` or `best` names; None if it is missing or damaged."""
    path = run.checkpoints_path / pointer
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return _step_of(file.read(100).decode(errors="replace").strip())


def _manifest(files: dict[str, dict[str, Any]]) -> str:
    text = json.dumps(files, indent=2) + "\n"
    own = {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return json.dumps(files | {MANIFEST: own}, indent=2) + "\n"


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def digest(record: Any) -> str:
    """SHA-256 of a JSON-able record."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _read(folder: Path) -> Checkpoint:
    """The checkpoint in a folder; UserError if it is damaged, or cannot be read now.

    No path depends on what a file says, and sizes are compared before anything is hashed.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise UserError(f"{folder} is damaged: it is no folder")
    paths = [folder / name for name in (*FILES, MANIFEST)]
    for path in paths:
        if path.is_symlink() or not path.is_file():
            raise UserError(f"{path} is damaged: it is missing, a link, or no file at all")
    try:
        if extra := sorted({*folder.iterdir()} - {*paths}):
            raise UserError(f"{extra[0]} is in the way: no checkpoint has such a file; remove it")
        manifest = read_json(folder / MANIFEST, MAX_JSON_BYTES, dict[str, dict[str, int | str]])
        files = {name: entry for name, entry in manifest.items() if name in FILES}
        if len(files) < len(FILES) or (folder / MANIFEST).read_bytes() != _manifest(files).encode():
            raise UserError(f"{folder / MANIFEST} is damaged: it does not match its own SHA-256")
        for name, entry in files.items():
            if (folder / name).stat().st_size != entry.get("bytes") or _fingerprint(folder / name) != entry:
                raise UserError(f"{folder / name} is damaged: it does not match manifest.json")
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror})") from error
    state = read_json(folder / STATE, MAX_JSON_BYTES, State)
    if state.step != _step_of(folder.name):
        raise UserError(f"{folder / STATE} is damaged: its step is not that of its folder")
    return Checkpoint(folder, state.model_dump(exclude_unset=True))


def _is_whole(folder: Path) -> bool:
    try:
        return bool(_read(folder))
    except UserError:
        return False


def _tidy(run: Run) -> None:
    """Remove what a kill or a failure left, and restore a checkpoint whose replacement was not finished."""
    for path in run.checkpoints_path.glob(".*"):
        if path.suffix == ".tmp":
            remove(path)
        elif (step := _step_of(path.name)) is not None:  # .old
            target = path.with_name(_name(step))
            remove(path) if target.exists() else path.rename(target)


def _remove(folder: Path) -> None:
    """Remove a checkpoint; a part of it never stands under its name."""
    remove(folder.rename(_beside(folder, "tmp")))
