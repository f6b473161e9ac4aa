"""The picture of a run's diagnostics: what its heads know, and what the losses ask of each layer."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from charlm.config import Config, UserError
from charlm.report.figures import GREY, STYLE, TRAIN, VALID, WIDTH, engineering, save
from charlm.runs.folder import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

# More of Okabe and Ito's palette, for the offsets.
OFFSETS = [TRAIN, VALID, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", GREY, "#000000"]

PANELS = [
    ("bits_per_character", "bits per character, next character", "linear"),
    ("supervision_ratio", "supervision ratio, all outputs", "log"),
    ("main_supervision_ratio", "supervision ratio, last layer's output", "log"),
    ("gradient_cosine", "cosine, auxiliary and main gradient", "linear"),
    ("gradient_norm", "gradient norm", "log"),
]
"""What a run's diagnostics have, the titles of their panels, and the scales of those."""

Record = tuple[int, dict[str, Any]]
"""A step and its diagnostics, as `charlm.training.diagnose.diagnose` describes them."""


def read_diagnostics(run: Run) -> list[Record]:
    """The diagnostics in metrics.jsonl, in their order.

    Raises:
        UserError: there are none.
    """
    records = [(row["step"], row["diagnostics"]) for row in run.metrics() if "diagnostics" in row]
    if not records:
        raise UserError(f"{run.metrics_path} holds no diagnostics; train with --train.diagnose_every=0.05")
    return records


def draw_diagnostics(run_dir: Path | str, path: Path | str | None = None) -> Path:
    """Draw a run's diagnostics over its optimizer steps, a line for each layer (`docs/diagnostics.md` explains them).

    Args:
        run_dir: the run's folder.
        path: where the picture goes, in the format that its suffix names; by default RUN/diagnostics.png.

    Returns:
        The picture's path.

    Raises:
        UserError: no run, no diagnostics, or a suffix that matplotlib does not write.
    """
    run = Run.open(run_dir)
    figure = diagnostics_figure(run.path.resolve().name, run.config(), read_diagnostics(run))
    return save(figure, Path(path) if path is not None else run.path / "diagnostics.png")


def diagnostics_figure(name: str, config: Config, records: Sequence[Record]) -> "Figure":
    """The figure of `draw_diagnostics`, unsaved. What the diagnostics lack has no panel."""
    import matplotlib
    from matplotlib.figure import Figure

    num_layers = config.model.num_layers
    panels = [panel for panel in PANELS if any(record.get(panel[0]) for _, record in records)]
    num_rows = math.ceil((len(panels) + 1) / 2)
    style = {"axes.spines.top": False, "axes.titlesize": 9, "axes.titlelocation": "left"}
    with matplotlib.rc_context(STYLE | style):
        figure = Figure(figsize=(WIDTH, 0.9 + 2.3 * num_rows), layout="constrained")
        grid = figure.subplots(num_rows, 2, squeeze=False)
        colours = _colours(num_layers)
        axes = list(grid.flat)
        profile = axes.pop(1)
        for (kind, title, scale), own in zip(panels, axes, strict=False):
            suffix = "/offset1" if kind == "bits_per_character" else ""
            lines = {
                layer: [record.get(kind, {}).get(f"layer{layer}{suffix}", math.nan) for _, record in records]
                for layer in range(1, num_layers + 1)
            }
            _draw_lines(lines, [step for step, _ in records], own, colours, config.train.steps)
            own.set_title(title)
            if scale == "log":
                use_log_scale(own)
        for unused in axes[len(panels) :]:
            unused.set_axis_off()
        _draw_profile(*records[-1], profile, num_layers)
        if num_layers > 1:
            bar = figure.colorbar(colours, ax=grid, pad=0.015, aspect=50, label="layer")
            bar.outline.set_visible(False)
            bar.ax.yaxis.get_major_locator().set_params(integer=True)
        figure.suptitle(f"{name}: diagnostics of the validation split", fontweight="bold")
    return figure


def _draw_lines(
    lines: dict[int, list[float]], steps: Sequence[int], axes: "Axes", colours: "ScalarMappable", total_steps: int
) -> None:
    last, few = max(lines), len(steps) < 30 and len(lines) <= 12
    for layer, values in lines.items():
        axes.plot(
            steps, values, color=colours.to_rgba(layer), linewidth=1.8 if layer == last else 1.0, marker="o",
            markersize=2.5 if few else 0, label=f"layer {layer}",
        )  # fmt: skip
    axes.set_xlim(0, total_steps)
    axes.xaxis.set_major_formatter(engineering())
    axes.set_xlabel("optimizer steps")
    axes.grid(axis="y")


def use_log_scale(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _colours(num_layers: int) -> "ScalarMappable":
    """From a yellow that can be seen on white, for the lowest layer, to the darkest, for the last."""
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    colours = ListedColormap(matplotlib.colormaps["viridis_r"](np.linspace(0.1, 1.0, 256)))
    return ScalarMappable(Normalize(min(1, num_layers - 1), num_layers), colours)


def _draw_profile(step: int, record: dict[str, Any], axes: "Axes", num_layers: int) -> None:
    """Bits per character by layer, a line for each offset."""
    by_offset: dict[int, dict[int, float]] = {}
    for name, bits in record["bits_per_character"].items():
        layer, offset = map(int, re.findall(r"\d+", name))
        by_offset.setdefault(offset, {})[layer] = bits
    for place, (offset, bits) in enumerate(sorted(by_offset.items())):
        axes.plot(
            list(bits), list(bits.values()), color=OFFSETS[place % len(OFFSETS)], marker="o", markersize=3,
            linewidth=1.2, label="next character" if offset == 1 else f"{offset} ahead",
        )  # fmt: skip
    if len(by_offset) <= len(OFFSETS):
        axes.legend()
    axes.set_title(f"bits per character after {step:,} steps")
    axes.set_xlabel("layer")
    axes.set_xlim(0.5, num_layers + 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y")
