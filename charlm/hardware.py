"""The machine's accelerator: which one it is, its memory, and what it lacks, found by trying."""

from functools import cache

import psutil
import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def default_device() -> torch.device:
    """The accelerator that accelerate chooses here, or the CPU."""
    from accelerate import PartialState  # slow, and whoever names a device does not need it

    # An instance would join a launcher's process group; the property needs none.
    return PartialState.default_device.fget(None)


def device_memory(device: torch.device) -> int:
    """Bytes of memory of a device, or of the machine, which CPUs and Apple's GPUs share."""
    module = torch.get_device_module(device)
    return module.mem_get_info(device)[1] if hasattr(module, "mem_get_info") else psutil.virtual_memory().total


def has_pinned_memory(device: torch.device) -> bool:
    """Whether copies from pinned memory need not wait for the device; torch's DataLoader decides alike."""
    return device.type not in ("cpu", "mps")


def in_float64(tensor: Tensor) -> Tensor:
    """`tensor` in float64; on the CPU if its device has no such type, as Apple's GPUs and some of Intel's."""
    try:
        return tensor.double()
    except (RuntimeError, TypeError):
        return tensor.cpu().double()


@cache
def has_fused(optimizer: type[Optimizer], device: torch.device) -> bool:
    """Whether an optimizer has a fused kernel here, and it makes no step if `found_inf` is 1."""
    parameter = nn.Parameter(torch.ones(1, device=device))
    parameter.grad = torch.ones_like(parameter)
    trial = optimizer([parameter], lr=1.0, fused=True)
    trial.grad_scale = trial.found_inf = torch.ones((), device=device)
    try:
        trial.step()
    except RuntimeError:
        return False
    return parameter.item() == 1.0
