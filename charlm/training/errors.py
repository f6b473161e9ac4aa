"""Turns two errors of torch into messages for people: out of memory and lost process."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from charlm.config import TrainConfig, UserError
from charlm.config.errors import first_line

NO_MEMORY = ("out of memory", "DefaultCPUAllocator: can't allocate memory", "ALLOC_FAILED")
NO_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
"""Words of torch, CUDA and gloo in errors whose class is a plain RuntimeError."""
UNTIL_LAUNCHER_KNOWS = 2.0
"""Seconds after which a launcher has noticed a process that died and has told the others to stop."""


@contextmanager
def explained(train: TrainConfig) -> Iterator[None]:
    """Inside, running out of memory and losing a process raise a UserError that names the way out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_about_memory(error):
            raise UserError(f"out of memory: {_less_memory(train)} ({first_line(error)})") from error
        if any(words in str(error) for words in NO_PEER):
            time.sleep(UNTIL_LAUNCHER_KNOWS)  # its SIGTERM is still caught here; later it would cut off the message
            raise UserError(
                "another process of this run has ended or hangs, and its own message says why; "
                f"--run.resume=true continues from the newest checkpoint ({first_line(error)})"
            ) from error
        raise


def is_about_memory(error: Exception) -> bool:
    """Whether memory was used up, on a GPU or on the host."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in NO_MEMORY)


def _less_memory(train: TrainConfig) -> str:
    ways = []
    if train.micro_batch_size != 1:
        now = f", now {train.micro_batch_size}" if train.micro_batch_size else ", now the whole batch of a process"
        ways.append(f"lower --train.micro_batch_size{now}")
    if not train.activation_checkpointing:
        ways.append("use --train.activation_checkpointing=true")
    return ", or ".join(ways) or "use a smaller model or context, or --train.sharding=fsdp2 on several GPUs"
