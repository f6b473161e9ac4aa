"""The worker's side of a race: take turns, time them, and say how much memory they took."""

import contextlib
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from charlm.process import peak_memory

Work = Callable[[], Any]


class Stop(Exception):
    """The race is over."""


class Turns:
    """Steps come in turns: `warmup` of them untimed, then `steps` timed, then the process sleeps until its next turn.

    The contestant calls `start` before it builds its model, `ready` after, and `done` after every step.
    """

    def __init__(self, commands: BinaryIO, replies: BinaryIO, *, warmup: int, steps: int, device: str):
        self.commands, self.replies = commands, replies
        self.warmup, self.steps, self.device = warmup, steps, device
        self.count, self.started, self.memory_before = 0, 0.0, 0

    def start(self) -> None:
        """What is in memory now, libraries above all, is not the model's."""
        self.memory_before = reset_peak_memory(self.device)

    def ready(self, **facts: Any) -> None:
        """Say what was built, and wait for the first turn.

        Raises:
            Stop: there is none.
        """
        self._reply(facts | {"threads": torch.get_num_threads()})

    def done(self, count: int = 1) -> None:
        """A turn's next `count` steps are done.

        Raises:
            Stop: they were the last.
        """
        self.count += count
        if self.count == self.warmup:
            self._synchronize()
            self.started = time.perf_counter()
        if self.count == self.warmup + self.steps:
            self._synchronize()
            seconds = time.perf_counter() - self.started
            memory = peak_memory() - self.memory_before
            if self.device == "cuda":
                torch.cuda.empty_cache()  # the next contestant needs it
            self._reply({"seconds": seconds, "peak_memory": memory})

    def play(self, work: Work) -> None:
        """`work` is a step: do it until the race is over.

        Raises:
            Stop: it is.
        """
        while True:
            work()
            self.done()

    def _reply(self, message: dict[str, Any]) -> None:
        self.replies.write(json.dumps(message).encode() + b"\n")
        self.replies.flush()
        if json.loads(self.commands.readline() or '"stop"') == "stop":  # nothing to read: the parent is gone
            raise Stop
        self.count = 0
        if self.warmup == 0:
            self.started = time.perf_counter()

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def reset_peak_memory(device: str) -> int:
    """Forget the highest use of memory so far; returns the present one in bytes."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError):  # Linux alone; elsewhere the highest use so far is the base
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()
