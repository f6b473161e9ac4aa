"""accelerate's experiment trackers, which log the numbers of metrics.jsonl.

tensorboard, wandb, dvclive and swanlab write into RUN/trackers; the others write where they are configured to. A
resumed run continues its record in tensorboard, wandb, dvclive, swanlab, trackio and comet_ml; other trackers start a
new record of the same name. accelerate's `init_trackers` gives all trackers one project name, which tensorboard takes
for a folder, and `end_training` destroys the process group, which a second run in the same process needs.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from charlm.config import Config, UserError, flatten
from charlm.config.errors import written
from charlm.runs.folder import Run

PACKAGES = {"aim": "'aim<4'", "comet_ml": "comet-ml"}
"""pip's name of a tracker, where it differs."""


def check_installed(names: Sequence[str]) -> None:
    """Raise UserError if a tracker's package is missing."""
    missing = [name for name in names if name not in map(str, get_available_trackers())]
    if missing:
        packages = " ".join(PACKAGES.get(name, name) for name in missing)
        raise UserError(f"run.tracker={','.join(missing)}: not installed; pip install {packages}, or leave it out")


def start_trackers(config: Config, run: Run, step: int) -> list[GeneralTracker]:
    """Start the trackers of a run that has completed `step` steps, and record the run's options.

    Raises:
        UserError: one did not start. The folder of a run without checkpoints is removed.
    """
    trackers: list[GeneralTracker] = []
    try:
        for name in config.run.tracker:
            tracker = _build(name, config, run, step)
            tracker.start()
            trackers.append(tracker)
            tracker.store_init_configuration(_options(config))
    except Exception as error:  # any kind: no login, no server, a folder of another version
        for tracker in trackers:
            tracker.finish()
        if not any(run.checkpoints_path.iterdir()):
            shutil.rmtree(run.path)  # otherwise it would block the corrected command
        raise UserError(f"run.tracker={name}: did not start: {error}; mend that, or leave it out") from error
    return trackers


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row of metrics.jsonl by path, such as `terms/layer3/offset1/all/loss`, without its step.

    A tracker keeps one value per name and step. So everything in a validation row gets the prefix `valid/`, and a row
    of diagnostics yields its diagnostics only: the training row of the same step has the progress.
    """
    if "valid" in row:
        row = {"valid": {name: value for name, value in row.items() if name not in ("step", "valid")} | row["valid"]}
    elif "diagnostics" in row:
        row = {"diagnostics": row["diagnostics"]}
    return {
        path: value for path, value in flatten(row, "/").items() if path != "step" and isinstance(value, int | float)
    }


def _options(config: Config) -> dict[str, bool | int | float | str]:
    """Every option by its dotted name; values other than scalars as in a config file."""
    options = flatten(config.model_dump(), ".")
    return {name: value if isinstance(value, (int, float, str)) else written(value) for name, value in options.items()}


def _build(name: str, config: Config, run: Run, step: int) -> GeneralTracker:
    folder, title = run.path / "trackers", run.path.resolve().name
    key, resumed = _key(folder), step > 0
    options: dict[str, Any] = {
        "clearml": {"task_name": title, "auto_connect_frameworks": False, "reuse_last_task_id": False},
        "comet_ml": {"experiment_key": key},
        "dvclive": {"dir": str(folder / "dvclive"), "resume": resumed, "save_dvc_exp": False, "dvcyaml": None},
        "mlflow": {"run_name": title},
        "swanlab": {"log_dir": str(folder / "swanlab"), "name": title, "id": key, "resume": "allow"},
        "tensorboard": {"purge_step": step + 1 if resumed else None},
        "trackio": {"name": f"{title}-{key[:8]}", "resume": "allow"},  # resumed by name
        "wandb": {"dir": str(folder), "name": title, "id": key, "resume": "allow"},
    }.get(name, {})
    if name == "tensorboard":  # accelerate's project name is a folder here
        return LOGGER_TYPE_TO_CLASS[name]("tensorboard", folder, **options)
    if name == "aim":  # finds the nearest .aim by itself, unless given a folder
        return LOGGER_TYPE_TO_CLASS[name](title, None, experiment=config.run.project)
    return LOGGER_TYPE_TO_CLASS[name](config.run.project, **options)


def _key(folder: Path) -> str:
    """The run's unique name in a tracker, kept for its resumption."""
    path = folder / "key"
    if not path.exists():
        folder.mkdir(exist_ok=True)
        path.write_text(uuid4().hex)
    return path.read_text()
