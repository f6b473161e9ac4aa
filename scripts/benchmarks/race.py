"""The parent's side of a race: trials in processes of their own take turns, one awake at a time.

Whatever the machine does over time, it does to all of them alike: ratios are taken within a round.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from tqdm import tqdm

from benchmarks.setups import ALLOCATOR, Setup, Trial
from charlm.config import UserError

SCRIPTS = Path(__file__).resolve().parents[1]
STARTING_AT_ONCE = 2
"""Processes that import and build at the same time. More would compete for the disk."""


@dataclass
class TrialResult:
    """The measurements of one trial in a race."""

    setup: Setup
    facts: dict[str, Any]
    """parameters, flop_per_step, characters_per_step and threads, as far as they apply."""
    steps: int
    seconds: list[float] = field(default_factory=list)
    """Time of the timed steps of each round."""
    peak_memory: int = 0
    """Bytes of the model, its optimizer and its steps, without libraries."""
    first_turn: float = 0.0
    """Seconds of the untimed first turn: warm-up and compilation."""

    @property
    def name(self) -> str:
        return self.setup.name

    def rates(self, fact: str = "characters_per_step") -> list[float]:
        """Characters (or, by `flop_per_step`, FLOPs) per second in each round."""
        return [self.steps * self.facts[fact] / seconds for seconds in self.seconds]


class WorkerError(Exception):
    """A worker failed; the message is the last line it printed."""


class Worker:
    """The process of a trial."""

    def __init__(self, trial: Trial):
        self.trial = trial
        self.printed = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed in `close`
        path = os.pathsep.join(filter(None, [str(SCRIPTS.parent), str(SCRIPTS), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.printed,
            env=os.environ | {"PYTHONPATH": path} | (ALLOCATOR[trial.device] if trial.setup.tuned else {}),
        )
        self.send(TypeAdapter(Trial).dump_json(trial))

    def send(self, message: bytes) -> None:
        """Send a line."""
        with contextlib.suppress(BrokenPipeError):  # `receive` tells why the worker has died
            self.process.stdin.write(message + b"\n")
            self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """The worker's next reply. Raises WorkerError if the worker has died."""
        try:
            return json.loads(self.process.stdout.readline())
        except ValueError:
            raise WorkerError(self._last_line()) from None

    def close(self) -> None:
        """End the process, which may have ended already."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.printed):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _last_line(self) -> str:
        code = self.process.wait()
        self.printed.seek(0)
        lines = [line for line in self.printed.read().splitlines() if line.strip()]
        return lines[-1].strip() if lines else f"its process ended with code {code}"


def race(trials: Sequence[Trial], rounds: int, say: Callable[[str], None], bar: tqdm) -> list[TrialResult]:
    """Let trials take turns: one untimed, then `rounds` timed.

    The order alternates, so that none always follows the same. A peer that fails (out of memory, say) is left out with
    a line; UserError if charlm fails. `bar` advances by `rounds` + 2 per trial.
    """
    workers: dict[str, Worker] = {}
    results: dict[str, TrialResult] = {}

    def reply_of(name: str) -> dict[str, Any] | None:
        """The worker's reply; None if it has died and is left out."""
        bar.update()
        try:
            return workers[name].receive()
        except WorkerError as error:
            if workers[name].trial.setup.library == "charlm":
                raise UserError(f"{name} failed: {error}") from error
            say(f"{name} failed and is left out: {error}")
            workers.pop(name).close()
            results.pop(name, None)
            return None

    try:
        for first in range(0, len(trials), STARTING_AT_ONCE):
            started = {trial.setup.name: Worker(trial) for trial in trials[first : first + STARTING_AT_ONCE]}
            workers |= started
            for name, worker in started.items():
                if facts := reply_of(name):
                    results[name] = TrialResult(worker.trial.setup, facts, worker.trial.steps)
        for number in range(rounds + 1):
            for name in list(workers) if number % 2 == 0 else list(workers)[::-1]:
                before = time.perf_counter()
                workers[name].send(b'"turn"')
                if reply := reply_of(name):
                    result = results[name]
                    result.peak_memory = max(result.peak_memory, reply["peak_memory"])
                    if number > 0:
                        result.seconds.append(reply["seconds"])
                    else:
                        result.first_turn = time.perf_counter() - before
    finally:
        for worker in workers.values():
            worker.close()
    return list(results.values())
