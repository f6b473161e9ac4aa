"""Pictures of a benchmark."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.report import point_dict
from benchmarks.results import RaceResult, spread
from benchmarks.setups import CHECKPOINTED
from benchmarks.suites import Outcome, Point, Settings
from charlm.report.style import GREY, STYLE, TRAIN, VALID, WIDTH, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEBI = 2**20


def draw(settings: Settings, outcome: Outcome, path: Path) -> Path:
    """Draw what was measured, and return the picture's path.

    Raises:
        UserError: a suffix that matplotlib does not write.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        if outcome.races:
            heights = [0.8 + 0.26 * len(result.entries) for result in outcome.races]
            figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
            all_axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
            for result, axes in zip(outcome.races, all_axes, strict=True):
                draw_race(result, axes)
        elif settings.benchmark == "auxiliary":
            figure = Figure(figsize=(WIDTH, 3), layout="constrained")
            draw_auxiliary(outcome.points, figure.subplots())
        else:
            figure = Figure(figsize=(WIDTH, 5), layout="constrained")
            names = list(dict.fromkeys(point.axis for point in outcome.points))
            grid = figure.subplots(2, len(names), squeeze=False, sharey="row")
            for (time, memory), name in zip(grid.T, names, strict=True):
                draw_axis([point for point in outcome.points if point.axis == name], time, memory)
            grid[0, 0].set_ylabel("µs per character")
            grid[1, 0].set_ylabel("peak memory, MiB")
            grid[1, 0].legend()
            grid[0, 0].legend()
    return save(figure, path)


def draw_race(result: RaceResult, axes: "Axes") -> None:
    """Bars of characters per second, the fastest on top, with a line over the middle half."""
    spreads = {entry.name: (spread(entry.rates()), entry.contestant.library) for entry in result.entries}
    rows = sorted(spreads.items(), key=lambda row: row[1][0]["median"])
    names, medians = [name for name, _ in rows], [rate["median"] for _, (rate, _) in rows]
    errors = [
        [rate["median"] - rate["lower_quartile"] for _, (rate, _) in rows],
        [rate["upper_quartile"] - rate["median"] for _, (rate, _) in rows],
    ]
    colours = [VALID if library == "charlm" else TRAIN for _, (_, library) in rows]
    axes.barh(names, medians, xerr=errors, color=colours, height=0.7, error_kw={"ecolor": GREY, "elinewidth": 1})
    for row, (_, (rate, _)) in enumerate(rows):
        place = (rate["upper_quartile"], row)
        axes.annotate(f"{rate['median']:,.0f}", place, xytext=(6, 0), textcoords="offset points", va="center")
    axes.margins(x=0.12)
    axes.tick_params(axis="y", length=0)
    axes.spines["top"].set_visible(False)
    axes.set_xlabel("characters per second")
    axes.set_title(result.title, loc="left", fontsize=9, fontweight="bold")


def draw_auxiliary(points: Sequence[Point], axes: "Axes") -> None:
    """What the auxiliary losses cost, by depth."""
    found = [point_dict(point) for point in points]
    depths = [point.value for point in points]
    times = [place["auxiliary_step_time_ratio"] for place in found]
    axes.errorbar(
        depths,
        [time["median"] for time in times],
        yerr=[
            [time["median"] - time["lower_quartile"] for time in times],
            [time["upper_quartile"] - time["median"] for time in times],
        ],
        color=VALID,
        marker="o",
        label="step time",
    )
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
    """One axis of `scaling`: time per character against its arithmetic, and memory, both axes logarithmic."""
    found = [point_dict(point) for point in points]
    values = [point.value for point in points]
    seconds = [place["seconds_per_character"] * 1e6 for place in found]
    scale = seconds[0] / found[0]["flop_per_character"]
    time.plot(values, seconds, color=VALID, marker="o", label="measured")
    time.plot(
        values,
        [scale * place["flop_per_character"] for place in found],
        color=GREY,
        linestyle="--",
        label="as its arithmetic",
    )
    memory.plot(
        values, [place["peak_memory_bytes"] / MEBI for place in found], color=VALID, marker="o", label="as it comes"
    )
    if all(CHECKPOINTED in point.setups for point in points):
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
