"""Optimizers, the learning rate as a function of the step, and averages of the parameters that they move."""

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from charlm.config import TrainConfig, steps_of
from charlm.hardware import has_fused
from charlm.model.rowwise import RowwiseRMS
from charlm.runs.tensors import AVERAGE, placed
from charlm.training.sharding import sparse_tables


def learning_rate_factor(train: TrainConfig, step: int) -> float:
    """Factor of the peak learning rate for the update after `step` completed steps.

    Linear from 1/w to 1 over the w steps of the warm-up; then constant, or a fall from 1 to
    `final_lr` at the last step, which begins after the warm-up, or with wsd as late as it can.
    """
    at, steps = train.planned_step(step), train.planned
    begin = warmup = steps_of(train.warmup, steps)
    if at < warmup:
        return min(1.0, (at + 1) / warmup)
    shape = train.lr_schedule
    if shape == "wsd":
        begin, shape = steps - steps_of(train.decay_steps, steps), train.decay_type
    u = max(0, at - begin) / max(1, steps - begin)
    falls = {
        "constant": 1.0,
        "linear": 1.0 - u,
        "cosine": (1.0 + math.cos(math.pi * u)) / 2,
        "1-sqrt": 1.0 - math.sqrt(u),
    }
    return train.final_lr + (1.0 - train.final_lr) * falls[shape]


def set_learning_rates(step_sizes: Mapping[Optimizer, float], factor: float) -> None:
    """Set every group's rate to `factor` times its peak times its optimizer's step size."""
    for optimizer, step_size in step_sizes.items():
        for group in optimizer.param_groups:
            group["lr"] = factor * step_size * group["peak_lr"]


def build_optimizers(
    train: TrainConfig, model: nn.Module, only: Collection[nn.Parameter] | None = None
) -> list[Optimizer]:
    """Optimizers that own every parameter of `model` once, or every parameter in `only`.

    Biases, norms, position tables, and embeddings with their projection do not decay. Parameters
    (of n-gram tables, rows) without a gradient are not moved.
    """
    wanted = set(model.parameters() if only is None else only)
    tables = [table for table in sparse_tables(model) if table in wanted]
    others = wanted.difference(tables)
    matrices, decayed, plain = [], [], []
    for name, parameter in model.named_parameters():
        if parameter not in others:
            continue
        if parameter.ndim < 2 or "embedding" in name or "position_tables" in name:
            plain.append(parameter)
        elif train.optimizer == "muon" and "blocks" in name:
            matrices.append(parameter)
        else:
            decayed.append(parameter)
    rate, device = train.learning_rate, next(model.parameters()).device
    groups = [_group(decayed, rate, train.weight_decay), _group(plain, rate)]
    optimizers = []
    if matrices:
        hidden = _group(matrices, train.muon_learning_rate, train.weight_decay)
        optimizers.append(Muon([hidden], momentum=train.muon_momentum))
    if train.optimizer == "sgd":
        # The fused one rounds otherwise on a CPU, and cannot move shards.
        unfused = device.type == "cpu" or any(hasattr(own, "full_tensor") for own in wanted)
        fused = not unfused and has_fused(torch.optim.SGD, device)
        optimizers.append((fused_sgd if fused else torch.optim.SGD)(groups, momentum=train.momentum))
    else:
        optimizers.append(torch.optim.AdamW(groups, betas=train.adam_betas, fused=has_fused(torch.optim.AdamW, device)))
    if tables:
        most = train.batch_size * max(model.window_length, train.context_divisor)
        rows = _group([*tables], train.ngram_learning_rate)
        optimizers.append(RowwiseRMS([rows], most))
    return optimizers


def fused_sgd(groups: list[dict[str, Any]], momentum: float) -> Optimizer:
    """torch.optim.SGD in few kernels. Its momentum begins at zero: that of a skipped step would stay unwritten."""
    sgd = torch.optim.SGD(groups, momentum=momentum, fused=True)
    sgd.register_step_pre_hook(_begin_at_rest)
    return sgd


def _begin_at_rest(sgd: Optimizer, *_: Any) -> None:
    for group in sgd.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and group["momentum"] and not sgd.state[parameter]:
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _group(parameters: list[Tensor], peak_lr: float, weight_decay: float = 0.0) -> dict[str, Any]:
    return {"params": parameters, "lr": peak_lr, "peak_lr": peak_lr, "weight_decay": weight_decay}


