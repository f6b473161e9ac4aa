"""The figures of runs and of early exit.

Most functions take a `Style` and return a matplotlib figure, or None if there is nothing to draw. Figures of several
runs give each a colour and a dash pattern, in the order of the runs.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from charlm.config import UserError
from charlm.report.metrics import Metrics, Points, read_runs
from charlm.report.style import (
    DASHES,
    GREY,
    PICTURE,
    SERIES,
    TRAIN,
    VALID,
    Style,
    add_layer_bar,
    engineering,
    layer_colour,
    new_figure,
    new_panels,
    save,
    use_log_scale,
)
from charlm.report.weights import draw_weights, heat_height, task_title, terms_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from charlm.inference.evaluation import Score

MOST_POINTS = 300
"""Most points of a learning curve; of more, neighbours are averaged."""
FEW_POINTS = 80
"""Most points of a loss or a speed, which are noisy: averages show better which line is above which."""
BITS = "bits per character"
DIAGNOSTICS = {
    "bits_per_character": "bits per character, next character",
    "supervision_ratio": "supervision ratio, all outputs",
    "main_supervision_ratio": "supervision ratio, last layer's output",
    "gradient_cosine": "cosine, auxiliary and main gradient",
    "gradient_norm": "gradient norm",
}
"""The title of each diagnostic's panel."""


def draw_run(run_dir: Path | str, path: Path | str | None = None) -> Path:
    """Draw a run's learning curves above the weights of its terms, over optimizer steps.

    Args:
        run_dir: the run's folder.
        path: the picture, in the format of its suffix; by default RUN/run.png.

    Returns:
        The picture's path.

    Raises:
        UserError: no run, no metrics yet, or a suffix that matplotlib does not write.
    """
    (run,) = read_runs([run_dir])
    if not run.has_bits:
        raise UserError(f"{run.folder.metrics_path} holds no bits per character; draw the run once it has trained")
    return save(run_figure(run), Path(path) if path is not None else run.folder.path / "run.png")


def draw_diagnostics(run_dir: Path | str, path: Path | str | None = None) -> Path:
    """Draw a run's diagnostics over optimizer steps, a line for each layer (docs/diagnostics.md explains them).

    Arguments, return value and errors as for `draw_run`; the default is RUN/diagnostics.png.
    """
    (run,) = read_runs([run_dir])
    figure = diagnostics(run, PICTURE)
    if figure is None:
        raise UserError(f"{run.folder.metrics_path} holds no diagnostics; train with --train.diagnose_every=0.05")
    return save(figure, Path(path) if path is not None else run.folder.path / "diagnostics.png")


def run_figure(run: Metrics) -> "Figure":
    """The figure of `draw_run`."""
    terms, factor = terms_of(run.config), run.characters_per_step
    heights = [2.9, heat_height(terms, PICTURE)]
    with new_figure(PICTURE, 1.5 + sum(heights)) as figure:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=heights)
        _draw_learning([run], above, "steps")
        if run.best is not None:
            bottom, top = above.get_ylim()
            above.set_ylim(bottom - 0.1 * (top - bottom))  # room for the label below the best
            place = {"xytext": (0, -8), "textcoords": "offset points", "ha": "right", "va": "top"}
            above.annotate(f"{run.best[1]:.3f}", run.best, color=VALID, fontweight="bold", **place)
        above.set_ylabel(BITS)
        above.legend(loc="upper right")
        characters = above.secondary_xaxis("top", functions=(lambda step: step * factor, lambda count: count / factor))
        characters.xaxis.set_major_formatter(engineering())
        characters.set_xlabel("characters seen")
        draw_weights(terms, below, run.config.train.steps)
        above.set_xlim(0, run.config.train.steps)
        result = "not validated yet" if run.best is None else "validation {1:.3f} bits per character after {0:,} steps"
        figure.suptitle(f"{run.name}: {result.format(*run.best or ())}", fontweight="bold")
    return figure


