"""Losses and gradients of one optimizer step: its windows in micro-batches, forward and backward.

Shapes: B windows of this process, W characters of a window.
"""

import gc
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from charlm.config import Config, UserError
from charlm.data.windows import training_windows
from charlm.objective.objective import LossReport, Objective
from charlm.objective.routes import Joint
from charlm.training.sharding import no_sync
from charlm.training.stop import is_about_memory


@dataclass(frozen=True)
class Losses:
    """Losses of one step in nats per symbol: this process's share, which adds up to that of the batch."""

    names: tuple[str, ...]
    row: Tensor
    """Total loss, then the loss of each active term, of these names."""

    def __add__(self, other: "Losses") -> "Losses":
        """The losses of two passes, which share no term."""
        total = self.row[:1] + other.row[:1]
        return Losses(self.names + other.names, torch.cat([total, self.row[1:], other.row[1:]]))


def weighted_losses(reports: Sequence[tuple[float, LossReport]]) -> Losses:
    """Sum the losses of micro-batches, weighted by their shares of the global batch."""
    rows = [share * torch.stack([report.total.detach(), *report.parts.values()]) for share, report in reports]
    return Losses(tuple(reports[0][1].parts), torch.stack(rows).sum(dim=0))


def micro_batches(
    config: Config,
    micro_batch_size: int | None,
    ids: np.ndarray,
    accelerator: Accelerator,
    objective: Objective,
    step: int,
) -> list[tuple[float, Tensor]]:
    """This process's windows of a step, cut up, and the share of each part in the batch."""
    train = config.train
    divisor = train.context_divisor if step / train.steps < train.full_context_from else 1
    windows = training_windows(
        ids,
        seed=train.seed,
        step=step,
        batch_size=train.batch_size * divisor,
        window_length=max(1, config.model.context_length // divisor) + objective.longest_offset,
    )
    own = torch.from_numpy(np.array_split(windows, accelerator.num_processes)[accelerator.process_index])
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
    """Run forward and backward passes over `windows`, and return this process's share of the losses."""
    train, reports = config.train, []
    for index, (share, windows_BW) in enumerate(windows):
        noise = np.random.SeedSequence([train.seed, step, accelerator.process_index, index])
        torch.manual_seed(int(noise.generate_state(1, np.uint64)[0]))  # of dropout; a resumed run repeats it
        with nullcontext() if index == len(windows) - 1 else no_sync(accelerator, model):
            report = model(windows_BW.to(accelerator.device, non_blocking=True), step / train.steps, layers)
            # Gradients are averaged over processes later.
            route.backward(report, share * accelerator.num_processes, accelerator.backward)
        reports.append((share, report))
    return weighted_losses(reports)


def find_micro_batch_size(objective: Objective, accelerator: Accelerator, upper: int) -> int:
    """The most windows, up to `upper`, that every process has the memory for, optimizer state included.

    Tries the first step, when most terms are active, with a tenth less each time. Leaves parameters, gradients and
    random state as they were. Raises UserError if not even one window fits.
    """
    windows = upper
    with torch.random.fork_rng():
        while windows > 0:
            fits = torch.tensor(int(_fits(objective, accelerator, windows)), device=accelerator.device)
            if accelerator.reduce(fits) == accelerator.num_processes:
                return windows
            gc.collect()
            torch.cuda.empty_cache()
            windows = int(windows * 0.9)
    ways_out = "use --train.activation_checkpointing=true, or a smaller model"
    text = f"train.micro_batch_size=auto: not one window fits into memory; {ways_out}"
    raise UserError(text, "train.micro_batch_size")


def _fits(objective: Objective, accelerator: Accelerator, windows: int) -> bool:
    """Whether this process has the memory for a micro-batch."""
    device, held = accelerator.device, []
    try:
        # Room for Adam's two moments, which do not exist yet, and a twentieth of the memory for fragmentation.
        held = [torch.empty_like(parameter) for parameter in objective.parameters() for _ in range(2)]
        if device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            held.append(torch.empty(total // 20, dtype=torch.uint8, device=device))
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
