"""Signals to launchers and to one of their processes: the run saves its state, and no process is left behind."""

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
GONE = "the launcher is gone"
CPU = SCRIPTS.parent / "configs" / "accelerate" / "cpu.yaml"


@pytest.mark.parametrize(
    ("launcher", "sharding", "rank", "number", "code", "reason"),
    [
        (TORCHRUN, "no", "0", signal.SIGTERM, 0, "SIGTERM"),
        (TORCHRUN, "no", "1", signal.SIGTERM, 0, "SIGTERM"),
        pytest.param(TORCHRUN, "no", None, signal.SIGTERM, 1, "SIGTERM", marks=pytest.mark.slow),
        pytest.param(TORCHRUN, "fsdp2", None, signal.SIGTERM, 1, "SIGTERM", marks=pytest.mark.slow),
        pytest.param(TORCHRUN, "no", None, signal.SIGUSR1, -signal.SIGUSR1, GONE, marks=pytest.mark.slow),
        pytest.param((*ACCELERATE, CPU), "no", None, signal.SIGTERM, -signal.SIGTERM, GONE, marks=pytest.mark.slow),
    ],
    ids=["rank-0", "rank-1", "torchrun-TERM", "torchrun-TERM-shards", "torchrun-USR1", "accelerate-TERM"],
)
def test_a_signal_ends_in_a_checkpoint(launcher, sharding, rank, number, code, reason, tmp_path, text_corpus_flags):
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
    assert f": {reason}; the same command with --run.resume=true continues\n" in (tmp_path / "said").read_text()
    assert (tmp_path / "run" / "checkpoints" / "last").exists()
