"""Figures of runs, weights and early exit; None where there is nothing to draw."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from charlm.config import Config, TrainConfig, UserError
from charlm.objective.terms import Term, build_terms
from charlm.report.metrics import Metrics, Points, read_runs
from charlm.report.style import (
    DASHES,
    GREY,
    MAP,
    PHONE,
    PICTURE,
    SERIES,
    TRAIN,
    VALID,
    Style,
    draw_panels,
    engineering,
    layer_colour,
    new_figure,
    save,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from charlm.inference.evaluation import Score

MOST_POINTS, FEW_POINTS = 300, 80  # of a line, and of a smoothed one
HEAT_COLUMNS = 400
MOST_ROW_LABELS = 32
BITS = "bits per character"
DIAGNOSTICS = {
    "bits_per_character": "bits per character, next character",
    "supervision_ratio": "supervision ratio, all outputs",
    "main_supervision_ratio": "supervision ratio, last layer's output",
    "gradient_cosine": "cosine, auxiliary and main gradient",
    "gradient_norm": "gradient norm",
}


def draw_run(run_dir: Path | str, path: Path | str | None = None) -> Path:
    """Draw a run's learning curves above the weights of its terms, over optimizer steps.

    Returns `path`, by default RUN/run.png. Raises UserError for no run, no metrics yet, or a suffix
    of no format.
    """
    (run,) = read_runs([run_dir])
    if not run.has_bits:
        raise UserError(f"{run.folder.metrics_path} holds no bits per character yet")
    return save(run_figure(run), Path(path or run.folder.path / "run.png"))


def draw_diagnostics(run_dir: Path | str, path: Path | str | None = None) -> Path:
    """Draw a run's diagnostics as `draw_run` does its curves."""
    (run,) = read_runs([run_dir])
    figure = diagnostics(run, PICTURE)
    if figure is None:
        text = f"{run.folder.metrics_path} holds no diagnostics"
        raise UserError(f"{text}; train with --train.diagnose_every=0.05")
    return save(figure, Path(path or run.folder.path / "diagnostics.png"))


def run_figure(run: Metrics) -> "Figure":
    """The figure of `draw_run`."""
    factor, train = run.characters_per_step, run.config.train
    terms = build_terms(run.config.aux, run.config.model.num_layers, train.planned)
    heights = [2.9, _heat_height(terms, PICTURE)]
    result = "not validated yet"
    if run.best:
        result = "validation {1:.3f} bits per character after {0:,} steps".format(*run.best)
    title = f"{run.name}: {result}"
    with new_figure(PICTURE, 1.5 + sum(heights), title) as figure:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=heights)
        _draw_learning(above, [run], [1.0], False)
        above.legend(loc="upper right")
        conversions = (lambda step: step * factor, lambda count: count / factor)
        characters = above.secondary_xaxis("top", functions=conversions)
        characters.xaxis.set_major_formatter(engineering())
        characters.set_xlabel("characters seen")
        _draw_weights(below, terms, train)
        above.set_xlim(0, train.steps)
    return figure


def learning(runs: Sequence[Metrics], style: Style) -> "Figure | None":
    """Bits per character against characters seen and against time."""
    if not any(run.has_bits for run in runs):
        return None
    longest = max(run.points("seconds")[1].max(initial=0) for run in runs)
    units = [(3600, "hours"), (60, "minutes"), (1, "seconds")]
    unit, name = next((unit for unit in units if longest > 2 * unit[0]), units[-1])
    scales = [run.characters_per_step for run in runs]
    by_characters = ("", _draw_learning, runs, scales, False)
    by_time = ("", _draw_learning, runs, [1 / unit] * len(runs), True)
    figure = draw_panels(style, [by_characters, by_time], 1.3)
    left, right = figure.axes
    _over(left, "characters seen")
    right.set(xlabel=f"{name} of training", xlim=(0, None), ylim=left.get_ylim())
    return figure


def tasks(runs: Sequence[Metrics], style: Style) -> "Figure | None":
    """The losses of each run's highest layer by task; None for a single run."""
    panels: dict[str, dict[int, Points]] = {}
    for place, run in enumerate(runs if len(runs) > 1 else []):
        for title, layers in _losses_by_task(run).items():
            steps, losses = layers[max(layers)]
            panels.setdefault(title, {})[place] = steps * run.characters_per_step, losses
    return draw_panels(style, [(title, _draw_lines, lines) for title, lines in panels.items()])


