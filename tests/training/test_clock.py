"""train.time: steps that fit into a time. The clock is a pretended one, so that their number is known."""

import json
import random
import shutil
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

import charlm
from charlm.ablation.variants import parse_row, plan
from charlm.config import Stopped, TrainConfig
from charlm.runs.folder import Run
from charlm.training import clock, log
from charlm.training.loop import Training, train
from charlm.training.optimizers import decay_of, learning_rate_factor
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
        self.short, self.long, self.validation = 1.0, 3.0, 2.0
        self.load: Callable[[float], float] = lambda now: 1.0
        self.after_step: Callable[[int], None] = lambda step: None
        clock = self

        class Timed(Training):
            def step(self) -> None:
                super().step()
                is_short = self.config.train.progress(self.state.step) <= 0.5
                clock.now += (clock.short if is_short else clock.long) * clock.load(clock.now)
                clock.after_step(self.state.step)

            def validate(self) -> None:
                super().validate()
                with self.tracker.speed_paused("validating"):
                    clock.now += clock.validation * clock.load(clock.now)

        self.kind = Timed

    def read(self) -> float:
        self.now += 1e-6  # no two readings are equal
        return self.now

    def train(self, *flags: str) -> Path:
        return train(charlm.load_config(overrides=flags), self.kind)


@pytest.fixture
def pretended(monkeypatch) -> Clock:
    """The clock that measures."""
    found = Clock()
    for module in (clock, log):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=found.read))
    return found


def steps(run: Path) -> int:
    train = Run.open(run).config().train
    assert train.time is None
    return train.steps


# The trial: three times a step in each quarter, 3 * (1 + 1 + 3 + 3) s or as long at one speed, and a validation, 0.1 s.
# Of the 99 s to aim at 74.8 are left without the last validation: 37 steps of 2 s on average.
@pytest.mark.parametrize(("short", "long"), [(1.0, 3.0), (2.0, 2.0)])
def test_the_steps_that_fit(short, long, pretended, tmp_path, text_corpus_flags, capfd):
    """Guards against steps of one window length taken for all, validations or the trial itself left out, a run whose
    schedules or records know nothing of the number, and a plan that changes although nothing has."""
    pretended.short, pretended.long, pretended.validation = short, long, 0.1
    run = pretended.train(*FLAGS, *text_corpus_flags, f"--run.dir={tmp_path / 'run'}", "--train.time=100s")
    assert "37 steps of 2 s fit" in capfd.readouterr().err
    assert 94 <= pretended.now <= 108
    plan = Run.open(run).config().train
    assert plan.planned == 37 and (not plan.steps_before) is (short == long)
    rows = [row for row in history(run) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, plan.steps + 1))
    assert [row["progress"] for row in rows] == pytest.approx(list(map(plan.progress, range(1, plan.steps + 1))))


def test_a_timed_run_is_reproduced_from_its_config(pretended, tmp_path, text_corpus_flags):
    """Guards against a trial that leaves a trace, in parameters, noise, files or trackers."""
    flags = [
        *FLAGS,
        *text_corpus_flags,
        *typed("--model.ngrams=[2] --model.ngram_buckets=64 --train.optimizer=muon --aux.hedge.enabled=true"),
    ]
    run = pretended.train(*flags, f"--run.dir={tmp_path / 'run'}")
    again = charlm.train(charlm.load_config(run / "config.yaml", {"run.dir": tmp_path / "again"}))
    assert_ended_like(again, run)
    assert {path.name for path in run.iterdir()} == {path.name for path in again.iterdir()}


