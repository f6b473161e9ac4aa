"""The page of the lens: one file with its style, its script, and what it shows as JSON."""

from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from charlm.report.page import render as report
from charlm.text import visible

HERE = Path(__file__).parent


def render(facts: dict[str, Any], reading: dict[str, Any] | None = None) -> str:
    """The page's HTML for the models in `facts`; with a `reading`, also without a server.

    Texts and names are JSON that cannot end its script. Only the page's own script runs.
    """
    environment = Environment(
        loader=FileSystemLoader([HERE, Path(report.__file__).parents[1]]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    colours = {"light": report.palette(dark=False), "dark": report.palette(dark=True)}
    style = environment.get_template("page.css").render(**colours, levels=report.LEVELS)
    script = (HERE / "page.js").read_text(encoding="utf-8")
    own = [f"'sha256-{b64encode(sha256(x.encode()).digest()).decode()}'" for x in (style, script)]
    policy = f"default-src 'none'; style-src {own[0]}; script-src {own[1]}; img-src data:; "
    policy += "base-uri 'none'; form-action 'none'; "
    policy += "connect-src 'self'" if facts["live"] else "connect-src 'none'"
    title = visible(" and ".join(run["name"] for run in facts["runs"]))
    shown = {"title": title, "policy": policy, "style": style, "script": script}
    return environment.get_template("page.html").render(facts=facts, reading=reading, **shown)
