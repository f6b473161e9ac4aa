"""A run on disk."""

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from charlm.config.types import Index, Section

TrackerName = Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"]


class RunConfig(Section):
    """The run on disk: its folder, how it is continued, and where its numbers go."""

    dir: Path = Path("runs/charlm")
    """The run's folder. It must not hold a run already, unless that run is resumed."""
    resume: bool = False
    """Continue the run from its newest checkpoint."""
    resume_from: Index | None = None
    """Continue the run from the checkpoint of this step."""
    auto_resume: bool = False
    """Continue the run if there is one, else start it. Meant for queues, which may start a job again."""
    max_time: str | None = None
    """Write a checkpoint and stop after this time, before a queue's limit: 3h50m, 90m, 1d12h."""
    report: bool = True
    """Write RUN/report.html at the end: the recorded numbers, and what the model shows if that is quick to compute."""
    tracker: tuple[TrackerName, ...] = ()
    """Experiment trackers that also get every number of metrics.jsonl; each needs its own package: tensorboard, or a
    list, [tensorboard, wandb]."""
    project: str = "charlm"
    """Name of the project or experiment, for trackers that group runs."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.resume_from is not None and self.auto_resume:
            text = "goes back to that step whenever a queue starts the command again; leave out run.auto_resume"
            raise self.mistake("resume_from", text, "auto_resume")
        if self.max_time is not None and self.max_seconds is None:
            raise self.mistake("max_time", "must be a time like 3h50m, in days (d), hours, minutes and seconds")
        if len(set(self.tracker)) < len(self.tracker):
            raise self.mistake("tracker", "names a tracker twice")
        return self

    @property
    def max_seconds(self) -> int | None:
        """`max_time` in seconds; None without one, or if it is no time."""
        match = re.fullmatch(r"(?:(\d{1,5})d)?(?:(\d{1,5})h)?(?:(\d{1,5})m)?(?:(\d{1,9})s)?", self.max_time or "")
        parts = map(int, match.groups("0")) if match else ()
        return sum(part * seconds for part, seconds in zip(parts, (86400, 3600, 60, 1), strict=False)) or None
