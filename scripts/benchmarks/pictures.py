"""Pictures of a benchmark's result."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.report import point_dict
from benchmarks.results import RaceResult, spread
from benchmarks.setups import CHECKPOINTED
from benchmarks.suites import BenchmarkResult, Point, Settings
from charlm.report.style import GREY, STYLE, TRAIN, VALID, WIDTH, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEBI = 2**20


def draw(settings: Settings, result: BenchmarkResult, path: Path) -> Path:
    """Draw the result, and return the picture's path.

    Raises:
        UserError: matplotlib does not write files of this suffix.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        if result.races:
            heights = [0.8 + 0.26 * len(race.trials) for race in result.races]
            figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
            all_axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
            for race, axes in zip(result.races, all_axes, strict=True):
                draw_race(race, axes)
        elif settings.benchmark == "auxiliary":
            figure = Figure(figsize=(WIDTH, 3), layout="constrained")
            draw_auxiliary(result.points, figure.subplots())
        else:
            figure = Figure(figsize=(WIDTH, 5), layout="constrained")
            names = list(dict.fromkeys(point.axis for point in result.points))
            grid = figure.subplots(2, len(names), squeeze=False, sharey="row")
            for (time, memory), name in zip(grid.T, names, strict=True):
                draw_axis([point for point in result.points if point.axis == name], time, memory)
            for axes, label in zip(grid[:, 0], ("µs per character", "peak memory, MiB"), strict=True):
                axes.set_ylabel(label)
                axes.legend()
    return save(figure, path)


def draw_race(race: RaceResult, axes: "Axes") -> None:
    """Bars of characters per second, the fastest on top, with a line over the middle half."""
    trials = sorted(race.trials, key=lambda trial: spread(trial.rates())["median"])
    lower, medians, upper = zip(*(_quartiles(spread(trial.rates())) for trial in trials), strict=True)
    colours = [VALID if trial.setup.library == "charlm" else TRAIN for trial in trials]
    bars = {"xerr": (lower, upper), "height": 0.7, "error_kw": {"ecolor": GREY, "elinewidth": 1}}
    axes.barh([trial.name for trial in trials], medians, color=colours, **bars)
    for row, (median, above) in enumerate(zip(medians, upper, strict=True)):
        axes.annotate(f"{median:,.0f}", (median + above, row), xytext=(6, 0), textcoords="offset points", va="center")
    axes.margins(x=0.12)
    axes.tick_params(axis="y", length=0)
    axes.spines["top"].set_visible(False)
    axes.set_xlabel("characters per second")
    axes.set_title(race.title, loc="left", fontsize=9, fontweight="bold")


def draw_auxiliary(points: Sequence[Point], axes: "Axes") -> None:
    """The cost of the auxiliary losses, by depth."""
    found = [point_dict(point) for point in points]
    depths = [point.value for point in points]
    lower, medians, upper = zip(*(_quartiles(place["auxiliary_step_time_ratio"]) for place in found), strict=True)
    axes.errorbar(depths, medians, yerr=(lower, upper), color=VALID, marker="o", label="step time")
    memory = [place["auxiliary_peak_memory_ratio"] for place in found]
    axes.plot(depths, memory, color=TRAIN, marker="s", label="peak memory")
    arithmetic = [place["auxiliary_arithmetic_ratio"] for place in found]
    axes.plot(depths, arithmetic, color=GREY, linestyle="--", label="arithmetic")
    axes.set_xlabel("layers")
    axes.set_ylabel("auxiliary losses, on / off")
    axes.spines["top"].set_visible(False)
    axes.grid(axis="y")
    axes.legend()


def draw_axis(points: Sequence[Point], time: "Axes", memory: "Axes") -> None:
    """One axis of `scaling`: time per character beside its arithmetic, and memory; all axes are logarithmic."""
    found = [point_dict(point) for point in points]
    values = [point.value for point in points]
    seconds = [place["seconds_per_character"] * 1e6 for place in found]
    flop = [place["flop_per_character"] for place in found]
    time.plot(values, seconds, color=VALID, marker="o", label="measured")
    time.plot(values, [seconds[0] / flop[0] * f for f in flop], color=GREY, linestyle="--", label="as its arithmetic")
    sizes = [place["peak_memory_bytes"] / MEBI for place in found]
    memory.plot(values, sizes, color=VALID, marker="o", label="as it comes")
    if all(CHECKPOINTED in point.trials for point in points):
        checkpointed = [place["checkpointed_peak_memory_bytes"] / MEBI for place in found]
        memory.plot(values, checkpointed, color=TRAIN, marker="s", label="activation checkpointing")
    for axes in (time, memory):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(values, map(str, values))
        axes.minorticks_off()
        axes.spines["top"].set_visible(False)
        axes.grid(axis="y")
    memory.set_xlabel(points[0].axis)


def _quartiles(values: dict[str, float]) -> tuple[float, float, float]:
    """A spread as matplotlib takes it: the distance to the lower quartile, the median, the distance to the upper."""
    median = values["median"]
    return median - values["lower_quartile"], median, values["upper_quartile"] - median
