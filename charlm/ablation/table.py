"""The table of an ablation: means, differences and verdicts, as Markdown, CSV and a picture."""

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charlm.ablation.variants import Variant, VariantRun
from charlm.markdown import markdown_table

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t, two-sided 95 %, for 1 to 9 degrees of freedom. More use the last one, which errs on the safe side."""
HOW_TO_READ = (
    "Bits per character: mean ± standard deviation over seeds. Δ: mean difference to `{reference}`, seed by seed (a "
    "seed means the same windows in every row), ± half the 95 % interval by Student's t. Better and worse: zero lies "
    "outside the interval; of 20 rows that change nothing, one is expected to look so. Time per step: median over "
    "seeds, without validation. CPU s: processor time of a whole run, median over seeds; it hardly depends on other "
    "work on the machine. Memory: the largest resident size of the process, libraries included."
)


@dataclass(frozen=True)
class Result:
    """The result of one finished run."""

    bits_per_character: float
    bits_per_byte: float
    """Both from the validation after the last step."""
    seconds_per_step: float | None
    cpu_seconds: float | None
    """Processor time of the run's processes, from start to end."""
    peak_memory: int | None
    """The largest resident size, in bytes."""


@dataclass(frozen=True)
class Row:
    """A row of the table, compared with the reference seed by seed."""

    variant: Variant
    results: Mapping[int, Result]
    """The result of each seed whose run has finished."""
    reference: "Row | None" = None
    """The row to compare with; None for the first row, which is the others' reference."""
    failures: Sequence[str] = ()
    """Messages of the runs that failed."""

    @property
    def scores(self) -> list[float]:
        return self._each("bits_per_character")

    @property
    def mean(self) -> float | None:
        return _mean(self.scores)

    @property
    def deltas(self) -> list[float]:
        """Bits per character minus the reference's, for the seeds that both have."""
        others = self.reference.results if self.reference is not None else {}
        return [
            result.bits_per_character - others[seed].bits_per_character
            for seed, result in self.results.items()
            if seed in others
        ]

    @property
    def delta(self) -> float | None:
        return _mean(self.deltas)

    @property
    def margin(self) -> float | None:
        """Half the 95 % interval of `delta`."""
        count = len(self.deltas)
        if count < 2:
            return None
        return T95[min(count - 1, len(T95)) - 1] * statistics.stdev(self.deltas) / math.sqrt(count)

    @property
    def verdict(self) -> str:
        """better, worse or within noise; empty if there are too few seeds to tell."""
        if self.delta is None or self.margin is None:
            return ""
        if abs(self.delta) <= self.margin:
            return "within noise"
        return "better" if self.delta < 0 else "worse"

    def to_dict(self) -> dict[str, Any]:
        """The row's figures by their names in the CSV file."""
        paper, reference = self.variant.paper, self.reference and self.reference.variant.paper
        return {
            "row": self.variant.name,
            "bits_per_character": self.mean,
            "standard_deviation": statistics.stdev(self.scores) if len(self.scores) > 1 else None,
            "bits_per_byte": _mean(self._each("bits_per_byte")),
            "delta": self.delta,
            "delta_95": self.margin,
            "verdict": self.verdict,
            "seconds_per_step": _median(self._each("seconds_per_step")),
            "cpu_seconds": _median(self._each("cpu_seconds")),
            "peak_memory_bytes": max(self._each("peak_memory"), default=None),
            "seeds": len(self.results),
            "failed": len(self.failures),
            "paper_bits_per_character": paper,
            "paper_delta": None if paper is None or reference is None else paper - reference,
        }

    def _each(self, name: str) -> list[Any]:
        """A field of the results, for the seeds that have it."""
        return [value for result in self.results.values() if (value := getattr(result, name)) is not None]


def protocols(runs: Iterable[VariantRun]) -> list[str]:
    """The protocol of the scores: one line if all rows share it, else one line for each protocol."""
    rows: dict[str, list[str]] = {}
    for run in runs:
        train, context = run.config.train, run.config.model.context_length
        protocol = (
            f"first {train.valid_symbols:,} symbols of the valid split of {run.config.data.corpus}, context {context}, "
            f"stride {max(1, context // 2)}; after {train.steps:,} steps of {train.batch_size * context:,} characters"
        )
        rows.setdefault(protocol, []).append(run.variant.name)
    if len(rows) == 1:
        return [f"Scored on the {protocol}." for protocol in rows]
    return [f"{', '.join(dict.fromkeys(names))}: scored on the {protocol}." for protocol, names in rows.items()]


