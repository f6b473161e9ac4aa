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

from benchmarks.setups import Setup, Trial
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
            env=os.environ | {"PYTHONPATH": path} | trial.setup.environment(trial.device),
        )
        with contextlib.suppress(WorkerError):  # a worker that has died is reported by `receive`
            self.send(TypeAdapter(Trial).dump_json(trial))

    def send(self, message: bytes) -> None:
        """
        Raises:
            WorkerError: the worker has died.
        """
        try:
            self.process.stdin.write(message + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._last_line()) from None

    def receive(self) -> dict[str, Any]:
        """
        Raises:
            WorkerError: the worker has died.
        """
        try:
            return json.loads(self.process.stdout.readline())
        except ValueError:
            raise WorkerError(self._last_line()) from None

    def take_turn(self, result: TrialResult, *, timed: bool) -> None:
        """Do one turn and add it to the result.

        Raises:
            WorkerError: the worker has died.
        """
        started = time.perf_counter()
        self.send(b'"turn"')
        reply = self.receive()
        if timed:
            result.seconds.append(reply["seconds"])
        else:
            result.first_turn = time.perf_counter() - started
        result.peak_memory = max(result.peak_memory, reply["peak_memory"])

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
    """Let trials take turns: one untimed, then `rounds` timed, in alternating order so that none always follows the
    same. A peer that fails (out of memory, say) is left out with a line. `bar` advances by `rounds` + 2 per trial.

    Raises:
        UserError: charlm failed.
    """
    workers: dict[str, Worker] = {}
    results: dict[str, TrialResult] = {}

    def attempt(name: str, action: Callable[[Worker], None]) -> None:
        """Do it, or leave the trial out."""
        try:
            action(workers[name])
        except WorkerError as error:
            if workers[name].trial.setup.library == "charlm":
                raise UserError(f"{name} failed: {error}") from error
            say(f"{name} failed and is left out: {error}")
            workers.pop(name).close()
            results.pop(name, None)
        bar.update()

    def build(worker: Worker) -> None:
        results[worker.trial.setup.name] = TrialResult(worker.trial.setup, worker.receive(), worker.trial.steps)

    def turn(worker: Worker, timed: bool) -> None:
        worker.take_turn(results[worker.trial.setup.name], timed=timed)

    try:
        for first in range(0, len(trials), STARTING_AT_ONCE):
            started = {trial.setup.name: Worker(trial) for trial in trials[first : first + STARTING_AT_ONCE]}
            workers |= started
            for name in started:
                attempt(name, build)
        for number in range(rounds + 1):
            for name in list(workers) if number % 2 == 0 else list(workers)[::-1]:
                attempt(name, lambda worker, timed=number > 0: turn(worker, timed))
    finally:
        for worker in workers.values():
            worker.close()
    return list(results.values())