def learning(runs: Sequence[Metrics], style: Style) -> "Figure | None":
    """Bits per character in training and validation, against characters seen and against time."""
    if not any(run.has_bits for run in runs):
        return None
    longest = max(run.longest for run in runs)
    units = [(3600, "hours"), (60, "minutes"), (1, "seconds")]
    unit, name = next((unit for unit in units if longest > 2 * unit[0]), units[-1])
    with new_panels(style, ["", ""], 1.3) as (figure, (left, right)):
        _draw_learning(runs, left, "characters")
        _draw_learning(runs, right, "seconds", unit)
        _over(left, "characters seen")
        right.set(xlabel=f"{name} of training", xlim=(0, None), ylim=left.get_ylim())
        left.set_ylabel(BITS)
        right.set_ylabel(BITS)
    return figure


def tasks(runs: Sequence[Metrics], style: Style) -> "Figure | None":
    """The losses of each run's highest layer, a panel for each task; None for a single run."""
    panels: dict[str, dict[int, Points]] = {}
    for place, run in enumerate(runs):
        for title, layers in _losses_by_task(run).items():
            steps, losses = layers[max(layers)]
            panels.setdefault(title, {})[place] = steps * run.characters_per_step, losses
    if len(runs) == 1 or not panels:
        return None
    with new_panels(style, list(panels)) as (figure, grid):
        for axes, lines in zip(grid, panels.values(), strict=True):
            lines = _thinned_alike(lines)
            _draw_runs(lines, axes)
            _cut_fall(lines.values(), axes)
            _over(axes, "characters seen")
    return figure


def terms(run: Metrics, style: Style) -> "Figure | None":
    """The loss of every term over training: a panel for each task, a line for each layer."""
    return _by_layer(run, _losses_by_task(run), style)


def hedge(run: Metrics, style: Style) -> "Figure | None":
    """The weight that hedge backpropagation gives each layer over training."""
    lines = {term.layer: points for term, points in run.hedge().items()}
    return _by_layer(run, {"weight of a layer": lines} if lines else {}, style)


def diagnostics(run: Metrics, style: Style) -> "Figure | None":
    """Diagnostics of heads and layers over training, and the newest bits per character of each layer."""
    found = {kind: run.diagnostic(kind) for kind in DIAGNOSTICS}
    titles = [DIAGNOSTICS[kind] for kind, points in found.items() if points]
    if not titles:
        return None
    newest, num_layers = max(step for step, _ in run.diagnostics), run.config.model.num_layers
    titles.append(f"bits per character after {newest:,} steps")
    with new_panels(style, titles) as (figure, grid):
        for axes, (kind, points) in zip(grid, filter(all, found.items()), strict=False):
            lines = {term.layer: line for term, line in points.items() if term.offset in (None, 1)}
            _draw_layers(run, lines, axes, logarithmic="ratio" in kind or "norm" in kind)
        _draw_profile(run, newest, grid[-1])
        if style.explains:
            figure.suptitle(f"{run.name}: diagnostics of the validation split", fontweight="bold")
            if num_layers > 1:
                add_layer_bar(figure, grid, num_layers)
    return figure


def by_layer(lines: dict[int, Points], style: Style) -> "Figure | None":
    """Bits per character as each layer predicts it: {place of the run: (layers, bits)}."""
    if not lines:
        return None
    with new_panels(style, [""], 1.15) as (figure, (axes,)):
        _draw_runs(lines, axes, marker="o")
        axes.set(xlabel="layer", ylabel=BITS)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def by_position(lines: dict[int, tuple[np.ndarray, ...]], style: Style) -> "Figure | None":
    """Bits per character by context: {place of the run: (symbols of context, bits, their standard errors)}."""
    if not lines:
        return None
    with new_panels(style, [""], 1.15) as (figure, (axes,)):
        for place, (symbols, bits, errors) in lines.items():
            axes.fill_between(symbols, bits - errors, bits + errors, color=_looks(place)[0], alpha=0.2, linewidth=0)
        _draw_runs({place: line[:2] for place, line in lines.items()}, axes, marker="o")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set(xlabel="symbols of context", ylabel=BITS)
    return figure