def terms(run: Metrics, style: Style) -> "Figure | None":
    """The loss of every term: a panel for each task, a line for each layer."""
    losses = _losses_by_task(run).items()
    return draw_panels(style, [(title, _draw_layers, run, lines) for title, lines in losses])


def hedge(run: Metrics, style: Style) -> "Figure | None":
    """The weight that hedge gives each layer over training."""
    lines = {term.layer: points for term, points in run.by_term("hedge/").items()}
    panels = [("weight of a layer", _draw_layers, run, lines)] if lines else []
    return draw_panels(style, panels)


def diagnostics(run: Metrics, style: Style) -> "Figure | None":
    """Diagnostics over training, and the newest bits of each layer."""
    panels = []
    for kind, title in DIAGNOSTICS.items():
        found = run.by_term(f"diagnostics/{kind}/")
        lines = {term.layer: points for term, points in found.items() if term.offset in (None, 1)}
        if lines:
            y = "log" if "ratio" in kind or "norm" in kind else "cut"
            panels.append((title, _draw_layers, run, lines, y))
    if panels:
        paths = [path for path in run.series if path.startswith("diagnostics/")]
        newest = int(max(run.points(path)[0][-1] for path in paths))
        panels.append((f"bits per character after {newest:,} steps", _draw_profile, run, newest))
    title = f"{run.name}: diagnostics of the validation split"
    return draw_panels(style, panels, title=title, num_layers=run.config.model.num_layers)


def bits_against(lines: dict[int, tuple], label: str, style: Style) -> "Figure | None":
    """Bits per character against "layer" or "symbols of context".

    `lines` maps the place of a run to x, bits and, if known, their standard errors.
    """

    def draw(axes: "Axes") -> None:
        for place, (x, bits, *errors) in lines.items():
            looks = _looks(place)
            for error in errors:
                shade = {"color": looks["color"], "alpha": 0.2, "linewidth": 0}
                axes.fill_between(x, bits - error, bits + error, **shade)
            axes.plot(x, bits, marker="o", **looks)
        axes.set(xlabel=label, ylabel=BITS)
        if label == "layer":
            axes.xaxis.get_major_locator().set_params(integer=True)
        else:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")

    return draw_panels(style, [("", draw)] if lines else [], 1.15)


def speed(runs: Sequence[Metrics], style: Style) -> "Figure | None":
    """Characters per second over training, and memory if recorded."""
    panels: dict[str, dict[int, Points]] = {}
    speeds = ("characters per second", "characters_per_second", 1)
    memory = ("memory, GiB", "memory", 2**30)
    for place, run in enumerate(runs):
        for title, path, unit in (speeds, memory):
            steps, values = run.points(path)
            if len(steps):
                line = steps * run.characters_per_step, values / unit
                panels.setdefault(title, {})[place] = line
    return draw_panels(style, [(title, _draw_lines, panels[title], "zero") for title in panels])


def early_exit(score: "Score") -> "Figure":
    """Bits per character by early exit and by one layer, against layers used."""
    exits = score.early_exit.points
    points = sorted((point.mean_layers, point.bits_per_character) for point in exits)
    layers = list(map(int, score.layers))

    def draw(axes: "Axes") -> None:
        looks = {"color": TRAIN, "marker": "o", "markersize": 3.5}
        axes.plot(*zip(*points, strict=True), label="early exit", **looks)
        axes.plot(layers, score.layers.values(), "s", color=VALID, label="one layer")
        axes.axhline(score.bits_per_character, color=GREY, linewidth=0.8, linestyle=":")
        axes.set(xlabel="layers used on average", ylabel=BITS)
        axes.legend(loc="upper right")

    title = f"Early exit: {score.split} split of {score.corpus}, {score.checkpoint}"
    return draw_panels(PICTURE, [("", draw)], 1.5, title)


def weights(config: Config, style: Style) -> "Figure":
    """A heat map of the weights of terms over training."""
    terms = build_terms(config.aux, config.model.num_layers, config.train.planned)
    title = f"Weights of {len(terms)} terms over training"
    with new_figure(style, 0.95 + _heat_height(terms, style), title) as figure:
        _draw_weights(figure.subplots(), terms, config.train, wrapped=style is PHONE)
    return figure


