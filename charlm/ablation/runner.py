"""Runs in processes of their own, several at once: the done are skipped, the begun go on, the failed are noted."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout
from tqdm import tqdm

from charlm.ablation.results import check_unchanged, measure, progress, write_record
from charlm.ablation.rows import Job
from charlm.config import UserError
from charlm.config_files import to_yaml
from charlm.process import RSS_UNIT
from charlm.runs.folder import write_whole
from charlm.terminal import fitted

POLL_SECONDS = 0.2
REDRAW_SECONDS = 2.0
LONGEST_MESSAGE = 300
LEAST_TO_JUDGE_BY = 0.02
"""Of a run, that must be made before the time that is left is estimated."""
SAME_REQUEST = 1.0
"""Seconds in which further signals count as the first."""
STOPPED = (0, -signal.SIGTERM, -signal.SIGKILL)
"""Exit codes of a run that was told to stop: saved, not begun yet, ended at once."""


@dataclass
class Child:
    """The process of a run."""

    job: Job
    process: subprocess.Popen
    log_start: int
    """Where in the log its own words begin."""
    progress_start: float
    """How far the run was when the process began."""


@dataclass(frozen=True)
class Outcome:
    """How many runs there are, how many are done, how many failed now, and whether a signal ended it."""

    total: int
    done: int
    failed: int
    stopped: bool


@dataclass
class Runner:
    """Makes runs, `at_once` at a time, by `command --config FILE`."""

    command: Sequence[str | Path]
    at_once: int
    threads: int
    """Of each process, where the environment does not say (OMP_NUM_THREADS)."""
    after_each: Callable[[], object]
    """Called whenever a run has ended."""
    children: list[Child] = field(default_factory=list)
    signals: int = 0
    signalled_at: float = 0.0

    def run(self, jobs: Sequence[Job], folder: Path) -> Outcome:
        """Make those of `jobs` that are not done, in their order, until SIGINT, SIGTERM or SIGHUP.

        The first signal has the runs under way write a checkpoint, the second ends them at once.

        Raises:
            UserError: before anything is made: a run was begun with another configuration, or another process works in
                `folder`.
        """
        check_unchanged(jobs)
        with _locked(folder):
            waiting = [job for job in jobs if measure(job) is None]
            self.total, self.done, self.failed = len(jobs), len(jobs) - len(waiting), 0
            self.began, self.made, self.to_make = time.monotonic(), 0.0, float(len(waiting))
            with self._catching_signals(), tqdm(bar_format="{desc}", disable=None, leave=False) as self.bar:
                before = f", {self.done} of them done before" if self.done else ""
                threads = os.environ.get("OMP_NUM_THREADS", self.threads)
                runs = f"{self.total} run{'s' if self.total > 1 else ''}"
                self._say(f"{runs}{before}; {self.at_once} at once, threads of each: {threads}; in {folder}")
                try:
                    self._make(waiting)
                finally:
                    self._end_children()
        return Outcome(self.total, self.done, self.failed, self.signals > 0)

    def _make(self, waiting: list[Job]) -> None:
        drawn, told = 0.0, 0
        while self.children or (waiting and not self.signals):
            while waiting and len(self.children) < self.at_once and not self.signals:
                self.children.append(self._start(waiting.pop(0)))
            if told < self.signals:
                told = self.signals
                for child in self.children:
                    os.kill(child.process.pid, signal.SIGTERM if told == 1 else signal.SIGKILL)
            for child in list(self.children):
                if self._has_ended(child):
                    self.children.remove(child)
                    self.after_each()
            if time.monotonic() - drawn > REDRAW_SECONDS:
                self._draw()
                drawn = time.monotonic()
            time.sleep(POLL_SECONDS)

    def _start(self, job: Job) -> Child:
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        write_whole(job.beside(".yaml"), to_yaml(job.config))
        with job.beside(".log").open("ab") as log:
            start = log.tell()
            process = subprocess.Popen(
                [*map(str, self.command), "--config", str(job.beside(".yaml"))],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": str(self.threads)} | os.environ,
                start_new_session=True,  # or Ctrl-C would reach it twice, from the terminal and from here
            )
        return Child(job, process, start, progress(job))

    def _has_ended(self, child: Child) -> bool:
        """Whether it has; then its result is noted and said."""
        pid, status, usage = os.wait4(child.process.pid, os.WNOHANG)
        if pid == 0:
            return False
        child.process.returncode = os.waitstatus_to_exitcode(status)
        result = measure(child.job)
        stopped = self.signals > 0 and child.process.returncode in STOPPED
        failure = None if result is not None or stopped else _last_words(child)
        write_record(
            child.job,
            peak_memory=usage.ru_maxrss * RSS_UNIT,
            cpu_seconds=usage.ru_utime + usage.ru_stime,
            failure=failure,
        )
        if result is not None:
            self.done += 1
            self._say(
                f"{self.done:>{len(str(self.total))}} of {self.total}: {child.job}: "
                f"{result.bits_per_character:.4f} bits per character"
            )
        elif failure is not None:
            self.failed += 1
            self._say(f"failed: {child.job}: {failure}")
        self.made += (1.0 if result is not None else progress(child.job)) - child.progress_start
        self.to_make -= 1.0
        return True

    def _end_children(self) -> None:
        """After an error of our own: leave none behind."""
        for child in self.children:
            child.process.terminate()
        for child in self.children:
            child.process.wait()

    @contextmanager
    def _catching_signals(self) -> Iterator[None]:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # under nohup a terminal that closes is no matter
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.signals == 0 or now - self.signalled_at > SAME_REQUEST:
            self.signals, self.signalled_at = self.signals + 1, now

    def _say(self, line: str) -> None:
        tqdm.write(fitted(line), file=sys.stderr)

    def _draw(self) -> None:
        shares = [(child, progress(child.job)) for child in self.children]
        made = self.made + sum(share - child.progress_start for child, share in shares)
        left = self.to_make - sum(share for _, share in shares)
        parts = [f"{self.done}/{self.total} runs"]
        if made > LEAST_TO_JUDGE_BY:
            parts[0] += f", {tqdm.format_interval((time.monotonic() - self.began) / made * left)} left"
        if self.signals:
            parts[0] += ", stopping"
        parts += [f"{child.job} {share:.0%}" for child, share in shares]
        self.bar.set_description_str("; ".join(parts)[: shutil.get_terminal_size().columns - 1])


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise UserError(f"run.dir={folder}: another process makes runs in it; let it end") from None
    except FileExistsError:
        raise UserError(f"run.dir={folder}: is a file; choose another --run.dir") from None


def _last_words(child: Child) -> str:
    """Why it failed: the first line of its error, else the last that it printed; and where there is more."""
    log = child.job.beside(".log")
    with log.open("rb") as file:
        file.seek(child.log_start)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    message = (errors or lines[-1:] or ["it said nothing"])[0].removeprefix("error: ")
    if child.process.returncode < 0:
        message = f"killed by {signal.Signals(-child.process.returncode).name}; {message}"
    return f"{message[:LONGEST_MESSAGE]} ({log})"
