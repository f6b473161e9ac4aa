"""Stops on request: a signal, a time limit, a dead launcher. All processes stop after the same step."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import psutil
import torch
import torch.distributed as dist

from charlm.config import Stopped
from charlm.training.device import PATIENCE

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
REASONS = (*(number.name for number in SIGNALS), "run.max_time is over", "the launcher is gone")
SAME_REQUEST = 1.0
"""Seconds within which further signals count as the same: Ctrl-C arrives from the terminal and again from the
launcher."""


class StopRequests:
    """Collects requests to stop while the context is open.

    A request is kept until `agreed` or `check`; inside `interrupting` it raises at once. A second signal ends the
    process immediately.
    """

    def __init__(self, max_seconds: float | None = None):
        """`max_seconds`: counted from the start of the process, as the time limits of job queues are."""
        self.max_seconds = max_seconds
        self.reason: str | None = None
        self._began = psutil.Process().create_time()
        self._interrupts = False
        self._launcher = os.getppid() if _launched() else None
        self._group: dist.ProcessGroup | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to no other
            watched, self._told = os.pipe()
            os.set_blocking(self._told, False)
            self._told_before = signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)
            self._handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
            self._watch = threading.Thread(target=_exit_at_the_second, args=(watched,), daemon=True)
            self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._handlers:
            signal.set_wakeup_fd(self._told_before)
            os.close(self._told)
            self._watch.join()
        self._group = None

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Inside, a signal interrupts at once, because there is nothing to save; call `check` after it."""
        self._interrupts = True
        try:
            yield
        except Stopped:
            pass
        finally:
            self._interrupts = False

    def agreed(self) -> bool:
        """Whether any process was asked to stop. All processes call it at the same point and get the same answer."""
        if self.reason is None and self.max_seconds is not None and time.time() - self._began >= self.max_seconds:
            self.reason = "run.max_time is over"
        if self.reason is None and self._launcher not in (None, os.getppid()):
            self.reason = "the launcher is gone"
        if dist.is_initialized() and dist.get_world_size() > 1:
            if self._group is None:  # gloo, so that no GPU is waited for
                self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
            code = torch.tensor(REASONS.index(self.reason) + 1 if self.reason else 0)
            dist.all_reduce(code, dist.ReduceOp.MAX, group=self._group)
            if not code:  # a signal that came meanwhile counts next time, when the others learn of it, too
                return False
            self.reason = REASONS[code.item() - 1]
        return self.reason is not None

    def check(self) -> None:
        """Raise Stopped if `agreed`."""
        if self.agreed():
            raise Stopped(self.reason)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name
        if self._interrupts:
            raise Stopped(self.reason)


def _exit_at_the_second(watched: int) -> None:
    """Read signals as they arrive, even while the main thread is in a library and Python's handlers cannot run."""
    first = None
    main = os.environ.get("RANK", "0") == "0"
    with os.fdopen(watched, "rb", buffering=0) as numbers:
        while number := numbers.read(1):
            now = time.monotonic()
            if first is None and main and number[0] in SIGNALS:
                os.write(2, b"\nstopping, once what is done is saved; a second Ctrl-C or signal ends it at once\n")
            first = first or now
            if number[0] in SIGNALS and now - first > SAME_REQUEST:
                os._exit(128 + number[0])


def _launched() -> bool:
    """Whether accelerate's launcher or torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
