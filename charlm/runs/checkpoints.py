"""Checkpoints: written whole or not at all, verified when read, and free of pickle.

RUN/checkpoints/
    last, best              text files, each with the name of a folder
    step-00001000/
        model.safetensors       parameters by name, and a digest of the vocabulary
        optimizer.safetensors   state by parameter and key, perhaps with a prefix (`layer4/`); averages (`average/`)
        state.json              step, best validation so far, gradient scaler
        manifest.json           size and SHA-256 of these three and of itself
    .*.tmp                  being written or removed; rubbish after a kill
    .step-*.old             whole, and being replaced by another of the same step
    .step-*.damaged         put aside when a run was resumed; ignored

Reading changes nothing on disk, so a run can be evaluated while it trains.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel
from torch import Tensor, nn
from torch.optim import Optimizer

from charlm.config import UserError
from charlm.files import read_json, remove, replacing, sha256_of, sync, write_whole
from charlm.model.rowwise import ROW_STATE
from charlm.runs.folder import Run
from charlm.runs.tensors import (
    AVERAGE,
    Snapshot,
    check_space,
    check_tensors,
    load_tensors,
    owned_parameters,
    placed,
    save_tensors,
)

MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
MANIFEST = "manifest.json"
FILES = (MODEL, OPTIMIZER, STATE)
STEP = r"step-(\d{8}|[1-9]\d{8,17})"
OWNER = "the model of config.yaml and provenance.json"
FOLDER = re.compile(rf"{STEP}|\.{STEP}\.old", re.ASCII)
MAX_JSON_BYTES = 2**20


class State(BaseModel, strict=True, extra="allow"):
    """Content of state.json that is used here."""

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

    def averages(self) -> dict[str, Tensor]:
        """The averaged parameters by name; none before the first entered."""
        found, _ = load_tensors(self.path / OPTIMIZER)
        names = map(re.compile(rf"{AVERAGE}(.*)\.mean").fullmatch, found)
        return {name[1]: found[name[0]] for name in names if name}

    def restore(self, model: nn.Module, optimizers: Iterable[Optimizer] = ()) -> None:
        """Put back parameters and optimizer state; UserError if tensors do not fit."""
        tensors, _ = load_tensors(self.path / MODEL)
        expected = model.state_dict()
        check_tensors(self.path / MODEL, tensors, expected, OWNER)
        whole = {name: placed(tensors[name], like) for name, like in expected.items()}
        model.load_state_dict(whole)
        self._restore_optimizers(model, optimizers)

    def _restore_optimizers(self, model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        found, _ = load_tensors(self.path / OPTIMIZER)
        split_names = [name.rpartition(".") for name in found]
        owners = {}
        for optimizer in optimizers:
            owned = owned_parameters(model, optimizer)
            with_state = {name for name, _, _ in split_names if name in owned}
            keys = sorted({key for name, _, key in split_names if name in owned})  # processes gather in this order
            for name, key in product(with_state, keys):
                owners[f"{name}.{key}"] = (optimizer, owned[name], key)
        expected = {n: own[:, :1] if key == ROW_STATE and own.ndim == 2 else own for n, (_, own, key) in owners.items()}
        counters = {name for name, tensor in found.items() if tensor.ndim == 0}
        expected |= {name: found[name] for name in counters & owners.keys()}
        check_tensors(self.path / OPTIMIZER, found, expected, "the optimizer of config.yaml")
        for name, (optimizer, parameter, key) in owners.items():
            value = found[name]
            if value.ndim > 0:
                value = placed(value, parameter)
            elif optimizer.param_groups[0].get("fused"):
                value = value.to(parameter.device)  # others keep step counters on the CPU
            optimizer.state[parameter][key] = value


def save_checkpoint(run: Run, snapshot: Snapshot, *, best: bool, keep: int) -> Checkpoint:
    """Write a checkpoint as `last` (and `best`); keep the newest `keep` and the best.

    Raises OSError if the disk fails; older checkpoints are then unchanged.
    """
    target = run.checkpoints_path / _name(snapshot.state["step"])
    _tidy(run)
    tensors = [*snapshot.model.values(), *snapshot.optimizer.values()]
    check_space(run.checkpoints_path, tensors)
    metadata = {"vocabulary": digest(run.provenance()["corpus"].get("vocabulary"))}
    try:
        with replacing(target) as temporary:
            temporary.mkdir()
            write_whole(temporary / STATE, json.dumps(snapshot.state, indent=2) + "\n")
            save_tensors(snapshot.model, temporary / MODEL, temporary / STATE, metadata)
            save_tensors(snapshot.optimizer, temporary / OPTIMIZER, temporary / STATE)
            fingerprints = {name: _fingerprint(temporary / name) for name in FILES}
            write_whole(temporary / MANIFEST, _manifest(fingerprints))
            if run.metrics_path.exists():
                sync(run.metrics_path)  # must survive whatever the checkpoint survives
            if target.exists():
                target.rename(_beside(target, "old"))
    finally:
        _tidy(run)
    for pointer in ("last", "best") if best else ("last",):
        write_whole(run.checkpoints_path / pointer, target.name + "\n")
    best_step = _pointed(run, "best")
    oldest_first = list(checkpoint_folders(run).items())
    for step, folder in oldest_first[:-keep]:
        if step != best_step:
            _remove(folder)
    return Checkpoint(target, snapshot.state)


def find_checkpoint(run: Run, which: str | int = "best") -> Checkpoint:
    """The checkpoint `which`: best, last, or a step; UserError if it is missing or damaged."""
    step = _step_of(f"step-{which:>08}")
    if which in ("best", "last"):
        step = _pointed(run, which)
    folders = checkpoint_folders(run)
    if step not in folders:
        steps = ", ".join(map(str, folders)) or "none yet"
        problem = f"{run.path} has no checkpoint {which!r}"
        raise UserError(f"{problem}; its steps are: {steps}", "checkpoint")
    try:
        return _read(folders.pop(step))
    except UserError as error:
        whole = ", ".join(str(step) for step, path in folders.items() if _is_whole(path))
        way_out = f"whole checkpoints are at the steps: {whole or 'none'}"
        raise UserError(f"{error}; {way_out}") from None


def newest_whole_checkpoint(run: Run) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, and warnings of damaged newer ones."""
    warnings = []
    for step, path in reversed(checkpoint_folders(run).items()):
        try:
            return _read(path), warnings
        except UserError as error:
            warnings.append(f"checkpoint of step {step:,} skipped: {error}")
    return None, warnings


