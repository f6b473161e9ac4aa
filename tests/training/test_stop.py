"""A run that is asked to stop saves its state, says so, and ends the same after it is resumed."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from operator import attrgetter
from pathlib import Path

import pytest

import charlm
from charlm.config import RunConfig, Stopped, TrainConfig
from charlm.config.types import seconds_of
from charlm.runs.folder import Run
from charlm.training import stop as signals
from launched import wait_until
from storage import steps
from tiny import SCRIPTS, TINY, assert_ended_like, checkpoint_bytes, refused, run_script, typed

STEPS = 20
FLAGS = [
    *TINY,
    *typed(f"--train.steps={STEPS} --train.log_every=1 --train.valid_every=5 --train.keep_checkpoints=100"),
    *typed("--model.residual_dropout=0.1"),
]
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may have started the tests
HANDLERS = [signal.getsignal(number) for number in SIGNALS]


def train(*flags: str) -> Path:
    """The run's folder, whether it came to its end or was stopped."""
    config = charlm.load_config(overrides=flags)
    try:
        return charlm.train(config)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return config.run.dir


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, text_corpus_flags) -> tuple[list[str], Path]:
    """Flags, and the run that they make when nothing stops it."""
    flags = [*FLAGS, *text_corpus_flags]
    return flags, train(*flags, f"--run.dir={tmp_path_factory.mktemp('signals') / 'whole'}")


@pytest.fixture
def at(monkeypatch):
    """Raise a signal when one of the loop's functions is called for the n-th time."""

    def arrange(where: str, call: int, number: signal.Signals) -> None:
        plain, calls = attrgetter(where)(sys.modules["charlm.training.loop"]), iter(range(1, 10_000))

        def signalling(*arguments, **options):
            if next(calls) == call:
                signal.raise_signal(number)
            return plain(*arguments, **options)

        monkeypatch.setattr(f"charlm.training.loop.{where}", signalling)

    return arrange


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    ("where", "call", "saved"),
    [
        ("accumulate_gradients", 8, 8),  # in the eighth step, which is completed
        ("accumulate_gradients", 1, 1),
        ("ScoredText.bits", 3, 10),  # behind the second validation: its own checkpoint is enough
        ("negative_log_likelihoods", 2, 10),  # which is broken off
        ("take_snapshot", 3, 15),
    ],
)
def test_a_signal_saves_and_stops(where, call, saved, number, whole_run, at, tmp_path, capfd):
    """Guards against losing the work since the last validation, and against a resumed run that is another one: a
    validation that was broken off must be made up for."""
    flags, whole = whole_run
    at(where, call, number)
    stopped = train(*flags, f"--run.dir={tmp_path / 'run'}")
    assert steps(Run(stopped))[-1] == saved
    assert f"stopped after step {saved} of {STEPS}: {number.name}" in capfd.readouterr().err
    assert all(signal.getsignal(number) == handler for number, handler in zip(SIGNALS, HANDLERS, strict=True))
    train(*flags, f"--run.dir={stopped}", "--run.resume=true")
    assert_ended_like(stopped, whole)


@pytest.fixture
def deaf():
    """Signals that strike outside of a run do nothing."""
    before = [signal.signal(number, lambda *_: None) for number in SIGNALS]
    yield
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50))
def test_a_signal_at_any_moment_leaves_a_run_that_goes_on(seed, whole_run, tmp_path, deaf):
    """Guards against a moment, in a step, a validation or a write, at which a signal loses or doubles something."""
    flags, whole = whole_run
    choose, run = random.Random(seed), tmp_path / "run"
    timer = threading.Timer(choose.uniform(0.0, 0.5), os.kill, (os.getpid(), choose.choice(SIGNALS)))
    timer.start()
    train(*flags, f"--run.dir={run}", "--run.auto_resume=true")
    timer.join()
    if run.exists():
        assert steps(Run(run)) and "tmp" not in "".join(path.name for path in run.rglob("*"))
    train(*flags, f"--run.dir={run}", "--run.auto_resume=true")
    assert_ended_like(run, whole)


