"""Stopping on request: signals, a limit of time, a launcher that died. All processes stop after the same step."""

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
"""Seconds in which further signals count as the first: Ctrl-C reaches a process from the terminal, and again from its
launcher."""


class StopRequests:
    """What asks a run to stop, for as long as the context is open.

    A request is remembered until `agreed` or `check` is called, but inside of `interrupting`. A second signal ends the
    process at once, whatever it is doing.
    """

    def __init__(self, max_seconds: float | None = None):
        """`max_seconds`: since the process began, so that what came before training counts against a queue's limit."""
        self.max_seconds = max_seconds
        self.reason: str | None = None
        self._began = psutil.Process().create_time()
        self._interrupts = False
        self._launcher = os.getppid() if _launched() else None
        self._group: dist.ProcessGroup | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is threading.main_thread():  # Python gives signals to no other
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
        """A signal ends what is done inside where it is, because nothing could be lost; `check` must follow."""
        self._interrupts = True
        try:
            yield
        except Stopped:
            pass
        finally:
            self._interrupts = False

    def agreed(self) -> bool:
        """Whether any process was asked to stop. Every process calls it at the same point, and all get one answer."""
        if self.reason is None and self.max_seconds is not None and time.time() - self._began >= self.max_seconds:
            self.reason = "run.max_time is over"
        if self.reason is None and self._launcher not in (None, os.getppid()):
            self.reason = "the launcher is gone"
        if dist.is_initialized() and dist.get_world_size() > 1:
            if self._group is None:  # over the network of the hosts: no device need be waited for
                self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
            code = torch.tensor(REASONS.index(self.reason) + 1 if self.reason else 0)
            dist.all_reduce(code, dist.ReduceOp.MAX, group=self._group)
            if not code:  # a signal that came meanwhile is for the next time, when the others hear of it, too
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
    """Read signals as they come, also while the main thread waits in a library and no handler of Python's can run."""
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
    """Whether this process is a launcher's child: accelerate's or torchrun's."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
