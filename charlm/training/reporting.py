"""The report page that a run leaves when it is done."""

from collections.abc import Callable

import numpy as np

from charlm.data.corpus import Corpus
from charlm.report.page.measured import CHARACTERS, measure
from charlm.report.page.recorded import Recorded, read_runs
from charlm.report.page.writing import write_report
from charlm.runs.folder import Run

QUICK_SECONDS = 10
"""The model is measured for the page where training passes over so many characters in that time."""
QUICK_LAYERS = 16
"""And where it is no deeper: samples are written a symbol after the other, each of which passes all layers."""


def report_run(run: Run, corpus: Corpus, *, alone: bool, say: Callable[[str], None]) -> None:
    """Write RUN/report.html. What goes wrong is said, and no more: the run is done and its checkpoints are safe.

    Bits by layer and by position, the passage and the samples need the model. They are left to scripts/report.py
    unless they are quick, and this is the only process.
    """
    try:
        measured = None
        if alone and is_quick(*read_runs([run.path])):
            measured = [measure(run, corpus, progress=False)]
        write_report([run.path], run.path / "report.html", measured)
    except Exception as error:
        say(f"report.html was not written ({error!r}); python scripts/report.py {run.path} tries again")


def is_quick(run: Recorded) -> bool:
    """Whether the model can be measured while the user waits, by the speed of training."""
    _, speeds = run.of_training("characters_per_second")
    speeds = speeds[np.isfinite(speeds)]
    fast = len(speeds) > 0 and float(np.median(speeds)) * QUICK_SECONDS >= CHARACTERS
    return fast and run.config.model.num_layers <= QUICK_LAYERS