LOADS = {
    "slower from the middle on": lambda now: 2.5 if now > 130 else 1.0,
    "faster from the start": lambda now: 0.4 if now > 45 else 1.0,
    "comes and goes": lambda now: 2.0 if now % 20 < 10 else 1.0,
    "four times as slow at once": lambda now: 4.0 if now > 45 else 1.0,
    "slower at the end": lambda now: 2.0 if now > 225 else 1.0,
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name.startswith("four") else pytest.mark.slow) for name in LOADS]
)
def test_a_run_beside_other_work_ends_in_time(name, pretended, tmp_path, text_corpus_flags):
    """Guards against a run that ends with the speed at its start, one that stops in the middle of its schedule or jumps
    there, and one that its config.yaml does not repeat."""
    pretended.short, pretended.long, pretended.validation, pretended.load = 2.0, 2.0, 2.0, LOADS[name]
    flags = [*FLAGS, *text_corpus_flags, "--train.average=tail"]
    run = pretended.train(*flags, f"--run.dir={tmp_path / 'run'}", "--train.time=250s")
    assert 225 <= pretended.now <= 275
    plan = Run.open(run).config().train
    assert plan.steps_before
    rows = [row for row in history(run) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, plan.steps + 1))
    progress = [0.0, *(row["progress"] for row in rows)]
    shares = [after - before for before, after in pairwise(progress)]
    assert progress[-1] == pytest.approx(1) and min(shares) > 0 and max(shares) < 0.1
    rates = [row["learning_rate"] / 1e-3 for row in rows]
    assert rates == pytest.approx([1 - share for share in progress[:-1]]) and rates[-1] < 0.1
    again = charlm.train(charlm.load_config(run / "config.yaml", {"run.dir": tmp_path / "again"}))
    assert_ended_like(again, run)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_keeps_what_it_decided(seed, pretended, tmp_path, text_corpus_flags):
    """Guards against a plan that is made anew from a checkpoint that is older than it, and time that a kill lost."""
    draw, seen = random.Random(seed), []
    pretended.short, pretended.long, pretended.load = 2.0, 2.0, lambda now: 1 + draw.random()
    flags = [*FLAGS, *text_corpus_flags, "--train.time=250s", f"--run.dir={tmp_path / 'run'}", "--run.auto_resume=true"]
    kills = sorted(draw.sample(range(10, 50), 2))

    def kill(step: int) -> None:
        if kills and step == kills[0]:
            del kills[0]
            raise InterruptedError

    pretended.after_step = kill
    for _ in range(2):
        with pytest.raises(InterruptedError):
            pretended.train(*flags)
        seen.append(Run(tmp_path / "run").config().train.steps_before)
    run = pretended.train(*flags)
    assert 225 <= max(row.get("seconds", 0) for row in Run(run).metrics()) <= 275
    plan = Run.open(run).config().train.steps_before
    assert all(plan[: len(before)] == before for before in seen) and len(plan) > 1
    again = charlm.train(charlm.load_config(run / "config.yaml", {"run.dir": tmp_path / "again"}))
    assert_ended_like(again, run)


def test_progress_by_hand():
    """Guards against progress that jumps where the plan changes, in schedules, averages and at the end."""
    train = TrainConfig(steps=40, steps_before=((10, 20), (20, 60)), average="tail", average_tail=5, average_every=1)
    # Half of 20 steps; then a fifth of the other half by step 20, as 50 are left; then 0.4 in 20 steps.
    assert train.planned == 20
    places = {0: 0, 5: 0.25, 10: 0.5, 15: 0.55, 20: 0.6, 30: 0.8, 39: 0.98, 40: 1}
    assert {step: train.progress(step) for step in places} == pytest.approx(places)
    # The last 5 of 20 planned steps begin at 0.75: at step 27.5 of these.
    assert [decay_of(train, step) for step in (27, 28, 29, 40)] == [None, 0, 1 / 2, 1 - 1 / 13]
    falling = train.replace(lr_schedule="wsd", decay_steps=10, decay_type="linear", warmup=4)
    rates = {0: 1 / 4, 1: 2 / 4, 5: 1, 10: 1, 20: 0.8, 30: 0.4, 39: 0.04}
    assert {step: learning_rate_factor(falling, step) for step in rates} == pytest.approx(rates)


@pytest.mark.parametrize(("flag", "changes"), [("--train.steps=50", ()), ("--train.time=1m", ()), ("", ((10, 20),))])
def test_another_length_is_another_plan(flag, changes, tmp_path):
    """Guards against a new run with the config of another, and changes that belong to the other's length."""
    (tmp_path / "config.yaml").write_text("train: {steps: 40, time: null, steps_before: [[10, 20]]}")
    found = charlm.load_config(tmp_path / "config.yaml", list(filter(None, [flag])))
    assert found.train.steps_before == changes


