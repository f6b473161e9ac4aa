"""What a run has learned at one step, apart from the modules that go on learning: tensors by name, on the CPU."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds."""

    model: dict[str, Tensor]
    """Parameters by name."""
    optimizer: dict[str, Tensor]
    """The state of all optimizers by `parameter.key`, behind a prefix where several learn the same parameters from
    different losses. Parameters that never had a gradient have none."""
    state: dict[str, Any]
    """JSON-able; `state["step"]` is the number of completed optimizer steps."""


def take_snapshot(model: nn.Module, optimizers: Iterable[Optimizer], state: Mapping[str, Any]) -> Snapshot | None:
    """Copies of everything, which further steps don't touch; None on every process but the first.

    Every process calls it: what lies in shards is gathered from all of them.
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
            value = tensor.item()  # SparseAdam counts its steps in a Python int, and computes otherwise from a tensor.
        else:
            # Step counters stay on the CPU unless a fused optimizer reads them on the device.
            value = tensor.to(parameter.device) if optimizer.param_groups[0].get("fused") else tensor
        optimizer.state[parameter][key] = value


def owned_parameters(model: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """The parameters of an optimizer, by the names that their state has in a snapshot.

    That is the model's name for them, behind what the optimizer's groups have as "state_prefix".
    """
    prefixes = {
        parameter: group.get("state_prefix", "") for group in optimizer.param_groups for parameter in group["params"]
    }
    return {
        prefixes[parameter] + name: parameter for name, parameter in model.named_parameters() if parameter in prefixes
    }


def _whole(tensor: Tensor) -> Tensor | None:
    """A copy on the CPU, gathered where it lies in shards; None on every process but the first."""
    if _in_shards(tensor):
        tensor = tensor.full_tensor()
    return tensor.detach().to("cpu", copy=True).contiguous() if _is_first() else None


def _placed(tensor: Tensor, like: Tensor | None) -> Tensor:
    """On the device and in the shards of `like`, each process taking its own from the whole that it has."""
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
