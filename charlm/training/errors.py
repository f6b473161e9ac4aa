"""What ends a run from outside, said in words: memory that is used up, processes that are gone.

Shapes: B windows, W characters of a window.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator

from charlm.config import TrainConfig, UserError
from charlm.config.errors import first_line
from charlm.objective.objective import Objective

NO_MEMORY = ("out of memory", "DefaultCPUAllocator: can't allocate memory", "ALLOC_FAILED")
NO_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
"""How torch, CUDA and gloo put it, in errors whose class says no more than RuntimeError."""
RESERVE = 0.05
"""The share of a GPU's memory that a search for the largest micro-batch leaves to fragmentation."""


@contextmanager
def explained(train: TrainConfig) -> Iterator[None]:
    """Inside, running out of memory and losing a process are UserErrors that name the way out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if _is_about_memory(error):
            raise UserError(f"out of memory: {_less_memory(train)} ({first_line(error)})") from error
        if any(words in str(error) for words in NO_PEER):
            raise UserError(
                "another process of this run has ended or hangs, and its own message says why; "
                f"--run.resume=true continues from the newest checkpoint ({first_line(error)})"
            ) from error
        raise


def largest_micro_batch(try_step: Callable[[int], None], upper: int, agree: Callable[[bool], bool] = bool) -> int:
    """The largest number of windows in [1, upper] with which `try_step` does not run out of memory.

    Doubles until it does, then halves the interval.

    Args:
        agree: makes one answer, the same in every process, of whether it was enough in this one.

    Raises:
        UserError: not even one fits.
    """

    def fits(windows: int) -> bool:
        try:
            try_step(windows)
        except (MemoryError, RuntimeError) as error:
            if not _is_about_memory(error):
                raise
            return agree(False)
        return agree(True)

    most, too_many = 0, upper + 1
    while most < too_many - 1:
        windows = min(max(1, 2 * most), upper) if too_many > upper else (most + too_many) // 2
        most, too_many = (windows, too_many) if fits(windows) else (most, windows)
    if most == 0:
        raise UserError(
            "train.micro_batch_size=auto: not one window fits into memory; use "
            "--train.activation_checkpointing=true, or a smaller model"
        )
    return most


def find_micro_batch_size(objective: Objective, accelerator: Accelerator, upper: int) -> int:
    """The largest micro-batch up to `upper` windows that every process has the memory for, optimizer state included.

    Each tries the first step's forward and backward passes, when most terms are active, apart from the others. Leaves
    parameters, gradients and random state as they were.

    Raises:
        UserError: not one window fits.
    """
    device, cuda = accelerator.device, accelerator.device.type == "cuda"

    def try_step(windows: int) -> None:
        try:
            # Adam's two moments are not there yet; the margin is for what lies between blocks in use.
            held = [torch.empty_like(parameter) for parameter in objective.parameters() for _ in range(2)]
            if cuda:
                total = torch.cuda.get_device_properties(device).total_memory
                held.append(torch.empty(int(RESERVE * total), dtype=torch.uint8, device=device))
            windows_BW = torch.zeros(windows, objective.window_length, dtype=torch.int64, device=device)
            with accelerator.autocast():
                objective(windows_BW, 0.0).total.backward()
        finally:
            held = []
            objective.zero_grad()

    def agree(fits: bool) -> bool:
        if cuda:
            torch.cuda.empty_cache()
        return bool(accelerator.reduce(torch.tensor(int(fits), device=device)) == accelerator.num_processes)

    with torch.random.fork_rng():
        return largest_micro_batch(try_step, upper, agree)


def _is_about_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in NO_MEMORY)


def _less_memory(train: TrainConfig) -> str:
    ways = []
    if train.micro_batch_size != 1:
        now = f", now {train.micro_batch_size}" if train.micro_batch_size else ", now the whole batch of a process"
        ways.append(f"lower --train.micro_batch_size{now}")
    if not train.activation_checkpointing:
        ways.append("use --train.activation_checkpointing=true")
    return ", or ".join(ways) or "use a smaller model or context, or --train.sharding=fsdp2 on several GPUs"
