"""Pictures of a run and of a table of terms.

matplotlib is imported when a picture is drawn, through `Figure` objects that know no display and share no state.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from charlm.config import Config, UserError
from charlm.objective.terms import Term, build_terms
from charlm.runs.folder import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

# Blue and vermilion of Okabe and Ito's palette: told apart by colour-blind readers, and in grey.
TRAIN, VALID = "#0072B2", "#D55E00"
GREY = "#555555"
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
}
WIDTH = 7.5
MOST_ROW_LABELS = 32
COLUMNS = 400


@dataclass(frozen=True)
class Curves:
    """The learning curves of a run: bits per character at completed optimizer steps."""

    train_steps: list[int] = field(default_factory=list)
    train_bits: list[float] = field(default_factory=list)
    valid_steps: list[int] = field(default_factory=list)
    valid_bits: list[float] = field(default_factory=list)


def read_curves(run: Run) -> Curves:
    """The curves in metrics.jsonl. Points that are not finite cannot be drawn and are left out.

    Raises:
        UserError: no point is left.
    """
    curves = Curves()
    for row in run.metrics():
        bits = row.get("valid", row).get("bits_per_character")
        if bits is not None and math.isfinite(bits):
            kind = "valid" if "valid" in row else "train"
            getattr(curves, f"{kind}_steps").append(row["step"])
            getattr(curves, f"{kind}_bits").append(bits)
    if not curves.train_steps and not curves.valid_steps:
        raise UserError(f"{run.metrics_path} holds no bits per character; draw the run once it has trained")
    return curves


def draw_run(run_dir: Path | str, path: Path | str | None = None) -> Path:
    """Draw a run's learning curves above the weights of its terms, on one axis of optimizer steps.

    Args:
        run_dir: the run's folder.
        path: where the picture goes, in the format that its suffix names; by default RUN/run.png.

    Returns:
        The picture's path.

    Raises:
        UserError: no run, no metrics yet, or a suffix that matplotlib does not write.
    """
    run = Run.open(run_dir)
    figure = run_figure(run.path.resolve().name, run.config(), read_curves(run))
    return save(figure, Path(path) if path is not None else run.path / "run.png")


def draw_table(config: Config, path: Path | str) -> Path:
    """Draw the weights of the terms that a config stands for, and return the picture's path.

    Raises:
        UserError: a suffix that matplotlib does not write.
    """
    return save(table_figure(config), Path(path))


def run_figure(name: str, config: Config, curves: Curves) -> "Figure":
    """The figure of `draw_run`, unsaved."""
    import matplotlib
    from matplotlib.figure import Figure

    steps = config.train.steps
    terms = build_terms(config.aux, config.model.num_layers, steps)
    curves_height, heat_height = 2.9, _heat_height(terms)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.5 + curves_height + heat_height), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[curves_height, heat_height])
        _draw_curves(curves, above, steps, config.train.batch_size * config.model.context_length)
        _add_colour_bar(draw_weights(terms, below, steps), below)
        figure.suptitle(f"{name}: {_result(curves)}", fontweight="bold")
    return figure


def table_figure(config: Config) -> "Figure":
    """The figure of `draw_table`, unsaved."""
    import matplotlib
    from matplotlib.figure import Figure

    terms = build_terms(config.aux, config.model.num_layers, config.train.steps)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.9 + _heat_height(terms)), layout="constrained")
        axes = figure.subplots()
        _add_colour_bar(draw_weights(terms, axes, config.train.steps), axes)
        figure.suptitle(f"Weights of {len(terms)} terms over training", fontweight="bold")
    return figure


def draw_weights(
    terms: Sequence[Term], axes: "Axes", steps: int, *, cmap: "Colormap | None" = None, wrapped: bool = False
) -> "AxesImage":
    """A heat map of the weights over `steps` optimizer steps: a row per term, empty where it is silent.

    Rows form one block per offset (and per kind of positions, where the table has both), the next character first;
    within a block the deepest layer is on top. Each column shows the weight at its middle. `wrapped` breaks the labels
    of the blocks, for narrow figures.
    """
    blocks = _blocks(terms)
    rows = [term for block in blocks.values() for term in block]
    weights = np.array(
        [[term.weight.at_next_turn((column + 0.5) / COLUMNS) for column in range(COLUMNS)] for term in rows]
    )
    highest = max(weights.max(), *(max(term.weight.at_next_turn(0.0), term.weight.limit) for term in rows))
    image = axes.imshow(
        np.ma.masked_equal(weights, 0.0),
        aspect="auto",
        interpolation="nearest",
        extent=(0, steps, len(rows) - 0.5, -0.5),
        cmap=cmap or _blues(),
        vmin=0.0,
        vmax=highest,
    )
    _label_rows({name.replace(" ", "\n") if wrapped else name: rows for name, rows in blocks.items()}, axes)
    axes.spines["top"].set_visible(False)
    axes.xaxis.set_major_formatter(engineering())
    axes.set_xlabel("optimizer steps")
    return image


def _blocks(terms: Sequence[Term]) -> dict[str, list[Term]]:
    """The rows of each block from the top down, by the block's label."""
    several_kinds = len({term.positions for term in terms}) > 1
    kinds = {"all": "all positions", "last": "last position"}
    blocks: dict[str, list[Term]] = {}
    for term in sorted(terms, key=lambda term: (term.task or "", term.offset, term.positions, -term.layer)):
        label = term.task or ("next character" if term.offset == 1 else f"{term.offset} ahead")
        several = several_kinds and term.task is None
        blocks.setdefault(f"{label}, {kinds[term.positions]}" if several else label, []).append(term)
    return blocks


