# PYTHON_ARGCOMPLETE_OK
"""Open a page that shows what each layer of a run expects: python scripts/lens.py RUN"""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout works without being installed

from charlm import cli  # first: it answers Ctrl-C

# isort: split
from pydantic import Field

import charlm
from charlm.config import Section
from charlm.files import OutputPath, write_whole
from charlm.text import INSTALLED


class Options(Section):
    """Open a page in the browser that shows what each layer of a run expects, as you type."""

    runs: Annotated[tuple[Path, ...], cli.Flag("runs", nargs="+", metavar="RUN"), Field(max_length=2)]
    """The folder of a run or of an exported model. A second one is shown beside it."""
    to: OutputPath | None = None
    """Write the page of --text into this file. It needs no server, and no other file."""
    text: Path | None = None
    """--to: the file with the text."""
    open: bool = True
    """Open the page in the browser; never over ssh."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """The port of the page's server; 0 takes a free one."""
    device: Literal["cpu", "cuda", "mps", "xpu"] | None = None
    """Where the model computes. The default is a GPU if there is one."""


def main() -> None:
    options = cli.parse(Options)
    if (options.to is None) != (options.text is None):
        raise charlm.UserError(f"to={options.to}, text={options.text}: one requires the other; give both")
    if options.to and len(options.runs) > 1:
        raise charlm.UserError(f"to={options.to}: a page without a server shows one run; leave the other out")
    if options.to is None and not (find_spec("starlette") and find_spec("uvicorn")):
        way_out = "pip install 'charlm[lens]'" if INSTALLED else "pip install -r requirements.txt"
        raise charlm.UserError(f"the page's server needs starlette and uvicorn: {way_out}; or write a page with --to")
    import torch  # not before --help and mistakes were answered

    from charlm.compression.coder import open_regular
    from charlm.data.sources import check_outside
    from charlm.lens.answers import whole
    from charlm.lens.render import render
    from charlm.lens.runs import MAX_TEXT, Runs

    if options.device and not torch.get_device_module(options.device).is_available():
        raise charlm.UserError(f"device={options.device}: torch can use none here; leave it out", "device")
    if options.to is None:
        from charlm.lens.server import serve

        serve(Runs(options.runs, options.device), options.port, options.open)
    with open_regular(options.text) as file:
        text = file.read(4 * MAX_TEXT + 1).decode("utf-8", "surrogateescape")  # of at most 4 bytes each
    runs = Runs(options.runs, options.device)
    check_outside(runs.configs[0].data, "to", options.to)
    write_whole(options.to, render(runs.facts(live=False), whole(runs.lens(), text)))


if __name__ == "__main__":
    cli.script(main)
