"""Figures as SVG inside a page: text in the page's font, and colours that its style sheet sets for light and dark."""

import re
from collections.abc import Callable
from io import BytesIO
from typing import TYPE_CHECKING, NamedTuple
from xml.etree import ElementTree

from charlm.report.style import GREY, GRID, INK, PHONE, SERIES, WINDOW, Style, layer_colours

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SERIES_DARK = ("#4aa8e0", "#ff8a3d", "#2fc79a", "#e59ac6", "#e6c14b", "#9ad4f5", "#b894d6", "#c9a96b")


class Picture(NamedTuple):
    """A figure of the page: its id, and SVGs for a window and for a phone."""

    name: str
    wide: str
    narrow: str


def picture(name: str, label: str, draw: Callable[[Style], "Figure | None"], run: str = "") -> Picture | None:
    """Draw a figure for a window and for a phone; None if there is nothing to draw.

    Args:
        label: what the figure shows, for readers who do not see it.
        run: the run that the figure is of. Ids inside the SVG are made from `name` and `run`, as they must differ.
    """
    import matplotlib

    drawn = []
    for style in (WINDOW, PHONE):
        with matplotlib.rc_context({"svg.hashsalt": f"{name}-{style.width}-{run}", "svg.fonttype": "none"}):
            figure = draw(style)
            if figure is None:
                return None
            drawn.append(inline(figure, label))
    return Picture(name, *drawn)


def inline(figure: "Figure", label: str) -> str:
    """A figure as an element of HTML: no addresses, only the ids that it refers to, colours as variables."""
    file = BytesIO()
    figure.savefig(file, format="svg", transparent=True)
    root, variables = ElementTree.fromstring(file.getvalue()), _variables()
    used = set(re.findall(rb"#([\w-]+)[\")]", file.getvalue()))
    for element in list(root.iter()):
        for child in [child for child in element if child.tag.endswith(("}metadata", "}style"))]:
            element.remove(child)
        element.tag = element.tag.partition("}")[2]
        for key, value in list(element.items()):
            del element.attrib[key]
            if key in ("style", "fill", "stroke"):
                value = re.sub(r"#[0-9a-f]{6}\b", lambda match: variables.get(match[0], match[0]), value)
            elif key in ("d", "transform", "x", "y"):
                value = re.sub(r"(\d\.\d\d)\d+", r"\1", value)  # a hundredth of a pixel will do
            if key != "id" or value.encode() in used:
                element.set(key.rpartition("}")[2], value)
    root.attrib = {"role": "img", "aria-label": label, "viewBox": root.get("viewBox")}
    return ElementTree.tostring(root, encoding="unicode")


def _variables() -> dict[str, str]:
    """For each colour that figures are drawn with, the variable that takes its place."""
    names = palette(dark=False) | {"--ink": INK, "--muted": GREY, "--grid": GRID}
    return {colour: f"var({name})" for name, colour in names.items()}


def palette(dark: bool) -> dict[str, str]:
    """The values of the variables for runs and layers, on a light page or a dark one."""
    series = {f"--series-{place}": colour for place, colour in enumerate(SERIES_DARK if dark else SERIES)}
    return series | {f"--layer-{place}": colour for place, colour in enumerate(layer_colours(dark))}
