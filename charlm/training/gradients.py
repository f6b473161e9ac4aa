"""Losses and gradients of one optimizer step: its windows in micro-batches, forward and backward.

Shapes: B windows of this process, W characters of a window.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn

from charlm.config import Config, UserError
from charlm.data.windows import training_windows
from charlm.hardware import device_memory, has_pinned_memory
from charlm.objective.objective import Objective
from charlm.objective.routes import Joint
from charlm.process import is_about_memory
from charlm.training.sharding import is_sharded, sparse_tables


@dataclass(frozen=True)
class Losses:
    """This process's share of a step's losses, in nats; all shares add up to the batch's."""

    names: tuple[str, ...]
    row: Tensor  # total loss, then the loss of each term in `names`

    def __add__(self, other: "Losses") -> "Losses":
        """The losses of two passes, which share no term."""
        total = self.row[:1] + other.row[:1]
        return Losses(self.names + other.names, torch.cat([total, self.row[1:], other.row[1:]]))


def micro_batches(
    config: Config,
    micro_batch_size: int | None,
    texts: list[np.ndarray],
    accelerator: Accelerator,
    objective: Objective,
    step: int,
) -> list[tuple[float, Tensor]]:
    """This process's micro-batches: their shares of the batch, and their ids, [B, W]."""
    train = config.train
    divisor = train.context_divisor if train.progress(step) < train.full_context_from else 1
    windows = training_windows(
        texts,
        shares=config.data.shares,
        seed=train.seed,
        step=step,
        batch_size=train.batch_size * divisor,
        window_length=max(1, config.model.context_length // divisor) + objective.longest_offset,
        stride=config.model.context_length if config.data.order == "epochs" else None,
        divisor=divisor,
    )
    shares = np.array_split(windows, accelerator.num_processes)
    own = torch.from_numpy(shares[accelerator.process_index])
    if has_pinned_memory(accelerator.device):  # narrow and pinned, so that copying does not wait
        own = torch.from_numpy(own.numpy().astype(texts[0].dtype)).pin_memory()
    parts = own.split((micro_batch_size or len(own)) * divisor)
    return [(len(windows_BW) / len(windows), windows_BW) for windows_BW in parts]


def accumulate_gradients(
    config: Config,
    accelerator: Accelerator,
    model: nn.Module,
    route: Joint,
    step: int,
    windows: list[tuple[float, Tensor]],
    layers: list[int] | None,
) -> Losses:
    """Run forward and backward passes over `windows`; return this process's losses."""
    train, rows = config.train, []
    for index, (share, windows_BW) in enumerate(windows):
        # A resumed run repeats the dropout of the step.
        noise = np.random.SeedSequence([train.seed, step, accelerator.process_index, index])
        torch.manual_seed(int(noise.generate_state(1, np.uint64)[0]))
        is_last = index == len(windows) - 1
        if is_sharded(model):
            model.set_requires_gradient_sync(is_last)
        with nullcontext() if is_last else accelerator.no_sync(model):
            on_device_BW = windows_BW.to(accelerator.device, non_blocking=has_pinned_memory(accelerator.device)).long()
            report = model(on_device_BW, train.progress(step), layers)
            # The last backward pass averages gradients over processes.
            route.backward(report, share * accelerator.num_processes, accelerator.backward)
        rows.append(share * torch.stack([report.total.detach(), *report.parts.values()]))
    return Losses(tuple(report.parts), torch.stack(rows).sum(dim=0))


def find_micro_batch_size(objective: Objective, accelerator: Accelerator, upper: int, copies: int = 2) -> int:
    """The most windows, up to `upper`, that fit into every process's memory with `copies` of the parameters.

    Tries the first step, when most terms are active, each time with a tenth less. UserError if none fits.
    """
    windows = upper
    with torch.random.fork_rng():
        while windows > 0:
            fits = _fits(objective, accelerator, windows, copies)
            count = torch.tensor(int(fits), device=accelerator.device)
            if accelerator.reduce(count) == accelerator.num_processes:
                return windows
            clear_device_cache(garbage_collection=True)
            windows = int(windows * 0.9)
    text = "not one window fits; use --train.activation_checkpointing=true, or a smaller model"
    raise UserError(f"train.micro_batch_size=auto: {text}", "train.micro_batch_size")


def _fits(objective: Objective, accelerator: Accelerator, windows: int, copies: int) -> bool:
    device, held = accelerator.device, []
    try:
        tables = set(sparse_tables(objective))
        for parameter in objective.parameters():  # Adam's moments, and averages, do not exist yet
            held += [torch.empty_like(parameter) for _ in range(copies - 2 * (parameter in tables))]
        if device.type != "cpu":  # a twentieth may be lost to fragmentation
            held.append(torch.empty(device_memory(device) // 20, dtype=torch.uint8, device=device))
        windows_BW = torch.zeros(windows, objective.window_length, dtype=torch.int64, device=device)
        with accelerator.autocast():
            objective(windows_BW, 0.0).total.backward()
    except (MemoryError, RuntimeError) as error:
        if not is_about_memory(error):
            raise
        return False
    finally:
        held.clear()
        objective.zero_grad()
    return True
