"""What a run has learned at one step, apart from the modules that go on learning: tensors by name, on the CPU."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds."""

    model: dict[str, Tensor]
    """Parameters by name."""
    optimizer: dict[str, Tensor]
    """The state of all optimizers by `parameter.key`. Parameters that never had a gradient have none."""
    state: dict[str, Any]
    """JSON-able; `state["step"]` is the number of completed optimizer steps."""


def take_snapshot(model: nn.Module, optimizers: Iterable[Optimizer], state: Mapping[str, Any]) -> Snapshot:
    """Copies of everything, which further steps don't touch."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return Snapshot(
        {name: _copied(tensor) for name, tensor in model.state_dict().items()},
        {
            f"{names[parameter]}.{key}": _copied(torch.as_tensor(value))
            for optimizer in optimizers
            for parameter, values in optimizer.state.items()
            for key, value in values.items()
        },
        dict(state),
    )


def restore(snapshot: Snapshot, model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
    """Put parameters and optimizer state back, on each parameter's device."""
    model.load_state_dict(snapshot.model)
    parameters = dict(model.named_parameters())
    owner = {
        parameter: optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for full_name, tensor in snapshot.optimizer.items():
        name, key = full_name.rsplit(".", 1)
        parameter = parameters[name]
        # Step counters stay on the CPU unless a fused optimizer reads them on the device.
        fused = owner[parameter].param_groups[0].get("fused")
        device = parameter.device if key != "step" or fused else tensor.device
        # SparseAdam counts its steps in a Python int, and computes otherwise from a tensor.
        value = tensor.item() if tensor.dtype == torch.int64 else tensor.to(device)
        owner[parameter].state[parameter][key] = value


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
