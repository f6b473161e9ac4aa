"""Signals to the launchers: the run saves its state, and no process is left behind."""

import os
import signal
import subprocess
import sys
from contextlib import suppress

import psutil
import pytest

from charlm.runs.folder import Run
from launched import ON_CPU, PATIENCE, TORCHRUN, wait_until
from tiny import SCRIPTS, TINY

ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--config_file")
CPU = SCRIPTS.parent / "configs" / "accelerate" / "cpu.yaml"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "sharding", "number", "code", "reason"),
    [
        (TORCHRUN, "no", signal.SIGTERM, 1, "SIGTERM"),
        (TORCHRUN, "fsdp2", signal.SIGTERM, 1, "SIGTERM"),
        (TORCHRUN, "no", signal.SIGUSR1, -signal.SIGUSR1, "the launcher is gone"),
        ((*ACCELERATE, CPU), "no", signal.SIGTERM, -signal.SIGTERM, "the launcher is gone"),
    ],
    ids=["torchrun-TERM", "torchrun-TERM-shards", "torchrun-USR1", "accelerate-TERM"],
)
def test_a_signal_to_the_launcher_ends_in_a_checkpoint(
    launcher, sharding, number, code, reason, tmp_path, text_corpus_flags
):
    """Guards against other exit codes than documented, lost steps, and orphaned processes."""
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
        process.send_signal(number)
        assert process.wait(PATIENCE) == code
        wait_until(lambda: not any(rank.is_running() and rank.status() != "zombie" for rank in ranks), "end")
    finally:
        for alive in [*ranks, process]:
            with suppress(psutil.NoSuchProcess):
                alive.kill()
    assert f": {reason}; the same command with --run.resume=true continues\n" in (tmp_path / "said").read_text()
    assert (tmp_path / "run" / "checkpoints" / "last").exists()
