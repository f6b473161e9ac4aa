"""What a run leaves to look at: pictures, and a page when it is done."""

from collections.abc import Callable
from contextlib import suppress

import numpy as np

from charlm.config import Config, UserError
from charlm.data.corpus import Corpus
from charlm.report.diagnostics import draw_diagnostics
from charlm.report.figures import draw_run
from charlm.report.page.metrics import Recorded, read_runs
from charlm.report.page.probe import CHARACTERS, measure
from charlm.report.page.render import write_report
from charlm.runs.folder import Run

QUICK_SECONDS = 10
"""The model is measured for the page where training passes over so many characters in that time."""
QUICK_LAYERS = 16
"""And where it is no deeper: samples are written a symbol after the other, each of which passes all layers."""


def draw_pictures(run: Run, config: Config) -> None:
    """Draw RUN/run.png, and what the run has of diagnostics."""
    with suppress(UserError):  # it ended before there was a point to draw
        draw_run(run.path)
        if config.train.diagnose_every:
            draw_diagnostics(run.path)


def report_run(run: Run, config: Config, corpus: Corpus, *, alone: bool, say: Callable[[str], None]) -> None:
    """Write RUN/report.html if `config` wants it, and say what there is to look at.

    Bits by layer and by position, the passage and the samples need the model. They are left to scripts/report.py
    unless they are quick, and this process is `alone`.
    """
    made = ["report.html"] if config.run.report and _write_page(run, corpus, alone, say) else []
    made += [name for name in ("run.png", "diagnostics.png") if (run.path / name).exists()]
    if made:
        say(f"{run.path} has {', '.join(made)}")


def _write_page(run: Run, corpus: Corpus, alone: bool, say: Callable[[str], None]) -> bool:
    """Whether it was written. What goes wrong is said, and no more: the run is done and its checkpoints are safe."""
    try:
        measured = None
        if alone and is_quick(*read_runs([run.path])):
            measured = [measure(run, corpus, progress=False)]
        write_report([run.path], run.path / "report.html", measured)
    except Exception as error:
        say(f"report.html was not written ({error!r}); python scripts/report.py {run.path} tries again")
        return False
    return True


def is_quick(run: Recorded) -> bool:
    """Whether the model can be measured while the user waits, by the speed of training."""
    _, speeds = run.of_training("characters_per_second")
    speeds = speeds[np.isfinite(speeds)]
    fast = len(speeds) > 0 and float(np.median(speeds)) * QUICK_SECONDS >= CHARACTERS
    return fast and run.config.model.num_layers <= QUICK_LAYERS
