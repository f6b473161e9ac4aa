"""What to run on the first day of a GPU: make gpu, and make gpu-record.

gpu: the tests marked gpu, the training benchmark at shapes P and D, and T12 at batch 16 and 64, timed, profiled and
beside what is predicted. record: enwik8_fast for ten minutes in two halves, and its score.
"""

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("torch", "accelerate", "pydantic", "constriction", "datasets", "psutil", "yaml", "safetensors")
"""Modules without which nothing runs; all are in requirements.txt."""
SECONDS, WARMUP, PROFILED = 20, 5, 3
"""Of timing, and steps before it and of the profile, of each batch."""
DATA_SHEET = (("H100", "h100"), ("H200", "h200"), ("A100", "a100"), ("L4", "l4"), ("4090", "4090"))
"""Names that `explain --on` gives to GPUs, by part of what the driver calls them."""


def missing() -> str | None:
    """What is missing on this machine, if anything is."""
    if lacks := [name for name in NEEDED if find_spec(name) is None]:
        return f"{', '.join(lacks)}: install requirements.txt, or carry a folder of unpacked wheels on PYTHONPATH"
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return f"a build of torch for GPUs: {torch.__version__} has none"
    return None if torch.cuda.is_available() else "a GPU: torch finds none here (nvidia-smi shows what the driver sees)"


def commands(what: str) -> list[list[str]]:
    """The programs to run, in order."""
    if what == "gpu":
        tests = [["-m", "pytest", "-m", "gpu", "-q"]] if find_spec("pytest") else []
        races = [["scripts/benchmark.py", "train", "--shape", shape, "--rounds", "2"] for shape in "PD"]
        return [*tests, *races, ["-m", "benchmarks.gpu", "steps"]]
    run = ["--run.dir=runs/gpu_record", "--run.auto_resume=true", "--train.steps=100_000", "--train.time=10m"]
    train = ["scripts/train.py", "--config", "configs/enwik8_fast.yaml", *run]
    return [[*train, "--run.max_time=5m"], train, ["scripts/evaluate.py", "runs/gpu_record", "--stride", "128"]]


def steps() -> None:
    """Time and profile the real loop on T12, and print the rows for docs/speed.md, each beside its prediction."""
    import torch

    from benchmarks.pretend import table
    from benchmarks.pretend.runs import any_corpus, opened

    for case in ("T12 batch 16", "T12 batch 64"):
        config = table.CASES[case].read()
        with opened(config, any_corpus()) as run:
            rate, peak, expected = measured(run)
            print(profiled(run), flush=True)
        name, sizes = torch.cuda.get_device_name(), f"{peak / 2**30:.2f} GiB | predicted {expected / 2**30:.2f}"
        print(f"| {case}, {name} | {rate:,.0f} characters/s | {sizes} |", flush=True)
        if on := next((short for part, short in DATA_SHEET if part in name), None):
            flags = [f"--train.batch_size={config.train.batch_size}", "--on", on]
            python("scripts/explain.py", "--config", f"configs/{table.CASES[case].config}", *flags)


def measured(run: Any, seconds: float = SECONDS) -> tuple[float, int, int]:
    """Characters per second of a run's steps, peak bytes, and the bytes that arithmetic predicts."""
    import torch

    from charlm.objective.count import step_memory

    config = run.config
    for _ in range(WARMUP):
        run.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    began, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - began < seconds:
        for _ in range(WARMUP):
            run.step()
        run.log()  # waits for the device
        count += WARMUP
    characters = count * config.train.batch_size * config.model.context_length
    rate = characters / (time.perf_counter() - began)
    return rate, torch.cuda.max_memory_allocated(), step_memory(config, run.objective, config.train.batch_size)


def profiled(run: Any) -> str:
    """The kernels that take longest, as a table."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for _ in range(PROFILED):
            run.step()
        torch.cuda.synchronize()
    return found.key_averages().table(sort_by="self_cuda_time_total", row_limit=12)


def python(*arguments: str) -> None:
    """Run a program of this checkout; raises subprocess.CalledProcessError."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")])
    environ = os.environ | {"PYTHONPATH": path.rstrip(os.pathsep)}
    subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environ, check=True)


def main(what: str) -> int:
    if lacks := missing():
        print(f"error: make {'gpu-record' if what == 'record' else 'gpu'} needs {lacks}", file=sys.stderr)
        return 2
    if what == "steps":
        steps()
        return 0
    for arguments in commands(what):
        print("$ python", *arguments, flush=True)
        try:
            python(*arguments)
        except subprocess.CalledProcessError as error:
            print(f"error: this ended with code {error.returncode}", file=sys.stderr)
            return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
