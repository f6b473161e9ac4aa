"""The pretended GPU itself: what it counts, and what it refuses."""

import json
from pathlib import Path

import pytest
from benchmarks.pretend import guard
from benchmarks.pretend.guard import missing
from benchmarks.pretend.worker import run

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"the pretended GPU needs {missing()}")

PROGRAM = """
import json
from benchmarks.pretend.device import pretended_gpu
import torch
from torch.nn import functional as F

on_cpu = torch.ones(1024, 256)
five_of_eight = torch.arange(8) < 5
found = {}
with pretended_gpu() as meter:
    with torch.device("cuda"):
        x, y, mask, weight = torch.zeros(1024, 256), torch.zeros(1024, 256), torch.zeros(8) > 0, torch.zeros(128, 256)
    for name, act in {
        "add": lambda: x + y,
        "add in place": lambda: x.add_(y),
        "copy": lambda: x.copy_(y),
        "zero": lambda: x.zero_(),
        "views": lambda: x.view(-1)[3:].detach(),
        "out": lambda: torch.add(x, y, out=torch.empty_like(x)),
        "expanded": lambda: x + y[:1].expand_as(x),
        "product": lambda: F.linear(x, weight),
        "list": lambda: torch._foreach_add_([x, y], 1.0),
        "read": lambda: float(x.sum()),
        "read several": lambda: x[0, :3].tolist(),
        "mask": lambda: mask[mask],
        "mask on the CPU": lambda: mask[five_of_eight],
        "index on the CPU": lambda: x[on_cpu[0, :3].long()],
        "copied": lambda: on_cpu[0].to("cuda"),
        "copied from pinned memory": lambda: on_cpu[1:2].clone().pin_memory().to("cuda", non_blocking=True),
        "on the CPU": lambda: float(on_cpu.sum()),
        "two at once": lambda: x.exp() + y.exp(),
        "one after the other": lambda: [None for tensor in (x, y) if tensor.exp() is None],
        "mixed": lambda: x + on_cpu,
    }.items():
        meter.reset("all")
        start, refused = meter.live, False
        try:
            act()
        except Exception as error:
            refused = "on the same device" in str(error)
        record, work = meter.record, meter.record.work["all"]
        counts = record.peak - start, sum(record.waits.values()), sum(record.unpinned.values())
        found[name] = [refused, work.kernels, work.moved, work.flops, *counts, meter.live - start]
print(json.dumps(found))
"""
MIB = 2**20
COUNTS = {
    # kernels, bytes moved, FLOP; bytes of memory at the peak; waits, copies from memory that is not pinned
    "add": [1, 3 * MIB, 0, MIB, 0, 0],
    "add in place": [1, 3 * MIB, 0, 0, 0, 0],
    "copy": [1, 2 * MIB, 0, 0, 0, 0],
    "zero": [1, MIB, 0, 0, 0, 0],
    "views": [0, 0, 0, 0, 0, 0],
    "out": [1, 3 * MIB, 0, MIB, 0, 0],
    "expanded": [1, 2 * MIB + 1024, 0, MIB, 0, 0],
    "product": [1, MIB + MIB // 8 + MIB // 2, 2 * 1024 * 256 * 128, MIB // 2, 0, 0],
    "list": [1, 4 * MIB, 0, 0, 0, 0],
    "read": [1, MIB + 4, 0, 512, 1, 0],
    "read several": [1, 2 * 12, 0, 0, 1, 0],
    "mask": [1, 2 * 8 + 8 * 8, 0, 512, 1, 0],
    "mask on the CPU": [1, 2 * 5 + 5 * 8, 0, 512, 1, 0],
    "index on the CPU": [1, 2 * 3 * 1024 + 3 * 8, 0, 3 * 1024, 0, 1],
    "copied": [1, 2 * 1024, 0, 1024, 0, 1],
    "copied from pinned memory": [1, 2 * 1024, 0, 1024, 0, 0],
    "on the CPU": [0, 0, 0, 0, 0, 0],
    "two at once": [3, 7 * MIB, 0, 3 * MIB, 0, 0],
    "one after the other": [2, 4 * MIB, 0, MIB, 0, 0],
    "mixed": [0, 0, 0, 0, 0, 0],
}


def test_counts() -> None:
    """Guards against a pass, a wait or memory that is not counted, and a mixed device that passes."""
    found = json.loads(run("-c", PROGRAM))
    assert {name: counts[1:-1] for name, counts in found.items()} == COUNTS
    assert [name for name, (refused, *_) in found.items() if refused] == ["mixed"]
    assert {name: kept for name, (*_, kept) in found.items() if kept} == {}


def test_each_installed_torch_has_its_own_guard(tmp_path, monkeypatch):
    """Guards against a guard that looks for torch's libraries in an environment that is gone."""
    monkeypatch.setenv("CHARLM_CACHE", str(tmp_path))
    monkeypatch.setattr(guard.subprocess, "run", lambda command, check: Path(command[-1]).touch())
    monkeypatch.setattr(guard, "_command", lambda target: [str(target)])
    monkeypatch.setattr(guard, "missing", lambda: None)
    here = guard.compiled_guard()
    assert guard.compiled_guard() == here
    monkeypatch.setattr(guard, "_torch", lambda: tmp_path / "elsewhere" / "torch")
    assert guard.compiled_guard() != here
