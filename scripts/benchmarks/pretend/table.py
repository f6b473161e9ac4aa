"""The tables of `python scripts/benchmark.py pretend`: predicted steps, targets and memory. Imports no torch."""

from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

from benchmarks.pretend.worker import ROOT, measure
from charlm.config import Config, steps_of
from charlm.config.load import load_config
from charlm.text import markdown_table

HOST = {"forward": 19e-6, "backward": 12e-6, "update": 5.5e-6, "validation": 19e-6}
"""Seconds in which the host launches a kernel: Python above it in the forward pass, C++ alone in the others."""
BETWEEN = 0.5e-3
"""Seconds of a step outside its phases: windows, schedules and the check for signals."""
PEAK = 989e12
"""FLOP per second of an H100 SXM in bf16, by its data sheet."""
MAIN_LOSS = {"aux.layers.enabled": False, "aux.targets.enabled": False}
ASSUMPTIONS = (
    "Pretended H100 SXM, bf16: a kernel takes the largest of its bytes / 2.85 TB/s, its FLOP / 600 TFLOP/s (attention "
    "450 forward, 320 backward, counted in full) and 2 µs; the host launches one in 19 µs in the forward pass, 12 µs "
    "in the backward pass and 5.5 µs in the update. A step takes the longer of device and host, and 0.5 ms. Numbers, "
    "caches, overlap and exchange between GPUs are not modelled. "
    "In compiled functions operations on the same tensors, between products and attention, are one kernel."
)


class Case(NamedTuple):
    """A config to measure."""

    config: str
    batch: int
    """Of each process."""
    options: Mapping[str, Any] = MappingProxyType({})
    processes: int = 1
    """More than one share the model in shards."""

    @property
    def request(self) -> dict[str, Any]:
        """As `measure` takes it."""
        batch = {"train.batch_size": self.batch * self.processes}
        sharding = {"train.sharding": "fsdp2"} if self.processes > 1 else {}
        return {"configs": [self.config], "set": batch | sharding | dict(self.options)}

    def read(self) -> Config:
        return load_config([ROOT / "configs" / self.config], self.request["set"])


T12, T64, FAST, SMALL = (f"enwik8_{name}.yaml" for name in ("t12", "t64", "fast", "small"))
ADAMW, MUON = {"train.optimizer": "adamw"}, {"train.optimizer": "muon"}
CHECKPOINTED = {"train.activation_checkpointing": True}
CASES = {
    "T12 batch 16": Case(T12, 16),
    "T12 batch 64": Case(T12, 64),
    "T12 batch 64, main loss alone": Case(T12, 64, MAIN_LOSS),
    "T12 batch 64, AdamW": Case(T12, 64, ADAMW),
    "T12 batch 64, Muon": Case(T12, 64, MUON),
    "T12 batch 64, checkpointed": Case(T12, 64, CHECKPOINTED),
    "T64 batch 16": Case(T64, 16),
    "T64 batch 16, AdamW": Case(T64, 16, ADAMW),
    "T64 batch 64": Case(T64, 64),
    "T64 batch 64, checkpointed": Case(T64, 64, CHECKPOINTED),
    "T64 batch 16, AdamW, 2 shards": Case(T64, 16, ADAMW, 2),
    "T64 batch 16, AdamW, 8 shards": Case(T64, 16, ADAMW, 8),
    "enwik8_fast batch 16": Case(FAST, 16),
    "enwik8_fast": Case(FAST, 64),
    "enwik8_small": Case(SMALL, 8),
    "enwik8_small batch 64": Case(SMALL, 64),
}


class Target(NamedTuple):
    """A figure, with the value to reach."""

    name: str
    measured: Callable[[], float]
    reach: float
    beyond: float | None = None
    more: bool = False
    """Whether more is better."""

    def is_reached(self, value: float) -> bool:
        return value >= self.reach if self.more else value <= self.reach


@cache
def step(name: str, progress: float | None = None) -> dict[str, Any]:
    """The figures of a step of one of CASES, by default as soon as its windows are full."""
    case = CASES[name]
    at = case.read().train.full_context_from if progress is None else progress
    return measure("steps", at=[at], processes=case.processes, **case.request)[0]


def host_seconds(found: Mapping[str, Any]) -> float:
    """Time that the host needs to launch the kernels."""
    return sum(HOST[phase] * work["kernels"] for phase, work in found["phases"].items())


def step_seconds(found: Mapping[str, Any]) -> float:
    """Predicted time of a step."""
    return max(found["seconds"], host_seconds(found)) + BETWEEN