class Muon(Optimizer):
    """Orthogonal updates of matrices (Jordan et al. 2024), as torch.optim.Muon with Nesterov momentum.

    Matrices of a shape move together, in products of batches. Like torch's fused optimizers it
    makes no step if `found_inf`, a number on the device, is 1.
    """

    def __init__(self, groups: list[dict[str, Any]], momentum: float):
        super().__init__(groups, {"momentum": momentum, "fused": True})

    @torch.no_grad()
    def step(self) -> None:
        skip = getattr(self, "found_inf", None)
        skip = None if skip is None else skip > 0
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            kept = 1 - group["lr"] * group["weight_decay"]
            if skip is not None and group["weight_decay"]:
                kept = torch.where(skip, 1.0, kept)
            for parameters in by_shape.values():
                if group["weight_decay"]:
                    # torch has no public name for one kernel over many tensors.
                    torch._foreach_mul_(parameters, kept)
                self._move(parameters, group["lr"], group["momentum"], skip)

    def _move(self, parameters: list[Tensor], lr: float, momentum: float, skip: Tensor | None) -> None:
        states = [self.state[parameter] for parameter in parameters]
        for state, parameter in zip(states, parameters, strict=True):
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [state["momentum_buffer"] for state in states]
        gradients_NAB = torch.stack([parameter.grad for parameter in parameters])
        if skip is not None:
            gradients_NAB = torch.where(skip, torch.stack(buffers), gradients_NAB)
        torch._foreach_lerp_(buffers, gradients_NAB.unbind(), 1 - momentum)
        updates_NAB = orthogonal(gradients_NAB.lerp(torch.stack(buffers), momentum)).float()
        if skip is not None:
            updates_NAB.masked_fill_(skip, 0.0)
        rows, columns = parameters[0].shape
        torch._foreach_add_(parameters, updates_NAB.unbind(), alpha=-lr * math.sqrt(max(1, rows / columns)))


def orthogonal(matrices_NAB: Tensor) -> Tensor:
    """Matrices near U V^T of each U S V^T, in bf16, by five steps of Newton and Schulz (Jordan et al. 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    whole_NAB = matrices_NAB.full_tensor() if hasattr(matrices_NAB, "full_tensor") else matrices_NAB
    tall = whole_NAB.shape[1] > whole_NAB.shape[2]
    x_NAB = whole_NAB.bfloat16()
    x_NAB = x_NAB.mT if tall else x_NAB
    norms_N = torch.stack(torch._foreach_norm(x_NAB.unbind()))
    x_NAB = x_NAB / norms_N.clamp(min=1e-7)[:, None, None]
    for _ in range(5):
        gram_NAA = x_NAB @ x_NAB.mT
        x_NAB = torch.baddbmm(x_NAB, torch.baddbmm(gram_NAA, gram_NAA, gram_NAA, beta=b, alpha=c), x_NAB, beta=a)
    return placed(x_NAB.mT if tall else x_NAB, matrices_NAB)


class WeightAverage:
    """Means of parameters, for checkpoints in the form of an optimizer. Inside `with`, the parameters are the means."""

    def __init__(self, train: TrainConfig, model: nn.Module):
        parameters = [] if train.average == "no" else list(model.parameters())
        self.param_groups = [{"params": parameters, "state_prefix": AVERAGE}]
        self.state: dict[nn.Parameter, dict[str, Tensor]] = defaultdict(dict)  # empty before the first entry

    @torch.no_grad()
    def update(self, train: TrainConfig, step: int) -> None:
        """Let the parameters after `step` steps enter, if it is their turn."""
        decay = decay_of(train, step)
        for parameter in [] if decay is None else self.param_groups[0]["params"]:
            if parameter not in self.state:
                self.state[parameter]["mean"] = parameter.detach().clone()
            self.state[parameter]["mean"].lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def _swap(self, *_: object) -> None:
        for parameter, state in self.state.items():
            raw = parameter.clone()
            parameter.copy_(state["mean"])
            state["mean"].copy_(raw)

    __enter__ = __exit__ = _swap


def decay_of(train: TrainConfig, step: int) -> float | None:
    """The factor of the mean as the parameters after `step` steps enter it; None if they do not."""
    every = steps_of(train.average_every, train.planned)
    if train.average == "no" or (step % every and step < train.steps):
        return None
    if train.average == "ema":
        return min(train.average_decay, (1 + step) / (10 + step)) ** (step % every or every)
    begin = max(0, train.planned - steps_of(train.average_tail, train.planned))
    before = bisect_right(range(step + 1), begin, key=train.planned_step) - 1  # the last step that does not count
    entries = -(-step // every) - before // every
    return 1 - 1 / entries if step > before else None
