"""A run that stops and goes on must end where the run that never stopped ends."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import charlm
from charlm.config import UserError
from charlm.runs.folder import Run
from tiny import SCRIPTS, TINY

STEPS = 24
FLAGS = [
    *TINY,
    "--model.num_layers=3",
    f"--train.steps={STEPS}",
    "--train.batch_size=6",
    "--train.warmup=4",
    "--train.lr_schedule=cosine",
    "--train.log_every=1",
    "--train.valid_every=1",
    "--train.keep_checkpoints=100",
]
DROPOUT = ["--model.attention_dropout=0.1", "--model.activation_dropout=0.2", "--model.residual_dropout=0.1"]
CHECKPOINTING = ["--train.activation_checkpointing=true"]
SETTINGS = {
    "fp32": ["--train.mixed_precision=no", *DROPOUT],
    "bf16": ["--train.mixed_precision=bf16", *DROPOUT, "--train.micro_batch_size=2"],
    "bf16-checkpointed": ["--train.mixed_precision=bf16", *DROPOUT, *CHECKPOINTING, "--train.micro_batch_size=4"],
    "sgd": [
        "--train.mixed_precision=no",
        *DROPOUT,
        *CHECKPOINTING,
        "--train.optimizer=sgd",
        "--train.micro_batch_size=4",
    ],
    "muon": ["--train.mixed_precision=bf16", "--train.optimizer=muon", "--train.clip_norm=1"],
    "ngrams": [*DROPOUT, "--model.ngrams=[2,3]", "--train.micro_batch_size=2", "--train.clip_norm=1"],
    "growing": ["--train.context_divisor=2", "--train.full_context_from=0.5", "--train.micro_batch_size=2"],
}


def train(*flags: str) -> Path:
    return charlm.train(charlm.load_config(overrides=flags))


def weights(run: Path, step: int = STEPS) -> tuple[bytes, bytes]:
    folder = run / "checkpoints" / f"step-{step:08d}"
    return (folder / "model.safetensors").read_bytes(), (folder / "optimizer.safetensors").read_bytes()


def history(run: Path) -> list[dict]:
    """The metrics, but for the clock's readings."""
    clock = ("seconds", "characters_per_second")
    return [{key: value for key, value in row.items() if key not in clock} for row in Run.open(run).metrics()]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, text_corpus_flags):
    """A run of fp32 that never stopped."""
    flags = [*FLAGS, *text_corpus_flags, *SETTINGS["fp32"]]
    return flags, train(*flags, f"--run.dir={tmp_path_factory.mktemp('whole') / 'run'}")


@pytest.mark.parametrize("setting", SETTINGS)
def test_resuming_at_any_step_ends_in_the_same_bytes(setting, tmp_path, text_corpus_flags):
    """Guards against state that a checkpoint forgets: optimizer moments, dropout noise, best score, schedule."""
    flags = [*FLAGS, *text_corpus_flags, *SETTINGS[setting]]
    whole = train(*flags, f"--run.dir={tmp_path / 'whole'}")
    for step in random.Random(setting).sample(range(1, STEPS), 4):
        resumed = tmp_path / f"from-{step}"
        shutil.copytree(whole, resumed)
        train(*flags, f"--run.dir={resumed}", f"--run.resume_from={step}")
        assert weights(resumed) == weights(whole), f"resumed at {step}"
        assert history(resumed) == history(whole), f"resumed at {step}"
        assert (resumed / "checkpoints" / "best").read_text() == (whole / "checkpoints" / "best").read_text()


