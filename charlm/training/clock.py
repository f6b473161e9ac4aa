"""Training by the clock: the steps that fit into `train.time`, by a trial that leaves no trace."""

import sys
import time
from bisect import bisect_right
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from charlm.config import Config, steps_of
from charlm.config.types import seconds_of
from charlm.data.corpus import Corpus
from charlm.runs.folder import Run
from charlm.training.log import Tracker
from charlm.training.start import TrainState, build, check_folder, refusal
from charlm.training.stop import StopRequests

AIM, TRIAL, TRIAL_SECONDS = 0.99, 0.1, 30.0  # shares of the time to fill, and for timing steps, with their limit


def with_steps(
    config: Config, corpus: Corpus, accelerator: Accelerator, kind: Callable[..., Any], stop: StopRequests
) -> tuple[Config, float]:
    """The config with train.steps in place of train.time, and the seconds that this took.

    They are measured in a `Training` by `kind`; a run that goes on keeps them. Raises UserError, Stopped.
    """
    began, run = time.perf_counter(), Run(config.run.dir)
    if config.train.time is None:
        return config, 0.0
    goes_on = check_folder(config.run) or config.run.resume or config.run.auto_resume
    if goes_on and run.config_path.exists():  # also if it ended before its first row
        steps = run.config().train.steps
    else:
        scale = accelerator.scaler.state_dict() if accelerator.scaler else {}
        objective, *others = build(config, corpus, accelerator)
        tracker = Tracker(run, config, corpus, objective.terms, state := TrainState(), main=False)
        writer = SimpleNamespace(wait=lambda: None, save=lambda *_: None)
        trial = kind(config, corpus, accelerator, objective, *others, state, tracker, writer, stop)
        steps = _steps_that_fit(trial, began)
        del objective, others, trial
        accelerator.free_memory()
        if scale:
            accelerator.scaler.load_state_dict(scale)
    train = dict(config.train) | {"steps": steps, "time": None}
    return config.replace(train=train), time.perf_counter() - began


def _steps_that_fit(trial: Any, began: float) -> int:
    """The number of steps, the same on all processes, in what is left of the time since `began`."""
    train, total, device = trial.config.train, seconds_of(trial.config.train.time), trial.accelerator.device
    trial.prepare()
    begin = time.perf_counter() - began  # the run itself begins as slowly
    step, more = _seconds_per_step(trial, min(TRIAL_SECONDS, TRIAL * total))
    events = {"valid_every": trial.validate, "checkpoint_every": trial.save, "diagnose_every": trial.diagnose}
    costs = [(getattr(train, name), _seconds(trial, event)) for name, event in events.items() if getattr(train, name)]

    def needed(steps: int) -> float:
        return steps * step + sum(-(-steps // steps_of(every, steps)) * cost for every, cost in costs)

    left = AIM * total - begin - more - (time.perf_counter() - began)
    steps = broadcast(torch.tensor(bisect_right(range(1, 10**9), left, key=needed), device=device)).item()
    if steps == 0:
        ways_out = "give more, or fewer --train.valid_symbols"
        raise refusal(trial.config, "train.time", f"no step of {step:.2g} s fits; {ways_out}")
    trial.accelerator.print(f"train.time={train.time}: {steps:,} steps of {step:.2g} s fit", file=sys.stderr)
    return steps


def _seconds_per_step(trial: Any, limit: float) -> tuple[float, float]:
    """The mean over the run, from about `limit` seconds of steps; and how much longer first steps take."""
    train = trial.config.train
    full = train.full_context_from if train.context_divisor > 1 else 0.0
    parts = [(start, end - start) for start, end in ((0.0, full), (full, 1.0)) if start < end]
    shares = {start + length * middle: length / 2 for start, length in parts for middle in (0.25, 0.75)}

    def make(progress: float, count: int) -> None:
        trial.state.step = int(progress * train.steps)
        for _ in range(count):
            trial.stop.check()
            trial.step()
        trial.updates.read()  # waits for the device

    def mean(count: int) -> float:
        return sum(share * _seconds(trial, make, progress, count) / count for progress, share in shares.items())

    first, step = mean(1), mean(1)
    if count := int(limit / 2 / len(shares) / step):
        step = (mean(count) + mean(count)) / 2  # one after the other, as other work comes and goes
    return step, max(0.0, first - step) * len(shares)


def _seconds(trial: Any, call: Callable[..., object], *arguments: float) -> float:
    """The duration of a call, the mean of all processes."""
    began = time.perf_counter()
    call(*arguments)
    seconds = torch.tensor(time.perf_counter() - began, device=trial.accelerator.device)
    return trial.accelerator.reduce(seconds, "mean").item()
