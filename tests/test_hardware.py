"""The accelerator of a machine: any that accelerate knows. None is here; what torch would say of it is pretended."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch.optim import SGD, AdamW

import charlm
from charlm import hardware
from charlm.compression.container import environment
from charlm.config import TrainConfig
from charlm.training import device as launching

KINDS = {
    # the questions that accelerate asks, torch's name of the device, and the exchange between processes
    "cuda": (["torch.cuda.is_available"], "cuda", "nccl"),
    "rocm": (["torch.cuda.is_available"], "cuda", "nccl"),
    "mps": (["accelerate.state.is_mps_available"], "mps", "gloo"),
    "xpu": (["accelerate.state.is_xpu_available"], "xpu", "xccl"),
    "none": ([], "cpu", "gloo"),
}


@pytest.mark.parametrize(("questions", "device", "backend"), KINDS.values(), ids=KINDS)
def test_the_device_is_accelerates(questions, device, backend, monkeypatch):
    """Guards against an accelerator that training uses and scoring does not see, or the other way round."""
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    for question in questions:
        monkeypatch.setattr(question, lambda *_, **__: True)
    monkeypatch.setattr(launching, "Accelerator", lambda **how: how)
    assert hardware.default_device() == torch.device(device)
    assert launching.build_accelerator(TrainConfig(mixed_precision="no"))[0]["cpu"] == (device == "cpu")
    assert torch.distributed.get_default_backend_for_device(hardware.default_device()) == backend
    if device != "cpu":
        assert launching.choose_precision(TrainConfig(mixed_precision="fp16"))[0] == "fp16"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert launching.on_cpu()


def test_nothing_else_asks_for_one_makers_devices():
    """Guards against a second place that decides what the machine has."""
    package, scripts = Path(charlm.__file__).parent, Path(__file__).parents[1] / "scripts"
    asked = [path for path in [*package.rglob("*.py"), *scripts.glob("*.py")] if "torch.cuda" in path.read_text()]
    assert [path.name for path in asked] == ["env.py"]  # which asks for the names of GPUs


@pytest.mark.parametrize("native", [True, False])
def test_bf16_only_where_it_is_native(native, monkeypatch):
    """Guards against bf16 that is emulated, and slow, and a device whose module has no such question."""
    monkeypatch.setattr(launching, "on_cpu", lambda: False)
    module = SimpleNamespace(is_bf16_supported=lambda including_emulation: native or including_emulation)
    monkeypatch.setattr(torch, "get_device_module", lambda *_: module)
    assert launching.has_fast_bf16() is native
    monkeypatch.setattr(torch, "get_device_module", lambda *_: SimpleNamespace())
    monkeypatch.setattr(launching, "is_bf16_available", lambda: native)
    assert launching.has_fast_bf16() is native


def test_memory_is_the_devices_or_the_machines(monkeypatch):
    """Guards against free memory taken for all of it, and a device that has none of its own."""
    assert hardware.device_memory(torch.device("cpu")) == psutil.virtual_memory().total
    module = SimpleNamespace(mem_get_info=lambda device: (1, 2))
    monkeypatch.setattr(torch, "get_device_module", lambda *_: module)
    assert hardware.device_memory(torch.device("xpu")) == 2


class Heedless(SGD):
    """A fused optimizer that steps whatever `found_inf` says."""

    def step(self):
        self.found_inf.zero_()
        super().step()


@pytest.mark.parametrize(
    ("optimizer", "device", "there"),
    [(AdamW, "cpu", True), (SGD, "cpu", True), (AdamW, "meta", False), (Heedless, "cpu", False)],
)
def test_fused_optimizers_are_tried(optimizer, device, there):
    """Guards against a kernel that is not there, and one that writes what is not finite into the parameters."""
    assert hardware.has_fused(optimizer, torch.device(device)) is there


class Narrow(torch.Tensor):
    """A tensor whose device has no float64."""

    def double(self):
        raise TypeError("no float64")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_sums_move_where_float64_is():
    """Guards against scores that are rounded to fp32, or that Apple's GPUs cannot compute at all."""
    wide = hardware.in_float64(torch.ones(3).as_subclass(Narrow))
    assert wide.dtype == torch.float64 and type(wide) is torch.Tensor


def test_what_is_lacking_is_said(monkeypatch):
    """Guards against a run that is slow without a word, and a word on a CPU, which lacks nothing that counts."""
    assert launching.describe_lacks(torch.device("cpu")) == []
    (line,) = launching.describe_lacks(torch.device("meta"))
    assert "fused" in line and "float64" not in line and "pinned" not in line


@pytest.mark.parametrize(("kind", "versions"), [("cuda", {"cuda": "12.8"}), ("cuda", {"hip": "6.4"}), ("xpu", {})])
def test_files_name_the_arithmetic(kind, versions, monkeypatch):
    """Guards against a compressed file whose header says None of the machine that wrote it."""
    monkeypatch.setattr(torch, "get_device_module", lambda *_: SimpleNamespace(get_device_name=lambda _: "X1"))
    for name, value in versions.items():
        monkeypatch.setattr(torch.version, name, value)
    assert f"X1 {kind} {next(iter(versions.values()), '')}" in environment(torch.device(kind))
