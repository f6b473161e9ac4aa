"""train.time: steps that fit into a time. The clock is a pretended one, so that their number is known."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import charlm
from charlm.ablation.variants import parse_row, plan
from charlm.config import Stopped
from charlm.runs.folder import Run
from charlm.training import clock
from charlm.training.loop import Training, train
from launched import train_with_two_processes
from tiny import TINY, assert_ended_like, history, refused, run_script, typed

FLAGS = [
    *(flag for flag in TINY if "steps" not in flag),
    *typed("--train.time=100s --train.context_divisor=4 --train.full_context_from=0.5 --train.lr_schedule=linear"),
    *typed("--train.valid_every=0.25 --train.log_every=1 --train.keep_checkpoints=100 --model.residual_dropout=0.1"),
]


class Clock:
    """Seconds that pass in steps and validations only."""

    def __init__(self):
        self.now = 0.0
        self.short, self.long, self.validation = 1.0, 3.0, 10.0
        clock = self

        class Timed(Training):
            def step(self) -> None:
                super().step()
                clock.now += clock.short if self.state.step <= self.config.train.steps / 2 else clock.long

            def validate(self) -> None:
                super().validate()
                clock.now += clock.validation

        self.kind = Timed

    def train(self, *flags: str) -> Path:
        return train(charlm.load_config(overrides=flags), self.kind)


@pytest.fixture
def pretended(monkeypatch) -> Clock:
    """The clock that measures."""
    found = Clock()
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: found.now))
    return found


def steps(run: Path) -> int:
    train = Run.open(run).config().train
    assert train.time is None
    return train.steps


@pytest.mark.parametrize(
    ("total", "validation", "expected"),
    [
        # The trial: twice a step in each of four parts, 2 * (1 + 1 + 3 + 3) s, and a validation: 26 s. Of the 99 s to
        # aim at 73 are left; 4 validations take 40, and steps 2 s on average: 16.
        (100, 10.0, 16),
        # As long as 30 s for timing: two rounds of int(15 / 8) = 1 step in each part, 16 s more. 297 - 33 s are left,
        # for 129 steps and 5 validations: after the 32nd, 64th, 96th, 128th and 129th.
        (300, 1.0, 129),
    ],
)
def test_the_steps_that_fit(total, validation, expected, pretended, tmp_path, text_corpus_flags, capfd):
    """Guards against steps of one window length taken for all, validations or the trial itself left out, and a run
    whose schedules or records know nothing of the number."""
    pretended.validation = validation
    run = pretended.train(*FLAGS, *text_corpus_flags, f"--run.dir={tmp_path / 'run'}", f"--train.time={total}s")
    assert steps(run) == expected
    assert 0.97 * total <= pretended.now <= total
    rows = history(run)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, expected + 1))
    rates = [row["learning_rate"] for row in rows if "loss" in row]
    assert rates[-1] == pytest.approx(1e-3 / expected)  # the line that reaches zero after it
    assert f"{expected} steps of 2 s fit" in capfd.readouterr().err


def test_a_timed_run_is_reproduced_from_its_config(pretended, tmp_path, text_corpus_flags):
    """Guards against a trial that leaves a trace, in parameters, noise, files or trackers."""
    flags = [*FLAGS, *text_corpus_flags, *typed("--model.ngrams=[2] --train.optimizer=muon --aux.hedge.enabled=true")]
    run = pretended.train(*flags, f"--run.dir={tmp_path / 'run'}")
    again = charlm.train(charlm.load_config(run / "config.yaml", {"run.dir": tmp_path / "again"}))
    assert_ended_like(again, run)
    assert {path.name for path in run.iterdir()} == {path.name for path in again.iterdir()}


@pytest.mark.parametrize("left", ["checkpoints", "metrics", "config"])
def test_a_run_that_is_killed_keeps_its_steps(left, pretended, tmp_path, text_corpus_flags, capfd):
    """Guards against a number that is measured anew on a machine that has become faster; also for a run that was killed
    before its first row."""
    flags = [*FLAGS, *text_corpus_flags]
    run = pretended.train(*flags, f"--run.dir={tmp_path / 'run'}")
    whole = shutil.copytree(run, tmp_path / "whole")
    pretended.short = pretended.long = 0.1
    for step in (8, 4):
        for checkpoint in (run / "checkpoints").glob("step-*"):
            if int(checkpoint.name[-8:]) > step or left != "checkpoints":
                shutil.rmtree(checkpoint)
        if left == "config":
            (run / "metrics.jsonl").unlink()
            for pointer in ("best", "last"):
                (run / "checkpoints" / pointer).unlink()
        pretended.train(*flags, f"--run.dir={run}", "--run.auto_resume=true")
        assert_ended_like(run, whole)
    assert "fit" not in capfd.readouterr().err.partition("fit")[2]


def test_a_finished_run_that_is_stopped_and_asked_for_more_steps_takes_them(pretended, tmp_path, text_corpus_flags):
    """Guards against a timed run that can never be trained longer."""
    flags = [*FLAGS, *text_corpus_flags, f"--run.dir={tmp_path / 'run'}"]
    run = pretended.train(*flags)
    flags = [flag for flag in flags if "time" not in flag]
    assert steps(pretended.train(*flags, "--run.resume=true", "--train.steps=20")) == 20
    assert history(run)[-1]["step"] == 20


def test_a_stop_while_measuring_leaves_nothing(pretended, tmp_path, text_corpus_flags):
    """Guards against a folder without a run, and a message about steps that were never made."""
    pretended.kind.validate = lambda self: (signal.raise_signal(signal.SIGTERM), super(pretended.kind, self).validate())
    with pytest.raises(Stopped, match="stopped before training began: SIGTERM; there is nothing new to save"):
        pretended.train(*FLAGS, *text_corpus_flags, f"--run.dir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("refuse", ["too short", "beside steps", "in a table"])
def test_what_cannot_be_timed_is_refused(refuse, pretended, tmp_path, text_corpus_flags):
    """Guards against a run of no step, a number that silently wins over a time, and rows of unequal length."""
    flags = [*FLAGS, *text_corpus_flags, f"--run.dir={tmp_path / 'run'}"]
    refusals: dict[str, Callable[[], object]] = {
        "too short": lambda: pretended.train(*flags, "--train.time=30s"),
        "beside steps": lambda: pretended.train(*flags, "--train.steps=5"),
        "in a table": lambda: plan([parse_row("--train.time=1h")], [], {}, 1),
    }
    with refused("train.time"):
        refusals[refuse]()
    assert not (tmp_path / "run").exists()


def test_a_time_is_explained(capfd):
    """Guards against steps of a run whose number is not known yet. The target's weight stops at 0.7."""
    flags = ["--train.time=1h", "--aux.targets.schedule=cutoff", "--aux.targets.end=0.7"]
    assert run_script("explain", *flags, "--json") == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["steps"], found["time"]) == (None, "1h")
    assert found["terms"][-1]["stops_at"] == 0.7 and found["terms"][-1]["stops_at_step"] is None
    assert run_script("explain", *flags) == 0
    text = capfd.readouterr().out
    assert "as many steps as fit into 1h, of 8,192 characters" in text and "100,000" not in text
    assert text.splitlines()[-1].split()[:3] == ["layer12/offset2/all", "0.5", "0.7"]


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["no", "fsdp2"])
def test_two_processes_agree_on_the_steps(sharding, tmp_path, text_corpus_flags):
    """Guards against processes that wait for each other for ever, and a trial that leaves a trace in one of them."""
    flags = [*FLAGS, *text_corpus_flags, f"--train.sharding={sharding}"]
    timed = [*flags, "--train.time=8s", f"--run.dir={tmp_path / 'run'}"]
    train_with_two_processes(tmp_path / "plan.json", [timed])
    found = steps(tmp_path / "run")
    flags = [flag for flag in flags if "time" not in flag] + [f"--train.steps={found}"]
    train_with_two_processes(tmp_path / "plan.json", [[*flags, f"--run.dir={tmp_path / 'again'}"]])
    assert_ended_like(tmp_path / "again", tmp_path / "run")
