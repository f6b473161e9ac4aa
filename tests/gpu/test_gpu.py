"""`make gpu` where there is no GPU, and tests for a machine that has one."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import gpu
from benchmarks.pretend import table
from benchmarks.pretend.guard import missing
from benchmarks.pretend.runs import any_corpus, opened
from benchmarks.pretend.worker import run

from charlm.objective.count import step_memory

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"model.num_layers": 2, "model.d_model": 64, "model.d_ff": 128, "train.mixed_precision": "bf16"}
PRETENDED = f"""
from benchmarks.pretend.device import pretended_gpu
from unittest import mock
from benchmarks import gpu
from benchmarks.pretend import runs, table
with mock.patch("torch.cuda.reset_peak_memory_stats", lambda *_: None), pretended_gpu():
    with runs.opened(table.Case(table.T12, 4, {SMALL}).read(), runs.any_corpus()) as run:
        print(min(gpu.measured(run, seconds=0.0)[::2]) > 0)
"""
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("what", ["gpu", "record"])
def test_says_what_is_missing(what):
    """Guards against an hour of a rented machine that begins with a traceback."""
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, gpu.__file__, what], env=environ, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: make gpu") and len(done.stderr.splitlines()) == 1


def test_names_modules_that_are_missing(monkeypatch):
    """Guards against a bare Python whose missing modules are found one by one."""
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if name in ("pydantic", "constriction") else name)
    assert gpu.missing().startswith("pydantic, constriction: ")


def test_runs_programs_that_are_there():
    """Guards against a day that ends at a renamed script."""
    programs = [arguments[0] for what in ("gpu", "record") for arguments in gpu.commands(what)]
    assert all((ROOT / program).is_file() for program in programs if program != "-m")


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=f"the pretended GPU needs {missing()}")
def test_measures_a_pretended_gpu():
    """Guards against a measurement that first fails on the day; the profiler knows real GPUs only."""
    assert run("-c", PRETENDED).split()[-1] == "True"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("options", [{}, table.ADAMW, table.MUON, {"train.mixed_precision": "fp16"}], ids=str)
def test_steps_on_a_gpu(options):
    """Guards against a step that only a real GPU refuses."""
    config = table.Case(table.T12, 4, SMALL | options).read()
    with opened(config, any_corpus()) as training:
        for _ in range(3):
            training.step()
        (report,) = training.updates.read()
        assert math.isfinite(report.loss) and report.skipped is None


@pytest.mark.gpu
@needs_gpu
def test_memory_on_a_gpu():
    """Guards against memory promised to whoever rents a GPU that a real one does not keep."""
    config = table.CASES["T12 batch 16"].read()
    with opened(config, any_corpus()) as training:
        training.step()
        torch.cuda.reset_peak_memory_stats()
        training.step()
        found = torch.cuda.max_memory_allocated()
        assert step_memory(config, training.objective, 16) == pytest.approx(found, rel=0.1)
