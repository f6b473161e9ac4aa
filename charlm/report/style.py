"""Style sheets of the figures: one for pictures, two for the page of runs.

matplotlib is imported only to draw. Its `Figure` objects need no display.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from charlm.config import UserError
from charlm.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#7a5195", "#8c6d31")
"""Okabe and Ito's palette, readable without colour vision; its yellow is darkened."""
TRAIN, VALID = SERIES[:2]
INK, GREY, GRID, MAP = "#1a1a1b", "#555556", "#ddddde", "#2389d0"
"""Text, axes, grid, heat map. All differ, because in the page each becomes a variable."""
DASHES = ("solid", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 1.5, 1.5, 1.5)))
LAYER_STEPS = 16  # colours for layers
WIDTH = 7.5  # of a picture, in inches
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.linewidth": 0.8,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "text.parse_math": False,  # a dollar in the name of a run or a term begins no formula
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
}
_WITH_GRID = STYLE | {"axes.grid": True, "axes.grid.axis": "y"}


@dataclass(frozen=True)
class Style:
    """How figures look in one place. Sizes are in inches."""

    rc: dict[str, Any]
    width: float
    row: float  # height of a row of panels
    columns: int  # most panels side by side
    explains: bool = False  # by its own title and colour bar; those of the page are HTML


PICTURE = Style(_WITH_GRID, WIDTH, 2.3, 2, explains=True)
_PAGE = _WITH_GRID | {"font.size": 12, "axes.titleweight": "bold"}
WINDOW = Style(_PAGE, 1080 / 72, 270 / 72, 3)  # an inch is 72 CSS pixels, a point is a pixel
PHONE = Style(_PAGE, 358 / 72, 220 / 72, 1)


@contextmanager
def new_figure(style: Style, height: float, title: str = "") -> Iterator["Figure"]:
    """An empty figure, `height` inches high, to be filled in the context."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(style.rc):
        figure = Figure(figsize=(style.width, height), layout="constrained")
        # Else a title seems to be the label of the axis above it.
        figure.get_layout_engine().set(h_pad=0.1)
        if title and style.explains:
            figure.suptitle(title, fontweight="bold")
        yield figure


def draw_panels(
    style: Style,
    panels: Sequence[tuple[Any, ...]],
    row: float = 1.0,
    title: str = "",
    num_layers: int = 0,
) -> "Figure | None":
    """A figure with as many panels side by side as `style` allows; None if there are no panels.

    A panel is its title, a function that fills its axes, and its further arguments. `row` scales
    the height of panels. Layers, if more than one, are explained by a colour bar.
    """
    if not panels:
        return None
    rows = math.ceil(len(panels) / style.columns)
    columns = math.ceil(len(panels) / rows)
    height = rows * row * style.row + (0.3 if style.explains else 0.0)
    with new_figure(style, height, title) as figure:
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, (heading, draw, *data) in zip(grid, panels, strict=False):
            axes.set_title(heading)
            draw(axes, *data)
        for unused in grid[len(panels) :]:
            unused.set_axis_off()
        if num_layers > 1 and style.explains:
            from matplotlib.cm import ScalarMappable
            from matplotlib.colors import ListedColormap, Normalize

            colours = ScalarMappable(Normalize(1, num_layers), ListedColormap(layer_colours()))
            place = {"ax": grid[: len(panels)], "pad": 0.015, "aspect": 50}
            bar = figure.colorbar(colours, label="layer", **place)
            bar.outline.set_visible(False)
            bar.ax.yaxis.get_major_locator().set_params(integer=True)
    return figure


def layer_colours(dark: bool = False) -> list[str]:
    """Viridis from the lowest layer to the last, where the background does not hide it."""
    import matplotlib
    from matplotlib.colors import to_hex

    places = np.linspace(0.25, 1.0, LAYER_STEPS) if dark else np.linspace(0.85, 0.0, LAYER_STEPS)
    return [to_hex(matplotlib.colormaps["viridis"](place)) for place in places]


def layer_colour(layer: int, num_layers: int) -> str:
    height = (layer - 1) / (num_layers - 1) if num_layers > 1 else 1.0
    return layer_colours()[round(height * (LAYER_STEPS - 1))]


def engineering() -> Any:
    """Tick labels such as 20k."""
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")


def check_suffix(path: Path) -> None:
    """Raise UserError unless matplotlib can write files with this suffix."""
    from matplotlib.figure import Figure

    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise UserError(f"picture {path}: its suffix must be one of .{', .'.join(sorted(formats))}")


def save(figure: "Figure", path: Path) -> Path:
    """Write a figure, making its folder. Raises UserError as `check_suffix`, and OSError."""
    check_suffix(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=160, format=path.suffix[1:])
    return path
