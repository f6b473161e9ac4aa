"""The page of the lens: one file with its style, its script, and what it shows as JSON."""

from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import Any

from charlm.report.page import render as report
from charlm.text import visible

HERE = Path(__file__).parent


def render(facts: dict[str, Any], reading: dict[str, Any] | None = None) -> str:
    """The page's HTML for the models in `facts`; with a `reading`, also without a server.

    Texts and names are JSON that cannot end its script. Only the page's own script runs.
    """
    templates = report.templates(HERE, Path(report.__file__).parents[1])
    templates.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    colours = {"light": report.palette(dark=False), "dark": report.palette(dark=True)}
    style = templates.get_template("page.css").render(**colours, levels=report.LEVELS)
    script = (HERE / "page.js").read_text(encoding="utf-8")
    hashes = [f"'sha256-{b64encode(sha256(own.encode()).digest()).decode()}'" for own in (style, script)]
    shown = {"title": visible(" and ".join(run["name"] for run in facts["runs"])), "style": style, "script": script}
    return templates.get_template("page.html").render(facts=facts, reading=reading, hashes=hashes, **shown)
