# PYTHON_ARGCOMPLETE_OK
"""The command `charlm`, also `python -m charlm`: a script by its name, from any folder."""

import os
import runpy
import sys
from importlib import import_module
from typing import Annotated, Literal, get_args

from charlm import __version__, cli
from charlm.config import Section
from charlm.text import SHIPPED

Command = Literal[
    "prepare", "explain", "train", "report", "ablate", "evaluate", "lens", "generate", "compress", "decompress",
    "export", "import", "env",
]  # fmt: skip


class Options(Section):
    """Run a command; charlm COMMAND --help shows its options. Each is the script of its name in scripts/; lm-eval is
    the command line of the lm-evaluation-harness."""

    command: Annotated[Command, cli.Flag("command", metavar="COMMAND")]
    """env shows versions and devices, for a report of a bug."""
    version: Annotated[bool, cli.Flag("--version", action="version", version=f"charlm {__version__}")] = False
    """Print the version."""


def main() -> None:
    """Run the command of the command line, and exit."""
    cli.script(_run)


def _run() -> None:
    sys.argv[0] = "charlm"
    if sys.argv[1:2] == ["lm-eval"]:  # reads no entry points of packages
        import_module("charlm.formats.lm_eval")
        del sys.argv[1]
        runpy.run_module("lm_eval", run_name="__main__")
        return
    words, place = sys.argv, int(os.environ.get("_ARGCOMPLETE", "0"))
    if place:  # a shell asks how its line may go on
        words = os.environ["COMP_LINE"].split(" ")[place - 1 :]
    if place and len(words) > 2 and words[1] in get_args(Command):
        os.environ["_ARGCOMPLETE"] = str(place + 1)
        command = words[1]
    else:
        command = cli.parse(Options, words[1:2]).command
    sys.argv = [f"charlm {command}", *words[2:]]
    runpy.run_path(str(SHIPPED / "scripts" / f"{command}.py"))["main"]()


if __name__ == "__main__":
    main()
