"""The figures of the page: what runs recorded, and what their models make of the validation split.

Each is a `Picture`, or None where there is nothing to draw. Runs are told apart by colour and dashes, in the order in
which the page lists them; their names stand in the page's legend, outside of the figures.
"""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from charlm.objective.terms import Term, build_terms
from charlm.report.diagnostics import PANELS, use_log_scale
from charlm.report.figures import draw_weights, engineering, smoothed
from charlm.report.page.metrics import Points, Recorded
from charlm.report.page.probe import Measured
from charlm.report.page.svg import DASHES, MAP, SERIES, Picture, figure_of, layer_colour, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_POINTS = 300
"""Of a line: more are averaged, as pixels could not show them."""
FEW_POINTS = 80
"""Of a loss, which is as noisy as its batch, and of a speed: means over more show which line is where."""
POINTS_OF_A_FIGURE = 12_000
MINUTE, HOUR = 60, 3600


def learning(runs: Sequence[Recorded]) -> Picture | None:
    """Bits per character in training and validation, against characters seen and against time."""
    lines = [_Learning(run) for run in runs]
    if not any(line.has_points for line in lines):
        return None
    longest = max((line.longest for line in lines), default=0.0)
    unit, name = (
        (HOUR, "hours") if longest > 2 * HOUR else (MINUTE, "minutes") if longest > 2 * MINUTE else (1, "seconds")
    )

    def draw(wide: bool) -> "Figure":
        figure = figure_of(wide, 360 if wide else 560)
        left, right = figure.subplots(1, 2, sharey=True) if wide else figure.subplots(2, 1)
        for place, line in enumerate(lines):
            for axes, against, scale in ((left, "characters", 1), (right, "seconds", unit)):
                line.draw(axes, against, scale, place, alone=len(lines) == 1)
        for axes, label in ((left, "characters seen"), (right, f"{name} of training")):
            axes.set_ylim(*_limits(lines))
            axes.set_xlim(left=0)
            axes.set_xlabel(label)
            axes.grid(axis="y")
        left.xaxis.set_major_formatter(engineering())
        for axes in (left,) if wide else (left, right):
            axes.set_ylabel("bits per character")
        return figure

    return picture("learning", "Bits per character against characters seen, and against time", draw)


class _Learning:
    """The learning curves of a run."""

    def __init__(self, run: Recorded):
        self.train_steps, bits = run.of_training("bits_per_character")
        self.bits = bits
        self.train_seconds = run.seconds(run.train)
        self.valid_steps, self.valid_bits = run.validation()
        self.valid_seconds = run.seconds(run.valid)
        self.per_step = run.characters_per_step
        self.has_points = bool(np.isfinite(self.bits).any() or np.isfinite(self.valid_bits).any())
        self.longest = max([0.0, *_finite(self.train_seconds), *_finite(self.valid_seconds)])
        good = np.isfinite(bits)
        self.smooth = np.full(len(bits), math.nan)
        self.smooth[good] = smoothed(bits[good].tolist())

    def draw(self, axes: "Axes", against: str, scale: float, place: int, *, alone: bool) -> None:
        """Training thin and smoothed, validation with its points. A run alone has a colour for each of them."""
        train, valid = (
            (self.train_steps * self.per_step, self.valid_steps * self.per_step)
            if against == "characters"
            else (self.train_seconds / scale, self.valid_seconds / scale)
        )
        colour, dashes = _style(place)
        if alone:
            axes.plot(*thinned(train, self.bits), color=colour, alpha=0.3, linewidth=0.8)
        axes.plot(*thinned(train, self.smooth), color=colour, linewidth=1.6 if alone else 0.9, label="training")
        axes.plot(
            *thinned(valid, self.valid_bits), color=SERIES[1] if alone else colour, linewidth=1.8, marker="o",
            markersize=4.5, linestyle="solid" if alone else dashes, clip_on=False, label="validation",
        )  # fmt: skip


