"""write_report: the page of one or several runs."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from charlm.config import Config, UserError
from charlm.config.load import to_yaml
from charlm.files import write_whole
from charlm.report import figures
from charlm.report.metrics import Metrics, read_runs
from charlm.report.page import tables
from charlm.report.page.passage import LEVELS, visible
from charlm.report.page.probe import LIKELIEST, TEMPERATURE, Probe
from charlm.report.page.svg import Picture, palette, picture
from charlm.report.style import DASHES, LAYER_STEPS, SERIES
from charlm.report.weights import weights

FIGURES_OF_A_RUN = (
    (
        "terms",
        figures.terms,
        "Loss of every term",
        "Bits per character, while a term weighs something. The first steps' fall is cut off.",
    ),
    ("weights", lambda run, style: weights(run.config, style), "Weights of the terms", "Empty where silent."),
    ("hedge", figures.hedge, "Weights learned by hedge", "They multiply the weights above."),
    ("diagnostics", figures.diagnostics, "Diagnostics", "On the validation split; see docs/diagnostics.md."),
)
"""Name, figure, heading and caption."""


def write_report(folders: Sequence[Path | str], path: Path | str, probes: Sequence[Probe | None] | None = None) -> Path:
    """Write the page of some runs, making its folder, and return `path`.

    Args:
        folders: the runs, finished or going on, in the order in which the page lists and colours them.
        probes: what `measure` found about each; None leaves that out.

    Raises:
        UserError: a folder is no run, a file of one is damaged, or the page cannot be written.
    """
    path = Path(path)
    runs = read_runs(folders)
    page = render(runs, list(probes) if probes is not None else [None] * len(runs))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, page)
    except OSError as error:
        raise UserError(f"report {path} cannot be written: {error.strerror or error}") from error
    return path


def render(runs: Sequence[Metrics], probes: Sequence[Probe | None]) -> str:
    """The page's HTML."""
    heads, rows = tables.results(runs, probes)
    configs = [run.config for run in runs]
    return (
        _environment()
        .get_template("page.html")
        .render(
            title=" · ".join(run.name for run in runs),
            heads=heads,
            runs=[_section(place, *parts) for place, parts in enumerate(zip(runs, probes, rows, strict=True))],
            **_figures(runs, probes),
            missing=_missing(runs, probes),
            validations=tables.validations(runs, probes),
            mismatch=tables.mismatch(runs),
            one_vocabulary=len({tables.vocabulary(run) for run in runs}) == 1,
            differences=tables.differences(configs if len(runs) > 1 else [Config(), *configs]),
            light=palette(dark=False),
            dark=palette(dark=True),
            layer_steps=LAYER_STEPS,
            levels=LEVELS,
            likeliest=LIKELIEST,
            temperature=TEMPERATURE,
        )
    )


def _figures(runs: Sequence[Metrics], probes: Sequence[Probe | None]) -> dict[str, Picture | None]:
    """The figures of all runs together."""
    scored = {place: probe for place, probe in enumerate(probes) if probe is not None and probe.score is not None}
    layers = {
        place: (np.array(list(map(int, probe.score.layers))), np.array(list(probe.score.layers.values())))
        for place, probe in scored.items()
    }
    positions = {place: probe.by_position for place, probe in scored.items() if probe.by_position is not None}
    drawn = {
        "learning": (figures.learning, runs, "Bits per character against characters seen, and against time"),
        "tasks": (figures.tasks, runs, "The losses of the highest layer over training, a line for each run"),
        "speed": (figures.speed, runs, "Characters per second over training"),
        "layers": (figures.by_layer, layers, "Bits per character by layer"),
        "positions": (figures.by_position, positions, "Bits per character by position in the context"),
    }
    return {name: picture(name, label, partial(draw, data)) for name, (draw, data, label) in drawn.items()}


def _section(place: int, run: Metrics, probe: Probe | None, row: list[str]) -> dict[str, Any]:
    """The page's parts about one run."""
    drawn = [
        (heading, note, picture(name, f"{heading}, over training", partial(draw, run), run.name))
        for name, draw, heading, note in FIGURES_OF_A_RUN
    ]
    return {
        "name": run.name,
        "series": place % len(SERIES),
        "dashes": place % len(DASHES),
        "headline": tables.headline(run),
        "row": row,
        "num_layers": run.config.model.num_layers,
        "figures": [parts for parts in drawn if parts[2] is not None],
        "probe": probe,
        "passage": _passage_data(probe) if probe else "",
        "validation": tables.validation_protocol(run),
        "by_page": tables.page_protocol(probe.score) if probe and probe.score else {},
        "origin": tables.origin(run),
        "config": to_yaml(run.config),
    }


def _missing(runs: Sequence[Metrics], probes: Sequence[Probe | None]) -> dict[str, list[tuple[str, str]]]:
    """The reasons why parts of the page are left out: {part: [(name of the run, reason)]}."""
    found: dict[str, list[tuple[str, str]]] = {"score": [], "passage": [], "samples": []}
    for run, probe in zip(runs, probes, strict=True):
        for part, reasons in found.items():
            if probe is None:
                again = f"python scripts/report.py {run.folder.path}"
                reasons.append((run.name, f"not measured when this page was made; {again} measures it"))
            elif part in probe.missing:
                reasons.append((run.name, probe.missing[part]))
    return found


def _passage_data(probe: Probe) -> Markup:
    """The likeliest characters of each piece for the page's script: JSON that no text can break out of."""
    data = [
        [round(piece.bits, 3), piece.num_symbols, [[text, round(p, 4)] for text, p in piece.likeliest]]
        for piece in probe.passage
    ]
    text = json.dumps(data, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["drawn"] = Markup
    environment.filters["shown"] = shown
    return environment


def shown(text: str) -> str:
    """Text of several lines without control characters but the ends of lines."""
    return "\n".join(visible(line.encode(errors="surrogateescape")) for line in text.split("\n"))
