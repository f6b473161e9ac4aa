"""Early ends of a run: by request, lack of memory, or loss of a process."""

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil
import torch
import torch.distributed as dist

from charlm.config import Stopped, TrainConfig, UserError
from charlm.config.errors import first_line
from charlm.config.types import seconds_of
from charlm.process import is_about_memory, is_main_process
from charlm.training.device import PATIENCE

NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
SIGNALS = tuple(signal.Signals[name] for name in NAMES if hasattr(signal, name))
MISSING = [name for name in NAMES if not hasattr(signal, name)]  # on Windows
REASONS = (*NAMES, "run.max_time is over", "the launcher is gone")
LAUNCHED = {"TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "FORK_LAUNCHED"}
"""Variables of torchelastic and accelerate that nobody sets by hand."""
LAUNCHER = "CHARLM_LAUNCHER"  # the id of an ablation's process
SAME_REQUEST = 1.0
"""Seconds in which signals count as one: a launcher repeats the terminal's Ctrl-C."""
NO_PEER = ("Connection closed by", "Connection reset by", "Broken pipe", "Timed out waiting")
"""Words of gloo in plain RuntimeErrors."""
COMPILERS = ("torch._dynamo", "torch._inductor")
"""Modules of the errors of torch.compile, which have no public base."""


class StopRequests:
    """Collects requests to stop: signals, a time limit, the death of the launcher.

    A request is kept until `agreed` or `check`. A second signal ends the process at once.
    """

    def __init__(self, max_time: str | None = None):
        """`max_time`, such as 3h50m, counts from the start of the process, as in job queues."""
        self.reason: str | None = None
        self.stays = False  # after the context, in a process about to end
        limit = math.inf if max_time is None else seconds_of(max_time)
        self._deadline = time.monotonic() + psutil.Process().create_time() - time.time() + limit
        self._interrupts = False
        launched = LAUNCHED & os.environ.keys()
        self._launcher = os.environ.get(LAUNCHER) or (str(os.getppid()) if launched else None)
        self._group: dist.ProcessGroup | None = None
        self._handlers = {}

    def __enter__(self) -> "StopRequests":
        # Python delivers signals to the main thread only.
        if threading.current_thread() is not threading.main_thread():
            return self
        watched, self._told = socket.socketpair()
        self._told.setblocking(False)
        self._told_before = signal.set_wakeup_fd(self._told.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            # nohup ignores the end of the terminal
            if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._on_signal)
        self._watching = threading.Thread(target=_exit_at_the_second, args=(watched,), daemon=True)
        self._watching.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._group = None
        if self._handlers and not self.stays:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._told_before)
            self._told.close()
            self._watching.join(SAME_REQUEST)  # so that its message is not among later ones

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Inside, a signal interrupts at once. Call `agreed` after it."""
        self._interrupts = True
        with suppress(Stopped):
            yield
        self._interrupts = False

    def agreed(self) -> bool:
        """Whether any process was asked to stop. All must call it."""
        if self.reason is None and time.monotonic() >= self._deadline:
            self.reason = "run.max_time is over"
        if self.reason is None and self._launcher not in (None, str(os.getppid())):
            self.reason = "the launcher is gone"
        if dist.is_initialized() and dist.get_world_size() > 1:
            if self._group is None:  # gloo, so that no GPU is waited for
                self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
            code = torch.tensor(REASONS.index(self.reason) + 1 if self.reason else 0)
            dist.all_reduce(code, dist.ReduceOp.MAX, group=self._group)
            if not code:  # a signal that came meanwhile counts next time
                return False
            self.reason = REASONS[code.item() - 1]
        return self.reason is not None

    def check(self) -> None:
        """Raise Stopped if `agreed`; the message is for a run that has not begun."""
        if self.agreed():
            raise Stopped(f"stopped before training began: {self.reason}; there is nothing new to save")

    def _on_signal(self, number: int, _: object) -> None:
        self.reason = self.reason or signal.Signals(number).name
        if self._interrupts:
            raise Stopped(self.reason)


@contextmanager
def explained(train: TrainConfig, stop: StopRequests) -> Iterator[None]:
    """Inside, lack of memory, of a compiler or of a process raises a UserError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        option = None
        if is_about_memory(error):
            option = "train.micro_batch_size"
            now = train.micro_batch_size or "the whole batch of a process"
            text = f"out of memory: lower --{option}, now {now}, or use a smaller model, "
            text += "--train.activation_checkpointing=true or --train.sharding=fsdp2"
        elif type(error).__module__.startswith(COMPILERS):
            option = "train.compile"
            text = f"{option}={train.compile}: the model cannot be compiled; install a C++ "
            text += "compiler, on a GPU also triton, or give --train.compile=no"
        elif any(words in str(error) for words in NO_PEER):
            stop.stays = True  # the launcher's SIGTERM must not cut off the message
            text = "another process has ended or hangs; see its own message; "
            text += "--run.resume=true continues from the newest checkpoint"
        else:
            raise
        raise UserError(f"{text} ({first_line(error)})", option) from error


def _exit_at_the_second(watched: socket.socket) -> None:
    """Read signals even while a library keeps handlers from running."""
    message = b"\nstopping, once all is saved; a second Ctrl-C or signal ends it at once\n"
    first = math.inf
    with watched:
        while number := watched.recv(1):
            if number[0] not in SIGNALS:
                continue
            if time.monotonic() - first > SAME_REQUEST:
                os._exit(128 + number[0])
            if first == math.inf and is_main_process():
                with suppress(OSError):  # a terminal that is closed
                    os.write(2, message)
            first = min(first, time.monotonic())
