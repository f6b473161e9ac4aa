"""The update of one optimizer step, and when it must not happen: numbers that are not finite, a loss that spikes.

Skipping leaves parameters and optimizer state as they were, on every process alike. It is decided where the gradients
are; the host learns of it when it reads the losses, so that a device is not waited for in between. A step of several
updates makes all of them or none.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer, SparseAdam

from charlm.config import TrainConfig
from charlm.objective.objective import LossReport
from charlm.objective.routes.routing import Update

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

    def __add__(self, other: "Losses") -> "Losses":
        """The losses of two passes, which have no term in common."""
        total = self.row[:1] + other.row[:1]
        return Losses(self.names + other.names, torch.cat([total, self.row[1:], other.row[1:]]))


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
        optimizers: Iterable[Optimizer],
        accepted_losses: Sequence[float],
        adapt: Callable[[Mapping[str, Tensor], Tensor], None] | None = None,
    ):
        """
        Args:
            optimizers: all that updates will name.
            accepted_losses: what `accepted_losses()` said at a checkpoint.
            adapt: gets after each step the global mean of each active term's loss, by name, and whether the step was
                skipped, a scalar on the device.
        """
        self.train, self.accelerator, self.adapt = train, accelerator, adapt
        padding = [float("nan")] * HISTORY
        self.history = torch.tensor([*padding, *accepted_losses][-HISTORY:], device=accelerator.device)
        self.unread: list[tuple[int, Losses, Tensor, Tensor]] = []
        # SparseAdam counts its steps on the host.
        sparse = any(isinstance(optimizer, SparseAdam) for optimizer in optimizers)
        self.decides_on_host = sparse or accelerator.device.type == "cpu"
        self.undo = Undo()
        self.passes: list[tuple[Losses, Tensor, Tensor]] = []
        """Of the step that is being made: the losses of each pass, their total, and whether all was finite."""

    def apply(self, step: int, losses: Losses, updates: Sequence[Update], last: bool = True) -> None:
        """Clip the gradient of each update and move every parameter that has one, or skip all of it; then forget the
        gradients.

        `last`: no other pass of the step follows. If one does, these updates are taken back should it not be finite.
        """
        norms = [self._clipped_norm(update) for update in updates]
        total = self.accelerator.reduce(losses.row[0], reduction="sum")
        finite = torch.isfinite(torch.stack([total, *norms])).all()
        self.passes.append((losses, total, finite))
        if last:
            self._finish(step, updates)
            return
        for update in updates:
            self._make(update, ~finite, keep=True)

    def _finish(self, step: int, updates: Sequence[Update]) -> None:
        losses, total, finite = self.passes[0]
        for more, of_more, also_finite in self.passes[1:]:
            losses, total, finite = losses + more, total + of_more, finite & also_finite
        spikes = self._spikes(total) if self.train.spike_threshold else torch.zeros_like(finite)
        skip = ~finite | spikes
        for update in updates:
            self._make(update, skip)
        self.undo.where(skip, self.decides_on_host)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        if self.train.spike_threshold:
            self.history = torch.where(skip, self.history, torch.cat([self.history[1:], total[None]]))
        if self.adapt is not None:
            means = self.accelerator.reduce(losses.row[1:], reduction="sum")
            self.adapt(dict(zip(losses.names, means, strict=True)), skip)
        self.unread.append((step + 1, losses, skip, spikes))
        self.passes = []

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

    def _clipped_norm(self, update: Update) -> Tensor:
        """The norm of the update's whole gradient before clipping; sparse gradients count, but are not clipped."""
        update.install()
        if self.accelerator.scaler is not None:
            for optimizer in update.step_sizes:
                self.accelerator.scaler.unscale_(optimizer)
        sparse = [gradient._values() for gradient in update.gradients.values() if gradient.is_sparse]
        dense = {parameter: gradient for parameter, gradient in update.gradients.items() if not gradient.is_sparse}
        norm = nn.utils.get_total_norm(list(dense.values()))
        if self.train.clip_norm:
            nn.utils.clip_grads_with_norm_(list(dense), self.train.clip_norm, norm)
        update.clear()
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return torch.stack([norm, *(values.norm() for values in sparse)]).norm()

    def _make(self, update: Update, skip: Tensor, keep: bool = False) -> None:
        update.install()
        for optimizer in update.step_sizes:
            if keep:
                self.undo.keep(optimizer)
            if not self.decides_on_host:
                step_unless(skip, optimizer)
            elif not skip:
                optimizer.step()
        update.clear()

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


class Undo:
    """What the updates of a step have moved, as it was before the first of them."""

    def __init__(self):
        self.before: dict[nn.Parameter, tuple[Optimizer, Tensor, dict[str, Any]]] = {}

    def keep(self, optimizer: Optimizer) -> None:
        """Copy what the optimizer is about to move, unless that was done."""
        for parameter in _moving(optimizer):
            if parameter not in self.before:
                state = {key: _copy(value) for key, value in optimizer.state.get(parameter, {}).items()}
                self.before[parameter] = optimizer, parameter.detach().clone(), state

    @torch.no_grad()
    def where(self, skip: Tensor, on_host: bool) -> None:
        """Put all of it back if `skip` (bool, a scalar on the device) holds, and forget it."""
        for parameter, (optimizer, value, state) in self.before.items():
            if not on_host:
                parameter.copy_(torch.where(skip, value, parameter))
                for key, tensor in optimizer.state[parameter].items():
                    tensor.copy_(torch.where(skip, state.get(key, torch.zeros_like(tensor)), tensor))
            elif skip:
                parameter.copy_(value)
                optimizer.state.pop(parameter, None)
                if state:
                    optimizer.state[parameter] = state
        self.before = {}


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _moving(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _tensors(optimizer: Optimizer) -> list[Tensor]:
    return _moving(optimizer) + [value for state in optimizer.state.values() for value in state.values()]


def _why(total: float, parts: dict[str, float], spikes: bool) -> str:
    for name, loss in parts.items():
        if not math.isfinite(loss):
            return f"the loss of {name} is {loss}"
    return f"a loss of {total:.3f} spikes" if spikes else "the gradient is not finite"