def test_a_signal_before_there_is_anything_to_save_ends_the_script_well(
    text_corpus_flags, tmp_path, monkeypatch, capfd
):
    """Guards against a queue that counts a stop during preparation as a failure."""
    monkeypatch.setattr("charlm.training.loop.load_corpus", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    assert run_script("train", *FLAGS, *text_corpus_flags, f"--run.dir={tmp_path / 'run'}") == 0
    assert "stopped before training began: SIGTERM; there is nothing new to save" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_time_limit_counts_from_the_start_of_the_process(whole_run, tmp_path, monkeypatch, capfd):
    """Guards against a run that its queue kills because preparing the corpus was not counted, and against one that
    ends early or late when the system's clock is set."""
    flags, whole = whole_run
    began = signals.psutil.Process().create_time()
    clock = iter(range(10_000_000))
    monkeypatch.setattr("charlm.training.stop.time.time", lambda: began + 13 * 60 + 53)
    monkeypatch.setattr("charlm.training.stop.time.monotonic", lambda: next(clock))
    run = train(*flags, f"--run.dir={tmp_path / 'run'}", "--run.max_time=14m")
    assert "run.max_time is over" in capfd.readouterr().err
    # The preparation, each step and each batch of the validation look at the clock once: 1 to 6, and time after 5.
    assert steps(Run(run)) == [5]
    train(*flags, f"--run.dir={run}", "--run.resume=true")
    assert_ended_like(run, whole)


def test_times_are_read_as_written_or_refused():
    """Guards against a unit taken for another, and a time limit that is ignored."""
    times = {"3h50m": 13_800, "90m": 5_400, "1d12h": 129_600, "45s": 45}
    assert {text: seconds_of(text) for text in times} == times
    for text in ("5", "1h2d", "-3h", "0m", "soon", "1.5h"):
        for section, option in ((RunConfig(), "max_time"), (TrainConfig(), "time")):
            with refused(option):
                section.replace(**{option: text})


def test_resume_from_and_auto_resume_exclude_each_other():
    """Guards against a command that goes back to the same step whenever a queue starts it."""
    with refused("run.resume_from"):
        charlm.load_config(overrides=["--run.resume_from=5", "--run.auto_resume=true"])


def test_the_same_command_begins_continues_and_ends_a_run(whole_run, tmp_path, at, capfd):
    """Guards against a requeued job that refuses its own folder, trains past its end, or silently does nothing."""
    flags, whole = whole_run
    command = [*flags, f"--run.dir={tmp_path / 'run'}", "--run.auto_resume=true"]
    at("accumulate_gradients", 3, signal.SIGUSR1)
    run = train(*command)
    assert steps(Run(run)) == [3]
    for finished in (False, True):
        capfd.readouterr()
        train(*command)
        assert_ended_like(run, whole)
        assert ("finished before, at step" in capfd.readouterr().err) == finished


def test_restarted_processes_continue_the_run_of_their_launcher_only(whole_run, tmp_path, at, monkeypatch):
    """Guards against restarted processes that refuse their own run, or continue an older one."""
    flags, whole = whole_run
    command = [*flags, f"--run.dir={tmp_path / 'run'}"]
    at("accumulate_gradients", 3, signal.SIGTERM)
    run = train(*command)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    os.utime(run / "config.yaml", (1, 1))
    with refused("run.dir"):
        train(*command)
    os.utime(run / "config.yaml")
    train(*command)
    assert checkpoint_bytes(run, STEPS) == checkpoint_bytes(whole, STEPS)


LONG = ["--train.steps=1000000", "--train.valid_every=1000000", "--train.log_every=1"]


def test_a_second_signal_ends_at_once(whole_run, tmp_path):
    """Guards against a run that can only be killed: here the first signal waits for a library that never returns, as
    one that waits for another process does, so that no handler of Python's runs; and nobody hears its answer."""
    flags, _ = whole_run
    run = tmp_path / "run"
    code = (
        "import ctypes, sys, charlm, charlm.training.loop as loop\n"
        "plain = loop.accumulate_gradients\n"
        "def endless(*arguments):\n"
        f"    open({str(tmp_path / 'reached')!r}, 'w').write('here')\n"
        "    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)\n"
        "    for _ in range(2): library.pthread_mutex_lock(mutex)\n"
        "loop.accumulate_gradients = endless\n"
        "charlm.train(charlm.load_config(overrides=sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, *flags, f"--run.dir={run}"]
    process = subprocess.Popen(command, cwd=SCRIPTS.parent, stderr=subprocess.PIPE)
    process.stderr.close()
    wait_until((tmp_path / "reached").exists, "first step")
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(signals.SAME_REQUEST * 1.5)
    assert process.wait() == 128 + signal.SIGTERM


def test_a_run_whose_launcher_died_saves_and_stops(whole_run, tmp_path):
    """Guards against an orphan that holds the machine for days after its job is gone."""
    flags, _ = whole_run
    run = tmp_path / "run"
    launch = (
        "import os, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, *sys.argv[1:]], env=os.environ | {'TORCHELASTIC_RUN_ID': 'test'})\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", launch, str(SCRIPTS / "train.py"), *flags, *LONG, f"--run.dir={run}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launcher:
        wait_until((run / "metrics.jsonl").exists, "training")
        launcher.kill()
        said = launcher.stderr.read()  # ends when the orphan has ended, too
    assert "the launcher is gone" in said
    assert steps(Run(run))


@pytest.mark.parametrize(
    ("name", "launched"),
    [
        *[(name, True) for name in sorted(signals.LAUNCHED)],
        *[(name, False) for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "SLURM_JOB_ID")],
    ],
)
def test_only_a_launch_has_a_launcher(name, launched, monkeypatch):
    """Guards against a run that ends with the shell that started it, because a variable for accelerate is exported."""
    for other in signals.LAUNCHED:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "no")
    parents = iter(range(100))
    monkeypatch.setattr(signals.os, "getppid", lambda: next(parents))
    assert signals.StopRequests().agreed() == launched


def test_nohup_is_heeded(deaf):
    """Guards against a run that ends with its terminal although nohup started it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with signals.StopRequests() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert not stop.agreed()


def test_a_signal_while_the_processes_agree_is_not_lost(monkeypatch):
    """Guards against losing a signal that arrives while the processes exchange their requests."""

    def reduce_under_fire(code, *_, **__):
        signal.raise_signal(signal.SIGTERM)

    with signals.StopRequests() as stop:
        monkeypatch.setattr(signals.dist, "is_initialized", lambda: True)
        monkeypatch.setattr(signals.dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(signals.dist, "new_group", lambda **_: None)
        monkeypatch.setattr(signals.dist, "all_reduce", reduce_under_fire)
        assert not stop.agreed()
        monkeypatch.setattr(signals.dist, "all_reduce", lambda *_, **__: None)
        assert stop.agreed()
        assert stop.reason == "SIGTERM"