def thinned(
    x: np.ndarray,
    y: np.ndarray,
    most: int = MOST_POINTS,
    end: float = 0.0,
) -> Points:
    """Means over `most` stretches from 0 to `end`; without it a short line stays as it is."""
    if len(x) <= most and not end:
        return x, y
    stretches = np.clip(x / (end or x.max() or 1) * most, 0, most - 1).astype(int)
    counts = np.bincount(stretches, minlength=most)
    sums = (np.bincount(stretches, values, most) for values in (x, y))
    return tuple(total[counts > 0] / counts[counts > 0] for total in sums)


def _draw_learning(axes: "Axes", runs: list[Metrics], scales: list[float], timed: bool) -> None:
    """Training smoothed, validation with points, over steps or seconds times a scale."""
    shown = []
    alone = len(runs) == 1
    for place, (run, scale) in enumerate(zip(runs, scales, strict=True)):
        x, bits = run.points("bits_per_character", timed)
        valid_x, valid_bits = run.points("valid/bits_per_character", timed)
        train = thinned(x * scale, bits, FEW_POINTS)
        valid = thinned(valid_x * scale, valid_bits)
        looks, pale = _looks(place), {"color": TRAIN, "alpha": 0.3, "linewidth": 0.8}
        colour, width = looks["color"], 1.6 if alone else 0.9
        if alone:
            axes.plot(*thinned(x * scale, bits), label="training", **pale)
            looks = {"color": VALID}
        axes.plot(*train, color=colour, linewidth=width, label="training, smoothed")
        looks |= {"linewidth": 1.6, "marker": "o", "markersize": 4}
        axes.plot(*valid, clip_on=False, label="validation", **looks)
        shown += [train, valid]
    axes.set_ylabel(BITS)
    _cut_fall(axes, shown)


def _looks(place: int) -> dict[str, Any]:
    colour, dashes = SERIES[place % len(SERIES)], DASHES[place % len(DASHES)]
    return {"color": colour, "linestyle": dashes, "markersize": 4.5}


def _draw_lines(
    axes: "Axes",
    lines: dict[int, Points],
    y: str = "cut",  # or "log" or "zero"
    looks: Callable = _looks,
    label: str = "characters seen",
    end: int | None = None,
) -> None:
    from matplotlib.ticker import MaxNLocator

    last = max(float(x[-1]) for x, _ in lines.values())
    lines = {key: thinned(*points, FEW_POINTS, last) for key, points in sorted(lines.items())}
    for key, points in lines.items():
        axes.plot(*points, **looks(key))
    if y == "cut":
        _cut_fall(axes, lines.values())
    elif y == "log":
        axes.set_yscale("log")
        bottom, top = axes.get_ylim()
        if top < 10 * bottom:  # ticks at 1, 2 and 5 would be too few
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
        else:
            axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5), numticks=6)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    else:
        axes.set_ylim(bottom=0)
        if axes.get_ylim()[1] >= 1000:  # a third of a GiB is not 333m of one
            axes.yaxis.set_major_formatter(engineering())
    _over(axes, label, end)


def _draw_layers(axes: "Axes", run: Metrics, lines: dict[int, Points], y: str = "cut") -> None:
    last = run.config.model.num_layers
    few = len(lines) <= 12 and all(len(steps) < 30 for steps, _ in lines.values())

    def looks(layer: int) -> dict[str, Any]:
        return {
            "color": layer_colour(layer, last),
            "linewidth": 2.0 if layer == last else 1.2,
            "label": f"layer {layer}",
            "marker": "o",
            "markersize": 3 if few else 0,
        }

    _draw_lines(axes, lines, y, looks, "optimizer steps", run.config.train.steps)


def _draw_profile(axes: "Axes", run: Metrics, newest: int) -> None:
    by_offset: dict[int, dict[int, float]] = {}
    for term, (steps, bits) in run.by_term("diagnostics/bits_per_character/").items():
        if term.offset and steps[-1] == newest:
            by_offset.setdefault(term.offset, {})[term.layer] = bits[-1]
    for place, (offset, bits) in enumerate(sorted(by_offset.items())):
        label = _task_title(offset, "all", None)
        axes.plot(list(bits), list(bits.values()), marker="o", label=label, **_looks(place))
    axes.legend()
    axes.set(xlabel="layer", xlim=(0.5, run.config.model.num_layers + 0.5))
    axes.xaxis.get_major_locator().set_params(integer=True)