def _label_rows(blocks: dict[str, list[Term]], axes: "Axes") -> None:
    num_rows = sum(map(len, blocks.values()))
    stride = -(-num_rows // MOST_ROW_LABELS)
    labels, top = {}, 0
    for name, block in blocks.items():
        labels |= {top + row: str(term.layer) for row, term in enumerate(block) if row % stride == 0}
        middle = top + (len(block) - 1) / 2
        axes.annotate(
            name, (0, middle), xytext=(-2.8, 0), xycoords=axes.get_yaxis_transform(), textcoords="offset fontsize",
            ha="right", va="center",
        )  # fmt: skip
        if top:
            axes.axhline(top - 0.5, color=GREY, linewidth=0.8)
        top += len(block)
    axes.set_yticks(list(labels), labels.values())
    axes.tick_params(axis="y", length=0)
    axes.annotate(
        "layer",
        (0, 1),
        xytext=(-0.35, 0.7),
        xycoords="axes fraction",
        textcoords="offset fontsize",
        ha="right",
        color=GREY,
    )


def _draw_curves(curves: Curves, axes: "Axes", steps: int, characters_per_step: int) -> None:
    smooth = smoothed(curves.train_bits)
    if curves.train_bits:
        axes.plot(curves.train_steps, curves.train_bits, color=TRAIN, alpha=0.25, linewidth=0.7, label="training")
        axes.plot(curves.train_steps, smooth, color=TRAIN, linewidth=1.6, label="training, smoothed")
    if curves.valid_bits:
        axes.plot(
            curves.valid_steps, curves.valid_bits, color=VALID, linewidth=1.2, marker="o", markersize=3.5,
            clip_on=False, label="validation",
        )  # fmt: skip
        best = int(np.argmin(curves.valid_bits))
        axes.annotate(
            f"{curves.valid_bits[best]:.3f}", (curves.valid_steps[best], curves.valid_bits[best]), xytext=(0, -8),
            textcoords="offset points", ha="right", va="top", color=VALID, fontweight="bold",
        )  # fmt: skip
    axes.set_xlim(0, steps)
    axes.set_ylim(*_limits(curves, smooth))
    axes.set_ylabel("bits per character")
    axes.grid(axis="y")
    axes.legend(loc="upper right")
    characters = axes.secondary_xaxis(
        "top", functions=(lambda step: step * characters_per_step, lambda count: count / characters_per_step)
    )
    characters.xaxis.set_major_formatter(engineering())
    characters.set_xlabel("characters seen")


def _limits(curves: Curves, smooth: Sequence[float]) -> tuple[float, float]:
    """The lowest and the highest value shown.

    A run starts at 8 bits and falls within its first steps; drawn whole, that fall would flatten all the rest. So the
    axis ends where the smoothed curve is after a fiftieth of its points.
    """
    bottom = min([*curves.train_bits, *curves.valid_bits])
    top = max([*smooth[len(smooth) // 50 :], *curves.valid_bits])
    span = max(top - bottom, 0.1)
    return bottom - 0.15 * span, top + 0.05 * span  # room for the label below the best


def smoothed(values: Sequence[float]) -> Sequence[float]:
    """The centred mean over a fortieth of the points, over fewer where an edge leaves fewer."""
    reach = len(values) // 80
    return [float(np.mean(values[max(0, i - reach) : i + reach + 1])) for i in range(len(values))]


def _result(curves: Curves) -> str:
    """The best validation, or the last training row of a run that has not been validated yet."""
    if curves.valid_bits:
        best = int(np.argmin(curves.valid_bits))
        kind, bits, step = "validation", curves.valid_bits[best], curves.valid_steps[best]
    else:
        kind, bits, step = "training", curves.train_bits[-1], curves.train_steps[-1]
    return f"{kind} {bits:.3f} bits per character after {step:,} steps"


def _heat_height(terms: Sequence[Term]) -> float:
    """Inches: rows as tall as their labels while they are few, then lower, up to a map that still fits a page."""
    return min(max(0.6, 0.16 * len(terms)), 4.5)


def _add_colour_bar(image: "AxesImage", axes: "Axes") -> None:
    bar = axes.figure.colorbar(image, ax=axes, pad=0.015, fraction=0.04, label="weight")
    bar.outline.set_visible(False)


def _blues():
    """Blues that start where they can be told from the white of a silent term."""
    import matplotlib
    from matplotlib.colors import ListedColormap

    return ListedColormap(matplotlib.colormaps["Blues"](np.linspace(0.15, 1.0, 256)))


def engineering():
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")


def check_suffix(path: Path) -> None:
    """Raise UserError for a picture that matplotlib does not write."""
    from matplotlib.figure import Figure

    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise UserError(f"picture {path}: its suffix must be one of .{', .'.join(sorted(formats))}")


def save(figure: "Figure", path: Path) -> Path:
    """Write a figure, making its folder, and return `path`.

    Raises:
        UserError: a suffix that matplotlib does not write, or a place where nothing can be written.
    """
    check_suffix(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160)
    except OSError as error:
        raise UserError(f"picture {path} cannot be written: {error}") from error
    return path