@pytest.mark.parametrize("changes", ["[[10, 10]]", "[[10, 30], [10, 40]]", "[[50, 60]]", "[[20, 30], [10, 40]]"])
def test_changes_that_cannot_be(changes):
    """Guards against progress that goes back or ends before the run does."""
    with refused("train.steps_before"):
        charlm.load_config(overrides=["--train.steps=50", f"--train.steps_before={changes}"])


@pytest.mark.parametrize("left", ["checkpoints", "metrics", "config"])
def test_a_run_that_is_killed_keeps_its_steps(left, pretended, tmp_path, text_corpus_flags, capfd):
    """Guards against a trial that is made anew, also for a run that was killed before its first row."""
    flags = [*FLAGS, *text_corpus_flags]
    run = pretended.train(*flags, f"--run.dir={tmp_path / 'run'}")
    whole = shutil.copytree(run, tmp_path / "whole")
    planned = Run.open(run).config().train.planned
    capfd.readouterr()
    for step in (20, 10):
        for checkpoint in (run / "checkpoints").glob("step-*"):
            if int(checkpoint.name[-8:]) > step or left != "checkpoints":
                shutil.rmtree(checkpoint)
        if left == "config":
            (run / "metrics.jsonl").unlink()
            for pointer in ("best", "last"):
                (run / "checkpoints" / pointer).unlink()
        pretended.train(*flags, f"--run.dir={run}", "--run.auto_resume=true")
        assert Run.open(run).config().train.planned == planned
        changes = Run.open(whole).config().train.steps_before
        assert Run.open(run).config().train.steps_before[: len(changes)] == changes
    assert "train.time=" not in capfd.readouterr().err


def test_a_finished_run_that_is_stopped_and_asked_for_more_steps_takes_them(pretended, tmp_path, text_corpus_flags):
    """Guards against a timed run that can never be trained longer."""
    flags = [*FLAGS, *text_corpus_flags, f"--run.dir={tmp_path / 'run'}"]
    run = pretended.train(*flags)
    flags = [flag for flag in flags if "time" not in flag]
    assert steps(pretended.train(*flags, "--run.resume=true", "--train.steps=60")) == 60
    assert history(run)[-1]["step"] == 60


def test_a_stop_while_measuring_leaves_nothing(pretended, tmp_path, text_corpus_flags):
    """Guards against a folder without a run, and a message about steps that were never made."""
    pretended.kind.validate = lambda self: (signal.raise_signal(signal.SIGTERM), super(pretended.kind, self).validate())
    with pytest.raises(Stopped, match="stopped before training began: SIGTERM; there is nothing new to save"):
        pretended.train(*FLAGS, *text_corpus_flags, f"--run.dir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("refuse", ["beside steps", "in a table"])
def test_what_cannot_be_timed_is_refused(refuse, pretended, tmp_path, text_corpus_flags):
    """Guards against a number that silently wins over a time, and rows of unequal length."""
    flags = [*FLAGS, *text_corpus_flags, f"--run.dir={tmp_path / 'run'}"]
    refusals: dict[str, Callable[[], object]] = {
        "beside steps": lambda: pretended.train(*flags, "--train.steps=5"),
        "in a table": lambda: plan([parse_row("--train.time=1h")], [], {}, 1),
    }
    with refused("train.time"):
        refusals[refuse]()
    assert not (tmp_path / "run").exists()


def test_a_time_that_is_too_short_is_a_step(pretended, tmp_path, text_corpus_flags):
    """Guards against a run of no step."""
    run = pretended.train(*FLAGS, *text_corpus_flags, f"--run.dir={tmp_path / 'run'}", "--train.time=20s")
    assert steps(run) == 1 and history(run)[-1]["progress"] == 1


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
    found = Run.open(tmp_path / "run").config().train
    flags = [flag for flag in flags if "time" not in flag] + [f"--train.steps={found.steps}"]
    flags += [f"--train.steps_before={json.dumps(found.steps_before)}"]
    train_with_two_processes(tmp_path / "plan.json", [[*flags, f"--run.dir={tmp_path / 'again'}"]])
    assert_ended_like(tmp_path / "again", tmp_path / "run")