def _limits(lines: Iterable[_Learning]) -> tuple[float, float]:
    """From the lowest value to where the curves are after a fiftieth of their points: not the fall from 8 bits."""
    lines = list(lines)
    shown = [value for line in lines for value in _finite(line.smooth[len(line.smooth) // 50 :])]
    shown += [value for line in lines for value in _finite(line.valid_bits)]
    bottom, top = min(shown), max(shown)
    span = max(top - bottom, 0.1)
    return bottom - 0.05 * span, top + 0.05 * span


def tasks(runs: Sequence[Recorded]) -> Picture | None:
    """The losses of each run's highest layer: a panel for each task, a line for each run. None for a run alone."""
    if len(runs) == 1:
        return None
    panels: dict[str, dict[int, Points]] = {}
    for place, run in enumerate(runs):
        for title, layers in _losses_by_task(run).items():
            steps, losses = layers[max(layers)]
            panels.setdefault(title, {})[place] = steps * run.characters_per_step, losses
    if not panels:
        return None
    panels = _shortly_titled(panels)

    def draw(wide: bool) -> "Figure":
        figure, grid = _panels(wide, len(panels))
        for axes, (title, lines) in zip(grid, panels.items(), strict=True):
            end = max(float(characters[-1]) for characters, _ in lines.values())
            lines = {place: thinned(*points, FEW_POINTS, end) for place, points in lines.items()}
            for place, points in lines.items():
                colour, dashes = _style(place)
                axes.plot(*points, color=colour, linestyle=dashes, linewidth=1.6)
            _without_the_fall(axes, lines)
            axes.set_title(title)
            axes.set_xlim(left=0)
            axes.xaxis.set_major_formatter(engineering())
            axes.set_xlabel("characters seen")
            axes.grid(axis="y")
        return figure

    return picture("tasks", "The losses of the highest layer over training, a line for each run", draw)


def terms(run: Recorded) -> Picture | None:
    """The loss of every term: a panel for each task, a line for each layer."""
    panels = _shortly_titled(_losses_by_task(run))
    return (
        _by_layer(run, "terms", "The loss of every term over training, a line for each layer", panels)
        if panels
        else None
    )


def _losses_by_task(run: Recorded) -> dict[str, dict[int, Points]]:
    """The loss of every term by the title of its task and by layer: in bits per character; in nats for own tasks."""
    panels: dict[str, dict[int, Points]] = {}
    bits_per_nat = run.symbols_per_character / math.log(2)
    for name, (steps, losses) in run.losses().items():
        found = Term.parse(name)
        if not found or not (found.positions or found.task) or not np.isfinite(losses).any():
            continue
        title = f"{found.task}, nats" if found.task else _title(found.offset, found.positions)
        panels.setdefault(title, {})[found.layer] = steps, losses * (1.0 if found.task else bits_per_nat)
    return panels


def _shortly_titled(panels: dict[str, dict[int, Points]]) -> dict[str, dict[int, Points]]:
    """The panels without the positions in their titles, where none differs by them alone."""
    titles = [title.removesuffix(", all positions") for title in panels]
    return dict(zip(titles if len(set(titles)) == len(panels) else panels, panels.values(), strict=True))


def _title(offset: int, positions: str) -> str:
    task = "next character" if offset == 1 else f"{offset} characters ahead"
    return f"{task}, {'all positions' if positions == 'all' else 'last position'}"


def weights(run: Recorded) -> Picture:
    """The weights of all terms over training: a map, layer by progress."""
    table = build_terms(run.config.aux, run.config.model.num_layers, run.config.train.steps)

    def draw(wide: bool) -> "Figure":
        figure = figure_of(wide, 70 + min(max(90, 15 * len(table)), 440))
        axes = figure.subplots()
        image = draw_weights(table, axes, run.config.train.steps, cmap=_fading(), wrapped=not wide)
        bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.04, **({} if wide else {"aspect": 30}))
        bar.outline.set_visible(False)
        bar.set_label("weight")
        return figure

    return picture("weights", weights_label(table), draw, run.name)


def weights_label(table: Sequence[Term]) -> str:
    """What the map of the weights says in words."""
    return f"The weights of {len(table)} terms over training, a row for each layer and task"


def by_layer(measured: Sequence[Measured | None]) -> Picture | None:
    """Bits per character of the validation split, as each layer predicts it."""
    lines = {
        place: {int(layer): bits for layer, bits in own.score.layers.items()}
        for place, own in enumerate(measured)
        if own is not None and own.score is not None
    }
    if not lines:
        return None

    def draw(wide: bool) -> "Figure":
        figure = figure_of(wide, 300 if wide else 260)
        axes = figure.subplots()
        for place, bits in lines.items():
            colour, dashes = _style(place)
            axes.plot(list(bits), list(bits.values()), color=colour, linestyle=dashes, marker="o", markersize=5)
        axes.set_xlabel("layer")
        axes.set_ylabel("bits per character")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.margins(x=0.04)
        axes.grid(axis="y")
        return figure

    return picture("layers", "Bits per character by layer", draw)


def by_position(measured: Sequence[Measured | None]) -> Picture | None:
    """Bits per character of the validation split by the number of symbols that a prediction is made from."""
    lines = {place: own.bins for place, own in enumerate(measured) if own is not None and own.bins}
    if not lines:
        return None

    def draw(wide: bool) -> "Figure":
        figure = figure_of(wide, 300 if wide else 260)
        axes = figure.subplots()
        for place, bins in lines.items():
            colour, dashes = _style(place)
            middles = [math.sqrt(own.first * own.last) for own in bins]
            bits = np.array([own.bits_per_character for own in bins])
            errors = np.array([own.standard_error or 0.0 for own in bins])
            axes.fill_between(middles, bits - errors, bits + errors, color=colour, alpha=0.2, linewidth=0)
            axes.plot(middles, bits, color=colour, linestyle=dashes, marker="o", markersize=4)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("symbols of context")
        axes.set_ylabel("bits per character")
        axes.grid(axis="y")
        return figure

    return picture("positions", "Bits per character by position in the context", draw)


def speed(runs: Sequence[Recorded]) -> Picture | None:
    """Characters per second, and memory where a run recorded it."""
    kinds = [("characters_per_second", "characters per second", 1.0), ("memory", "memory, GiB", 2.0**-30)]
    panels = []
    for key, label, factor in kinds:
        found = [(run, *run.of_training(key)) for run in runs]
        if any(np.isfinite(values).any() for _, _, values in found):
            panels.append((label, [(steps * run.characters_per_step, values * factor) for run, steps, values in found]))
    if not panels:
        return None

    def draw(wide: bool) -> "Figure":
        count = len(panels)
        figure = figure_of(wide, 260 if wide else 240 * count)
        grid = figure.subplots(1, count, squeeze=False) if wide else figure.subplots(count, 1, squeeze=False)
        for axes, (label, lines) in zip(grid.flat, panels, strict=True):
            for place, line in enumerate(lines):
                colour, dashes = _style(place)
                axes.plot(*thinned(*line, FEW_POINTS), color=colour, linestyle=dashes, linewidth=1.4)
            axes.set_ylim(bottom=0)
            axes.set_xlim(left=0)
            axes.set_title(label)
            axes.set_xlabel("characters seen")
            axes.xaxis.set_major_formatter(engineering())
            if axes.get_ylim()[1] >= 1000:  # a third of a GiB is not 333m of one
                axes.yaxis.set_major_formatter(engineering())
            axes.grid(axis="y")
        return figure

    return picture("speed", "Characters per second over training", draw)


def hedge(run: Recorded) -> Picture | None:
    """What hedge backpropagation has made of the layers' weights."""
    lines = {_layer(name): points for name, points in run.hedge().items() if _layer(name)}
    label = "The weight that hedge backpropagation gives each layer"
    return _by_layer(run, "hedge", label, {"weight of a layer": lines}) if lines else None


def diagnostics(run: Recorded) -> Picture | None:
    """What the heads know, and what the losses ask of each layer: docs/diagnostics.md."""
    panels, logarithmic = {}, set()
    for kind, title, scale in PANELS:
        lines: dict[int, list[tuple[float, float]]] = {}
        for step, record in run.diagnostics:
            figures = record.get(kind)
            for name, value in figures.items() if isinstance(figures, dict) else ():
                found = Term.parse(name)
                if found and found.offset in (None, 1) and isinstance(value, int | float):
                    lines.setdefault(found.layer, []).append((step, value))
        if lines:
            panels[title] = {layer: tuple(np.array(points, float).T) for layer, points in sorted(lines.items())}
            logarithmic |= {title} if scale == "log" else set()
    label = "Diagnostics over training, a line for each layer"
    return _by_layer(run, "diagnostics", label, panels, logarithmic) if panels else None


def _by_layer(
    run: Recorded, name: str, label: str, panels: dict[str, dict[int, Points]], logarithmic: Iterable[str] = ()
) -> Picture:
    """A panel for each title, a line in it for each layer, over optimizer steps."""
    num_layers = run.config.model.num_layers
    most = max(20, min(FEW_POINTS, POINTS_OF_A_FIGURE // sum(map(len, panels.values()))))

    def draw(wide: bool) -> "Figure":
        figure, grid = _panels(wide, len(panels))
        for axes, (title, lines) in zip(grid, panels.items(), strict=True):
            end = max(float(steps[-1]) for steps, _ in lines.values())
            lines = {layer: thinned(*points, most, end) for layer, points in sorted(lines.items())}
            for layer, points in lines.items():
                axes.plot(
                    *points, color=layer_colour(layer, num_layers), label=f"layer {layer}",
                    linewidth=2.0 if layer == num_layers else 1.2, marker="o",
                    markersize=3 if len(points[0]) < 3 else 0,
                )  # fmt: skip
            if title in logarithmic:
                use_log_scale(axes)
            else:
                _without_the_fall(axes, lines)
            axes.set_title(title)
            axes.set_xlim(0, run.config.train.steps)
            axes.xaxis.set_major_formatter(engineering())
            axes.set_xlabel("optimizer steps")
            axes.grid(axis="y")
        return figure

    return picture(name, label, draw, run.name)


def _panels(wide: bool, count: int) -> tuple["Figure", list["Axes"]]:
    """A figure of so many panels: up to three beside each other, on a phone all below each other."""
    columns = (2 if count in (2, 4) else min(count, 3)) if wide else 1
    rows = math.ceil(count / columns)
    figure = figure_of(wide, 270 * rows if wide else 220 * rows)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in grid[count:]:
        unused.set_axis_off()
    return figure, grid[:count]


def _without_the_fall(axes: "Axes", lines: dict[int, Points]) -> None:
    """End the axis where the lines are after a fiftieth of their points: the first of them would flatten all others."""
    last = max(float(steps[-1]) for steps, _ in lines.values())
    shown = [value for steps, values in lines.values() for value in _finite(values[steps >= last / 50])]
    if len(shown) > 1 and max(shown) > min(shown):
        span = max(shown) - min(shown)
        axes.set_ylim(min(shown) - 0.05 * span, max(shown) + 0.05 * span)


def thinned(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS, end: float | None = None) -> Points:
    """A line of at most `most` points: means over equal stretches from 0 to `end`, without values that are not finite.

    `end` is the line's own unless told: lines of a figure that end early are to be averaged as the others are.
    """
    good = np.isfinite(x) & np.isfinite(y)
    x, y = x[good], y[good]
    if len(x) <= most and end is None:
        return x, y
    stretches = np.clip(x / (end or x.max(initial=0) or 1) * most, 0, most - 1).astype(int)
    counts = np.bincount(stretches, minlength=most)
    sums = (np.bincount(stretches, values, most) for values in (x, y))
    return tuple(total[counts > 0] / counts[counts > 0] for total in sums)


def _style(place: int) -> tuple[str, Any]:
    return SERIES[place % len(SERIES)], DASHES[place % len(DASHES)]


def _layer(name: str) -> int:
    found = Term.parse(name)
    return found.layer if found else 0


def _finite(values: np.ndarray) -> list[float]:
    return values[np.isfinite(values)].tolist()


def _fading():
    """One colour that fades with the weight: right on a light page and a dark one, as no white is in it."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    return LinearSegmentedColormap.from_list("fading", [(*to_rgb(MAP), 0.2), (*to_rgb(MAP), 1.0)])
