"""Training by the clock: the steps that fit into `train.time`, by a trial that leaves no trace, and by later looks."""

import math
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from charlm.config import Config
from charlm.config.types import seconds_of
from charlm.data.corpus import Corpus
from charlm.runs.folder import Run
from charlm.training.log import Tracker
from charlm.training.start import TrainState, build, check_folder
from charlm.training.stop import StopRequests

AIM, LATER, OFF, LEAST = 0.99, 0.1, 0.03, 0.03
"""Shares: of the time to fill, of the rest until the next look, of the steps to be off, of the first plan, at least."""


class Clock:
    """The time of a run, and the steps that fit into it."""

    def __init__(self, limit: str | None):
        self.began, self.spent = time.perf_counter(), 0.0  # seconds of the trial
        self.limit = AIM * seconds_of(limit) if limit else math.inf  # seconds, without the last validation
        self.next_look, self.looks = 1, []  # not the first step, which may compile

    def with_steps(
        self, config: Config, corpus: Corpus, accelerator: Accelerator, kind: Callable[..., Any], stop: StopRequests
    ) -> Config:
        """The config with train.steps in place of train.time: measured by `kind`, or those of a run that goes on."""
        train, run, plan = config.train, Run(config.run.dir), {}
        goes_on = check_folder(config.run) or config.run.resume or config.run.auto_resume
        if goes_on and run.config_path.exists():  # also if it ended before its first row
            begun = run.config().train
            plan = {"steps": begun.steps if train.time else train.steps, "steps_before": begun.steps_before}
        elif train.time:
            scale = accelerator.scaler.state_dict() if accelerator.scaler else {}
            objective, *others = build(config, corpus, accelerator)
            tracker = Tracker(run, config, corpus, objective.terms, state := TrainState(), main=False)
            writer = SimpleNamespace(wait=lambda: None, save=lambda *_: None)
            trial = kind(config, corpus, accelerator, objective, *others, state, tracker, writer, stop)
            plan = {"steps": self._fit(trial)}
            del objective, others, trial
            accelerator.free_memory()
            if scale:
                accelerator.scaler.load_state_dict(scale)
        return config.replace(train=dict(train) | plan | {"time": None})

    def _fit(self, trial: Any) -> int:
        """The steps that fit, if they take as long as some in the middle of each quarter of the run."""
        train = trial.config.train
        trial.prepare()

        def make(count: int) -> float:
            began = time.perf_counter()
            for eighth in (1, 3, 5, 7):
                trial.state.step = train.steps * eighth // 8
                for _ in range(count):
                    trial.stop.check()
                    trial.step()
            trial.updates.read()  # waits for the device
            return (time.perf_counter() - began) / (4 * count)

        make(1)  # which may compile
        step, before = make(2), time.perf_counter()
        trial.validate()
        now = time.perf_counter()
        self.spent, self.limit = now - self.began, self.limit - (now - before)
        fit = torch.tensor(max(1, int((self.limit - self.spent) / step)), device=trial.accelerator.device)
        steps = broadcast(fit).item()
        trial.accelerator.print(f"train.time={train.time}: {steps:,} steps of {step:.2g} s fit", file=sys.stderr)
        return steps

    def look(self, training: Any) -> None:
        """Choose the rest of the steps anew if the run does not end in time at its speed as a whole and of late."""
        train, step, tracker = training.config.train, training.state.step, training.tracker
        if step < self.next_look or self.limit == math.inf:
            return
        now, worked = tracker.seconds, tracker.seconds - tracker.paused_seconds
        if self.looks:
            (_, first, began), *_ = self.looks
            speeds = [(step - before) / (worked - then) for before, then, _ in (self.looks[0], self.looks[-1])]
            left = (self.limit - now) * (worked - first) / (now - began)  # without pauses
            least = min(LEAST * train.planned, train.steps - step)  # so that schedules do not jump to their end
            fit = torch.tensor(step + math.ceil(max(sum(speeds) / 2 * left, least)), device=training.accelerator.device)
            steps = broadcast(fit).item()
            if abs(steps - train.steps) > OFF * train.steps:
                train = train.replace(steps=steps, steps_before=(*train.steps_before, (step, train.steps)))
                training.config = training.config.replace(train=train)
                if training.accelerator.is_main_process:
                    with tracker.run.os_errors_explained(cannot_be="written"):
                        tracker.run.write_config(training.config)
                tracker.say(f"train.time: {steps:,} steps fit now")
                tracker.train, tracker.bar.total = train, steps
        self.looks.append((step, worked, now))
        decided = max((change for change, _ in train.steps_before), default=0)
        self.next_look = max(decided + 1, step + math.ceil(LATER * (train.steps - step)))