def _draw_weights(axes: "Axes", terms: Sequence[Term], train: TrainConfig, wrapped: bool = False) -> None:
    """A heat map of the weights: a row for each term, a block of rows for each task.

    Columns show the weight at their middle. `wrapped` breaks the labels of the blocks.
    """
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    rows = sorted(terms, key=lambda term: (term.task or "", term.offset, term.positions, -term.layer))
    progresses = [train.progress(train.steps * (column + 0.5) / HEAT_COLUMNS) for column in range(HEAT_COLUMNS)]
    weights = np.array([list(map(term.weight.at_next_turn, progresses)) for term in rows])
    peaks = [max(term.weight.at_next_turn(0.0), term.weight.limit) for term in rows]
    faint, full = (*to_rgb(MAP), 0.2), (*to_rgb(MAP), 1.0)
    image = axes.imshow(
        np.ma.masked_equal(weights, 0.0),
        aspect="auto",
        interpolation="nearest",
        extent=(0, train.steps, len(rows) - 0.5, -0.5),
        # One colour that fades suits light and dark backgrounds.
        cmap=LinearSegmentedColormap.from_list("weights", [faint, full]),
        vmin=0.0,
        vmax=max(weights.max(), *peaks),
    )
    _label_rows(axes, rows, wrapped)
    axes.grid(False)
    _over(axes, "optimizer steps", train.steps)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.015, fraction=0.04, label="weight")
    bar.outline.set_visible(False)


def _label_rows(axes: "Axes", terms: Sequence[Term], wrapped: bool) -> None:
    titles = [_task_title(term.offset, term.positions, term.task) for term in terms]
    stride = math.ceil(len(terms) / MOST_ROW_LABELS)
    labels = {}
    place = {"textcoords": "offset fontsize", "ha": "right", "va": "center"}
    for title in dict.fromkeys(titles):
        top, count = titles.index(title), titles.count(title)
        labels |= {row: str(terms[row].layer) for row in range(top, top + count, stride)}
        name = title.replace(" ", "\n") if wrapped else title
        middle = (0, top + (count - 1) / 2)
        axes.annotate(name, middle, xytext=(-2.8, 0), xycoords=axes.get_yaxis_transform(), **place)
        if top:
            axes.axhline(top - 0.5, color=GREY, linewidth=0.8)
    axes.set_yticks(list(labels), labels.values())
    axes.tick_params(axis="y", length=0)
    place = place | {"xytext": (-0.35, 0.7), "va": "baseline"}
    axes.annotate("layer", (0, 1), xycoords="axes fraction", color=GREY, **place)


def _heat_height(terms: Sequence[Term], style: Style) -> float:
    """Inches: rows as tall as their labels while they are few, then lower."""
    return min(max(4.5, len(terms)), 28) * style.rc["font.size"] / 55


def _task_title(offset: int, positions: str, task: str | None) -> str:
    title = task or ("next character" if offset == 1 else f"{offset} ahead")
    return title if task or positions == "all" else f"{title}, last position"


def _losses_by_task(run: Metrics) -> dict[str, dict[int, Points]]:
    """Losses by task and layer; own tasks in nats."""
    panels = {}
    for term, (steps, losses) in run.by_term("terms/", "/loss").items():
        title = _task_title(term.offset, term.positions, term.task and f"{term.task}, nats")
        factor = 1.0 if term.task else run.symbols_per_character / math.log(2)
        panels.setdefault(title, {})[term.layer] = steps, losses * factor
    return panels


def _over(axes: "Axes", label: str, end: float | None = None) -> None:
    axes.set(xlabel=label, xlim=(0, end))
    axes.xaxis.set_major_formatter(engineering())


def _cut_fall(axes: "Axes", lines: Iterable[Points]) -> None:
    """End the y axis where lines are after a fiftieth of their length."""
    lines = [line for line in lines if len(line[0])]
    last = max((float(x[-1]) for x, _ in lines), default=0.0)
    shown = [value for x, values in lines for value in values[x >= last / 50]]
    if len(shown) > 1 and max(shown) > min(shown):
        margin = 0.05 * (max(shown) - min(shown))
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