def to_markdown(rows: Sequence[Row], notes: Sequence[str] = ()) -> str:
    """The notes, the table, how to read it, and what failed."""
    cells = [_cells(row.to_dict()) for row in rows]
    columns = [name for name in cells[0] if "paper" not in name or any(row[name] for row in cells)]
    table = markdown_table(columns, [[row[name] for name in columns] for row in cells])
    text = [*notes, "", table, "", HOW_TO_READ.format(reference=rows[0].variant.name)]
    failures = [f"- {failure}" for row in rows for failure in row.failures]
    text += ["", "Failed:", "", *failures] if failures else []
    return "\n".join(text).strip() + "\n"


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "row": row["row"],
        "bits per character": _cell(row["bits_per_character"], ".4f")
        + _cell(row["standard_deviation"], ".4f", before=" ± "),
        "Δ": _cell(row["delta"], "+.4f") + _cell(row["delta_95"], ".4f", before=" ± "),
        "verdict": row["verdict"],
        "ms per step": _cell(row["seconds_per_step"], ".1f", scale=1000),
        "CPU s": _cell(row["cpu_seconds"], ",.0f"),
        "peak memory": _cell(row["peak_memory_bytes"], ",.0f", scale=2**-20, unit=" MiB"),
        "seeds": str(row["seeds"]),
        "paper: T64, text8 dev": _cell(row["paper_bits_per_character"], ".3f"),
        "paper's Δ": _cell(row["paper_delta"], "+.3f"),
    }


def to_csv(rows: Sequence[Row]) -> str:
    """The same figures unrounded, with one column per seed."""
    seeds = sorted({seed for row in rows for seed in row.results})
    file = io.StringIO()
    writer = csv.DictWriter(file, [*rows[0].to_dict(), *(f"seed_{seed}" for seed in seeds)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            row.to_dict() | {f"seed_{seed}": result.bits_per_character for seed, result in row.results.items()}
        )
    return file.getvalue()


def draw(rows: Sequence[Row], path: Path) -> Path:
    """Draw every seed of every row, with the mean and its figure, and return the picture's path.

    The axis covers the rows near the reference; the mean of a row far outside is an arrow at the edge.

    Raises:
        UserError: the picture cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    from charlm.report.style import GREY, STYLE, TRAIN, VALID, WIDTH, save

    shown = [row for row in rows if row.results]
    left, right = _limits(shown)
    beside = {"xycoords": ("axes fraction", "data"), "xytext": (6, 0), "textcoords": "offset points", "va": "center"}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.9 + 0.26 * len(shown)), layout="constrained")
        axes = figure.subplots()
        for place, row in enumerate(shown):
            places = [place] * len(row.scores)
            axes.plot(row.scores, places, linestyle="", marker="o", markersize=3, color=TRAIN, alpha=0.6)
            beyond = row.mean > right
            marker = {"marker": ">" if beyond else "|", "markersize": 6 if beyond else 12, "markeredgewidth": 2}
            axes.plot([min(row.mean, right)], [place], linestyle="", color=VALID, **marker)
            star = "*" if row.verdict in ("better", "worse") else ""
            label = f"{row.mean:.3f}" + _cell(row.delta, "+.3f", before="  ", unit=star)
            axes.annotate(label, (1, place), **beside)
        if rows[0].results:
            axes.axvline(rows[0].mean, color=GREY, linewidth=0.8, linestyle="--")
        axes.set_xlim(left, right + 0.02 * (right - left))
        axes.set_yticks(range(len(shown)), [row.variant.name for row in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.spines["top"].set_visible(False)
        axes.grid(axis="x")
        axes.set_xlabel("valid bits per character: seeds, mean, and difference to the first row (* beyond noise)")
    return save(figure, path)


def _limits(rows: Sequence[Row]) -> tuple[float, float]:
    """The lowest and highest score shown: up to four times as far from the best as the middle row."""
    means = sorted(row.mean for row in rows)
    lowest = min(score for row in rows for score in row.scores)
    far = means[0] + 4 * max(means[len(means) // 2] - means[0], 0.02)
    highest = max(score for row in rows for score in row.scores if row.mean <= far)
    span = max(highest - lowest, 0.02)
    return lowest - 0.05 * span, highest + 0.05 * span


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _cell(value: float | None, spec: str, *, scale: float = 1, before: str = "", unit: str = "") -> str:
    return "" if value is None else f"{before}{value * scale:{spec}}{unit}"