def checkpoint_folders(run: Run) -> dict[int, Path]:
    """The run's checkpoints by step, in order."""
    folders = {}
    if run.checkpoints_path.is_dir():
        for path in sorted(run.checkpoints_path.iterdir()):  # `.old` ones first
            if (step := _step_of(path.name)) is not None:
                folders[step] = path
    return dict(sorted(folders.items()))


def rewind(run: Run, checkpoint: Checkpoint, *, discard: bool = False) -> list[str]:
    """Make `checkpoint` the run's newest: drop later metrics and checkpoints; return warnings.

    With `discard`, whole checkpoints are removed; others are put aside. `best` will name the best step of
    the state if it exists, else the same as before, else this one.
    """
    warnings = []
    _tidy(run)
    folders = checkpoint_folders(run)
    candidates = (checkpoint.state.get("best_step"), _pointed(run, "best"))
    existing = (step for step in candidates if step in folders and step <= checkpoint.step)
    best = next(existing, checkpoint.step)
    write_whole(run.checkpoints_path / "last", checkpoint.name + "\n")
    write_whole(run.checkpoints_path / "best", _name(best) + "\n")
    for step in sorted(folders, reverse=True):  # a kill leaves a run that can continue
        if step > checkpoint.step and discard and _is_whole(folders[step]):
            _remove(folders[step])
        elif step > checkpoint.step:
            aside = _beside(folders[step], "damaged")
            remove(aside)  # an earlier one of the same step
            folders[step].rename(aside)
            warnings.append(f"checkpoint of step {step:,} put aside as {aside}")
    validated_step = checkpoint.state.get("validated_step")
    return warnings + run.forget_metrics_after(checkpoint.step, validated_step)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _step_of(name: str) -> int | None:
    match = FOLDER.fullmatch(name)
    return int(match[1] or match[2]) if match else None


def _beside(folder: Path, suffix: str) -> Path:
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
    """The checkpoint in a folder; UserError if it is damaged."""
    if folder.is_symlink() or not folder.is_dir():
        raise UserError(f"{folder} is damaged: it is not a folder")
    try:
        paths = {folder / name for name in (*FILES, MANIFEST)}
        for path in sorted(paths | {*folder.iterdir()}):
            if path not in paths:
                raise UserError(f"{path}: no checkpoint has such a file; remove it")
            if path.is_symlink() or not path.is_file():
                problem = "it is missing, a link, or not a regular file"
                raise UserError(f"{path} is damaged: {problem}")
        manifest = read_json(folder / MANIFEST, MAX_JSON_BYTES, dict[str, dict[str, int | str]])
        files = {name: entry for name, entry in manifest.items() if name in FILES}
        if len(files) < len(FILES) or (folder / MANIFEST).read_text() != _manifest(files):
            raise UserError(f"{folder / MANIFEST} is damaged: its own SHA-256 does not match")
        unlike = f"is damaged: it does not match {MANIFEST}"
        for name, entry in files.items():
            if (folder / name).stat().st_size != entry.get("bytes"):
                raise UserError(f"{folder / name} {unlike}")
        if (size := sum(entry["bytes"] for entry in files.values())) > 4 * psutil.virtual_memory().total:
            raise UserError(f"{folder} has {size:,} bytes, more than four times this machine's memory")
        for name in (MODEL, OPTIMIZER):
            load_tensors(folder / name)  # the headers, too, say how long the files are
        for name, entry in files.items():
            if _fingerprint(folder / name) != entry:
                raise UserError(f"{folder / name} {unlike}")
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
    """Remove what a kill left; put back a checkpoint that was not replaced."""
    for path in run.checkpoints_path.glob(".*"):
        if path.suffix == ".tmp":
            remove(path)
        elif (step := _step_of(path.name)) is not None:  # .old
            target = path.with_name(_name(step))
            if target.exists():
                remove(path)
            else:
                path.rename(target)


def _remove(folder: Path) -> None:
    """Remove a checkpoint, so that its name never stands for a part of it."""
    remove(folder.rename(_beside(folder, "tmp")))
