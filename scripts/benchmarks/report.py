"""The result of a benchmark: one JSON document, and Markdown for people."""

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import psutil

from benchmarks.results import RaceResult, drafts_table, mebibytes, middle_half, paired, spread
from benchmarks.setups import ALL_LOSSES, ALLOCATOR, CHECKPOINTED, MAIN_LOSS
from benchmarks.suites import BenchmarkResult, Point, Settings
from charlm.process import processor_name
from charlm.text import markdown_table

PACKAGES = ("torch", "accelerate", "x-transformers", "transformers")


def document(settings: Settings, result: BenchmarkResult) -> dict[str, Any]:
    """The result for JSON. Its headline figures are those of the first race."""
    found: dict[str, Any] = {
        "benchmark": settings.benchmark,
        "machine": machine(settings.device),
        "protocol": protocol(settings, result) | {"left_out": result.missing},
    }
    if result.races:
        found |= result.races[0].headline() | {"races": [race.to_dict() for race in result.races]}
    if result.points:
        found["points"] = [point_dict(point) for point in result.points]
    return found


def protocol(settings: Settings, result: BenchmarkResult) -> dict[str, Any]:
    """The conditions of the measurement."""
    first = result.races[0].trials[0] if result.races else result.points[0].trials[ALL_LOSSES]
    return {
        "shape": asdict(settings.shape),
        "precision": settings.precision,
        "device": settings.device,
        "threads": first.facts["threads"],
        "rounds": settings.rounds,
        "timed_steps_per_round": first.steps,
        "compile": settings.compile,
        "optimizer": "AdamW",
        "dropout": 0.0,
        "text": "the run's valid split" if settings.run else "Python standard library, bytes",
        "allocator_of_tuned_peers": ALLOCATOR[settings.device],
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def machine(device: str) -> str:
    """The machine in words: processor, cores, memory, GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    words = (
        f"{processor_name()}, {cores} cores, {platform.system()}, Python {platform.python_version()}, "
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB of memory"
    )
    if device == "cuda":
        import torch

        words = f"{torch.cuda.get_device_name()}; {words}"
    return words


def point_dict(point: Point) -> dict[str, Any]:
    """A point of `auxiliary` or `scaling`, for JSON."""
    on, off = point.trials[ALL_LOSSES], point.trials[MAIN_LOSS]
    found = {
        point.axis: point.value,
        "shape": asdict(point.shape),
        "seconds_per_character": 1 / float(np.median(on.rates())),
        "flop_per_character": on.facts["flop_per_step"] / on.facts["characters_per_step"],
        "model_flops_utilisation": point.utilisations[ALL_LOSSES],
        "peak_memory_bytes": on.peak_memory,
        "auxiliary_step_time_ratio": spread(paired(off.rates(), on.rates())),
        "auxiliary_arithmetic_ratio": on.facts["flop_per_step"] / off.facts["flop_per_step"],
        "auxiliary_peak_memory_ratio": on.peak_memory / off.peak_memory,
    }
    if CHECKPOINTED in point.trials:
        found |= {
            "checkpointed_step_time_ratio": point.utilisations[ALL_LOSSES] / point.utilisations[CHECKPOINTED],
            "checkpointed_peak_memory_bytes": point.trials[CHECKPOINTED].peak_memory,
        }
    return found


def to_markdown(settings: Settings, result: BenchmarkResult) -> str:
    """Tables, and below them how they were measured."""
    as_table = drafts_table if settings.benchmark == "drafts" else RaceResult.to_markdown
    tables = [as_table(race) for race in result.races]
    if settings.benchmark == "auxiliary":
        tables.append(auxiliary_table(result.points))
    if settings.benchmark == "scaling":
        tables += [
            scaling_table([point for point in result.points if point.axis == axis])
            for axis in dict.fromkeys(point.axis for point in result.points)
        ]
    found = protocol(settings, result)
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    tables.append(
        f"Medians of {found['rounds']} rounds of {found['timed_steps_per_round']} timed steps, contestants in turn; "
        f"{found['threads']} threads{', AdamW, no dropout' * (not settings.run)}; {versions}; "
        f"{machine(settings.device)}."
    )
    return "\n\n".join(tables)


def auxiliary_table(points: Sequence[Point]) -> str:
    """The cost of intermediate layers and extra targets; all positions predict with and without them."""
    rows = []
    for point in points:
        found, off = point_dict(point), mebibytes(point.trials[MAIN_LOSS].peak_memory)
        time, arithmetic, memory = auxiliary_ratios(found)
        quartiles = middle_half(found["auxiliary_step_time_ratio"], ".3f")
        rows.append([str(point.value), time, quartiles, arithmetic, memory, mebibytes(found["peak_memory_bytes"]), off])
    header = ["layers", "step time, on / off", "middle half", "arithmetic alone", "peak memory, on / off", "on", "off"]
    return f"**Auxiliary losses on against off** ({points[0].shape.in_words()})\n\n{markdown_table(header, rows)}"


def auxiliary_ratios(found: dict[str, Any]) -> list[str]:
    """Time, arithmetic and memory of a step with auxiliary losses over those without."""
    time = found["auxiliary_step_time_ratio"]["median"]
    ratios = time, found["auxiliary_arithmetic_ratio"], found["auxiliary_peak_memory_ratio"]
    return [f"{ratio:.3f}" for ratio in ratios]


def scaling_table(points: Sequence[Point]) -> str:
    """One axis of `scaling`.

    "beyond arithmetic" is the time per FLOP compared with the axis's first point: 1 means that time grows like the
    arithmetic. Since points are measured one after the other, time is counted in matrix products of the same rounds.
    """
    header = [
        points[0].axis, "µs per character", "MFLOP per character", "beyond arithmetic", "of the matrix rate",
        "peak memory", "checkpointed: memory", "time", "auxiliary on / off: time", "arithmetic", "memory",
    ]  # fmt: skip
    first = point_dict(points[0])["model_flops_utilisation"]
    rows = [
        [
            f"{point.value}",
            f"{found['seconds_per_character'] * 1e6:.1f}",
            f"{found['flop_per_character'] / 1e6:.1f}",
            f"{first / found['model_flops_utilisation']:.2f}",
            f"{found['model_flops_utilisation']:.0%}",
            mebibytes(found["peak_memory_bytes"]),
            mebibytes(found["checkpointed_peak_memory_bytes"]),
            f"{found['checkpointed_step_time_ratio']:.2f}",
            *auxiliary_ratios(found),
        ]
        for point, found in zip(points, map(point_dict, points), strict=True)
    ]
    return f"**Scaling with {points[0].axis}** (from {points[0].shape.in_words()})\n\n{markdown_table(header, rows)}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
