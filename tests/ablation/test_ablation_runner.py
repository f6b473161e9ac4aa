"""The runner, with a stub in place of training: runs that are skipped, resumed, stopped, refused, and that fail."""

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from filelock import FileLock

from charlm.ablation.runner import Runner
from charlm.ablation.table import write_tables
from charlm.ablation.variants import Variant, VariantRun, plan, seconds_per_step
from charlm.config import UserError, flatten
from charlm.training.stop import StopRequests

STUB = [sys.executable, Path(__file__).with_name("stub_train.py")]
SMALL = {"train.steps": 4, "train.batch_size": 4, "model.context_length": 16}


def rates(*values: float) -> list[Variant]:
    return [Variant(f"rate {value}", {"train.learning_rate": value}) for value in values]


@pytest.fixture
def runs_of(tmp_path):
    def make(rows: Sequence[Variant], seeds: int = 1, **options: dict) -> list[VariantRun]:
        return plan(rows, [], SMALL | {"run.dir": tmp_path / "out"} | flatten(options, "."), seeds)

    return make


@pytest.fixture
def train(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def make(runs: Sequence[VariantRun], at_once: int = 2, **options) -> tuple[int, int, bool]:
        """How many runs are done and failed, and whether a signal stopped the rest."""
        runner = Runner(command=STUB, at_once=at_once, threads=3, after_each=options.get("after_each", lambda: None))
        runner.run(runs, tmp_path / "out")
        return runner.done, len(runner.failed), runner.signals > 0

    return make


def test_runs_are_made_measured_and_skipped(runs_of, train) -> None:
    """Guards against results under another row or seed, runs made twice, and threads that are not shared out."""
    rows, ended = rates(0.1, 0.2), []
    runs = runs_of(rows, 2)
    assert train(runs, after_each=lambda: ended.append(1)) == (4, 0, False)
    assert len(ended) == 4
    scores = {str(run): run.result()["bits_per_character"] for run in runs}
    named = {"rate 0.1, seed 0": 2.1, "rate 0.2, seed 0": 2.2, "rate 0.1, seed 1": 2.11, "rate 0.2, seed 1": 2.21}
    assert scores == pytest.approx(named)
    assert runs[0].result()["bits_per_byte"] == pytest.approx(1.1)
    assert runs[0].beside(".log").read_text() == "threads 3\n"
    assert 2**20 < runs[0].result()["peak_memory"] < 2**36
    assert runs[0].result()["cpu_seconds"] > 0
    assert train(runs) == (4, 0, False)
    assert runs[0].beside(".log").read_text() == "threads 3\n", "a finished run was made again"


def test_failures_do_not_end_the_rest(runs_of, train, tmp_path) -> None:
    """Guards against one failure that ends all, a message that is lost, and a failed run that is never tried again."""
    rows = rates(0.1, 0.666, 0.75, 0.2)
    runs = runs_of(rows)
    assert train(runs, at_once=1) == (2, 2, False)
    lines = write_tables(runs, tmp_path / "out")
    assert [len(row.results) for row in lines] == [1, 0, 0, 1]
    text = (tmp_path / "out" / "table.md").read_text()
    assert f"- rate 0.666, seed 0: train.learning_rate=0.666: number of the beast ({runs[1].beside('.log')})" in text
    assert "- rate 0.75, seed 0: killed by SIGKILL; threads 3 (" in text
    assert train(runs) == (2, 2, False)
    assert runs[1].beside(".log").read_text().count("number of the beast") == 2
    assert runs[0].beside(".log").read_text().count("threads") == 1


def test_a_signal_stops_all_and_the_same_command_goes_on(runs_of, train, tmp_path) -> None:
    """Guards against orphans, runs begun after the signal, a stop called a failure, and a first part forgotten."""
    runs = runs_of(rates(0.25), 3)

    def stop_when_two_run() -> None:
        while not all(run.fraction_done() for run in runs[:2]):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=stop_when_two_run)
    thread.start()
    assert train(runs) == (0, 0, True)
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is handler
    assert [run.fraction_done() for run in runs] == [0.5, 0.5, 0.0]
    assert not runs[2].folder.exists()
    assert not any(row.failures for row in write_tables(runs, tmp_path / "out"))
    cpu_seconds = runs[0].costs().cpu_seconds
    runs[2].folder.parent.mkdir(exist_ok=True)
    runs[2].beside(".log").write_text("threads")  # so that the stub does not wait
    assert train(runs) == (3, 0, False)
    assert runs[0].costs().cpu_seconds > cpu_seconds


def test_another_configuration_is_refused(runs_of, train, tmp_path, monkeypatch) -> None:
    """Guards against a table of runs that were not trained alike, and two commands that train in the same folders.
    Options that do not affect the result may change."""
    rows = rates(0.1)
    train(runs_of(rows))
    moved = {"train": {"keep_checkpoints": 5}, "run": {"max_time": "5h"}, "data": {"path": "elsewhere"}}
    assert train(runs_of(rows, **moved))[0] == 1
    changed = runs_of([*rates(0.3), *rows], train={"steps": 5}, aux={"layers": {"every": 2}})
    with pytest.raises(UserError) as error:
        train(changed)
    for part in ("rate_0.1/seed-0", "aux.layers.every: 1 -> 2; train.steps: 4 -> 5", "--run.dir", "remove the folder"):
        assert part in str(error.value)
    assert not (tmp_path / "out" / "rate_0.3").exists()
    monkeypatch.setattr("charlm.runs.folder.PATIENCE", 0)
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(UserError, match="another process"):
        train(runs_of(rates(0.2)))


def test_a_run_knows_the_ablation_that_started_it(runs_of, monkeypatch, tmp_path) -> None:
    """Guards against runs that outlive a killed ablation, and are in the way of the next one."""
    runner = Runner([sys.executable, "-c", "import os; print(os.environ['CHARLM_LAUNCHER'])"], 1, 1, lambda: None)
    runner.run(runs_of(rates(0.1))[:1], tmp_path / "out")
    log = (tmp_path / "out" / "rate_0.1" / "seed-0.log").read_text()
    assert log == f"{os.getpid()}\n"
    for launcher, reason in ((os.getppid(), None), (999_999_999, "the launcher is gone")):
        monkeypatch.setenv("CHARLM_LAUNCHER", str(launcher))
        stop = StopRequests()
        assert (stop.agreed(), stop.reason) == (reason is not None, reason)


def test_an_ablation_that_lost_its_folder_stops(runs_of, tmp_path) -> None:
    """Guards against tables of two ablations in one folder, and a traceback from the costs of a run that is gone."""
    code = f"import shutil, time; shutil.rmtree({str(tmp_path / 'out')!r}); time.sleep(60)"
    with pytest.raises(UserError, match="out: was removed, moved or replaced"):
        Runner([sys.executable, "-c", code], 1, 1, lambda: None).run(runs_of(rates(0.1)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


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


def test_a_score_that_is_no_number_is_no_result(runs_of, train) -> None:
    """Guards against a diverged run that spoils the mean of its row."""
    runs = runs_of(rates(0.1))
    train(runs)
    with (runs[0].folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "valid": {"bits_per_character": NaN, "bits_per_byte": NaN}}\n')
    assert runs[0].result() is None