def speed(runs: Sequence[Metrics], style: Style) -> "Figure | None":
    """Characters per second over training, and the memory of runs that recorded it."""
    panels = {}
    kinds = {"characters per second": ("characters_per_second", 1.0), "memory, GiB": ("memory", 2.0**-30)}
    for title, (key, factor) in kinds.items():
        found = {place: (run, *run.of_training(key)) for place, run in enumerate(runs)}
        lines = {place: (x * run.characters_per_step, y * factor) for place, (run, x, y) in found.items()}
        if any(np.isfinite(y).any() for _, y in lines.values()):
            panels[title] = lines
    if not panels:
        return None
    with new_panels(style, list(panels)) as (figure, grid):
        for axes, lines in zip(grid, panels.values(), strict=True):
            _draw_runs({place: thinned(*line, FEW_POINTS) for place, line in lines.items()}, axes)
            axes.set_ylim(bottom=0)
            _over(axes, "characters seen")
            if axes.get_ylim()[1] >= 1000:  # a third of a GiB is not 333m of one
                axes.yaxis.set_major_formatter(engineering())
    return figure


def early_exit(score: "Score") -> "Figure":
    """Bits per character against layers used: the curve of early exit, and each layer's own score."""
    points = sorted((point.mean_layers, point.bits_per_character) for point in score.early_exit.points)
    with new_panels(PICTURE, [""], 1.5) as (figure, (axes,)):
        axes.plot(*zip(*points, strict=True), color=TRAIN, marker="o", markersize=3.5, label="early exit")
        axes.plot(list(map(int, score.layers)), score.layers.values(), "s", color=VALID, label="one layer")
        axes.axhline(score.bits_per_character, color=GREY, linewidth=0.8, linestyle=":")
        axes.set(xlabel="layers used on average", ylabel=BITS)
        axes.legend(loc="upper right")
        figure.suptitle(f"Early exit: {score.split} split of {score.corpus}, {score.checkpoint}", fontweight="bold")
    return figure


def thinned(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS, end: float | None = None) -> Points:
    """A line of at most `most` points: means over equal stretches from 0 to `end`, without values that are not finite.

    A line that is short enough stays as it is, unless it is given an `end`.
    """
    good = np.isfinite(x) & np.isfinite(y)
    x, y = x[good], y[good]
    if len(x) <= most and end is None:
        return x, y
    stretches = np.clip(x / (end or x.max(initial=0) or 1) * most, 0, most - 1).astype(int)
    counts = np.bincount(stretches, minlength=most)
    sums = (np.bincount(stretches, values, most) for values in (x, y))
    return tuple(total[counts > 0] / counts[counts > 0] for total in sums)


