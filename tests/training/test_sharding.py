"""Models in shards (FSDP2): when a launcher or an option asks for them, and what cannot be sharded."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from charlm.config import Config, TrainConfig, UserError
from charlm.objective.build import build_objective
from charlm.training.sharding import wants_shards
from charlm.training.start import check_fits
from charlm.training.update import step_unless
from tiny import refused, small_model

FSDP = ("ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING")
"""Environment variables by which a launcher asks for shards."""


@pytest.fixture
def launcher_asks(monkeypatch):
    """`launcher_asks(NAME=value, ...)`: a launcher that sets these variables and no others of FSDP."""

    def arrange(**environment: str) -> None:
        for name in FSDP:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return arrange


@pytest.mark.parametrize(
    ("option", "environment", "expected"),
    [
        ("auto", {}, False),
        ("fsdp2", {}, True),
        ("auto", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, True),
        ("no", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, False),
    ],
)
def test_shards_are_wanted_by_the_option_or_else_by_the_launcher(option, environment, expected, launcher_asks):
    """Guards against a launcher's setting that is ignored, or that wins over the configuration."""
    launcher_asks(**environment)
    assert wants_shards(TrainConfig(sharding=option), num_processes=2) is expected
    assert wants_shards(TrainConfig(sharding=option), num_processes=1) is False


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "fsdp_version=1: only FSDP2"),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params=true"),
        ({"FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "--train.activation_checkpointing=true"),
    ],
)
def test_unsupported_settings_of_the_launcher_are_refused(environment, message, launcher_asks):
    """Guards against a launcher's setting without effect."""
    launcher_asks(ACCELERATE_USE_FSDP="true", **environment)
    with pytest.raises(UserError, match=message):
        wants_shards(TrainConfig(), num_processes=2)


@pytest.mark.parametrize(
    ("model", "train", "option"),
    [
        ({}, {"micro_batch_size": "auto"}, "train.micro_batch_size"),
        ({}, {"batch_size": 5, "micro_batch_size": 2}, "train.batch_size"),
        ({}, {"batch_size": 5, "micro_batch_size": 2, "context_divisor": 4}, "train.batch_size"),
    ],
)
def test_options_that_cannot_be_sharded_are_refused(model, train, option):
    """Guards against a run that hangs or fails at its first step: 3 + 2 windows in micro-batches of 2 are 2 and 1."""
    config = Config(model=small_model(**model), train=TrainConfig(sharding="fsdp2", **train))
    accelerator = SimpleNamespace(num_processes=2, mixed_precision="no")
    objective = build_objective(config, vocabulary_size=11)
    with refused(option):
        check_fits(config, SimpleNamespace(splits={}), objective, accelerator, sharded=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.AdamW(parameters, fused=True),
        lambda parameters: torch.optim.SGD(parameters, momentum=0.9),
        lambda parameters: torch.optim.Muon(parameters),
    ],
    ids=["adamw", "sgd", "muon"],
)
def test_an_update_that_is_skipped_on_the_device_leaves_shards_as_they_were(make):
    """Guards against a skip that works on whole tensors only. Shards exist in a group of one process, too."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        linear = nn.Linear(4, 4, bias=False)
        fully_shard(linear)
        optimizer = make(linear.parameters())
        for skip in (True, False):
            before = linear.weight.full_tensor().clone()
            linear(torch.randn(2, 4)).sum().backward()
            step_unless(torch.tensor(skip), optimizer)
            assert torch.equal(linear.weight.full_tensor(), before) is skip
    finally:
        dist.destroy_process_group()
