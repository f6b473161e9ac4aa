"""Training by the clock: the steps that fit into `train.time`, by a trial that leaves no trace."""

import sys
import time
from bisect import bisect_right
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from charlm.config import Config, TrainConfig, steps_of
from charlm.config.types import seconds_of
from charlm.data.corpus import Corpus
from charlm.process import is_main_process
from charlm.runs.folder import Run
from charlm.text import say
from charlm.training.log import Tracker
from charlm.training.start import TrainState, build, check_folder, refusal
from charlm.training.stop import StopRequests

PARTS = 4  # of a run; steps in the middle of each are timed
TRIAL_SHARE, TRIAL_SECONDS = 1 / 10, 30.0  # limits for timing steps; the share is of the time
AIM = 0.99  # of the time


def with_steps(
    config: Config, corpus: Corpus, accelerator: Accelerator, kind: Callable[..., Any], stop: StopRequests
) -> tuple[Config, float]:
    """The config with train.steps in place of train.time, and the seconds that this took.

    `kind` makes the `Training` to time; a run that goes on keeps its steps. Raises UserError if no step
    fits, and Stopped as `stop.check`.
    """
    if config.train.time is None:
        return config, 0.0
    began, run = time.perf_counter(), Run(config.run.dir)
    goes_on = check_folder(config.run) or config.run.resume or config.run.auto_resume
    if goes_on and run.config_path.exists():  # also if it ended before its first row
        steps = run.config().train.steps
    else:
        scale = accelerator.scaler.state_dict() if accelerator.scaler else {}
        steps = _steps_that_fit(config, corpus, accelerator, kind, stop)
        accelerator.free_memory()
        if scale:
            accelerator.scaler.load_state_dict(scale)
    train = dict(config.train) | {"steps": steps, "time": None}
    return config.replace(train=train), time.perf_counter() - began


def _steps_that_fit(
    config: Config, corpus: Corpus, accelerator: Accelerator, kind: Callable[..., Any], stop: StopRequests
) -> int:
    """The number of steps, the same on all processes, in what is left of the time."""
    train, total, began = config.train, seconds_of(config.train.time), time.perf_counter()
    parts = build(config, corpus, accelerator)
    state, writer = TrainState(), SimpleNamespace(wait=lambda: None, save=lambda *_: None)
    tracker = Tracker(Run(config.run.dir), config, corpus.splits["train"], parts[0].terms, state, main=False)
    trial = kind(config, corpus, accelerator, *parts, state, tracker, writer, stop)
    trial.prepare()
    begin = time.perf_counter() - began  # the run itself begins as slowly
    step, first = _seconds_per_step(trial, min(TRIAL_SECONDS, TRIAL_SHARE * total))
    events = {"valid_every": trial.validate, "checkpoint_every": trial.save, "diagnose_every": trial.diagnose}
    costs = {name: _seconds(event) for name, event in events.items() if getattr(train, name)}

    def aside(steps: int) -> float:
        times = {name: -(-steps // steps_of(getattr(train, name), steps)) for name in costs}
        return sum(times[name] * cost for name, cost in costs.items())

    left = AIM * total - begin - first - (time.perf_counter() - began)
    fit = bisect_right(range(1, 10**9), left, key=lambda steps: steps * step + aside(steps))
    fit = int(_agreed(fit, accelerator))
    if fit == 0:
        text = f"too short for a step of {step:.2g} s, {aside(1):.2g} s to validate and {begin + first:.2g} s to begin"
        raise refusal(config, "train.time", f"{text}; give more, or fewer --train.valid_symbols")
    if is_main_process():
        text = f"{fit:,} steps of {step:.2g} s fit, and {aside(fit):.0f} s of validations"
        say(f"train.time={train.time}: {text}", file=sys.stderr)
    return fit


def _seconds_per_step(trial: Any, limit: float) -> tuple[float, float]:
    """The mean over the run, from about `limit` seconds of steps; and how much longer first steps take."""
    shares = _parts(trial.config.train)

    def each(count: int) -> dict[float, float]:
        def make(progress: float) -> None:
            trial.state.step = int(progress * trial.config.train.steps)
            for _ in range(count):
                trial.stop.check()
                trial.step()
            trial.updates.read()  # waits for the device

        return {progress: _seconds(make, progress) / count for progress in shares}

    first, times = each(1), each(1)
    more = max(0.0, sum(first.values()) - sum(times.values()))
    count = int(_agreed(limit / 2 / sum(times.values()), trial.accelerator))
    if count > 0:
        rounds = each(count), each(count)  # one after the other, as other work comes and goes
        times = {progress: sum(both[progress] for both in rounds) / 2 for progress in shares}
    return sum(share * times[progress] for progress, share in shares.items()), more


def _parts(train: TrainConfig) -> dict[float, float]:
    """The share of each part of a run by the progress in its middle. Windows grow at an edge."""
    grows = train.context_divisor > 1 and 0 < train.full_context_from < 1
    edges = [0.0, train.full_context_from, 1.0] if grows else [0.0, 1.0]
    number = PARTS // (len(edges) - 1)
    widths = {start: (end - start) / number for start, end in pairwise(edges)}
    return {start + (n + 0.5) * width: width for start, width in widths.items() for n in range(number)}


def _seconds(event: Callable[..., object], *arguments: float) -> float:
    began = time.perf_counter()
    event(*arguments)
    return time.perf_counter() - began


def _agreed(value: float, accelerator: Accelerator) -> float:
    """The first process's value, on all."""
    return broadcast(torch.tensor(value, dtype=torch.float64, device=accelerator.device)).item()