def smoothed(values: np.ndarray) -> np.ndarray:
    """The centred mean over a fortieth of the finite values, fewer at the ends; NaN stays NaN."""
    good, result = np.isfinite(values), np.full(len(values), math.nan)
    kernel = np.ones(2 * (good.sum() // 80) + 1)
    if good.any():
        result[good] = np.convolve(values[good], kernel, "same") / np.convolve(np.ones(good.sum()), kernel, "same")
    return result


def _draw_learning(runs: Sequence[Metrics], axes: "Axes", against: str, unit: float = 1.0) -> None:
    """Training thin and smoothed, validation with points. A single run has a colour for each, and the raw curve."""
    shown, alone = [], len(runs) == 1
    for place, run in enumerate(runs):
        (steps, bits), (valid_steps, valid_bits) = run.of_training("bits_per_character"), run.validation()
        if against == "seconds":
            x, valid_x = run.seconds(run.train) / unit, run.seconds(run.valid) / unit
        else:
            scale = run.characters_per_step if against == "characters" else 1.0
            x, valid_x = steps * scale, valid_steps * scale
        train, valid = thinned(x, smoothed(bits)), thinned(valid_x, valid_bits)
        colour, dashes = _looks(place)
        if alone:
            axes.plot(*thinned(x, bits), color=colour, alpha=0.3, linewidth=0.8, label="training")
        axes.plot(*train, color=colour, linewidth=1.6 if alone else 0.9, label="training, smoothed")
        looks = {"color": VALID} if alone else {"color": colour, "linestyle": dashes}
        axes.plot(*valid, linewidth=1.6, marker="o", markersize=4, clip_on=False, label="validation", **looks)
        shown += [train, valid]
    _cut_fall(shown, axes)


def _draw_runs(lines: dict[int, Points], axes: "Axes", marker: str = "") -> None:
    """A line for each run, by its place among the runs."""
    for place, points in lines.items():
        colour, dashes = _looks(place)
        axes.plot(*points, color=colour, linestyle=dashes, marker=marker, markersize=4.5)


def _by_layer(run: Metrics, panels: dict[str, dict[int, Points]], style: Style) -> "Figure | None":
    """A panel for each title with a line for each layer, over optimizer steps."""
    if not panels:
        return None
    with new_panels(style, list(panels)) as (figure, grid):
        for axes, lines in zip(grid, panels.values(), strict=True):
            _draw_layers(run, lines, axes)
    return figure


def _draw_layers(run: Metrics, lines: dict[int, Points], axes: "Axes", logarithmic: bool = False) -> None:
    """A line for each layer over optimizer steps."""
    num_layers, lines = run.config.model.num_layers, _thinned_alike(lines)
    few = len(lines) <= 12 and all(len(steps) < 30 for steps, _ in lines.values())
    for layer, points in sorted(lines.items()):
        looks = {"color": layer_colour(layer, num_layers), "linewidth": 2.0 if layer == num_layers else 1.2}
        axes.plot(*points, marker="o", markersize=3 if few else 0, label=f"layer {layer}", **looks)
    if logarithmic:
        use_log_scale(axes)
    else:
        _cut_fall(lines.values(), axes)
    _over(axes, "optimizer steps", run.config.train.steps)


def _draw_profile(run: Metrics, newest: int, axes: "Axes") -> None:
    """The newest bits per character by layer, a line for each offset."""
    by_offset: dict[int, dict[int, float]] = {}
    for term, (steps, bits) in run.diagnostic("bits_per_character").items():
        if term.offset and steps[-1] == newest:
            by_offset.setdefault(term.offset, {})[term.layer] = bits[-1]
    for place, (offset, bits) in enumerate(sorted(by_offset.items())):
        line = {"color": _looks(place)[0], "marker": "o", "markersize": 3, "label": task_title(offset, "all", None)}
        axes.plot(list(bits), list(bits.values()), linewidth=1.2, **line)
    if len(by_offset) <= len(SERIES):
        axes.legend()
    axes.set(xlabel="layer", xlim=(0.5, run.config.model.num_layers + 0.5))
    axes.xaxis.get_major_locator().set_params(integer=True)


def _over(axes: "Axes", label: str, end: float | None = None) -> None:
    axes.set(xlabel=label, xlim=(0, end))
    axes.xaxis.set_major_formatter(engineering())


def _looks(place: int) -> tuple[str, Any]:
    """Colour and dashes of a run, by its place among the runs."""
    return SERIES[place % len(SERIES)], DASHES[place % len(DASHES)]


def _thinned_alike(lines: dict[int, Points]) -> dict[int, Points]:
    """The lines of a panel as means over the same stretches: none is smoothed more than another."""
    end = max(float(x[-1]) for x, _ in lines.values())
    return {key: thinned(*points, FEW_POINTS, end) for key, points in lines.items()}


def _cut_fall(lines: Iterable[Points], axes: "Axes") -> None:
    """End the y axis where the lines are after a fiftieth of their length.

    A run starts at 8 bits and falls within its first steps: drawn whole, that fall would flatten all the rest.
    """
    lines = [line for line in lines if len(line[0])]
    last = max((float(x[-1]) for x, _ in lines), default=0.0)
    shown = [value for x, values in lines for value in values[x >= last / 50]]
    if len(shown) > 1 and max(shown) > min(shown):
        margin = 0.05 * (max(shown) - min(shown))
        axes.set_ylim(min(shown) - margin, max(shown) + margin)


def _losses_by_task(run: Metrics) -> dict[str, dict[int, Points]]:
    """The loss of every term by the title of its task and by layer: bits per character, or nats for a user's task."""
    panels: dict[str, dict[int, Points]] = {}
    for term, (steps, losses) in run.losses().items():
        title = task_title(term.offset, term.positions, term.task and f"{term.task}, nats")
        factor = 1.0 if term.task else run.symbols_per_character / math.log(2)
        panels.setdefault(title, {})[term.layer] = steps, losses * factor
    return panels
