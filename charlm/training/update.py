"""Makes the update of an optimizer step, or skips it: if loss or gradient are not finite, or the loss spikes.

A skipped update leaves parameters and optimizer state as they were, on all processes alike. The decision is made on the
device; the host learns of it when it reads the losses, so it never waits for the device in between. A step of several
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
from charlm.objective.routes import Update
from charlm.training.gradients import Losses

HISTORY, ENOUGH = 128, 32
"""Most and fewest accepted losses that a spike is judged by."""
DEVIATION = 1.4826
"""Ratio of the standard deviation of a normal distribution to its median absolute deviation."""


@dataclass(frozen=True)
class StepReport:
    """Result of a step as the host reads it; losses are global means."""

    step: int
    """Number of completed optimizer steps, this one included."""
    loss: float
    parts: dict[str, float]
    skipped: str | None
    """Reason why the update was skipped; None if it was made."""


class Updates:
    """Makes or skips the updates of a run, and keeps the losses that the host has not read yet."""

    def __init__(
        self,
        train: TrainConfig,
        accelerator: Accelerator,
        parameters: Iterable[nn.Parameter],
        optimizers: Iterable[Optimizer],
        accepted_losses: Sequence[float],
        adapt: Callable[[Mapping[str, Tensor], Tensor], None] | None = None,
    ):
        """
        Args:
            parameters: all that are trained.
            optimizers: all that updates will name.
            accepted_losses: result of `accepted_losses()` at a checkpoint.
            adapt: called after each step with the global mean loss of each active term, by name, and whether the step
                was skipped, a scalar on the device.
        """
        self.train, self.accelerator, self.adapt = train, accelerator, adapt
        self.parameters = list(parameters)
        padding = [float("nan")] * HISTORY
        self.history = torch.tensor([*padding, *accepted_losses][-HISTORY:], device=accelerator.device)
        self.unread: list[tuple[int, Losses, Tensor, Tensor]] = []
        # SparseAdam counts its steps on the host.
        sparse = any(isinstance(optimizer, SparseAdam) for optimizer in optimizers)
        self.decides_on_host = sparse or accelerator.device.type == "cpu"
        self.undo = Undo()
        self.pending: tuple[Losses, Tensor, Tensor] | None = None
        """Losses, total and whether all was finite, over the passes of an unfinished step."""

    def apply(self, step: int, losses: Losses, updates: Sequence[Update], last: bool = True) -> None:
        """Clip the gradients of each update and make it, or skip all updates; then remove the gradients.

        Args:
            losses: of the pass that the updates follow.
            last: no other pass of the step follows. Earlier ones are undone if a later one is not finite.
        """
        norms = [self._clip(update) for update in updates]
        total = self.accelerator.reduce(losses.row[0], reduction="sum")
        finite = torch.isfinite(torch.stack([total, *norms])).all()
        if self.pending is not None:
            earlier, sum_of_earlier, earlier_finite = self.pending
            losses, total, finite = earlier + losses, sum_of_earlier + total, earlier_finite & finite
        skip = ~finite
        if last and self.train.spike_threshold:
            spikes = self._spikes(total)
            skip = skip | spikes
        else:
            spikes = torch.zeros_like(skip)
        for update in updates:
            with update.in_place():
                for optimizer in update.step_sizes:
                    if not last:
                        self.undo.keep(optimizer)
                    self._step(optimizer, skip)
        for parameter in self.parameters:
            parameter.grad = None
        if last:
            self.undo.restore_if(skip, self.decides_on_host)
            self._record(step, losses, total, skip, spikes)
        self.pending = None if last else (losses, total, finite)

    def _step(self, optimizer: Optimizer, skip: Tensor) -> None:
        if not self.decides_on_host:
            step_unless(skip, optimizer)
        elif not skip:
            optimizer.step()

    def _record(self, step: int, losses: Losses, total: Tensor, skip: Tensor, spikes: Tensor) -> None:
        """Let everything that learns from a step's losses know them."""
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        if self.train.spike_threshold:
            self.history = torch.where(skip, self.history, torch.cat([self.history[1:], total[None]]))
        if self.adapt is not None:
            means = self.accelerator.reduce(losses.row[1:], reduction="sum")
            self.adapt(dict(zip(losses.names, means, strict=True)), skip)
        self.unread.append((step + 1, losses, skip, spikes))

    def read(self) -> list[StepReport]:
        """Reports of the newest step made and of all skipped ones since the last call. Waits for the device."""
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
        """Accepted losses, which a resumed run needs to judge spikes alike."""
        return self.history[~self.history.isnan()].tolist()

    def _clip(self, update: Update) -> Tensor:
        """Clip dense gradients; return the norm of all gradients before clipping, sparse ones included."""
        with update.in_place():
            if self.accelerator.scaler is not None:
                for optimizer in update.step_sizes:
                    self.accelerator.scaler.unscale_(optimizer)
            reached = [parameter for parameter in self.parameters if parameter.grad is not None]
            # `values()` would need the sum of equal rows first, which is another norm.
            sparse = [parameter.grad._values() for parameter in reached if parameter.grad.is_sparse]
            dense = [parameter for parameter in reached if not parameter.grad.is_sparse]
            norm = nn.utils.get_total_norm([parameter.grad for parameter in dense])
            if self.train.clip_norm:
                nn.utils.clip_grads_with_norm_(dense, self.train.clip_norm, norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return torch.stack([norm, *(values.norm() for values in sparse)]).norm()

    def _spikes(self, total: Tensor) -> Tensor:
        """Whether `total` exceeds the median of accepted losses by `spike_threshold` robust standard deviations."""
        median = self.history.nanmedian()
        deviation = (self.history - median).abs().nanmedian() * DEVIATION
        limit = median + self.train.spike_threshold * deviation
        return (total > limit) & ((~self.history.isnan()).sum() >= ENOUGH)


def step_unless(skip: Tensor, optimizer: Optimizer) -> None:
    """Step, or leave everything as it is if `skip` (bool, a scalar on the device) holds; never wait for the device."""
    if optimizer.defaults.get("fused"):  # fused optimizers read these two, as torch.amp.GradScaler sets them
        optimizer.grad_scale, optimizer.found_inf = torch.ones((), device=skip.device), skip.float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
        return
    undo = Undo()
    undo.keep(optimizer)
    optimizer.step()
    undo.restore_if(skip, on_host=False)


class Undo:
    """Parameters and optimizer state from before the first update of a step, for those that its updates move."""

    def __init__(self):
        self.before: dict[nn.Parameter, tuple[Optimizer, Tensor, dict[str, Any]]] = {}

    def keep(self, optimizer: Optimizer) -> None:
        """Copy what the optimizer is about to move, unless it was copied before."""
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            if parameter.grad is not None and parameter not in self.before:
                state = {
                    key: value.clone() if isinstance(value, Tensor) else value
                    for key, value in optimizer.state.get(parameter, {}).items()
                }
                self.before[parameter] = optimizer, parameter.detach().clone(), state

    @torch.no_grad()
    def restore_if(self, skip: Tensor, on_host: bool) -> None:
        """Restore everything if `skip` (bool, a scalar on the device) holds, and drop the copies."""
        for parameter, (optimizer, value, state) in self.before.items():
            if not on_host:
                parameter.copy_(torch.where(skip, value, parameter))
                # State that the step created counts as zero before it.
                for key, tensor in optimizer.state[parameter].items():
                    tensor.copy_(torch.where(skip, state.get(key, torch.zeros_like(tensor)), tensor))
            elif skip:
                parameter.copy_(value)
                optimizer.state.pop(parameter, None)
                if state:
                    optimizer.state[parameter] = state
        self.before = {}


def _why(total: float, parts: dict[str, float], spikes: bool) -> str:
    for name, loss in parts.items():
        if not math.isfinite(loss):
            return f"the loss of {name} is {loss}"
    return f"a loss of {total:.3f} spikes" if spikes else "the gradient is not finite"
