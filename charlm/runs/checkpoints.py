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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from charlm.config import UserError
from charlm.runs.folder import Run, read_json, write_whole

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

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer state by `parameter.key`, on the CPU."""
        return load_file(self.path / OPTIMIZER)


def save_checkpoint(
    run: Run, model: nn.Module, optimizers: Iterable[Optimizer], state: Mapping[str, Any], *, best: bool, keep: int
) -> Checkpoint:
    """Write a checkpoint beside the others, point `last` (and `best`) at it, then prune to `keep` and the best.

    Args:
        state: JSON-able; `state["step"]` names the checkpoint.
    """
    target = run.checkpoints_path / f"step-{state['step']:08d}"
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        metadata = {"vocabulary": _digest(run.provenance()["corpus"].get("vocabulary"))}
        parameters = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(parameters, temporary / MODEL, metadata)
        save_file(optimizer_tensors(model, optimizers), temporary / OPTIMIZER)
        write_whole(temporary / STATE, json.dumps(dict(state), indent=2) + "\n")
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
    return Checkpoint(target, dict(state))


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


def optimizer_tensors(model: nn.Module, optimizers: Iterable[Optimizer]) -> dict[str, Tensor]:
    """The state of all optimizers by `parameter.key`. Parameters that never had a gradient have none."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}.{key}": torch.as_tensor(value).contiguous()
        for optimizer in optimizers
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def restore_optimizers(model: nn.Module, optimizers: Iterable[Optimizer], tensors: Mapping[str, Tensor]) -> None:
    """Put what `optimizer_tensors` gave back, on each parameter's device."""
    parameters = dict(model.named_parameters())
    owner = {
        parameter: optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for full_name, tensor in tensors.items():
        name, key = full_name.rsplit(".", 1)
        parameter = parameters[name]
        # Step counters stay on the CPU unless a fused optimizer reads them on the device.
        fused = owner[parameter].param_groups[0].get("fused")
        device = parameter.device if key != "step" or fused else tensor.device
        # SparseAdam counts its steps in a Python int, and computes otherwise from a tensor.
        value = tensor.item() if tensor.dtype == torch.int64 else tensor.to(device)
        owner[parameter].state[parameter][key] = value


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