def characters_per_second(name: str) -> float:
    """Predicted speed."""
    case = CASES[name]
    return case.batch * case.read().model.context_length / step_seconds(step(name))


def utilisation(name: str) -> float:
    """Share of the data sheet's rate."""
    return step(name)["flops"] / step_seconds(step(name)) / PEAK


def minutes(name: str) -> float:
    """Predicted time of a whole run with its validations, from steps before and after windows grow."""
    case = CASES[name]
    train = case.read().train
    seconds, grown = 0.0, train.full_context_from
    for start, end in ((0.0, grown), (grown, 1.0)):
        if end > start:
            seconds += (end - start) * train.steps * step_seconds(step(name, start))
    validations = train.steps // steps_of(train.valid_every, train.steps)
    found = measure("validation", **case.request)
    return (seconds + validations * max(found["seconds"], host_seconds(found))) / 60


def auxiliary_ratio() -> float:
    """Predicted time of a step with auxiliary losses over one without."""
    on, off = step("T12 batch 64"), step("T12 batch 64, main loss alone")
    return step_seconds(on) / step_seconds(off)


TARGETS = (
    Target("T12 batch 64: of 989 TFLOP/s, %", lambda: 100 * utilisation("T12 batch 64"), 33, 42, more=True),
    Target("T64 batch 64: of 989 TFLOP/s, %", lambda: 100 * utilisation("T64 batch 64"), 33, 42, more=True),
    Target(
        "T12 batch 16: 1,000 characters/s", lambda: characters_per_second("T12 batch 16") / 1e3, 500, 700, more=True
    ),
    Target("T64: kernels of one update", lambda: step("T64 batch 64")["phases"]["update"]["kernels"], 150, 60),
    Target("enwik8_fast with validations: minutes", lambda: minutes("enwik8_fast"), 10, 8),
    Target("enwik8_small, with n-grams: host waits per step", lambda: sum(step("enwik8_small")["waits"].values()), 0),
    Target("T12 batch 64: time with auxiliary losses on / off", auxiliary_ratio, 1.12, 1.07),
)
"""What the program must reach to be ready for a GPU."""


def document(say: Callable[[str], None]) -> dict[str, Any]:
    """All tables, for JSON; `say` hears of each measurement."""
    steps, goals = [], []
    for name in CASES:
        say(name)
        found = step(name)
        figures = {
            "case": name,
            "kernels": found["kernels"],
            "kernels_of_update": found["phases"]["update"]["kernels"],
            "gigabytes_moved": found["moved"] / 1e9,
            "teraflop": found["flops"] / 1e12,
            "device_milliseconds": found["seconds"] * 1e3,
            "host_milliseconds": host_seconds(found) * 1e3,
            "characters_per_second": characters_per_second(name),
            "utilisation": utilisation(name),
            "peak_bytes": found["peak"],
            "waits": sum(found["waits"].values()),
            "unpinned_copies": sum(found["unpinned"].values()),
        }
        steps.append(figures)
    for target in TARGETS:
        say(target.name)
        goal = {"name": target.name, "measured": target.measured()}
        goals.append(goal | {"reach": target.reach, "beyond": target.beyond})
    return {"assumptions": ASSUMPTIONS, "targets": goals, "steps": steps}


def to_markdown(found: Mapping[str, Any]) -> str:
    """The tables, for people."""
    columns = ("measured", "reach", "beyond")
    goals = [[goal["name"], *(_digits(goal[column]) for column in columns)] for goal in found["targets"]]
    header = ["", "kernels", "in the update", "GB moved", "TFLOP", "device ms", "host ms", "characters/s"]
    header += ["of 989 TFLOP/s", "peak GiB", "host waits", "unpinned copies"]
    tables = [
        markdown_table(["", "now", "to reach", "goal beyond"], goals),
        markdown_table(header, [_cells(step) for step in found["steps"]]),
    ]
    return "\n\n".join([*tables, found["assumptions"]])


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 20 else f"{value:.3g}"


def _cells(step: Mapping[str, Any]) -> list[str]:
    return [
        step["case"],
        f"{step['kernels']:,}",
        f"{step['kernels_of_update']:,}",
        f"{step['gigabytes_moved']:.1f}",
        f"{step['teraflop']:.2f}",
        f"{step['device_milliseconds']:.1f}",
        f"{step['host_milliseconds']:.1f}",
        f"{step['characters_per_second'] / 1e3:.0f}k",
        f"{step['utilisation']:.0%}",
        f"{step['peak_bytes'] / 2**30:.2f}",
        f"{step['waits']}",
        f"{step['unpinned_copies']}",
    ]
