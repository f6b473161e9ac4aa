"""The update of one optimizer step, and when it must not happen: numbers that are not finite, a loss that spikes.

Skipping leaves parameters and optimizer state as they were, on every process alike. It is decided where the gradients
are; the host learns of it when it reads the losses, so that a device is not waited for in between.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer, SparseAdam

from charlm.config import TrainConfig
from charlm.objective.objective import LossReport

HISTORY, ENOUGH = 128, 32
"""Accepted losses that a leap is judged by: at most, and at least."""
DEVIATION = 1.4826
"""Standard deviations of a normal distribution in its median absolute deviation."""


@dataclass(frozen=True)
class Losses:
    """What one optimizer step's windows cost, in nats per symbol: this process's share, to be summed over all."""

    names: tuple[str, ...]
    """Of the active terms."""
    row: Tensor
    """The total, then each active term's own loss."""


def weighted_losses(reports: Sequence[tuple[float, LossReport]]) -> Losses:
    """The losses of micro-batches, each with its share of the global batch."""
    rows = [share * torch.stack([report.total.detach(), *report.parts.values()]) for share, report in reports]
    return Losses(tuple(reports[0][1].parts), torch.stack(rows).sum(dim=0))


@dataclass(frozen=True)
class StepReport:
    """A step as the host reads it: global means."""

    step: int
    """Completed optimizer steps with this one."""
    loss: float
    parts: dict[str, float]
    skipped: str | None
    """Why the update was skipped; None if it was made."""


class Updates:
    """Makes or skips the updates of a run, and remembers what the host has not read yet."""

    def __init__(
        self,
        train: TrainConfig,
        accelerator: Accelerator,
        optimizers: Sequence[Optimizer],
        parameters: Iterable[nn.Parameter],
        accepted_losses: Sequence[float],
    ):
        """`parameters`: those that the optimizers own; `accepted_losses`: what `accepted_losses()` said at a
        checkpoint."""
        self.train, self.accelerator, self.optimizers = train, accelerator, optimizers
        self.parameters = list(parameters)
        padding = [float("nan")] * HISTORY
        self.history = torch.tensor([*padding, *accepted_losses][-HISTORY:], device=accelerator.device)
        self.unread: list[tuple[int, Losses, Tensor, Tensor]] = []
        # SparseAdam counts its steps on the host.
        sparse = any(isinstance(getattr(optimizer, "optimizer", optimizer), SparseAdam) for optimizer in optimizers)
        self.decides_on_host = sparse or accelerator.device.type == "cpu"

    def apply(self, step: int, losses: Losses) -> None:
        """Clip the gradients, update every parameter that has one, or skip all of it; then forget the gradients."""
        total = self.accelerator.reduce(losses.row[0], reduction="sum")
        finite = torch.isfinite(total) & torch.isfinite(self._clipped_norm())
        spikes = self._spikes(total) if self.train.spike_threshold else torch.zeros_like(finite)
        skip = ~finite | spikes
        for optimizer in self.optimizers:
            if not self.decides_on_host:
                step_unless(skip, optimizer.optimizer)
            elif not skip:
                optimizer.optimizer.step()
            optimizer.zero_grad()
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        if self.train.spike_threshold:
            self.history = torch.where(skip, self.history, torch.cat([self.history[1:], total[None]]))
        self.unread.append((step + 1, losses, skip, spikes))

    def read(self) -> list[StepReport]:
        """The last step that was not skipped, and all that were, since the last reading. Waits for the device."""
        flags = [torch.stack([skip, spikes]) for _, _, skip, spikes in self.unread]
        flags = torch.stack(flags).tolist() if flags else []
        made = [index for index, (skip, _) in enumerate(flags) if not skip]
        reports = []
        for index, (step, losses, _, _) in enumerate(self.unread):
            skip, spikes = flags[index]
            if skip or index == made[-1]:
                total, *parts = self.accelerator.reduce(losses.row, reduction="sum").tolist()
                named = dict(zip(losses.names, parts, strict=True))
                reports.append(StepReport(step, total, named, _why(total, named, spikes) if skip else None))
        self.unread.clear()
        return reports

    def accepted_losses(self) -> list[float]:
        """What a resumed run needs to judge spikes alike."""
        return self.history[~self.history.isnan()].tolist()

    def _clipped_norm(self) -> Tensor:
        """The norm of the whole gradient before clipping; sparse gradients count, but are not clipped."""
        if self.accelerator.scaler is not None:
            for optimizer in self.optimizers:
                self.accelerator.scaler.unscale_(optimizer.optimizer)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        sparse = [gradient._values() for gradient in gradients if gradient.is_sparse]
        norm = nn.utils.get_total_norm([gradient for gradient in gradients if not gradient.is_sparse])
        if self.train.clip_norm:
            dense = [p for p in self.parameters if p.grad is not None and not p.grad.is_sparse]
            nn.utils.clip_grads_with_norm_(dense, self.train.clip_norm, norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return torch.stack([norm, *(values.norm() for values in sparse)]).norm()

    def _spikes(self, total: Tensor) -> Tensor:
        """Whether a loss lies beyond the robust threshold."""
        median = self.history.nanmedian()
        deviation = (self.history - median).abs().nanmedian() * DEVIATION
        limit = median + self.train.spike_threshold * deviation
        return (total > limit) & ((~self.history.isnan()).sum() >= ENOUGH)


def step_unless(skip: Tensor, optimizer: Optimizer) -> None:
    """Step, but leave all as it is where `skip` (bool, a scalar on the device) holds, and don't wait for the device."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):  # torch's own way, of its fused optimizers
        optimizer.grad_scale, optimizer.found_inf = torch.ones((), device=skip.device), skip.float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
        return
    with torch.no_grad():
        before = {tensor: tensor.clone() for tensor in _tensors(optimizer)}
        optimizer.step()
        for tensor in _tensors(optimizer):
            # State that this very step began would have begun at zero.
            tensor.copy_(torch.where(skip, before.get(tensor, torch.zeros_like(tensor)), tensor))


def _tensors(optimizer: Optimizer) -> list[Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return parameters + [value for state in optimizer.state.values() for value in state.values()]


def _why(total: float, parts: dict[str, float], spikes: bool) -> str:
    for name, loss in parts.items():
        if not math.isfinite(loss):
            return f"the loss of {name} is {loss}"
    return f"a loss of {total:.3f} spikes" if spikes else "the gradient is not finite"
