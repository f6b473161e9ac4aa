"""The table of an ablation, as Markdown, CSV and a picture."""

import csv
import io
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from charlm.ablation.variants import Variant, VariantRun
from charlm.data.windows import default_stride
from charlm.files import write_whole
from charlm.report.style import GREY, PICTURE, TRAIN, VALID, new_figure, save
from charlm.text import markdown_table, visible

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t, two-sided 95 %, for 1 to 9 degrees of freedom; more use the last."""
HOW_TO_READ = (
    "Bits per character: mean ± standard deviation over seeds. "
    "Δ: mean over seeds of the difference to `{reference}`, "
    "± half the 95 % confidence interval (Student's t). "
    "Better and worse: the interval excludes zero; "
    "about 1 in 20 rows without a real effect is marked so by chance. "
    "The errors hang together: all rows are compared with the same runs. "
    "Time per step: median over seeds, without validation. "
    "CPU s: processor time of a whole run, median over seeds. "
    "Memory: the largest resident size of the process."
)


@dataclass(frozen=True)
class Row:
    """A row of the table, compared with the reference seed by seed."""

    variant: Variant
    results: Mapping[int, Mapping[str, Any]]
    """`VariantRun.result` of each seed whose run has finished."""
    reference: "Row | None" = None  # to compare with
    failures: Sequence[str] = ()  # messages of the runs that failed

    @property
    def scores(self) -> dict[int, float]:
        """Bits per character by seed."""
        return {seed: result["bits_per_character"] for seed, result in self.results.items()}

    @cached_property
    def figures(self) -> dict[str, Any]:
        """By name in the CSV file, None for too few seeds."""
        scores = list(self.scores.values())
        others = self.reference.scores if self.reference else {}
        deltas = [bits - others[seed] for seed, bits in self.scores.items() if seed in others]
        delta = statistics.fmean(deltas) if deltas else None
        margin, verdict = None, ""
        if len(deltas) > 1:
            t = T95[min(len(deltas) - 1, len(T95)) - 1]
            margin = t * statistics.stdev(deltas) / math.sqrt(len(deltas))
            outside = "better" if delta < 0 else "worse"
            verdict = outside if abs(delta) > margin else "within noise"
        paper = self.variant.paper
        base = self.reference and self.reference.variant.paper
        return {
            "row": self.variant.name,
            "bits_per_character": self._over_seeds("bits_per_character", statistics.fmean),
            "standard_deviation": statistics.stdev(scores) if len(scores) > 1 else None,
            "bits_per_byte": self._over_seeds("bits_per_byte", statistics.fmean),
            "delta": delta,
            "delta_95": margin,
            "verdict": verdict,
            "seconds_per_step": self._over_seeds("seconds_per_step", statistics.median),
            "cpu_seconds": self._over_seeds("cpu_seconds", statistics.median),
            "peak_memory_bytes": self._over_seeds("peak_memory", max),
            "seeds": len(self.results),
            "failed": len(self.failures),
            "paper_bits_per_character": paper,
            "paper_delta": paper - base if paper and base else None,
        }

    def _over_seeds(self, name: str, mean: Callable[[list[Any]], Any]) -> Any:
        values = [result[name] for result in self.results.values() if result[name] is not None]
        return mean(values) if values else None

    def cell(self, name: str, form: str = "{:.4f}", scale: float = 1) -> str:
        """A figure in words; empty where there is none."""
        value = self.figures[name]
        return "" if value is None else form.format(value * scale)


def write_tables(runs: Sequence[VariantRun], folder: Path) -> list[Row]:
    """Write table.md and table.csv from what is on disk; returns their rows."""
    rows: list[Row] = []
    for variant in [run.variant for run in runs if run.seed == runs[0].seed]:
        own = [run for run in runs if run.variant == variant]
        results = {run.seed: result for run in own if (result := run.result())}
        unfinished = [(run, run.costs().failure) for run in own if run.seed not in results]
        failures = [f"{run}: {failure}" for run, failure in unfinished if failure]
        rows.append(Row(variant, results, rows[0] if rows else None, failures))
    write_whole(folder / "table.md", to_markdown(rows, protocols(runs)))
    write_whole(folder / "table.csv", to_csv(rows))
    return rows


def protocols(runs: Iterable[VariantRun]) -> list[str]:
    """A line for each protocol by which rows were scored."""
    rows: dict[str, dict[str, None]] = {}
    for run in runs:
        train, context = run.config.train, run.config.model.context_length
        protocol = (
            f"Scored on the first {train.valid_symbols:,} symbols of the valid split of "
            f"{run.config.data.corpus}, context {context}, stride {default_stride(context)}; "
            f"after {train.steps:,} steps of {train.batch_size * context:,} characters."
        )
        rows.setdefault(protocol, {})[run.variant.name] = None
    if len(rows) == 1:
        return list(rows)
    return [f"{', '.join(names)}: {protocol}" for protocol, names in rows.items()]


def to_markdown(rows: Sequence[Row], notes: Sequence[str]) -> str:
    """The notes, the table, how to read it, and what failed."""
    deviation = " ± {:.4f}"
    cells = [
        {
            "row": row.variant.name,
            "bits per character": row.cell("bits_per_character") + row.cell("standard_deviation", deviation),
            "Δ": row.cell("delta", "{:+.4f}") + row.cell("delta_95", deviation),
            "verdict": row.figures["verdict"],
            "ms per step": row.cell("seconds_per_step", "{:.1f}", 1000),
            "CPU s": row.cell("cpu_seconds", "{:,.0f}"),
            "peak memory": row.cell("peak_memory_bytes", "{:,.0f} MiB", 2**-20),
            "seeds": str(len(row.results)),
            "paper: T64, text8 dev": row.cell("paper_bits_per_character", "{:.3f}"),
            "paper's Δ": row.cell("paper_delta", "{:+.3f}"),
        }
        for row in rows
    ]
    columns = [name for name in cells[0] if "paper" not in name or any(row[name] for row in cells)]
    table = markdown_table(columns, [[row[name] for name in columns] for row in cells])
    text = [*notes, "", table, "", HOW_TO_READ.format(reference=rows[0].variant.name)]
    if failures := [f"- {failure}" for row in rows for failure in row.failures]:
        text += ["", "Failed:", "", *failures]
    return "\n".join(text).strip() + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """The same figures unrounded, with one column per seed."""
    seeds = sorted({seed for row in rows for seed in row.results})
    file = io.StringIO()
    columns = [*rows[0].figures, *(f"seed_{seed}" for seed in seeds)]
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        scores = {f"seed_{seed}": bits for seed, bits in row.scores.items()}
        writer.writerow(row.figures | scores)
    return file.getvalue()


def draw(rows: Sequence[Row], path: Path) -> Path:
    """Draw the seeds and the mean of every row, an arrow for one far from the best."""
    shown = [row for row in rows if row.results]
    left, right = _limits(shown)
    with new_figure(PICTURE, 0.9 + 0.26 * len(shown)) as figure:
        axes = figure.subplots()
        beside = axes.get_yaxis_transform()
        for place, row in enumerate(shown):
            scores = row.scores.values()
            mean = row.figures["bits_per_character"]
            axes.plot(scores, [place] * len(scores), "o", markersize=3, color=TRAIN, alpha=0.6)
            marker, size = (">", 6) if mean > right else ("|", 12)
            mark = {"marker": marker, "markersize": size, "markeredgewidth": 2}
            axes.plot(min(mean, right), place, color=VALID, **mark)
            star = "*" if row.figures["verdict"] in ("better", "worse") else ""
            text = f"{mean:.3f}" + row.cell("delta", "  {:+.3f}") + star
            axes.text(1.01, place, text, transform=beside, va="center")
        if rows[0].results:
            mean = rows[0].figures["bits_per_character"]
            axes.axvline(mean, color=GREY, linewidth=0.8, linestyle="--")
        axes.set_xlim(left, right + 0.02 * (right - left))
        axes.set_yticks(range(len(shown)), [visible(row.variant.name) for row in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(False, axis="y")
        axes.grid(axis="x")
        axes.set_xlabel("valid bits per character, and difference to the first row (* beyond noise)")
    return save(figure, path)


def _limits(rows: Sequence[Row]) -> tuple[float, float]:
    """The ends of the axis: up to four times as far from the best as the middle."""
    means = sorted(row.figures["bits_per_character"] for row in rows)
    far = means[0] + 4 * max(means[len(means) // 2] - means[0], 0.02)
    lowest = min(min(row.scores.values()) for row in rows)
    near = [row for row in rows if row.figures["bits_per_character"] <= far]
    highest = max(max(row.scores.values()) for row in near)
    margin = 0.05 * max(highest - lowest, 0.02)
    return lowest - margin, highest + margin
