"""The page of runs. Its style sheet sets the font and the colours of its figures."""

import re
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from charlm.config import Config
from charlm.config.load import to_yaml
from charlm.files import write_whole
from charlm.report import figures
from charlm.report.metrics import Metrics, read_runs
from charlm.report.page import tables
from charlm.report.page.probe import LIKELIEST, TEMPERATURE, Probe
from charlm.report.style import DASHES, GREY, GRID, INK, LAYER_STEPS, PHONE, SERIES, WINDOW, Style, layer_colours
from charlm.text import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SERIES_DARK = ("#4aa8e0", "#ff8a3d", "#2fc79a", "#e59ac6", "#e6c14b", "#9ad4f5", "#b894d6", "#c9a96b")
LEVELS = 9  # shades of the passage; the last stands for 8 bits and more
FIGURES_OF_A_RUN = {
    "terms": ("Loss of every term", figures.terms),
    "weights": ("Weights of the terms", lambda run, style: figures.weights(run.config, style)),
    "hedge": ("Weights learned by hedge", figures.hedge),
    "diagnostics": ("Diagnostics", figures.diagnostics),
}


def write_report(folders: Sequence[Path | str], path: Path | str, probes: Sequence[Probe | None] | None = None) -> Path:
    """Write the page of some runs, making its folder, and return `path`.

    `probes` are what `measure` found about each. Raises UserError if a folder is not a run, or a
    file is damaged; OSError if the page cannot be written.
    """
    path = Path(path)
    runs = read_runs(folders)
    page = render(runs, probes or [None] * len(runs))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page)
    return path


def render(runs: Sequence[Metrics], probes: Sequence[Probe | None]) -> str:
    """The page's HTML."""
    again = "not measured when this page was made; python scripts/report.py {} measures it"
    paths = [shlex.quote(str(run.folder.path)) for run in runs]
    missing = [Probe.without(again.format(path)) for path in paths]
    probes = [probe or other for probe, other in zip(probes, missing, strict=True)]
    configs = [run.config for run in runs]
    measured = [(place, probe) for place, probe in enumerate(probes) if probe.by_position]
    bits = [(place, probe.score.layers) for place, probe in measured]
    layers = {place: (list(map(int, own)), list(own.values())) for place, own in bits}
    positions = {place: probe.by_position for place, probe in measured}
    context = "symbols of context"
    drawn = [
        ("learning", "Bits per character over characters and over time", figures.learning, runs),
        ("tasks", "The losses of each run's highest layer over training", figures.tasks, runs),
        ("speed", "Characters per second over training", figures.speed, runs),
        ("layers", "Bits per character by layer", figures.bits_against, layers, "layer"),
        ("positions", "Bits per character by context", figures.bits_against, positions, context),
    ]
    return (
        templates(Path(__file__).parent)
        .get_template("page.html")
        .render(
            title=" · ".join(run.name for run in runs),
            runs=list(map(_section, range(len(runs)), runs, probes, tables.results(runs, probes))),
            **{name: picture(name, label, partial(draw, *data)) for name, label, draw, *data in drawn},
            mismatch=tables.mismatch(runs),
            one_vocabulary=len(set(map(tables.vocabulary, runs))) == 1,
            differences=tables.differences(configs if len(runs) > 1 else [Config(), *configs]),
            light=palette(dark=False),
            dark=palette(dark=True),
            layer_steps=LAYER_STEPS,
            levels=LEVELS,
            likeliest=LIKELIEST,
            temperature=TEMPERATURE,
        )
    )


def templates(*folders: Path) -> Environment:
    """The templates of a page, in which no text becomes markup."""
    environment = Environment(
        loader=FileSystemLoader(folders),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = partial(visible, kept="\n")
    return environment


def picture(name: str, label: str, draw: Callable[[Style], Any]) -> dict[str, str] | None:
    """The name of a figure and its SVGs; None if there is nothing to draw.

    `label` says what the figure shows. Ids are made from it.
    """
    import matplotlib

    drawn = {"name": name}
    for width, style in (("wide", WINDOW), ("narrow", PHONE)):
        unique = {"svg.hashsalt": f"{label}-{style.width}", "svg.fonttype": "none"}
        with matplotlib.rc_context(unique):
            if (figure := draw(style)) is None:
                return None
            drawn[width] = inline(figure, label)
    return drawn


def inline(figure: "Figure", label: str) -> str:
    """A figure as HTML without addresses and unused ids, with colours as variables."""
    names = palette(dark=False) | {"--ink": INK, "--muted": GREY, "--grid": GRID}
    variables = {colour: f"var({name})" for name, colour in names.items()}
    file = BytesIO()
    figure.savefig(file, format="svg", transparent=True)
    root = ElementTree.fromstring(file.getvalue())
    used = set(re.findall(rb"#([\w-]+)[\")]", file.getvalue()))
    for element in list(root.iter()):
        for child in list(element):
            if child.tag.endswith(("}metadata", "}style")):
                element.remove(child)
        element.tag = element.tag.partition("}")[2]
        for key, value in list(element.items()):
            del element.attrib[key]
            if key in ("style", "fill", "stroke"):
                value = re.sub(r"#[0-9a-f]{6}\b", lambda m: variables.get(m[0], m[0]), value)
            elif key in ("d", "transform", "x", "y"):
                value = re.sub(r"(\d\.\d\d)\d+", r"\1", value)  # a hundredth of a pixel will do
            if key != "id" or value.encode() in used:
                element.set(key.rpartition("}")[2], value)
    root.attrib = {"role": "img", "aria-label": label, "viewBox": root.get("viewBox")}
    return ElementTree.tostring(root, encoding="unicode")


def palette(dark: bool) -> dict[str, str]:
    """The values of the page's variables for the colours of runs and layers."""
    kinds = {"series": SERIES_DARK if dark else SERIES, "layer": layer_colours(dark)}
    return {f"--{kind}-{n}": colour for kind in kinds for n, colour in enumerate(kinds[kind])}


def _section(place: int, run: Metrics, probe: Probe, row: dict[str, str]) -> dict[str, Any]:
    drawn = []
    for name, (heading, draw) in FIGURES_OF_A_RUN.items():
        label = f"{heading} of {visible(run.name)}, over training"
        drawn.append((heading, picture(name, label, partial(draw, run))))
    return {
        "name": run.name,
        "series": place % len(SERIES),
        "dashes": place % len(DASHES),
        "metrics": run,
        "validated": tables.validated(run),
        "row": row,
        "figures": [(heading, own) for heading, own in drawn if own],
        "probe": probe,
        "protocols": tables.protocols(run, probe),
        "config": to_yaml(run.config),
    }
