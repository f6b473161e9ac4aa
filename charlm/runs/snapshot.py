"""A copy of all that a run has learned at one step: tensors by name, on the CPU."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class Snapshot:
    """The content of a checkpoint."""

    model: dict[str, Tensor]
    """Parameters by name."""
    optimizer: dict[str, Tensor]
    """The state of all optimizers by `parameter.key`, with a prefix where several optimizers update the same parameters
    for different losses. Parameters that never received a gradient have no state."""
    state: dict[str, Any]
    """JSON-able; `state["step"]` is the number of completed optimizer steps."""


def take_snapshot(model: nn.Module, optimizers: Iterable[Optimizer], state: Mapping[str, Any]) -> Snapshot | None:
    """Copy parameters and optimizer state to the CPU; None on every process but the first.

    Every process must call it, because shards are gathered from all of them.
    """
    tensors = {name: _whole(tensor) for name, tensor in model.state_dict().items()}
    optimizer_tensors = {
        f"{name}.{key}": _whole(torch.as_tensor(value))
        for optimizer in optimizers
        for name, parameter in owned_parameters(model, optimizer).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    return Snapshot(tensors, optimizer_tensors, dict(state)) if _is_first() else None


def restore(snapshot: Snapshot, model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
    """Put parameters and optimizer state back, on each parameter's device and in its shards."""
    current = model.state_dict()
    model.load_state_dict({name: _placed(tensor, current.get(name)) for name, tensor in snapshot.model.items()})
    owned = {
        name: (optimizer, parameter)
        for optimizer in optimizers
        for name, parameter in owned_parameters(model, optimizer).items()
    }
    for full_name, tensor in snapshot.optimizer.items():
        name, key = full_name.rsplit(".", 1)
        optimizer, parameter = owned[name]
        if tensor.ndim > 0:
            value = _placed(tensor, parameter)
        elif tensor.dtype == torch.int64:
            value = tensor.item()  # SparseAdam counts its steps in a Python int, and a tensor would change its results
        else:
            # A fused optimizer reads its step counters on the device, all others on the CPU.
            value = tensor.to(parameter.device) if optimizer.param_groups[0].get("fused") else tensor
        optimizer.state[parameter][key] = value


def owned_parameters(model: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """The parameters of an optimizer by the names used for their state in a snapshot.

    That is the model's name for each, after the "state_prefix" of its parameter group if it has one.
    """
    prefixes = {
        parameter: group.get("state_prefix", "") for group in optimizer.param_groups for parameter in group["params"]
    }
    return {
        prefixes[parameter] + name: parameter for name, parameter in model.named_parameters() if parameter in prefixes
    }


def _whole(tensor: Tensor) -> Tensor | None:
    """A copy on the CPU, gathered if it is sharded; None on every process but the first."""
    if _in_shards(tensor):
        tensor = tensor.full_tensor()
    return tensor.detach().to("cpu", copy=True).contiguous() if _is_first() else None


def _placed(tensor: Tensor, like: Tensor | None) -> Tensor:
    """A whole tensor, which every process has, put on the device of `like` and sharded as `like` is."""
    if like is None:
        return tensor
    tensor = tensor.to(like.device)
    if not _in_shards(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def _in_shards(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor, whose module takes a second to import


def _is_first() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