def test_a_killed_process_resumes_to_the_same_bytes(tmp_path, whole_run):
    """Guards against a run that only resumes after a clean exit: SIGKILL leaves no time for anything."""
    flags, whole = whole_run
    killed = tmp_path / "killed"
    command = [sys.executable, str(SCRIPTS / "train.py"), *flags, f"--run.dir={killed}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while not (killed / "checkpoints" / "step-00000005").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "checkpoints" / f"step-{STEPS:08d}").exists(), "killed too late to prove anything"
    train(*flags, f"--run.dir={killed}", "--run.resume=true")
    assert weights(killed) == weights(whole)
    assert history(killed) == history(whole)


def test_a_run_stopped_before_its_first_checkpoint_starts_anew(tmp_path, whole_run, capfd):
    """Guards against a folder that can neither be resumed, for want of a checkpoint, nor be trained into."""
    flags, whole = whole_run
    stopped = tmp_path / "stopped"
    shutil.copytree(whole, stopped, ignore=shutil.ignore_patterns("step-*", "best", "last"))
    train(*flags, f"--run.dir={stopped}", "--run.resume=true")
    assert "stopped before its first checkpoint: starts anew" in capfd.readouterr().err
    assert weights(stopped) == weights(whole)
    assert history(stopped) == history(whole)


def test_another_micro_batch_sees_the_same_characters(tmp_path, text_corpus_flags):
    """Guards against windows or weighting that depend on how the batch is cut up."""
    flags = [*FLAGS, *text_corpus_flags, "--train.mixed_precision=no", "--train.matmul_precision=highest"]
    whole = train(*flags, f"--run.dir={tmp_path / 'whole'}")
    resumed = tmp_path / "resumed"
    shutil.copytree(whole, resumed)
    train(*flags, f"--run.dir={resumed}", "--run.resume_from=10", "--train.micro_batch_size=4")
    for before, after in zip(history(whole), history(resumed), strict=True):
        if "loss" in before:
            assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--model.d_ff=48", "model.d_ff: 32 -> 48"),
        ("--aux.targets.weight=0.25", "aux.targets.weight: 0.5 -> 0.25"),
        ("--train.optimizer=sgd", "train.optimizer: adamw -> sgd"),
        ("--train.seed=1", "train.seed: 0 -> 1"),
        ("--data.test_fraction=0.2", "data.test_fraction: 0.05 -> 0.2"),
    ],
)
def test_resuming_with_a_changed_option_is_refused_by_name(flag, named, whole_run):
    """Guards against a run that silently goes on as another experiment."""
    flags, whole = whole_run
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    with pytest.raises(UserError, match=named):
        train(*flags, flag, f"--run.dir={whole}", "--run.resume=true")
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_resuming_on_a_changed_text_is_refused(whole_run, tmp_path):
    """Guards against going on with another text under the same path."""
    flags, whole = whole_run
    other = tmp_path / "other.txt"
    other.write_text("something else entirely. " * 2000)
    with pytest.raises(UserError, match="another corpus: sha256"):
        train(*flags, f"--data.path={other}", f"--run.dir={whole}", "--run.resume=true")


def test_a_run_folder_that_exists_is_not_overwritten(whole_run, tmp_path):
    """Guards against losing a run to a repeated command; the message must say how to continue."""
    flags, whole = whole_run
    with pytest.raises(UserError, match=r"holds a run already; continue it with --run.resume=true"):
        train(*flags, f"--run.dir={whole}")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        train(*flags, f"--run.dir={tmp_path}")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--run.resume_from=7000"], "no checkpoint 7000; its steps are: 1, 2"),
        (["--run.resume=true", "--train.steps=5"], "train.steps=5: the checkpoint is past it, at step 24"),
    ],
)
def test_resuming_from_where_there_is_nothing_is_refused(flags, message, whole_run):
    """Guards against starting over, or past the end, when asked to continue."""
    whole_flags, whole = whole_run
    with pytest.raises(UserError, match=message):
        train(*whole_flags, f"--run.dir={whole}", *flags)


def test_resuming_where_there_is_no_run_is_refused(whole_run, tmp_path):
    """Guards against a typing mistake in run.dir that starts a new run when an old one was meant."""
    flags, _ = whole_run
    with pytest.raises(UserError, match="is not a run"):
        train(*flags, f"--run.dir={tmp_path / 'nothing'}", "--run.resume=true")
    assert not (tmp_path / "nothing").exists()


def test_changed_length_is_recorded(whole_run, tmp_path):
    """Guards against a config.yaml that no longer says what the run does."""
    flags, whole = whole_run
    longer = tmp_path / "longer"
    shutil.copytree(whole, longer)
    train(*flags, f"--run.dir={longer}", "--run.resume=true", f"--train.steps={STEPS + 4}")
    assert Run.open(longer).config().train.steps == STEPS + 4
    assert json.loads((longer / "metrics.jsonl").read_text().splitlines()[-1])["step"] == STEPS + 4
