"""Steps of the real loop on a pretended GPU: no mixed device, no wait, few kernels. A process for each."""

from typing import Any

import pytest
from benchmarks.pretend import table
from benchmarks.pretend.guard import missing
from benchmarks.pretend.worker import ROOT, measure

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"the pretended GPU needs {missing()}")

SMALL = {
    **{"model.num_layers": 4, "model.num_heads": 2, "model.d_model": 32, "model.d_ff": 64, "model.context_length": 64},
    **{"model.ngram_buckets": 64, "train.batch_size": 4, "train.mixed_precision": "bf16"},
}
"""Which kernels run, and where, does not depend on sizes."""
SHIPPED = [path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.yaml")]
CONFIGS = sorted(name for name in SHIPPED if not name.startswith("accelerate/"))
FP16, ADAMW, MUON = {"train.mixed_precision": "fp16"}, {"train.optimizer": "adamw"}, {"train.optimizer": "muon"}
NGRAMS = {"model.ngrams": [2, 3]}
OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": ADAMW,
    "muon": MUON,
    "fp16": FP16,
    "fp16, adamw": FP16 | ADAMW,
    "fp16, muon": FP16 | MUON,
    "fp32": {"train.mixed_precision": "no"},
    "relay": {"aux.route": "relay"},
    "pairwise": {"aux.route": "pairwise"},
    "multiway": {"aux.route": "multiway"},
    "weighted": {"aux.step_sizes": "weighted"},
    "hedge": {"aux.hedge.enabled": True},
    "spikes": {"train.spike_threshold": 6.0},
    "hedge, spikes, fp16": {"aux.hedge.enabled": True, "train.spike_threshold": 6.0} | FP16,
    "checkpointing": {"train.activation_checkpointing": True},
    "clipping, micro-batches": {"train.clip_norm": 1.0, "train.micro_batch_size": 2},
    "reference loss": {"train.cross_entropy": "reference"},
    "attention in blocks": {"train.attention": "blocks", "model.attention_dropout": 0.0},
    "n-grams": NGRAMS,
    "n-grams, fp16": NGRAMS | FP16,
    "n-grams, pairwise": NGRAMS | {"aux.route": "pairwise"},
}
REACHED = {
    "T64: kernels of one update",
    "T12 batch 16: 1,000 characters/s",
    "enwik8_fast with validations: minutes",
    "enwik8_small, with n-grams: host waits per step",
}
"""Targets that are reached."""
IN_CORE = {"enwik8_t12.yaml", "n-grams"}


def cases() -> list:
    """Every shipped config, and T12 with every option; the core runs in `make test`."""
    found = []
    for name, config, options in [
        *((name, name, {}) for name in CONFIGS),
        *((name, table.T12, options) for name, options in OPTIONS.items()),
    ]:
        marks = [] if name in IN_CORE else [pytest.mark.slow]
        found.append(pytest.param(config, options, id=name, marks=marks))
    return found


def steps(config: str, options: dict[str, Any], **request: Any) -> list[dict[str, Any]]:
    """Figures of small steps of a config."""
    return measure("steps", configs=[config], set=SMALL | options, **request)


@pytest.mark.parametrize(("config", "options"), cases())
def test_no_step_mixes_devices_or_waits(config, options):
    """Guards against a tensor left on the CPU, and a host that waits for the GPU in a step, early or late in a run."""
    found = steps(config, options, at=[0.0, 0.6, 0.99], log=True)
    assert {wait for step in found for wait in step["waits"]} == set()
    assert all(sum(step["waits_of_log"].values()) <= 2 for step in found)  # flags, and the losses of one step


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param(MUON | FP16, marks=pytest.mark.slow),
        pytest.param(NGRAMS | FP16),
        pytest.param(NGRAMS | {"train.sharding": "no"}, marks=pytest.mark.slow),
        pytest.param(NGRAMS | {"aux.route": "multiway", "train.sharding": "no"}, marks=pytest.mark.slow),
    ],
    ids=["sgd", "muon, fp16", "n-grams, fp16", "n-grams, replicas", "n-grams, multiway"],
)
def test_several_gpus(options):
    """Guards against tables that only one GPU can train, and a wait or a sparse exchange among several."""
    found = steps(table.T12, {"train.sharding": "fsdp2"} | options, at=[0.0, 0.6], processes=2)
    assert [step["waits"] for step in found] == [{}, {}]


def test_silent_heads_are_not_waited_for():
    """Guards against DDP, which copies a map of the parameters to the host once one of them has no gradient."""
    found = steps(table.T12, {}, at=[0.0, 0.6], processes=2)
    assert [step["waits"] for step in found] == [{}, {}]


def test_windows_come_from_pinned_memory():
    """Guards against a copy that waits for the device, and windows of eight bytes per character."""
    (found,) = steps(table.T12, {})
    assert found["unpinned"] == {}


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (table.T12, {}),
        pytest.param(table.T12, ADAMW, marks=pytest.mark.slow),
        pytest.param(table.FAST, {"model.ngrams": "[]", "train.average": "no"}, marks=pytest.mark.slow),
    ],
    ids=["sgd", "adamw", "muon"],
)
def test_an_update_is_a_few_kernels(config, options):
    """Guards against an update that copies, or launches a kernel for every parameter."""
    (shallow,) = steps(config, options)
    (deep,) = steps(config, options | {"model.num_layers": 8})
    few, more = (found["phases"]["update"]["kernels"] for found in (shallow, deep))
    assert more <= 120 and more - few <= 8  # lists of tensors are cut into launches


@pytest.mark.slow
def test_autocast_sends_no_activation_to_fp32():
    """Guards against operations that CUDA's autocast computes in fp32, and wide activations cast there and back."""
    (found,) = steps(table.FAST, {})
    assert "forward: pow" not in found["operations"]


def test_blocks_are_compiled_by_default():
    """Guards against runs on a GPU that wait for the host, whose kernels are too many to launch one by one."""
    (found,) = steps(table.T12, {})
    assert found["compiled"] >= SMALL["model.num_layers"]


OPEN = pytest.mark.xfail(strict=True, reason="not reached yet")


@pytest.mark.slow
@pytest.mark.parametrize(
    "target",
    [pytest.param(own, id=own.name, marks=[] if own.name in REACHED else OPEN) for own in table.TARGETS],
)
def test_target(target):
    """Guards against a step that gets slower on a GPU while everything is as fast as before on a CPU."""
    assert target.is_reached(target.measured())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "gibibytes"),
    [("T64 batch 16", 13.8), ("T64 batch 64", 48.6), ("T64 batch 64, checkpointed", 12.5)],
)
def test_memory_of_t64(name, gibibytes):
    """Guards against activations that are kept twice, and checkpointing that keeps them."""
    assert table.step(name)["peak"] < 1.01 * gibibytes * 2**30
