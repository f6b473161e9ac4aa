"""What a benchmark found: one JSON document, and Markdown for people."""

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.race import Entry
from benchmarks.results import RaceResult, drafts_table, paired, spread
from benchmarks.setups import ALL_LOSSES, ALLOCATOR, CHECKPOINTED, MAIN_LOSS
from benchmarks.suites import Outcome, Point, Settings
from charlm.markdown import markdown_table

PACKAGES = ("torch", "accelerate", "x-transformers", "transformers")


def document(settings: Settings, outcome: Outcome) -> dict[str, Any]:
    """JSON-able. The headline figures are those of the first race: shape and stride of the paper, one prompt."""
    entries = [entry for result in outcome.races for entry in result.entries]
    entries += [entry for point in outcome.points for entry in point.setups.values()]
    found: dict[str, Any] = {
        "benchmark": settings.benchmark,
        "machine": machine(settings.device),
        "protocol": protocol(settings, entries) | {"left_out": outcome.missing},
    }
    if outcome.races:
        found |= outcome.races[0].headline() | {"races": [result.to_dict() for result in outcome.races]}
    if outcome.points:
        found["points"] = [point_dict(point) for point in outcome.points]
    return found


def protocol(settings: Settings, entries: Sequence[Entry]) -> dict[str, Any]:
    """How it was measured."""
    return {
        "shape": asdict(settings.shape),
        "precision": settings.precision,
        "device": settings.device,
        "threads": entries[0].facts["threads"],
        "rounds": settings.num_rounds,
        "timed_steps_per_round": entries[0].steps,
        "compile": settings.compile,
        "optimizer": "AdamW",
        "dropout": 0.0,
        "text": "the run's valid split" if settings.run else "Python standard library, bytes",
        "allocator_of_tuned_peers": ALLOCATOR[settings.device],
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def machine(device: str) -> str:
    """The machine in words: processor, cores, memory, GPU."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    words = f"{model}, {cores} cores, {platform.system()}, Python {platform.python_version()}"
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        words += f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB of memory"
    if device == "cuda":
        import torch

        words = f"{torch.cuda.get_device_name()}; {words}"
    return words


def point_dict(point: Point) -> dict[str, Any]:
    """A place of `auxiliary` or `scaling`, JSON-able."""
    on, off = point.setups[ALL_LOSSES], point.setups[MAIN_LOSS]
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
    if CHECKPOINTED in point.setups:
        checkpointed = point.setups[CHECKPOINTED]
        found |= {
            "checkpointed_step_time_ratio": point.utilisations[ALL_LOSSES] / point.utilisations[CHECKPOINTED],
            "checkpointed_peak_memory_bytes": checkpointed.peak_memory,
        }
    return found


def to_markdown(settings: Settings, outcome: Outcome) -> str:
    """Tables, and under them how they were measured."""
    as_table = drafts_table if settings.benchmark == "drafts" else RaceResult.to_markdown
    tables = [as_table(result) for result in outcome.races]
    if settings.benchmark == "auxiliary":
        tables.append(auxiliary_table(outcome.points))
    if settings.benchmark == "scaling":
        tables += [
            scaling_table([point for point in outcome.points if point.axis == axis])
            for axis in dict.fromkeys(point.axis for point in outcome.points)
        ]
    found = document(settings, outcome)["protocol"]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return "\n\n".join(
        [
            *tables,
            f"Medians of {found['rounds']} rounds of {found['timed_steps_per_round']} timed steps, "
            f"contestants in turn; {found['threads']} threads{', AdamW, no dropout' * (not settings.run)}; {versions}; "
            f"{machine(settings.device)}.",
        ]
    )


def auxiliary_table(points: Sequence[Point]) -> str:
    """Intermediate layers and extra targets on against off; all positions predict in both."""
    header = ["layers", "step time, on / off", "middle half", "arithmetic alone", "peak memory, on / off", "on", "off"]
    rows = []
    for point in points:
        found, off = point_dict(point), point.setups[MAIN_LOSS]
        ratio = found["auxiliary_step_time_ratio"]
        rows.append(
            [
                str(point.value),
                f"{ratio['median']:.3f}",
                f"{ratio['lower_quartile']:.3f} to {ratio['upper_quartile']:.3f}",
                f"{found['auxiliary_arithmetic_ratio']:.3f}",
                f"{found['auxiliary_peak_memory_ratio']:.3f}",
                _mebibytes(found["peak_memory_bytes"]),
                _mebibytes(off.peak_memory),
            ]
        )
    return f"**Auxiliary losses on against off** ({points[0].shape.in_words()})\n\n" + markdown_table(header, rows)


def scaling_table(points: Sequence[Point]) -> str:
    """One axis. "beyond arithmetic" is time per FLOP against the axis's first place: 1 is growth as it should be. As
    places are measured one after the other, time is counted in matrix products of the same rounds."""
    header = [
        points[0].axis, "µs per character", "MFLOP per character", "beyond arithmetic", "of the matrix rate",
        "peak memory", "checkpointed: memory", "time", "auxiliary on / off: time", "arithmetic", "memory",
    ]  # fmt: skip
    found = [point_dict(point) for point in points]
    utilisations = [place["model_flops_utilisation"] for place in found]
    rows = [
        [
            f"{point.value}",
            f"{place['seconds_per_character'] * 1e6:.1f}",
            f"{place['flop_per_character'] / 1e6:.1f}",
            f"{utilisations[0] / utilisation:.2f}",
            f"{utilisation:.0%}",
            _mebibytes(place["peak_memory_bytes"]),
            _mebibytes(place["checkpointed_peak_memory_bytes"]),
            f"{place['checkpointed_step_time_ratio']:.2f}",
            f"{place['auxiliary_step_time_ratio']['median']:.3f}",
            f"{place['auxiliary_arithmetic_ratio']:.3f}",
            f"{place['auxiliary_peak_memory_ratio']:.3f}",
        ]
        for point, place, utilisation in zip(points, found, utilisations, strict=True)
    ]
    return f"**Scaling with {points[0].axis}** (from {points[0].shape.in_words()})\n\n" + markdown_table(header, rows)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
