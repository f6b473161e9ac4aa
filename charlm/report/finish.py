"""Train a run, then draw its pictures and write its report page."""

import os
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from charlm.config import Config, UserError
from charlm.data.corpus import load_corpus
from charlm.process import is_main_process
from charlm.report.figures import draw_diagnostics, draw_run
from charlm.report.metrics import read_runs
from charlm.report.page.probe import CHARACTERS, measure
from charlm.report.page.render import write_report
from charlm.runs.folder import Run
from charlm.text import command, fitted, say
from charlm.training.loop import train
from charlm.training.stop import StopRequests

QUICK_SECONDS, QUICK_LAYERS = 10, 16
"""Limits for measuring the model: seconds by the speed of training, and layers."""


def train_and_report(config: Config) -> Path:
    """Train as `charlm.train` does, then draw pictures and write the page into the run's folder.

    If the run stops or fails after training began, only the pictures are made. Returns the folder;
    raises UserError and Stopped as `charlm.train` does.
    """
    run = Run(config.run.dir)
    before = _last_change(run)
    # A first signal lets drawing finish; a second one kills.
    with StopRequests(config.run.max_time) as stop:
        try:
            train(config, stop=stop)
        except BaseException as error:
            # The folder of a run that was refused, or lost it, may be another's.
            is_others = getattr(error, "option", None) == "run.dir"
            if is_main_process() and _last_change(run) != before and not is_others:
                draw_pictures(run, config)
            raise
        if is_main_process():
            with tqdm(desc="drawing", bar_format="{desc}", leave=False, disable=None):
                draw_pictures(run, config)
                if config.run.report:
                    write_page(run, run.config())
            names = ("report.html", "run.png", "diagnostics.png")
            if made := [name for name in names if (run.path / name).exists()]:
                print(fitted(f"{run.path} has {', '.join(made)}"), file=sys.stderr)
    return run.path


def draw_pictures(run: Run, config: Config) -> None:
    """Draw run.png, and diagnostics.png if there are diagnostics."""
    with suppress(UserError, OSError):  # no point to draw yet, or the disk is full
        draw_run(run.path)
        if config.train.diagnose_every:
            draw_diagnostics(run.path)


def write_page(run: Run, config: Config) -> None:
    """Write RUN/report.html, with what needs the model if quick; or print an error."""
    path, probes = run.path / "report.html", None
    try:
        _, speeds = read_runs([run.path])[0].points("characters_per_second")
        fast = len(speeds) > 0 and np.median(speeds) * QUICK_SECONDS >= CHARACTERS
        quick = fast and config.model.num_layers <= QUICK_LAYERS
        if quick and os.environ.get("WORLD_SIZE", "1") == "1":
            corpus = load_corpus(config.data, show_progress=False)
            probes = [measure(run, corpus, show_progress=False)]
        write_report([run.path], path, probes)
    except Exception as error:
        failure = f"report.html was not written ({error!r})"
        print(fitted(f"{failure}; this tries again:"), file=sys.stderr)
        say("  " + command("report.py", run.path, "-o", path), file=sys.stderr)


def _last_change(run: Run) -> int | None:
    return run.metrics_path.stat().st_mtime_ns if run.metrics_path.exists() else None
