"""Precision, compilation and accumulation by config, launcher and hardware, in this order."""

import os
import subprocess
import sys

import pytest
import torch

from charlm.config import Config, TrainConfig, UserError
from charlm.training import device as hardware
from charlm.training.sharding import wants_shards
from tiny import SCRIPTS, refused


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("MIXED_PRECISION", "GRADIENT_ACCUMULATION_STEPS", "DYNAMO_BACKEND"):
        monkeypatch.delenv(f"ACCELERATE_{name}", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.mark.parametrize(
    ("configured", "launcher", "fast_bf16", "precision"),
    [
        ("auto", None, True, "bf16"),
        ("auto", None, False, "no"),
        ("auto", "no", True, "no"),
        ("auto", "bf16", False, "bf16"),
        ("no", "bf16", True, "no"),
        ("bf16", "no", False, "bf16"),
    ],
)
def test_the_config_wins_over_the_launcher_and_the_launcher_over_the_hardware(
    configured, launcher, fast_bf16, precision, monkeypatch
):
    """Guards against another precision than the one asked for."""
    if launcher:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    monkeypatch.setattr(hardware, "has_fast_bf16", lambda: fast_bf16)
    assert hardware.choose_precision(TrainConfig(mixed_precision=configured))[0] == precision


@pytest.mark.parametrize("asked_by", ["config", "launcher"])
def test_fp16_on_a_cpu_is_refused(asked_by, monkeypatch):
    """Guards against accelerate's silent change to fp32."""
    if asked_by == "launcher":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with refused("train.mixed_precision"):
        hardware.choose_precision(TrainConfig(mixed_precision="fp16" if asked_by == "config" else "auto"))


def test_the_launchers_accumulation_is_refused(monkeypatch):
    """Guards against a global batch that silently is a multiple of the configured one."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(UserError, match=r"gradient_accumulation_steps=4: use --train.micro_batch_size"):
        hardware.build_accelerator(TrainConfig(mixed_precision="no"))


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "abc"},
        {"WORLD_SIZE": "0"},
        {"WORLD_SIZE": "2"},  # of processes that would not know of each other
        {"RANK": "-1"},
        {"RANK": "1"},
        {"LOCAL_RANK": "-3"},
        {"LOCAL_RANK": "x"},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"},
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "29555", "MASTER_ADDR": "nowhere.invalid"},
        {"ACCELERATE_USE_CPU": "maybe"},
        {"ACCELERATE_USE_FSDP": "maybe"},
        {"ACCELERATE_DEBUG_MODE": "maybe"},
        {"ACCELERATE_MIXED_PRECISION": "fp8"},
        {"ACCELERATE_DYNAMO_BACKEND": "nonsense"},
        {"ACCELERATE_TORCH_DEVICE": "abacus"},
        {"ACCELERATE_TORCH_DEVICE": "meta"},
    ],
    ids=str,
)
def test_nonsense_of_a_launcher_is_refused(variables, monkeypatch):
    """Guards against accelerate's traceback, a wait for a process that nobody starts, and processes that each believe
    to be alone."""
    hardware.AcceleratorState._reset_state(reset_partial_state=True)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    option = "train.mixed_precision" if name == "ACCELERATE_MIXED_PRECISION" else None
    with refused(option, f"{name}={value}"):
        wants_shards(TrainConfig(), hardware.build_accelerator(TrainConfig())[0].num_processes)


def test_a_compiler_cache_that_cannot_be_made_is_refused():
    """Guards against torch's traceback, which does not name the variable. torch reads it once in a process."""
    code = "import charlm.training.device as device\nwith device.torch_settings(charlm.Config()): pass"
    place = {"TORCHINDUCTOR_CACHE_DIR": "/dev/null/cache", "PYTHONPATH": str(SCRIPTS.parent)}
    done = subprocess.run(
        [sys.executable, "-c", f"import charlm\n{code}"], env=os.environ | place, capture_output=True, text=True
    )
    assert "UserError: cannot start with" in done.stderr and "TORCHINDUCTOR_CACHE_DIR=/dev/null/cache" in done.stderr


@pytest.mark.parametrize("there", [True, False])
def test_processes_on_cpus_find_each_other_by_themselves(there, monkeypatch):
    """Guards against two processes that each believe to be alone, unless ACCELERATE_USE_CPU is set."""
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr(hardware, "default_device", lambda: torch.device("cuda" if there else "cpu"))
    monkeypatch.setattr(hardware, "Accelerator", lambda **how: how)
    assert hardware.build_accelerator(TrainConfig(mixed_precision="no"))[0]["cpu"] != there


@pytest.mark.parametrize(
    ("configured", "device", "backend", "compiles"),
    [
        ("auto", "cpu", None, False),
        ("auto", "cpu", "NO", False),
        ("auto", "cpu", "INDUCTOR", True),
        ("no", "cpu", "INDUCTOR", False),
        ("auto", "cuda", "NO", True),  # the launcher's default says nothing
        ("no", "cuda", None, False),
    ],
)
def test_compile_follows_device_and_launcher_unless_configured(configured, device, backend, compiles, monkeypatch):
    """Guards against a GPU that waits for the host, and the launcher's wish that is not heard."""
    if backend:
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
    assert hardware.choose_compile(TrainConfig(compile=configured), torch.device(device)) is compiles


def test_a_second_run_of_a_process_may_have_another_precision():
    """Guards against accelerate's process-wide state, which keeps the first precision."""
    for precision in ("no", "bf16", "no"):
        accelerator, _ = hardware.build_accelerator(TrainConfig(mixed_precision=precision))
        assert accelerator.mixed_precision == precision


def test_settings_of_the_process_are_put_back():
    """Guards against a run that changes the arithmetic of later code."""
    before = torch.get_float32_matmul_precision()
    with (
        pytest.raises(RuntimeError),
        hardware.torch_settings(Config(train=TrainConfig(matmul_precision="medium", deterministic=True))),
    ):
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.are_deterministic_algorithms_enabled()
        raise RuntimeError
    assert torch.get_float32_matmul_precision() == before
    assert not torch.are_deterministic_algorithms_enabled()
