"""Making the runs, with a stub in place of training: what is skipped, resumed, stopped, refused, and what fails."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

from charlm.ablation import runner as runner_module
from charlm.ablation.results import measure, progress, read_record, seconds_per_step, table, write_tables
from charlm.ablation.rows import Job, Row, plan
from charlm.ablation.runner import Child, Outcome, Runner
from charlm.config import UserError

STUB = [sys.executable, Path(__file__).with_name("stub_train.py")]
SMALL = ["--train.steps=4", "--train.batch_size=4", "--model.context_length=16"]


def rates(*values: float) -> list[Row]:
    return [Row(f"rate {value}", flags=(f"--train.learning_rate={value}",)) for value in values]


@pytest.fixture
def jobs_of(tmp_path):
    def make(rows: Sequence[Row], seeds: int = 1, *flags: str) -> list[Job]:
        return plan(rows, [], [*SMALL, f"--run.dir={tmp_path / 'out'}", *flags], seeds)

    return make


@pytest.fixture
def make_runs(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def make(jobs: Sequence[Job], at_once: int = 2, **options) -> Outcome:
        runner = Runner(command=STUB, at_once=at_once, threads=3, after_each=options.get("after_each", lambda: None))
        return runner.run(jobs, tmp_path / "out")

    return make


def test_runs_are_made_measured_and_skipped(jobs_of, make_runs, capfd) -> None:
    """Guards against results under another row or seed, runs made twice, and threads that are not shared out."""
    rows, ended = rates(0.1, 0.2), []
    jobs = jobs_of(rows, 2)
    assert make_runs(jobs, after_each=lambda: ended.append(1)) == Outcome(total=4, done=4, failed=0, stopped=False)
    assert len(ended) == 4
    scores = {(job.row, job.seed): measure(job).bits_per_character for job in jobs}
    assert scores == {
        ("rate 0.1", 0): 2.1, ("rate 0.2", 0): 2.2, ("rate 0.1", 1): pytest.approx(2.11), ("rate 0.2", 1): 2.21,
    }  # fmt: skip
    assert measure(jobs[0]).bits_per_byte == pytest.approx(1.1)
    assert jobs[0].beside(".log").read_text() == "threads 3\n"
    assert 2**20 < measure(jobs[0]).peak_memory < 2**36
    assert measure(jobs[0]).cpu_seconds > 0
    said = capfd.readouterr().err
    assert "4 runs; 2 at once, threads of each: 3" in said
    assert "4 of 4: rate 0.2, seed 1: 2.2100 bits per character" in said
    assert make_runs(jobs) == Outcome(total=4, done=4, failed=0, stopped=False)
    assert jobs[0].beside(".log").read_text() == "threads 3\n", "a finished run was made again"


def test_failures_do_not_end_the_rest(jobs_of, make_runs, tmp_path, capfd) -> None:
    """Guards against one failure that ends all, a message that is lost, and a failed run that is never tried again."""
    rows = rates(0.1, 0.666, 0.75, 0.2)
    jobs = jobs_of(rows)
    assert make_runs(jobs, at_once=1) == Outcome(total=4, done=2, failed=2, stopped=False)
    lines = write_tables(rows, jobs, tmp_path / "out")
    assert [len(line.runs) for line in lines] == [1, 0, 0, 1]
    text = (tmp_path / "out" / "table.md").read_text()
    assert f"- rate 0.666, seed 0: train.learning_rate=0.666: number of the beast ({jobs[1].beside('.log')})" in text
    assert "- rate 0.75, seed 0: killed by SIGKILL; threads 3 (" in text
    assert "failed: rate 0.666, seed 0: train.learning_rate=0.666" in capfd.readouterr().err
    assert make_runs(jobs) == Outcome(total=4, done=2, failed=2, stopped=False)
    assert jobs[1].beside(".log").read_text().count("number of the beast") == 2
    assert jobs[0].beside(".log").read_text().count("threads") == 1


def test_a_signal_stops_all_and_the_same_command_goes_on(jobs_of, make_runs) -> None:
    """Guards against orphans, runs begun after the signal, a stop called a failure, and a first part forgotten."""
    jobs = jobs_of(rates(0.25), 3)

    def stop_when_two_run() -> None:
        while not all(progress(job) for job in jobs[:2]):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=stop_when_two_run)
    thread.start()
    assert make_runs(jobs) == Outcome(total=3, done=0, failed=0, stopped=True)
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is handler
    assert [progress(job) for job in jobs] == [0.5, 0.5, 0.0]
    assert not jobs[2].folder.exists()
    assert all(line.failures == () for line in table(rates(0.25), jobs))
    cpu_seconds = read_record(jobs[0])["cpu_seconds"]
    jobs[2].folder.parent.mkdir(exist_ok=True)
    jobs[2].beside(".log").write_text("threads")  # so that the stub does not wait
    assert make_runs(jobs) == Outcome(total=3, done=3, failed=0, stopped=False)
    assert read_record(jobs[0])["cpu_seconds"] > cpu_seconds


def test_another_configuration_is_refused(jobs_of, make_runs, tmp_path) -> None:
    """Guards against a table of runs that were not trained alike; what does not touch the result may change."""
    rows = rates(0.1)
    make_runs(jobs_of(rows))
    moved = jobs_of(rows, 1, "--train.keep_checkpoints=5", "--run.max_time=5h", "--data.path=elsewhere")
    assert make_runs(moved).done == 1
    changed = jobs_of([*rates(0.3), *rows], 1, "--train.steps=5", "--aux.layers.every=2")
    with pytest.raises(UserError) as error:
        make_runs(changed)
    for part in ("rate_0.1/seed-0", "aux.layers.every: 1 -> 2; train.steps: 4 -> 5", "--run.dir", "remove the folder"):
        assert part in str(error.value)
    assert not (tmp_path / "out" / "rate_0.3").exists()


def test_two_at_the_same_runs(jobs_of, make_runs, tmp_path) -> None:
    """Guards against two commands that train into the same folders."""
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(UserError, match="another process makes runs in it"):
        make_runs(jobs_of(rates(0.1)))


def test_the_line_of_progress(jobs_of, monkeypatch) -> None:
    """Guards against a line that wraps in a terminal of 80 columns, and time left that forgets what was resumed."""
    jobs = jobs_of([Row("a row with quite a long name, as some have"), Row("and another one of them")])
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(runner_module.time, "monotonic", lambda: 1600.0)
    runner, shown = Runner(command=STUB, at_once=2, threads=1, after_each=lambda: None), []
    runner.children = [Child(job, process=None, log_start=0, progress_start=0.25) for job in jobs]
    monkeypatch.setattr(runner_module, "progress", lambda job: 0.5 if job is jobs[0] else 0.75)
    runner.bar = SimpleNamespace(set_description_str=shown.append)
    # Made: 1 run, and 0.25 + 0.5 of two resumed ones, in 700 s. Left: 4.75 - 0.5 - 0.75 = 3.5 runs, or 1,400 s.
    runner.done, runner.total, runner.began, runner.made, runner.to_make = 3, 8, 900.0, 1.0, 4.75
    runner._draw()
    assert shown[-1].startswith("3/8 runs, 23:20 left; a row with quite a long name, as some have, seed 0 50%; a")
    assert len(shown[-1]) == 79


def test_time_per_step_by_hand() -> None:
    """Guards against the mean of speeds in place of that of times, the first rows in it, and validations as rows."""
    rows = [
        {"step": 10, "characters_per_second": 1.0},
        {"step": 20, "characters_per_second": 100.0},
        {"step": 20, "valid": {"bits_per_character": 3.0}},
        {"step": 50, "characters_per_second": 200.0},
    ]
    # 10 steps of 100 characters take 10 s, 30 steps take 15 s.
    assert seconds_per_step(rows, 100) == pytest.approx(25 / 40)
    assert seconds_per_step(rows[:1], 100) is None


@pytest.mark.parametrize("bits", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_no_result(jobs_of, make_runs, bits) -> None:
    """Guards against a diverged run that makes a mean of its row's."""
    jobs = jobs_of(rates(0.1))
    make_runs(jobs)
    with (jobs[0].folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "valid": {"bits_per_character": bits, "bits_per_byte": bits}}) + "\n")
    assert measure(jobs[0]) is None
