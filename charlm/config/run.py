"""A run on disk."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from charlm.config.errors import require

TrackerName = Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run lives on disk."""

    dir: Path = Path("runs/charlm")
    """The run's folder. It must not hold a run already, unless that run is resumed."""
    resume: bool = False
    """Continue the run from its newest checkpoint."""
    resume_from: int | None = None
    """Continue the run from the checkpoint of this step."""
    auto_resume: bool = False
    """Continue the run if there is one, else begin it: what a queue that starts a job again needs."""
    max_time: str | None = None
    """Checkpoint and stop when the process has run for so long, before a queue's limit: 3h50m, 90m, 1d12h."""
    report: bool = True
    """Leave RUN/report.html when the run is done: what it recorded, and what its model shows if that is quick."""
    tracker: tuple[TrackerName, ...] = ()
    """Experiment trackers that get every number of metrics.jsonl too, each a package of its own to be installed:
    tensorboard, or a list, [tensorboard, wandb]."""
    project: str = "charlm"
    """What trackers that group runs by project or experiment call this one."""

    def __post_init__(self):
        require(
            self.resume_from is None or self.resume_from >= 0,
            "run.resume_from",
            self.resume_from,
            "must be the step of a checkpoint",
        )
        require(
            self.resume_from is None or not self.auto_resume,
            "run.resume_from",
            self.resume_from,
            "would go back to that step whenever a queue starts the command again; not with run.auto_resume",
        )
        require(
            self.max_time is None or _duration(self.max_time) is not None,
            "run.max_time",
            self.max_time,
            "must be a time like 3h50m, of days (d), hours, minutes and seconds",
        )
        require(len(set(self.tracker)) == len(self.tracker), "run.tracker", self.tracker, "names a tracker twice")

    @property
    def max_seconds(self) -> float | None:
        """`max_time` in seconds."""
        return None if self.max_time is None else _duration(self.max_time)


def _duration(text: str) -> float | None:
    """The seconds of "3h50m"; None if it is no duration, or none at all."""
    match = re.fullmatch(r"(?:(\d{1,5})d)?(?:(\d{1,5})h)?(?:(\d{1,5})m)?(?:(\d{1,9})s)?", text)
    parts = [int(part or 0) for part in match.groups()] if match else [0]
    return sum(part * seconds for part, seconds in zip(parts, (86400, 3600, 60, 1), strict=False)) or None
