"""The parent's side: contestants in processes of their own, one awake at a time, taking turns in rounds.

Whatever the machine does over time, it does to all of them alike: ratios are taken within a round.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.setups import Contestant, Job
from charlm.config import UserError

SCRIPTS = Path(__file__).resolve().parents[1]
STARTING_AT_ONCE = 2
"""Processes that import and build at the same time: more would only fetch each other's pages from the disk."""


@dataclass
class Entry:
    """What a contestant did in a race."""

    contestant: Contestant
    facts: dict[str, Any]
    """parameters, flop_per_step, characters_per_step, threads; as far as they apply."""
    steps: int
    seconds: list[float] = field(default_factory=list)
    """Of the timed steps of each round."""
    peak_memory: int = 0
    """Bytes, of the model, its optimizer and its steps; libraries not counted."""
    first_turn: float = 0.0
    """Seconds of the untimed first turn: warm-up, compilation."""

    @property
    def name(self) -> str:
        return self.contestant.name

    def rates(self, fact: str = "characters_per_step") -> list[float]:
        """Characters (or `flop_per_step`) per second in each round."""
        return [self.steps * self.facts[fact] / seconds for seconds in self.seconds]


class WorkerError(Exception):
    """A contestant failed; the message is the last line it printed."""


class Worker:
    """A contestant's process."""

    def __init__(self, job: Job):
        self.job = job
        self.printed = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed in `close`
        path = os.pathsep.join(filter(None, [str(SCRIPTS.parent), str(SCRIPTS), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.printed,
            env=os.environ | {"PYTHONPATH": path} | job.contestant.environment(job.device),
        )
        with contextlib.suppress(WorkerError):  # if it has died already, `receive` says so
            self.send(job.to_dict())

    def send(self, message: Any) -> None:
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._last_words()) from None

    def receive(self) -> dict[str, Any]:
        """
        Raises:
            WorkerError: it has died.
        """
        try:
            return json.loads(self.process.stdout.readline())
        except ValueError:
            raise WorkerError(self._last_words()) from None

    def close(self) -> None:
        """End the process, which may have ended already."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.printed):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _last_words(self) -> str:
        code = self.process.wait()
        self.printed.seek(0)
        lines = [line for line in self.printed.read().splitlines() if line.strip()]
        return lines[-1].strip() if lines else f"its process ended with code {code}"


def race(jobs: Sequence[Job], rounds: int, say: Callable[[str], None], title: str) -> list[Entry]:
    """Let the contestants of `jobs` take turns: one that is not timed, then `rounds` that are.

    The order turns around every round, so that none always follows the same. A peer that fails (out of memory, say) is
    left out with a line.

    Raises:
        UserError: charlm failed.
    """
    workers: dict[str, Worker] = {}
    entries: dict[str, Entry] = {}
    turns = len(jobs) * (rounds + 2)
    with tqdm(total=turns, desc=title, unit="turn", disable=None, leave=False) as bar:

        def attempt(name: str, action: Callable[[Worker], None]) -> None:
            """Do it, or leave the contestant out."""
            try:
                action(workers[name])
            except WorkerError as error:
                if workers[name].job.contestant.library == "charlm":
                    raise UserError(f"{name} failed: {error}") from error
                say(f"{name} failed and is left out: {error}")
                workers.pop(name).close()
                entries.pop(name, None)
            bar.update()

        def build(worker: Worker) -> None:
            name = worker.job.contestant.name
            entries[name] = Entry(worker.job.contestant, worker.receive(), worker.job.steps)

        def turn(worker: Worker, timed: bool) -> None:
            entry = entries[worker.job.contestant.name]
            started = time.perf_counter()
            worker.send("turn")
            reply = worker.receive()
            if timed:
                entry.seconds.append(reply["seconds"])
            else:
                entry.first_turn = time.perf_counter() - started
            entry.peak_memory = max(entry.peak_memory, reply["peak_memory"])

        try:
            for first in range(0, len(jobs), STARTING_AT_ONCE):
                started = {job.contestant.name: Worker(job) for job in jobs[first : first + STARTING_AT_ONCE]}
                workers |= started
                for name in started:
                    attempt(name, build)
            for number in range(rounds + 1):
                for name in list(workers) if number % 2 == 0 else list(workers)[::-1]:
                    attempt(name, lambda worker, timed=number > 0: turn(worker, timed))
        finally:
            for worker in workers.values():
                worker.close()
    return list(entries.values())


def estimate(seconds: float) -> str:
    """A duration for people."""
    return f"{math.ceil(seconds)} seconds" if seconds < 90 else f"{math.ceil(seconds / 60)} minutes"
