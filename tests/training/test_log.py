"""Rows of metrics.jsonl and the progress line, against a clock that the test moves."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch

from charlm.config import AuxConfig, Config, ModelConfig, RunConfig, TrainConfig
from charlm.objective.terms import build_terms
from charlm.runs.folder import Run
from charlm.training import log as tracking
from charlm.training.log import Tracker
from charlm.training.start import TrainState
from charlm.training.update import StepReport
from tiny import TINY, checkpoint_folder, train


class Clock:
    """In place of the module `time`."""

    now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(tracking, "time", clock)
    monkeypatch.setattr(tracking, "peak_memory", lambda: 2**20)
    return clock


@pytest.fixture
def build_tracker(tmp_path, clock):
    """`build_tracker(step, seconds, main)`: a tracker of 8 steps of 3 windows of 5 characters, with two layers."""
    config = Config(
        model=ModelConfig(num_layers=2, context_length=5),
        train=TrainConfig(steps=8, batch_size=3),
        run=RunConfig(dir=tmp_path / "run"),
    )
    run, terms = Run.create(config, {}), build_terms(AuxConfig(), 2)
    split = {"symbols": 2 * math.log(2), "characters": 1}  # two bits per nat
    corpus = SimpleNamespace(sources={}, splits={"train": split})

    def build(step: int = 0, seconds: float = 0.0, main: bool = True) -> Tracker:
        return Tracker(run, config, corpus, terms, TrainState(step=step, seconds=seconds), main)

    return build


def update(step: int, total: float, *losses: float) -> StepReport:
    names = ["layer1/offset1/all", "layer1/offset2/all", "layer2/offset1/all", "layer2/offset2/all"]
    return StepReport(step, total, dict(zip(names[-len(losses) :], losses, strict=True)), skipped=None)


def rows(tracker: Tracker) -> list[dict]:
    return list(tracker.run.metrics())


def test_training_rows_by_hand(build_tracker, clock):
    """Guards against weights of the next step, learned weights that are not logged, bits of the wrong term, and a speed
    that includes validation or counts one process only."""
    tracker = build_tracker()
    clock.now += 4.0
    hedge = SimpleNamespace(layers=[1, 2], weights=torch.tensor([0.25, 0.75]))
    tracker.log_training(update(2, 9.0, 4.0, 3.0, 2.0, 1.0), 0.125, hedge)
    clock.now += 1.0
    with tracker.speed_paused("validating"):
        clock.now += 100.0
    clock.now += 1.0
    tracker.log_training(update(3, 2.5, 1.5, 2.0), 0.25)
    first, second = rows(tracker)
    assert first == {
        "step": 2,
        "progress": 0.25,
        "loss": 9.0,
        "bits_per_character": 4.0,
        "learning_rate": 0.125,
        "characters_per_second": 2 * 3 * 5 / 4,
        "seconds": 4.0,
        "memory": 2**20,
        # The update that completed step 2 was weighed at 1/8, before layer 1 of 2 stops at 1/4.
        "terms": {
            "layer1/offset1/all": {"loss": 4.0, "weight": 1.0},
            "layer1/offset2/all": {"loss": 3.0, "weight": 0.5},
            "layer2/offset1/all": {"loss": 2.0, "weight": 1.0},
            "layer2/offset2/all": {"loss": 1.0, "weight": 0.5},
        },
        "hedge": {"layer1": 0.25, "layer2": 0.75},
    }
    assert second.keys() == first.keys() - {"hedge"}
    assert (second["bits_per_character"], second["characters_per_second"]) == (3.0, 3 * 5 / 2)
    assert (second["seconds"], list(second["terms"])) == (106.0, ["layer2/offset1/all", "layer2/offset2/all"])


def test_validation_rows_by_hand(build_tracker, clock, capfd):
    """Guards against validations missing from the log, and lines that do not say which checkpoint is the best."""
    tracker = build_tracker()
    clock.now += 7.0
    tracker.log_validation(4, 2.5, 2.25, best=True, sources={"text": 2.5})
    tracker.log_validation(8, 2.75, 2.5, best=False, sources={"a": 2.5, "b": 3.5})
    assert rows(tracker) == [
        {"step": 4, "progress": 0.5, "seconds": 7.0, "valid": {"bits_per_character": 2.5, "bits_per_byte": 2.25}},
        {
            "step": 8,
            "progress": 1.0,
            "seconds": 7.0,
            "valid": {
                "bits_per_character": 2.75,
                "bits_per_byte": 2.5,
                "bits_per_character/a": 2.5,
                "bits_per_character/b": 3.5,
            },
        },
    ]
    assert capfd.readouterr() == (
        "",
        "step 4: valid 2.5000 bits per character (best so far)\nstep 8: valid 2.7500 bits per character\n",
    )


def test_a_resumed_run_goes_on_counting(build_tracker, clock):
    """Guards against seconds that restart at zero, and a speed that includes steps from before the resumption."""
    tracker = build_tracker(step=4, seconds=50.0)
    clock.now += 3.0
    tracker.log_training(update(6, 3.0, 1.5, 2.0), 0.5)
    (row,) = rows(tracker)
    assert (row["seconds"], row["characters_per_second"]) == (53.0, 2 * 3 * 5 / 3)


def test_the_progress_line(build_tracker, clock, capsys, monkeypatch):
    """Guards against a line that lacks something: step, loss, bits, rate, active terms, speed or the time left; and
    time that is left for a finished run."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    tracker = build_tracker()
    for step, losses in ((2, (4.0, 3.0, 2.0, 1.0)), (8, (1.5, 2.0))):
        clock.now += 1.0
        tracker.log_training(update(step, 2.5, *losses), 0.002)
        tracker.bar.refresh()
        with tracker.speed_paused("validating"):
            clock.now += 10.0
    tracker.conclude(8, 2.5)
    tracker.close()
    lines = [line.strip() for line in capsys.readouterr().err.replace("\r", "\n").splitlines()]
    assert "2/8 00:00 left loss 2.5 4.000 bpc lr 2.0e-03 4 terms 30 ch/s" in lines  # by tqdm's own clock
    assert "0/8 ? left" in lines  # before the first step is over
    assert "8/8 00:00 left, validating" in lines
    assert lines[-1] == "8/8 00:00 left loss 2.5 3.000 bpc lr 2.0e-03 2 terms 90 ch/s"


