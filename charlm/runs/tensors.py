"""Tensors of models and optimizers: copied to the CPU, written, read and checked."""

import errno
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from charlm.config import UserError
from charlm.files import sync

AVERAGE = "average/"  # begins the names of averaged parameters, whose key is `mean`
MAX_HEADER_BYTES = 2**24  # names and shapes of more than 100,000 tensors
SPARE_BYTES = 2**20
"""Free space needed beyond the tensors, for headers and small files."""


@dataclass(frozen=True)
class Snapshot:
    """The content of a checkpoint, on the CPU."""

    model: dict[str, Tensor]
    """Parameters by name."""
    optimizer: dict[str, Tensor]
    """State of all optimizers by `parameter.key`, named as in `owned_parameters`."""
    state: dict[str, Any]
    """JSON-able; `state["step"]` is the number of completed optimizer steps."""


def take_snapshot(model: nn.Module, optimizers: Iterable[Optimizer], state: Mapping[str, Any]) -> Snapshot | None:
    """All state, on the first process; None on others, which must call it too."""
    tensors = {name: _whole(tensor) for name, tensor in model.state_dict().items()}
    optimizer_tensors = {
        f"{name}.{key}": _whole(torch.as_tensor(value))
        for optimizer in optimizers
        for name, parameter in owned_parameters(model, optimizer).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    return Snapshot(tensors, optimizer_tensors, dict(state)) if _is_first() else None


def owned_parameters(model: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """An optimizer's parameters by name, after the "state_prefix" of their group."""
    prefixes = {}
    for group in optimizer.param_groups:
        prefixes |= dict.fromkeys(group["params"], group.get("state_prefix", ""))
    named = model.named_parameters()
    return {prefixes[own] + name: own for name, own in named if own in prefixes}


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, moved to the device and shards of `like`."""
    tensor = tensor.to(like.device)
    if not _in_shards(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def check_space(folder: Path, tensors: Iterable[Tensor]) -> None:
    """Raise OSError unless the folder's disk has room for the tensors."""
    needed = SPARE_BYTES + sum(tensor.nbytes for tensor in tensors)
    free = shutil.disk_usage(folder).free
    if free < needed:
        sizes = f"{needed / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {sizes}", str(folder))


def save_tensors(tensors: dict[str, Tensor], path: Path, like: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a file with the access rights of the file `like`; OSError if that fails."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        if cause := re.search(r"\(os error (\d+)\)", str(error)):
            number = int(cause[1])
            raise OSError(number, os.strerror(number), str(path)) from error
        raise
    shutil.copymode(like, path)  # safetensors creates files that only their owner may read
    sync(path)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors by name, memory-mapped, and its metadata; UserError if it is damaged."""
    try:
        if not path.is_file():
            raise OSError("it is missing or not a regular file")
        with path.open("rb") as opened:
            if int.from_bytes(opened.read(8), "little") > MAX_HEADER_BYTES:
                raise OSError("header too large")
            # safetensors refuses a path that is not UTF-8
            place = path if str(path).isprintable() else f"/dev/fd/{opened.fileno()}"
            with safe_open(place, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return tensors, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from error


def check_tensors(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], owner: str) -> None:
    """Raise UserError if names, shapes or types are not those that `owner` needs."""
    for name in sorted(expected.keys() | found.keys()):
        kind, needed = _shown(found.get(name)), _shown(expected.get(name))
        if kind != needed:
            raise UserError(f"{path}: its tensor {name} is {kind}; in {owner} it is {needed}")


def _shown(tensor: Tensor | None) -> str:
    if tensor is None:
        return "missing"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _whole(tensor: Tensor) -> Tensor | None:
    """A copy on the CPU, gathered if it is sharded; None on other processes."""
    if _in_shards(tensor):
        tensor = tensor.full_tensor()
    return tensor.detach().to("cpu", copy=True).contiguous() if _is_first() else None


def _in_shards(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor, whose module takes a second to import


def _is_first() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
