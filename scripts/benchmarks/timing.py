"""The worker's side of a race: do steps in turns, time them, and measure the memory they take."""

import contextlib
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from charlm.process import peak_memory


class Stop(Exception):
    """The race is over."""


class Timer:
    """Times steps in turns: `warmup` untimed ones, then `steps` timed ones; then the process waits for its next turn.

    A worker calls `start` before it builds its model, `ready` after, and `done` after every step.
    """

    def __init__(self, commands: BinaryIO, replies: BinaryIO, *, warmup: int, steps: int, device: str):
        self.commands, self.replies = commands, replies
        self.warmup, self.steps, self.device = warmup, steps, device
        self.count, self.started, self.memory_before = 0, 0.0, 0

    def start(self) -> None:
        """Note the memory in use now, mostly by libraries; only what comes on top is counted."""
        self.memory_before = reset_peak_memory(self.device)

    def ready(self, **facts: Any) -> None:
        """Report what was built, and wait for the first turn.

        Raises:
            Stop: the race is over.
        """
        self._reply(facts | {"threads": torch.get_num_threads()})

    def done(self) -> None:
        """Count a step; after the last of a turn, report and wait for the next turn.

        Raises:
            Stop: the race is over.
        """
        self.count += 1
        if self.count == self.warmup:
            self._synchronize()
            self.started = time.perf_counter()
        if self.count == self.warmup + self.steps:
            self._synchronize()
            seconds = time.perf_counter() - self.started
            memory = peak_memory() - self.memory_before
            if self.device == "cuda":
                torch.cuda.empty_cache()  # the next worker needs it
            self._reply({"seconds": seconds, "peak_memory": memory})

    def repeat(self, step: Callable[[], Any]) -> None:
        """Do `step` until the race is over.

        Raises:
            Stop: the race is over.
        """
        while True:
            step()
            self.done()

    def _reply(self, message: dict[str, Any]) -> None:
        self.replies.write(json.dumps(message).encode() + b"\n")
        self.replies.flush()
        if json.loads(self.commands.readline() or '"stop"') == "stop":  # no line: the parent is gone
            raise Stop
        self.count, self.started = 0, time.perf_counter()

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def reset_peak_memory(device: str) -> int:
    """Forget the highest use of memory so far, and return the present use in bytes."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError):  # elsewhere than on Linux, the highest use so far stays
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()
