# PYTHON_ARGCOMPLETE_OK
"""Show what a configuration means, before anything is trained.

python scripts/explain.py --config configs/enwik8_t12.yaml --aux.layers.enabled=false
python scripts/explain.py --config configs/text8_t64.yaml --json --picture weights.png
"""

import json
import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout works without being installed

from charlm import cli
from charlm.files import OutputPath
from charlm.text import say


class Options(cli.WithConfig):
    """Show the table of terms, the parameters and the FLOPs of a configuration."""

    as_json: Annotated[bool, cli.Flag("--json", dest="as_json")] = False
    """Print one JSON document."""
    picture: OutputPath | None = None
    """Also draw the weights over training into this file (.png, .svg, .pdf)."""


def main() -> None:
    options = cli.parse(Options)
    from charlm.data.sources import check_outside
    from charlm.report.explain import explain
    from charlm.report.figures import weights
    from charlm.report.style import PICTURE, save
    from charlm.training.origin import resolved

    config = resolved(options.config, continues=False)
    explanation = explain(config)
    if options.picture is not None:
        check_outside(config.data, "picture", options.picture)
        save(weights(config, PICTURE), options.picture)
    if options.as_json:
        say(json.dumps(explanation.to_dict(), indent=2))
    else:
        sys.stdout.reconfigure(errors="replace")  # bars keep their width
        say(explanation.to_text())


if __name__ == "__main__":
    cli.script(main)
