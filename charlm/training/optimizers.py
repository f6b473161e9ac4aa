"""Optimizers, and the learning rate as a function of the step."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from charlm.config import TrainConfig, steps_of


def learning_rate_factor(train: TrainConfig, step: int) -> float:
    """Factor of the peak learning rate for the update after `step` completed steps.

    Linear from 1/w to 1 over the w steps of the warm-up; then constant, or a fall from 1 to
    `final_lr` at the last step, which begins after the warm-up, or with wsd as late as it can.
    """
    begin = warmup = steps_of(train.warmup, train.steps)
    if step < warmup:
        return (step + 1) / warmup
    shape = train.lr_schedule
    if shape == "wsd":
        begin, shape = train.steps - steps_of(train.decay_steps, train.steps), train.decay_type
    u = max(0, step - begin) / max(1, train.steps - begin)
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
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    tables = {embedding.weight for embedding in embeddings if embedding.sparse}
    sparse, matrices, decayed, plain = [], [], [], []
    for name, parameter in model.named_parameters():
        if parameter not in wanted:
            continue
        if parameter in tables:
            sparse.append(parameter)
        elif parameter.ndim < 2 or "embedding" in name or "position_tables" in name:
            plain.append(parameter)
        elif train.optimizer == "muon" and "blocks" in name:
            matrices.append(parameter)
        else:
            decayed.append(parameter)
    rate = train.learning_rate
    groups = [_group(decayed, rate, train.weight_decay), _group(plain, rate)]
    optimizers = []
    if matrices:
        hidden = _group(matrices, train.muon_learning_rate, train.weight_decay)
        optimizers.append(torch.optim.Muon([hidden], momentum=train.muon_momentum, nesterov=True))
    if train.optimizer == "sgd":
        optimizers.append(torch.optim.SGD(groups, momentum=train.momentum))
    else:
        optimizers.append(torch.optim.AdamW(groups, betas=train.adam_betas, fused=True))
    if sparse:
        rows = _group(sparse, train.ngram_learning_rate)
        optimizers.append(torch.optim.SparseAdam([rows], betas=train.adam_betas))
    return optimizers


def _group(parameters: list[Tensor], peak_lr: float, weight_decay: float = 0.0) -> dict[str, Any]:
    return {"params": parameters, "lr": peak_lr, "peak_lr": peak_lr, "weight_decay": weight_decay}
