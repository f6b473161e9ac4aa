"""Launchers: the launch files, signals to launchers or to one of their processes, and processes that die."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

import charlm
from charlm.runs.folder import Run
from launched import ON_CPU, PATIENCE, TORCHRUN, launch, wait_until
from tiny import SCRIPTS, TINY, train, training_rows, typed

LAUNCH_FILES = SCRIPTS.parent / "configs" / "accelerate"
STEPS = 80
FLAGS = (
    *TINY,
    *typed(f"--model.num_layers=4 --model.d_model=32 --model.d_ff=64 --train.steps={STEPS} --train.batch_size=6"),
    *typed("--train.matmul_precision=highest --train.log_every=1 --train.valid_every=20 --train.clip_norm=1"),
)
DYING = SCRIPTS.parent / "tests" / "training" / "train_and_die.py"


def by_accelerate(launch_file: str, *options: str) -> tuple[str | Path, ...]:
    """accelerate's own launcher."""
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--main_process_port=0", "--config_file")
    return (*launcher, LAUNCH_FILES / launch_file, *options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "first_lines"),
    [
        ("cpu.yaml", ["1 x cpu", "precision no (as accelerate was told)"]),
        ("cpu_2_processes.yaml", ["2 x cpu", "precision no (as accelerate was told)"]),
        ("fsdp2_bf16.yaml --num_processes=2", ["2 x cpu", "sharded by FSDP2, precision bf16 (as accelerate was told)"]),
    ],
)
def test_a_launch_file_starts_what_it_says(how, first_lines, tmp_path, text_corpus_flags):
    """Guards against accelerate starting one CPU process in place of two, its own FSDP, which would wrap the model a
    second time, unreadable launch files, and processes that each print a score of their own."""
    flags = [*TINY, "--train.mixed_precision=auto", *text_corpus_flags, f"--run.dir={tmp_path / 'run'}"]
    trained = launch([*by_accelerate(*how.split()), SCRIPTS / "train.py", *flags])
    for line in first_lines:
        assert line in trained.stderr
    assert trained.stdout.count("Next:") == 1
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()

    scored = launch([*by_accelerate(*how.split()), SCRIPTS / "evaluate.py", tmp_path / "run", "--json"])
    score = json.loads(scored.stdout)
    model = charlm.load(tmp_path / "run", device="cpu")
    alone = charlm.bits_per_character(model, charlm.load_corpus(model.config.data))
    assert score["bits_per_character"] == pytest.approx(alone.bits_per_character, abs=1e-6)
    assert score["symbols"] == alone.symbols == 2000


@pytest.mark.parametrize("launch_file", sorted(LAUNCH_FILES.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_knows_every_key_of_a_launch_file(launch_file):
    """Guards against a key that accelerate has dropped or never had, which it would refuse on a cluster first."""
    loaded = load_config_from_file(str(launch_file))
    flags = {flag.removeprefix("--") for action in launch_command_parser()._actions for flag in action.option_strings}
    assert set(loaded.fsdp_config) <= flags


@pytest.mark.parametrize(
    ("launcher", "sharding", "rank", "number", "code"),
    [
        (TORCHRUN, "no", "0", signal.SIGTERM, 0),
        pytest.param(TORCHRUN, "no", "1", signal.SIGTERM, 0, marks=pytest.mark.slow),
        pytest.param(TORCHRUN, "no", None, signal.SIGTERM, 1, marks=pytest.mark.slow),
        pytest.param(TORCHRUN, "fsdp2", None, signal.SIGTERM, 1, marks=pytest.mark.slow),
        pytest.param(TORCHRUN, "no", None, signal.SIGHUP, 1, marks=pytest.mark.slow),
        pytest.param(TORCHRUN, "no", None, signal.SIGUSR1, -signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param(by_accelerate("cpu.yaml"), "no", None, signal.SIGTERM, -signal.SIGTERM, marks=pytest.mark.slow),
    ],
    ids=["rank-0", "rank-1", "torchrun-TERM", "torchrun-TERM-shards", "torchrun-HUP", "torchrun-USR1", "accelerate"],
)
def test_a_signal_ends_in_a_checkpoint(launcher, sharding, rank, number, code, tmp_path, text_corpus_flags):
    """Guards against other exit codes than documented, lost steps, orphaned processes, and processes that wait for each
    other for ever because only one of them got the signal."""
    flags = [*TINY, *text_corpus_flags, "--train.steps=1000000", "--train.log_every=1", "--train.valid_every=1000000"]
    flags += [f"--train.sharding={sharding}", f"--run.dir={tmp_path / 'run'}"]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            [*map(str, launcher), str(SCRIPTS / "train.py"), *flags], env=os.environ | ON_CPU, stdout=said, stderr=said
        )
    ranks = []
    try:
        wait_until(lambda: Run(tmp_path / "run").metrics_path.exists(), "training")
        ranks = psutil.Process(process.pid).children(recursive=True)
        struck = [child for child in ranks if child.environ().get("RANK") == rank] if rank else [process]
        struck[0].send_signal(number)
        assert process.wait(PATIENCE) == code
        wait_until(lambda: not any(rank.is_running() and rank.status() != "zombie" for rank in ranks), "end")
    finally:
        for alive in [*ranks, process]:
            with suppress(psutil.NoSuchProcess):
                alive.kill()
    reason = "the launcher is gone" if code < 0 else number.name
    assert f": {reason}; the same command with --run.resume=true continues\n" in (tmp_path / "said").read_text()
    assert (tmp_path / "run" / "checkpoints" / "last").exists()


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["no", "fsdp2"])
def test_a_process_that_dies_ends_the_others_and_the_run_goes_on_from_its_checkpoint(
    sharding, tmp_path, text_corpus_flags
):
    """Guards against processes that wait forever for one that was killed, and a checkpoint that it takes along."""
    flags = [*FLAGS, *text_corpus_flags, f"--train.sharding={sharding}", f"--run.dir={tmp_path / 'run'}"]
    died = launch([*TORCHRUN, DYING, *flags])
    assert died.returncode != 0
    assert "[rank0]: Traceback" not in died.stderr
    assert died.stderr.count("error: another process has ended") == 1, died.stderr
    assert (tmp_path / "run" / "checkpoints" / "last").read_text() == "step-00000040\n"
    train(*flags, "--run.resume=true")
    assert [row["step"] for row in training_rows(tmp_path / "run")] == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "sharding", "goes_back"),
    [(TORCHRUN, "fsdp2", False), (by_accelerate("cpu_2_processes.yaml"), "no", False), (TORCHRUN, "no", True)],
    ids=["torchrun-shards", "accelerate", "to a chosen step"],
)
def test_a_launcher_that_restarts_processes_continues_the_run(
    launcher, sharding, goes_back, tmp_path, text_corpus_flags
):
    """Guards against a restart that refuses the run's own folder, or that waits for the earlier processes at addresses
    that the launcher remembers; and attempts that each go back to run.resume_from and remove what the one before has
    learned."""
    flags = [*FLAGS, *text_corpus_flags, "--train.keep_checkpoints=9"]
    flags += [f"--train.sharding={sharding}", f"--run.dir={tmp_path / 'run'}"]
    if goes_back:
        train(*flags)
        flags.append("--run.resume_from=20")
    done = launch([*launcher, "--max_restarts=1", DYING, *flags])
    assert done.returncode == 0, done.stderr[-3000:]
    assert [done.stderr.count(f"resumed at step {step}\n") for step in (20, 40)] == [goes_back, True]
    assert [row["step"] for row in training_rows(tmp_path / "run")] == list(range(1, STEPS + 1))
