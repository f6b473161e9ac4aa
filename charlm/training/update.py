"""The updates of a step, which are skipped if a loss or gradient is not finite or spikes.

A skipped step leaves parameters and optimizer state as they were, on all processes. The device
decides; the host learns of it when it reads the losses.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from charlm.config import TrainConfig
from charlm.model.rowwise import RowwiseRMS
from charlm.objective.routes import Joint, Update
from charlm.training.gradients import Losses

HISTORY = 128  # most accepted losses that a spike is judged by
ENOUGH = 32  # fewest
DEVIATION = 1.4826  # standard deviation over median absolute deviation, if normal


@dataclass(frozen=True)
class StepReport:
    """Result of a step for the host; losses are global means."""

    step: int  # completed steps, this one included
    loss: float
    parts: dict[str, float]
    skipped: str | None  # the reason, if it was


class Updates:
    """Makes or skips updates, and keeps the losses until the host reads them."""

    def __init__(
        self,
        train: TrainConfig,
        accelerator: Accelerator,
        route: Joint,
        accepted_losses: Sequence[float],
        adapt: Callable[[Mapping[str, Tensor], Tensor], None] | None = None,
    ):
        """`adapt` gets each step's global mean losses by term, and whether it was skipped."""
        self.train, self.accelerator, self.adapt = train, accelerator, adapt
        self.parameters = route.parameters
        losses = [math.nan] * HISTORY + list(accepted_losses)
        self.history = torch.tensor(losses[-HISTORY:], device=accelerator.device)
        self.unread = []  # step, losses, and two flags on the device: skipped, spikes
        tables = [own.param_groups for own in route.optimizers if isinstance(own, RowwiseRMS)]
        self.tables = {table for group in chain(*tables) for table in group["params"]}
        self.decides_on_host = accelerator.device.type == "cpu"
        self.undo = Undo()
        self.pending = None  # losses, total and finiteness of an unfinished step's passes

    def apply(self, step: int, losses: Losses, updates: Sequence[Update], last: bool = True) -> None:
        """Clip the gradients and make all updates, or none; then remove the gradients.

        Updates before the `last` pass of a step are undone if a later one is not finite.
        """
        norms = [self._clip(update) for update in updates]
        total = self.accelerator.reduce(losses.row[0], reduction="sum")
        finite = torch.isfinite(torch.stack([total, *norms])).all()
        if self.pending is not None:
            earlier, earlier_total, earlier_finite = self.pending
            losses, total = earlier + losses, earlier_total + total
            finite = earlier_finite & finite
        judged = last and self.train.spike_threshold
        spikes = self._spikes(total) if judged else torch.zeros_like(finite)
        skip = ~finite | spikes
        made = self.decides_on_host and not skip  # the host waits once
        for update in updates:
            with update.in_place():
                for optimizer in update.step_sizes:
                    if not last:
                        self.undo.keep(optimizer)
                    if not self.decides_on_host:
                        step_unless(skip, optimizer)
                    elif made:
                        optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None
        if last:
            self.undo.restore_if(skip, self.decides_on_host)
            self._record(step, losses, total, skip, spikes)
        self.pending = None if last else (losses, total, finite)

    def _record(self, step: int, losses: Losses, total: Tensor, skip: Tensor, spikes: Tensor) -> None:
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        if self.train.spike_threshold:
            moved = torch.cat([self.history[1:], total[None]])
            self.history = torch.where(skip, self.history, moved)
        if self.adapt is not None:
            means = self.accelerator.reduce(losses.row[1:], reduction="sum")
            self.adapt(dict(zip(losses.names, means, strict=True)), skip)
        self.unread.append((step + 1, losses, torch.stack([skip, spikes])))

    def read(self) -> list[StepReport]:
        """Reports of the newest step made and all skipped ones; waits for the device."""
        if not self.unread:
            return []
        flags = torch.stack([flags for *_, flags in self.unread]).tolist()
        made = [step for (step, *_), (skip, _) in zip(self.unread, flags, strict=True) if not skip]
        reports = []
        for (step, losses, _), (skip, spikes) in zip(self.unread, flags, strict=True):
            if skip or step == made[-1]:
                total, *parts = self.accelerator.reduce(losses.row, reduction="sum").tolist()
                named = dict(zip(losses.names, parts, strict=True))
                reason = _why(total, named, spikes) if skip else None
                reports.append(StepReport(step, total, named, reason))
        self.unread.clear()
        return reports

    def accepted_losses(self) -> list[float]:
        """The losses from which a resumed run judges spikes."""
        return self.history[~self.history.isnan()].tolist()

    def _clip(self, update: Update) -> Tensor:
        """Clip dense gradients; return the norm of all before clipping."""
        with update.in_place():
            if self.accelerator.scaler is not None:
                for optimizer in update.step_sizes:
                    self.accelerator.scaler.unscale_(optimizer)
            reached = [parameter for parameter in self.parameters if parameter.grad is not None]
            dense = [parameter for parameter in reached if parameter not in self.tables]
            rows = [parameter.grad for parameter in reached if parameter in self.tables]
            norm = nn.utils.get_total_norm([parameter.grad for parameter in dense])
            if self.train.clip_norm:
                nn.utils.clip_grads_with_norm_(dense, self.train.clip_norm, norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        rows = [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in rows]
        return torch.stack([norm, *(values.norm() for values in rows)]).norm()

    def _spikes(self, total: Tensor) -> Tensor:
        """Whether `total` is too many robust deviations above the median."""
        median = self.history.nanmedian()
        deviation = (self.history - median).abs().nanmedian() * DEVIATION
        limit = median + self.train.spike_threshold * deviation
        known = (~self.history.isnan()).sum()
        return (total > limit) & (known >= ENOUGH)


def step_unless(skip: Tensor, optimizer: Optimizer) -> None:
    """Step unless `skip` holds, a bool on the device, without waiting for it."""
    if optimizer.defaults.get("fused"):  # it reads these two, as torch.amp.GradScaler sets them
        optimizer.grad_scale = torch.ones((), device=skip.device)
        optimizer.found_inf = skip.float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
        return
    undo = Undo()
    undo.keep(optimizer)
    optimizer.step()
    undo.restore_if(skip, on_host=False)


class Undo:
    """Parameters and optimizer state before the first update of a step."""

    def __init__(self):
        self.before = {}  # by parameter: its optimizer, value and state

    def keep(self, optimizer: Optimizer) -> None:
        """Copy what the optimizer is about to move, at most once."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter not in self.before:
                    state = copy.deepcopy(optimizer.state.get(parameter, {}))
                    self.before[parameter] = optimizer, parameter.detach().clone(), state

    @torch.no_grad()
    def restore_if(self, skip: Tensor, on_host: bool) -> None:
        """Restore all if `skip` holds, and drop the copies."""
        for parameter, (optimizer, value, state) in self.before.items():
            if not on_host:
                parameter.copy_(torch.where(skip, value, parameter))
                # State that the step created counts as zero before it.
                for key, tensor in optimizer.state[parameter].items():
                    before = state.get(key, torch.zeros_like(tensor))
                    tensor.copy_(torch.where(skip, before, tensor))
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
