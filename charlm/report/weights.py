"""The heat map of a table of terms: the weight of each over training."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from charlm.config import Config
from charlm.objective.terms import Term, build_terms
from charlm.report.style import GREY, MAP, PHONE, Style, engineering, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 400
MOST_ROW_LABELS = 32


def weights(config: Config, style: Style) -> "Figure":
    """The figure of a config's heat map."""
    terms = terms_of(config)
    with new_figure(style, 0.95 + heat_height(terms, style)) as figure:
        draw_weights(terms, figure.subplots(), config.train.steps, wrapped=style is PHONE)
        if style.explains:
            figure.suptitle(f"Weights of {len(terms)} terms over training", fontweight="bold")
    return figure


def draw_weights(terms: Sequence[Term], axes: "Axes", steps: int, wrapped: bool = False) -> None:
    """A heat map of the weights over `steps` optimizer steps: a row per term, empty while it is silent.

    Rows form one block per task, the next character first; within a block the deepest layer is on top. Each column
    shows the weight at its middle. `wrapped` breaks the labels of the blocks, for narrow figures.
    """
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    blocks = _blocks(terms)
    rows = [term for block in blocks.values() for term in block]
    progresses = (np.arange(COLUMNS) + 0.5) / COLUMNS
    weights = np.array([[term.weight.at_next_turn(progress) for progress in progresses] for term in rows])
    image = axes.imshow(
        np.ma.masked_equal(weights, 0.0),
        aspect="auto",
        interpolation="nearest",
        extent=(0, steps, len(rows) - 0.5, -0.5),
        # One colour that fades suits light and dark backgrounds.
        cmap=LinearSegmentedColormap.from_list("weights", [(*to_rgb(MAP), 0.2), (*to_rgb(MAP), 1.0)]),
        vmin=0.0,
        vmax=max(weights.max(), *(max(term.weight.at_next_turn(0.0), term.weight.limit) for term in rows)),
    )
    _label_rows({name.replace(" ", "\n") if wrapped else name: rows for name, rows in blocks.items()}, axes)
    axes.grid(False)
    axes.xaxis.set_major_formatter(engineering())
    axes.set_xlabel("optimizer steps")
    axes.figure.colorbar(image, ax=axes, pad=0.015, fraction=0.04, label="weight").outline.set_visible(False)


def terms_of(config: Config) -> tuple[Term, ...]:
    """The table of terms that a config stands for."""
    return build_terms(config.aux, config.model.num_layers, config.train.steps)


def task_title(offset: int, positions: str, task: str | None) -> str:
    """The task of a term in words; loss positions are named only for terms of the last position alone."""
    title = task or ("next character" if offset == 1 else f"{offset} ahead")
    return title if task or positions == "all" else f"{title}, last position"


def heat_height(terms: Sequence[Term], style: Style) -> float:
    """Inches: rows as tall as their labels while they are few, then lower, up to a map that still fits a page."""
    return min(max(4.5, len(terms)), 28) * style.rc["font.size"] / 55


def _blocks(terms: Sequence[Term]) -> dict[str, list[Term]]:
    """The rows of each block from the top down, by the block's label."""
    blocks: dict[str, list[Term]] = {}
    for term in sorted(terms, key=lambda term: (term.task or "", term.offset, term.positions, -term.layer)):
        blocks.setdefault(task_title(term.offset, term.positions, term.task), []).append(term)
    return blocks


def _label_rows(blocks: dict[str, list[Term]], axes: "Axes") -> None:
    """The name of each block, and the layer of every row or of every n-th."""
    stride = -(-sum(map(len, blocks.values())) // MOST_ROW_LABELS)
    labels, top = {}, 0
    place = {"textcoords": "offset fontsize", "ha": "right"}
    for name, block in blocks.items():
        labels |= {top + row: str(term.layer) for row, term in enumerate(block) if row % stride == 0}
        middle = (0, top + (len(block) - 1) / 2)
        axes.annotate(name, middle, xytext=(-2.8, 0), xycoords=axes.get_yaxis_transform(), va="center", **place)
        if top:
            axes.axhline(top - 0.5, color=GREY, linewidth=0.8)
        top += len(block)
    axes.set_yticks(list(labels), labels.values())
    axes.tick_params(axis="y", length=0)
    axes.annotate("layer", (0, 1), xytext=(-0.35, 0.7), xycoords="axes fraction", color=GREY, **place)
