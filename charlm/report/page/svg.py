"""Figures as SVG inside a page: its font, and colours that its style sheet sets, for a light page and a dark one."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from io import StringIO
from typing import TYPE_CHECKING

import numpy as np

from charlm.report.figures import GREY, STYLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDE, NARROW = 1080, 358
"""CSS pixels of the two drawings that each figure has: beside a window's margins, and beside those of a phone."""
INK, MUTED, GRID, MAP = "#1a1a1b", "#5a5a5b", "#ddddde", "#2389d0"
"""Stand for colours of the page, as all colours do that are drawn with: no two alike."""
LAYER_STEPS = 16
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#7a5195", "#8c6d31")
"""Okabe and Ito's, the yellow of which is darkened, as it could not be seen on white; one for each run of a page."""
SERIES_DARK = ("#4aa8e0", "#ff8a3d", "#2fc79a", "#e59ac6", "#e6c14b", "#9ad4f5", "#b894d6", "#c9a96b")
DASHES = ("solid", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 1.5, 1.5, 1.5)))
"""What tells runs apart where colours do not."""
RC = STYLE | {
    "font.size": 12,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.labelsize": 12,
    "grid.color": GRID,
    "text.color": INK,
    "text.parse_math": False,  # or names of runs and terms with a dollar would be read as formulas
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "svg.fonttype": "none",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@dataclass(frozen=True)
class Picture:
    """A figure of the page."""

    name: str
    """Its id in the page."""
    label: str
    """What it shows, for those who do not see it."""
    wide: str
    """SVG for a window."""
    narrow: str
    """SVG for a phone."""


def picture(name: str, label: str, draw: Callable[[bool], "Figure"], run: str = "") -> Picture:
    """Draw a figure twice: `draw(True)` is `WIDE` CSS pixels wide, `draw(False)` as wide as a phone.

    `run`: the one that it is of, as ids must differ in a page.
    """
    import matplotlib

    drawn = []
    for wide in (True, False):
        with matplotlib.rc_context(RC | {"svg.hashsalt": f"{name}-{wide}-{run}"}):
            drawn.append(inline(draw(wide), label))
    return Picture(name, label, *drawn)


def figure_of(wide: bool, height: float) -> "Figure":
    """An empty figure of `height` CSS pixels, which are the points of an SVG that is shown at its own size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=((WIDE if wide else NARROW) / 72, height / 72), layout="constrained")
    figure.get_layout_engine().set(h_pad=8 / 72)  # a panel's title is not to be taken for the label of the one above
    return figure


def inline(figure: "Figure", label: str) -> str:
    """A figure as an element of HTML: no addresses, no ids but those it refers to, colours as variables of the page."""
    out = StringIO()
    figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = out.getvalue()
    text = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->|\s+xmlns(:\w+)?=\"[^\"]*\"", "", text, flags=re.S
    )
    used = set(re.findall(r"#([\w-]+)[\")]", text))
    text = re.sub(r'\s+id="([^"]*)"', lambda match: match[0] if match[1] in used else "", text)
    for colour, variable in variables().items():
        text = re.sub(re.escape(colour) + r"\b", f"var({variable})", text, flags=re.I)
    text = re.sub(r"(\d+\.\d{2})\d+", r"\1", text)  # a hundredth of a pixel will do
    width, height = (float(part) for part in re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups())
    head = f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width:g} {height:g}">'
    return head + re.sub(r".*?<svg[^>]*>", "", text, count=1, flags=re.S).strip()


def variables() -> dict[str, str]:
    """The colours that are drawn with, and the variables of the page that take their places."""
    names = {INK: "--ink", MUTED: "--muted", GREY: "--muted", GRID: "--grid"}
    names |= {colour: f"--series-{place}" for place, colour in enumerate(SERIES)}
    return names | {colour: f"--layer-{place}" for place, colour in enumerate(layer_colours(dark=False))}


def palette(dark: bool) -> dict[str, str]:
    """What those variables are that depend on the number of runs or layers: on a light page, or a dark one."""
    series = {f"--series-{place}": colour for place, colour in enumerate(SERIES_DARK if dark else SERIES)}
    return series | {f"--layer-{place}": colour for place, colour in enumerate(layer_colours(dark))}


def layer_colours(dark: bool) -> list[str]:
    """Viridis, from the lowest layer to the last, without the end that the page's background would swallow."""
    import matplotlib
    from matplotlib.colors import to_hex

    places = np.linspace(0.25, 1.0, LAYER_STEPS) if dark else np.linspace(0.85, 0.0, LAYER_STEPS)
    return [to_hex(matplotlib.colormaps["viridis"](place)) for place in places]


def layer_colour(layer: int, num_layers: int) -> str:
    """What a layer is drawn with."""
    place = round((layer - 1) / max(1, num_layers - 1) * (LAYER_STEPS - 1)) if num_layers > 1 else LAYER_STEPS - 1
    return layer_colours(dark=False)[place]
