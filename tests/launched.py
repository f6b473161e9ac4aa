"""Starts programs under launchers, on two CPU processes."""

import json
import os
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
ON_CPU = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}

PATIENCE = 300.0
TASKS = Path(__file__).resolve().parents[1] / "docs" / "tasks.md"


def documented_task(folder: Path) -> Path:
    """The example of docs/tasks.md, which registers the task `order`, as a program in `folder`."""
    (code,) = re.findall(r"<!-- order\.py -->\n```python\n(.*?)```", TASKS.read_text(), re.DOTALL)
    (folder / "order.py").write_text(code)
    return folder / "order.py"


def register_documented_task(folder: Path) -> None:
    """Register `order`, by way of a file in `folder`."""
    runpy.run_path(str(documented_task(folder)))


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Return as soon as `condition` holds."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < PATIENCE, f"no {what} after {PATIENCE} seconds"
        time.sleep(0.1)


def launch(command: Sequence[str | Path], **environment: str) -> subprocess.CompletedProcess:
    """The finished `command`, killed if it hangs."""
    environ = os.environ | ON_CPU | environment
    return subprocess.run([*map(str, command)], env=environ, capture_output=True, text=True, timeout=800)


def train_with_two_processes(plan: Path, runs: Sequence[Sequence[str]]) -> str:
    """The stderr of training `runs`, lists of flags, in turn on two processes. `plan` is a file to write."""
    plan.write_text(json.dumps([list(flags) for flags in runs]))
    done = launch([*TORCHRUN, Path(__file__).parent / "training" / "train_many.py", plan])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("2 x cpu") == len(runs), "torchrun did not start two processes"
    return done.stderr
