"""Trains runs, each in a process of its own; finished ones are skipped."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from charlm.ablation.variants import VariantRun
from charlm.config.load import to_yaml
from charlm.files import write_whole
from charlm.process import RSS_UNIT
from charlm.runs.folder import Run
from charlm.text import fitted, visible
from charlm.training.stop import LAUNCHER, SAME_REQUEST

POLL_SECONDS, REDRAW_SECONDS = 0.2, 2.0
LONGEST_MESSAGE = 300
BAR = {"smoothing": 0, "disable": None, "leave": False}
# Exit codes when told to stop: it saved, had not begun, or was killed.
STOPPED = (0, -signal.SIGTERM, -signal.SIGKILL)


class Child(NamedTuple):
    """The process of a run, and where in the log file its output begins."""

    run: VariantRun
    process: subprocess.Popen
    log_start: int


@dataclass
class Runner:
    """Trains runs by `command --config FILE`, at most `at_once` at a time."""

    command: Sequence[str | Path]
    at_once: int
    threads: int  # of each process, unless OMP_NUM_THREADS is set
    after_each: Callable[[], object]
    children: list[Child] = field(default_factory=list)
    done: int = 0  # now or earlier
    failed: list[VariantRun] = field(default_factory=list)
    signals: int = 0
    signalled_at: float = float("-inf")

    def run(self, runs: Sequence[VariantRun], folder: Path) -> None:
        """Train the unfinished `runs`. The first signal stops, the second kills them.

        Raises UserError if a run was begun with another configuration, another process works in
        `folder`, or `folder` is removed meanwhile.
        """
        for run in runs:
            run.check_unchanged()
        stopping = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup ignores it
            stopping.append(signal.SIGHUP)
        place = Run(folder)
        with place.lock(), ExitStack() as stack:
            for number in stopping:
                earlier = signal.signal(number, self._on_signal)
                stack.callback(signal.signal, number, earlier)
            waiting = [run for run in runs if run.result() is None]
            self.done = len(runs) - len(waiting)
            _say(f"{folder}: {len(runs)} runs, {self.done} finished; {self.at_once} at once")
            begun = sum(run.fraction_done() for run in runs)
            form = "{desc}, {remaining} left{postfix}"
            try:
                with tqdm(total=len(runs), initial=begun, bar_format=form, **BAR) as bar:
                    self._train(waiting, runs, place, bar)
            finally:  # also after an error
                for child in self.children:
                    child.process.terminate()
                for child in self.children:
                    child.process.wait()

    def _train(self, waiting: list[VariantRun], runs: Sequence[VariantRun], place: Run, bar: tqdm) -> None:
        drawn, told = 0.0, 0
        while self.children or (waiting and not self.signals):
            place.check_held()
            while waiting and len(self.children) < self.at_once and not self.signals:
                self.children.append(self._start(waiting.pop(0)))
            if told < self.signals:
                told = self.signals
                number = signal.SIGTERM if told == 1 else signal.SIGKILL
                for child in self.children:
                    os.kill(child.process.pid, number)  # send_signal would reap an ended one
            for child in list(self.children):
                pid, status, usage = os.wait4(child.process.pid, os.WNOHANG)
                if pid:
                    child.process.returncode = os.waitstatus_to_exitcode(status)
                    self.children.remove(child)
                    failure = self._note_end(child, len(runs))
                    cpu_seconds = usage.ru_utime + usage.ru_stime
                    child.run.add_costs(usage.ru_maxrss * RSS_UNIT, cpu_seconds, failure)
                    self.after_each()
            if time.monotonic() - drawn > REDRAW_SECONDS:
                stopping = ", stopping" if told else ""
                bar.n = sum(1.0 if run in self.failed else run.fraction_done() for run in runs)
                bar.set_description_str(f"{self.done}/{len(runs)} runs{stopping}", refresh=False)
                training = [f"{run} {run.fraction_done():.0%}" for run, *_ in self.children]
                bar.set_postfix_str(visible("; ".join(training)))
                drawn = time.monotonic()
            time.sleep(POLL_SECONDS)

    def _start(self, run: VariantRun) -> Child:
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        write_whole(run.beside(".yaml"), to_yaml(run.config))
        launcher = str(os.getpid())
        with run.beside(".log").open("ab") as log:
            start = log.tell()
            process = subprocess.Popen(
                [*map(str, self.command), "--config", str(run.beside(".yaml"))],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": str(self.threads)} | os.environ | {LAUNCHER: launcher},
                start_new_session=True,  # out of reach of the terminal's Ctrl-C
            )
        return Child(run, process, start)

    def _note_end(self, child: Child, total: int) -> str | None:
        failure = None
        if result := child.run.result():
            self.done += 1
            score = f"{result['bits_per_character']:.4f} bits per character"
            _say(f"{self.done} of {total}: {child.run}: {score}")
        elif not self.signals or child.process.returncode not in STOPPED:
            self.failed.append(child.run)
            failure = _failure(child)
            _say(f"failed: {child.run}: {failure}")
        return failure

    def _on_signal(self, *_: object) -> None:
        now = time.monotonic()
        if now - self.signalled_at > SAME_REQUEST:
            self.signals, self.signalled_at = self.signals + 1, now


def _say(line: str) -> None:
    tqdm.write(fitted(line), file=sys.stderr)


def _failure(child: Child) -> str:
    log = child.run.beside(".log")
    output = log.read_bytes()[child.log_start :].decode(errors="replace")
    lines = ["it printed nothing", *filter(str.strip, output.splitlines())]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    message = (errors or lines[-1:])[0].strip()
    if child.process.returncode < 0:
        message = f"killed by {signal.Signals(-child.process.returncode).name}; {message}"
    return f"{message[:LONGEST_MESSAGE]} ({log})"
