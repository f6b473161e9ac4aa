"""Stopping on request: signals, a limit of time, a launcher that died. All processes stop after the same step."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import psutil
import torch
import torch.distributed as dist

from charlm.config import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
REASONS = (*(number.name for number in SIGNALS), "run.max_time is over", "the launcher is gone")
SAME_REQUEST = 1.0
"""Seconds in which further signals count as the first: Ctrl-C reaches a process from the terminal, and again from its
launcher."""


class StopRequests:
    """What asks a run to stop, for as long as the context is open.

    Outside of `deferred` a signal raises Stopped where it strikes: nothing has been learned that could be lost.
    Inside, it is remembered until `agreed` is asked. A second signal ends the process at once.
    """

    def __init__(self, max_seconds: float | None = None):
        """`max_seconds`: since the process began, so that what came before training counts against a queue's limit."""
        self.max_seconds = max_seconds
        self.reason: str | None = None
        self._began = psutil.Process().create_time()
        self._signalled: float | None = None
        self._deferring = False
        self._launcher = os.getppid() if _launched() else None
        self._handlers: dict[int, Any] = {}
        self._group: dist.ProcessGroup | None = None

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is threading.main_thread():  # Python gives signals to no other
            self._handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """From now on signals wait until `agreed` is asked. Every process calls it, once its group exists."""
        self._deferring = True
        if dist.is_initialized() and dist.get_world_size() > 1:
            # Over the network of the hosts: a device need not be waited for.
            self._group = dist.new_group(backend="gloo") if dist.get_backend() != "gloo" else dist.group.WORLD

    def agreed(self) -> bool:
        """Whether any process was asked to stop. Every process calls it at the same point, and all get one answer."""
        if self.reason is None and self.max_seconds is not None and time.time() - self._began >= self.max_seconds:
            self.reason = "run.max_time is over"
        if self.reason is None and self._launcher not in (None, os.getppid()):
            self.reason = "the launcher is gone"
        if self._group is not None:
            code = torch.tensor(REASONS.index(self.reason) + 1 if self.reason else 0)
            dist.all_reduce(code, dist.ReduceOp.MAX, group=self._group)
            self.reason = REASONS[code.item() - 1] if code else None
        return self.reason is not None

    def check(self) -> None:
        """Raise Stopped if `agreed`."""
        if self.agreed():
            raise Stopped(self.reason)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self._signalled is None:
            self._signalled, self.reason = now, self.reason or signal.Signals(number).name
            if not self._deferring:
                raise Stopped(self.reason)
        elif now - self._signalled > SAME_REQUEST:
            os._exit(128 + number)


def _launched() -> bool:
    """Whether this process is a launcher's child: accelerate's or torchrun's."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
