"""Options of a run's folder, of how it ends and goes on, and of trackers."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, model_validator

from charlm.config.types import Count, Duration, Index, Section

TrackerName = Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"]

OF_ONE_CALL = {"resume", "resume_from", "auto_resume", "max_time"}  # options that a run's config.yaml leaves out


class RunConfig(Section):
    """The run on disk: its folder, how to continue it, and where its numbers go."""

    dir: Path = Path("runs/charlm")
    """Folder of the run. It must not hold a run, unless that is resumed."""
    init_from: str | None = None
    """Begin a new run with the weights of a RUN, an exported FOLDER or OWNER/NAME[@REVISION] on the hub,
    which also decides the options of model and vocabulary. RUN@last or RUN@STEP: not its best checkpoint."""
    branch_from: Annotated[Path | None, AfterValidator(lambda path: path and path.absolute())] = None
    """Begin a new run at a checkpoint of this one, with its options and its optimizers' state, and let
    lr_schedule=wsd decay from there (Hägele et al. 2024, section 4)."""
    branch_step: Count | None = None
    """Step of that checkpoint. train.steps is by default the end of a decay that begins there."""
    resume: bool = False
    """Continue the run from its newest checkpoint."""
    resume_from: Index | None = None
    """Continue the run from the checkpoint of this step."""
    auto_resume: bool = False
    """Continue the run if it exists, else start it; for queues that start jobs again."""
    max_time: Duration | None = None
    """Write a checkpoint and stop after this time, such as 3h50m, 90m or 1d12h."""
    report: bool = True
    """Write RUN/report.html at the end, with what is quickly measured."""
    tracker: tuple[TrackerName, ...] = ()
    """Experiment trackers that also get every number, such as [tensorboard, wandb]."""
    project: str = "charlm"
    """Name of the project or experiment in trackers."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.resume_from is not None and self.auto_resume:
            text = "would go back to that step at every restart; leave out run.auto_resume"
            raise self.mistake("resume_from", text, "auto_resume")
        if (self.branch_from is None) != (self.branch_step is None):
            raise self.mistake("branch_step", "goes with run.branch_from; give both, or none", "branch_from")
        if self.init_from is not None and self.branch_from is not None:
            raise self.mistake("init_from", "a branch begins with run.branch_from; leave out one", "branch_from")
        if len(set(self.tracker)) < len(self.tracker):
            raise self.mistake("tracker", "contains a tracker twice")
        return self