def test_the_progress_line_of_a_long_run_fits(build_tracker, clock, capsys, monkeypatch):
    """Guards against a line that does not fit into 80 columns, whose end, the speed, would be cut."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "81")  # tqdm leaves one of those that COLUMNS names
    tracker = build_tracker()
    tracker.bar.total, tracker.train = 100_000, tracker.train.replace(steps=100_000)
    tracker.symbols_per_step = 512
    tracker.began -= 40_000.0
    tracker.bar.start_t -= 40_000.0
    tracker.logged_seconds = 40_000.0
    clock.now += 4.0
    tracker.log_training(update(50_000, 123.456, 1.5, 2.0), 0.002)
    tracker.bar.refresh()
    line = capsys.readouterr().err.rpartition("\r")[2]
    assert line.strip() == "50000/100000 11:06:40 left loss 123.5 3.000 bpc lr 2.0e-03 2 terms 6400.0k ch/s"


def test_the_last_lines(build_tracker, clock, capfd):
    """Guards against a time that includes earlier processes of the run, and a wrong share of pauses."""
    tracker = build_tracker(seconds=1000.0)
    clock.now += 30.0
    with tracker.speed_paused("validating"):
        clock.now += 10.0
    tracker.conclude(4, 2.5)
    assert capfd.readouterr().err == (
        "best: 2.5000 bits per character on valid, at step 4 of 8\n"
        "time: 00:40, 25% of it for validations, checkpoints and diagnostics\n"
    )


@pytest.mark.parametrize("main", [True, False])
def test_rows_outside_a_terminal(main, build_tracker, clock, capfd):
    """Guards against logs filled with thousands of progress lines, and rows and lines written once per process."""
    tracker = build_tracker(main=main)
    clock.now += 1.0
    tracker.log_training(update(2, 9.0, 1.5, 2.0), 0.125)
    tracker.record(2, {"diagnostics": {}})
    tracker.log_validation(4, 2.5, 2.25, best=True, sources={"text": 2.5})
    tracker.record(5, {"skipped": 1})
    tracker.say("step 5: skipped")
    tracker.close()
    assert [row["step"] for row in rows(tracker)] == ([2, 2, 4, 5] if main else [])
    assert [line.partition(":")[0] for line in capfd.readouterr().err.splitlines()] == (
        ["step 4", "step 5"] if main else []
    )


def test_training_outlives_its_log(text_corpus_flags, tmp_path, monkeypatch):
    """Guards against a run from Python whose work is lost with the disk of its log."""
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        run = train(*TINY, *text_corpus_flags, f"--run.dir={tmp_path / 'run'}")
        assert sys.stderr is full
    assert checkpoint_folder(run, 3).exists()
