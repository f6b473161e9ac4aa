"""The table of an ablation: means, differences, what is beyond noise; Markdown, CSV and a picture."""

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charlm.config import Config
from charlm.markdown import markdown_table

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t, two-sided 95 %, for 1 to 9 degrees of freedom; more are taken for 9, which is on the safe side."""
MEBI = 2**20
HOW_TO_READ = (
    "Bits per character: mean ± standard deviation over seeds. Δ: mean of the differences to `{reference}` seed by "
    "seed (a seed means the same windows in every row) ± half of its 95 % interval by Student's t. Better and worse: "
    "zero lies outside of the interval; of 20 rows that change nothing, one is expected to look so. Time per step: in "
    "training, validation left out, median over seeds. CPU s: processor time of a whole run, which other work on the "
    "machine hardly changes, median over seeds. Memory: the most that the process had resident, libraries included."
)


@dataclass(frozen=True)
class Measurement:
    """What one run came to."""

    row: str
    seed: int
    bits_per_character: float
    bits_per_byte: float
    """Both of the validation after the last step."""
    seconds_per_step: float | None
    cpu_seconds: float | None
    """Processor time of the run's processes, from their start to their end."""
    peak_memory: int | None
    """Bytes resident."""


@dataclass(frozen=True)
class Line:
    """A row of the table."""

    name: str
    runs: tuple[Measurement, ...]
    deltas: tuple[float, ...]
    """Bits per character against the reference, for the seeds that both have; none of the reference itself."""
    paper: float | None = None
    paper_delta: float | None = None
    failures: tuple[str, ...] = ()

    @property
    def scores(self) -> list[float]:
        return [run.bits_per_character for run in self.runs]

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.scores) if self.runs else None

    @property
    def deviation(self) -> float | None:
        """The standard deviation over seeds, of a sample."""
        return statistics.stdev(self.scores) if len(self.runs) > 1 else None

    @property
    def delta(self) -> float | None:
        return statistics.fmean(self.deltas) if self.deltas else None

    @property
    def margin(self) -> float | None:
        """Half of the 95 % interval of `delta`."""
        count = len(self.deltas)
        if count < 2:
            return None
        return T95[min(count - 1, len(T95)) - 1] * statistics.stdev(self.deltas) / math.sqrt(count)

    @property
    def verdict(self) -> str:
        """better, worse, within noise; empty where that cannot be told."""
        if self.delta is None or self.margin is None:
            return ""
        if abs(self.delta) <= self.margin:
            return "within noise"
        return "better" if self.delta < 0 else "worse"

    @property
    def seconds_per_step(self) -> float | None:
        return _median(run.seconds_per_step for run in self.runs)

    @property
    def cpu_seconds(self) -> float | None:
        return _median(run.cpu_seconds for run in self.runs)

    @property
    def peak_memory(self) -> int | None:
        return max((run.peak_memory for run in self.runs if run.peak_memory is not None), default=None)


def summarise(
    names: Sequence[str],
    measurements: Sequence[Measurement],
    paper: Mapping[str, float] | None = None,
    failures: Sequence[tuple[str, int, str]] = (),
) -> list[Line]:
    """A line for every name, the first of which is the reference.

    Args:
        paper: the paper's figures by name.
        failures: row, seed and message of the runs that failed.
    """
    paper = paper or {}
    runs = {name: {run.seed: run for run in measurements if run.row == name} for name in names}
    reference = runs[names[0]]
    lines = []
    for name in names:
        own = runs[name]
        shared = [] if name == names[0] else sorted(own.keys() & reference.keys())
        both = name != names[0] and name in paper and names[0] in paper
        lines.append(
            Line(
                name=name,
                runs=tuple(own[seed] for seed in sorted(own)),
                deltas=tuple(own[seed].bits_per_character - reference[seed].bits_per_character for seed in shared),
                paper=paper.get(name),
                paper_delta=paper[name] - paper[names[0]] if both else None,
                failures=tuple(f"{name}, seed {seed}: {message}" for row, seed, message in failures if row == name),
            )
        )
    return lines


def protocols(configs: Mapping[str, Config]) -> list[str]:
    """What the scores of the rows are of, in words; one line if it is the same for all."""
    words: dict[str, list[str]] = {}
    for name, config in configs.items():
        train, context = config.train, config.model.context_length
        text = (
            f"first {train.valid_symbols:,} symbols of the valid split of {config.data.corpus}, context {context}, "
            f"stride {max(1, context // 2)}; after {train.steps:,} steps of {train.batch_size * context:,} characters"
        )
        words.setdefault(text, []).append(name)
    if len(words) == 1:
        return [f"Scored on the {text}." for text in words]
    return [f"{', '.join(names)}: scored on the {text}." for text, names in words.items()]


