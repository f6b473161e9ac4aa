"""A picture of what early exit costs: bits per character against layers used."""

from pathlib import Path
from typing import TYPE_CHECKING

from charlm.inference.early_exit import EarlyExit
from charlm.report.figures import GREY, STYLE, TRAIN, VALID, WIDTH, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_early_exit(curve: EarlyExit, path: Path | str) -> Path:
    """Draw the curve beside each layer's own score, and return the picture's path.

    Raises:
        UserError: a suffix that matplotlib does not write, or a place where nothing can be written.
    """
    return save(early_exit_figure(curve), Path(path))


def early_exit_figure(curve: EarlyExit) -> "Figure":
    """The figure of `draw_early_exit`, unsaved."""
    import matplotlib
    from matplotlib.figure import Figure

    layers = {int(layer): bits for layer, bits in curve.score.layers.items()}
    points = sorted((point.mean_layers, point.bits_per_character) for point in curve.points)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
        axes = figure.subplots()
        axes.plot(*zip(*points, strict=True), color=TRAIN, marker="o", markersize=3.5, label="early exit")
        axes.plot(
            layers.keys(), layers.values(), color=VALID, linestyle="none", marker="s", markersize=5, label="one layer"
        )
        axes.axhline(curve.score.bits_per_character, color=GREY, linewidth=0.8, linestyle=":")
        axes.set_xlabel("layers used on average")
        axes.set_ylabel("bits per character")
        axes.grid(axis="y")
        axes.legend(loc="upper right")
        figure.suptitle(
            f"Early exit: {curve.score.split} split of {curve.score.corpus}, {curve.score.checkpoint}",
            fontweight="bold",
        )
    return figure
