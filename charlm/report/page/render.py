"""write_report: the page of one or several runs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from charlm.config import Config, UserError
from charlm.config_files import to_yaml
from charlm.files import write_whole
from charlm.report.page import figures, tables
from charlm.report.page.metrics import Recorded, read_runs
from charlm.report.page.passage import LEVELS
from charlm.report.page.probe import LIKELIEST, TEMPERATURE, Measured
from charlm.report.page.svg import LAYER_STEPS, SERIES, palette

MEASURE = "python scripts/report.py {}"


def write_report(
    folders: Sequence[Path | str], path: Path | str, measured: Sequence[Measured | None] | None = None
) -> Path:
    """Write the page of some runs, making its folder, and return `path`.

    Args:
        folders: of the runs, finished or going on, in the order in which they are listed and coloured.
        measured: what `measure` made of each; None for what is not to be shown.

    Raises:
        UserError: a folder is no run, a file of one is damaged, or the page cannot be written.
    """
    path = Path(path)
    runs = read_runs(folders)
    page = render(runs, list(measured) if measured is not None else [None] * len(runs))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, page)
    except OSError as error:
        raise UserError(f"report {path} cannot be written: {error.strerror or error}") from error
    return path


def render(runs: Sequence[Recorded], measured: Sequence[Measured | None]) -> str:
    """The page's HTML."""
    heads, rows = tables.results(runs, measured)
    configs = [run.config for run in runs]
    return (
        _environment()
        .get_template("page.html")
        .render(
            title=" · ".join(run.name for run in runs),
            heads=heads,
            runs=[
                _section(place, run, own, row)
                for place, (run, own, row) in enumerate(zip(runs, measured, rows, strict=True))
            ],
            learning=figures.learning(runs),
            tasks=figures.tasks(runs),
            speed=figures.speed(runs),
            by_layer=figures.by_layer(measured),
            by_position=figures.by_position(measured),
            missing=_missing(runs, measured),
            validations=tables.validations(runs, measured),
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


def _section(place: int, run: Recorded, measured: Measured | None, row: list[str]) -> dict[str, Any]:
    """What the page says of one run."""
    return {
        "name": run.name,
        "series": place % len(SERIES),
        "dashes": place % 4,
        "headline": tables.headline(run),
        "row": row,
        "num_layers": run.config.model.num_layers,
        "figures": [
            (title, note, picture)
            for title, note, picture in (
                (
                    "Loss of every term",
                    "Bits per character, while a term weighs something. The first steps' fall is cut off.",
                    figures.terms(run),
                ),
                ("Weights of the terms", "Empty where a term is silent.", figures.weights(run)),
                ("Weights learned by hedge", "They multiply those above.", figures.hedge(run)),
                ("Diagnostics", "Of the validation split; see docs/diagnostics.md.", figures.diagnostics(run)),
            )
            if picture is not None
        ],
        "measured": measured,
        "passage": _passage_data(measured) if measured else "",
        "validation": tables.validation_protocol(run),
        "by_page": tables.page_protocol(measured.score) if measured and measured.score else [],
        "origin": tables.origin(run),
        "config": to_yaml(run.config),
    }


def _missing(runs: Sequence[Recorded], measured: Sequence[Measured | None]) -> dict[str, list[tuple[str, str]]]:
    """Why parts of the page are not there: {part: [(name of the run, reason)]}."""
    found: dict[str, list[tuple[str, str]]] = {"score": [], "passage": [], "samples": []}
    for run, own in zip(runs, measured, strict=True):
        for part, reasons in found.items():
            if own is None:
                reasons.append((run.name, f"not measured when this page was made; {MEASURE.format(run.run.path)} does"))
            elif part in own.missing:
                reasons.append((run.name, own.missing[part]))
    return found


def _passage_data(measured: Measured) -> Markup:
    """The likeliest characters of each piece, for the page's script: JSON that no text can break out of."""
    data = [
        [round(piece.bits, 3), piece.num_symbols, [[text, round(p, 4)] for text, p in piece.likeliest]]
        for piece in measured.passage
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
    """Text of several lines in which no control character is left but the ends of lines."""
    from charlm.report.page.passage import visible

    return "\n".join(visible(line.encode(errors="surrogateescape")) for line in text.split("\n"))