def to_markdown(lines: Sequence[Line], notes: Sequence[str] = ()) -> str:
    """The table under its `notes`, over how it is read and what failed."""
    with_paper = any(line.paper is not None for line in lines)
    header = ["row", "bits per character", "Δ", "verdict", "ms per step", "CPU s", "peak memory", "seeds"]
    header += ["paper: T64, text8 dev", "paper's Δ"] if with_paper else []
    table = []
    for line in lines:
        cells = [
            line.name,
            _with_spread(line.mean, line.deviation, ""),
            _with_spread(line.delta, line.margin, "+"),
            line.verdict,
            "" if line.seconds_per_step is None else f"{1000 * line.seconds_per_step:.1f}",
            "" if line.cpu_seconds is None else f"{line.cpu_seconds:,.0f}",
            "" if line.peak_memory is None else f"{line.peak_memory / MEBI:,.0f} MiB",
            str(len(line.runs)),
        ]
        if with_paper:
            cells += [
                "" if line.paper is None else f"{line.paper:.3f}",
                "" if line.paper_delta is None else f"{line.paper_delta:+.3f}",
            ]
        table.append(cells)
    text = [*notes, "", markdown_table(header, table), "", HOW_TO_READ.format(reference=lines[0].name)]
    failures = [failure for line in lines for failure in line.failures]
    if failures:
        text += ["", "Failed:", "", *(f"- {failure}" for failure in failures)]
    return "\n".join(text).strip() + "\n"


def to_csv(lines: Sequence[Line]) -> str:
    """The same for programs: a line per row, seconds and bytes, one column per seed."""
    seeds = sorted({run.seed for line in lines for run in line.runs})
    file = io.StringIO()
    writer = csv.DictWriter(file, [*_record(lines[0]), *(f"seed_{seed}" for seed in seeds)], lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow(_record(line) | {f"seed_{run.seed}": run.bits_per_character for run in line.runs})
    return file.getvalue()


def draw(lines: Sequence[Line], path: Path) -> Path:
    """Draw every seed of every row, with the mean and its figure, and return the picture's path.

    The axis is that of the rows near the reference; one that is far outside stands at its edge, with an arrow.

    Raises:
        UserError: it cannot be written there.
    """
    import matplotlib
    from matplotlib.figure import Figure

    from charlm.report.figures import GREY, STYLE, TRAIN, VALID, WIDTH, save

    shown = [line for line in lines if line.runs]
    left, right = _limits(shown)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.9 + 0.26 * len(shown)), layout="constrained")
        axes = figure.subplots()
        for place, line in enumerate(shown):
            inside = [score for score in line.scores if score <= right]
            axes.plot(inside, [place] * len(inside), linestyle="", marker="o", markersize=3, color=TRAIN, alpha=0.6)
            beyond = line.mean > right
            marker = {"marker": ">" if beyond else "|", "markersize": 6 if beyond else 12, "markeredgewidth": 2}
            axes.plot([min(line.mean, right)], [place], linestyle="", color=VALID, **marker)
            star = "*" if line.verdict in ("better", "worse") else ""
            delta = "" if line.delta is None else f"  {line.delta:+.3f}{star}"
            axes.annotate(
                f"{line.mean:.3f}{delta}", (1, place), xycoords=("axes fraction", "data"), xytext=(6, 0),
                textcoords="offset points", va="center",
            )  # fmt: skip
        if shown and shown[0].name == lines[0].name:
            axes.axvline(shown[0].mean, color=GREY, linewidth=0.8, linestyle="--")
        axes.set_xlim(left, right + 0.02 * (right - left))
        axes.set_yticks(range(len(shown)), [line.name for line in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.spines["top"].set_visible(False)
        axes.grid(axis="x")
        axes.set_xlabel("valid bits per character: seeds, mean, and difference to the first row (* beyond noise)")
    return save(figure, path)


def _limits(lines: Sequence[Line]) -> tuple[float, float]:
    """The lowest and the highest score shown: up to four times as far from the best as the middle row is."""
    means = sorted(line.mean for line in lines)
    lowest = min(score for line in lines for score in line.scores)
    far = means[0] + 4 * max(means[len(means) // 2] - means[0], 0.02)
    near = [score for line in lines for score in line.scores if line.mean <= far]
    span = max(max(near) - lowest, 0.02)
    return lowest - 0.05 * span, max(near) + 0.05 * span


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _record(line: Line) -> dict[str, Any]:
    return {
        "row": line.name,
        "bits_per_character": line.mean,
        "standard_deviation": line.deviation,
        "bits_per_byte": statistics.fmean(run.bits_per_byte for run in line.runs) if line.runs else None,
        "delta": line.delta,
        "delta_95": line.margin,
        "verdict": line.verdict,
        "seconds_per_step": line.seconds_per_step,
        "cpu_seconds": line.cpu_seconds,
        "peak_memory_bytes": line.peak_memory,
        "seeds": len(line.runs),
        "failed": len(line.failures),
        "paper_bits_per_character": line.paper,
        "paper_delta": line.paper_delta,
    }


def _with_spread(value: float | None, spread: float | None, sign: str) -> str:
    if value is None:
        return ""
    return f"{value:{sign}.4f}" if spread is None else f"{value:{sign}.4f} ± {spread:.4f}"
