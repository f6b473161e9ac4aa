"""Logging of a run: metrics.jsonl, the same numbers for accelerate's trackers, and a progress line.

tensorboard, wandb, dvclive and swanlab write into RUN/trackers; the others write where they are configured to. A
resumed run continues its record in tensorboard, wandb, dvclive, swanlab, trackio and comet_ml; other trackers start a
new record of the same name. accelerate's `init_trackers` gives all trackers one project name, which tensorboard takes
for a folder, and `end_training` destroys the process group, which a second run in the same process needs.
"""

import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from tqdm import tqdm

from charlm.config import Config, UserError, flatten, steps_of
from charlm.config.errors import written
from charlm.data.corpus import Split
from charlm.objective.objective import Hedge
from charlm.objective.terms import Term, active
from charlm.process import peak_memory
from charlm.runs.folder import Run
from charlm.text import counted, fitted
from charlm.training.start import TrainState
from charlm.training.update import StepReport


class Tracker:
    """Writes metrics and shows progress; does nothing on any process but the main one.

    In a terminal one line is redrawn in place; elsewhere only validations are printed, so that logs stay short.
    """

    def __init__(self, run: Run, config: Config, split: Split, terms: Sequence[Term], state: TrainState, main: bool):
        """Log training on `split`. Raises UserError if one of run.tracker does not start."""
        self.run, self.terms, self.main = run, terms, main
        self.bits_per_nat = split.symbols / split.characters / math.log(2)
        self.total_steps = config.train.steps
        self.symbols_per_step = config.train.batch_size * config.model.context_length
        self.main_names = [f"layer{config.model.num_layers}/offset1/{positions}" for positions in ("all", "last")]
        self.trackers = start_trackers(config, run, state.step) if main else []
        self.began = time.perf_counter()
        self.earlier_seconds = state.seconds
        self.paused_seconds = 0.0
        self.cadences = {"validating": config.train.valid_every, "diagnosing": config.train.diagnose_every}
        self.newest_pauses: dict[str, float] = {}
        """Seconds by kind. Saving is left out: it takes next to no time to begin."""
        self.first_step = self.logged_step = state.step
        self.logged_seconds = 0.0
        self.loses_rows = False
        self.time_left, self.shown = "?", ""
        self.bar = tqdm(
            total=self.total_steps,
            initial=state.step,
            disable=None if main else True,
            dynamic_ncols=True,
            bar_format="{n}/{total} {desc}",
            desc=f"{self.time_left} left",
        )

    @property
    def seconds(self) -> float:
        """Duration of the run, including the time before it was resumed."""
        return self.earlier_seconds + time.perf_counter() - self.began

    @property
    def training_seconds(self) -> float:
        """Duration of this process's steps, without validations, checkpoints and diagnostics."""
        return time.perf_counter() - self.began - self.paused_seconds

    def seconds_left(self, step: int) -> float:
        """Estimate from the mean speed so far and the newest pause of each kind."""
        left = (self.total_steps - step) * self.training_seconds / max(1, step - self.first_step)
        for doing, seconds in self.newest_pauses.items():
            every = steps_of(self.cadences[doing], self.total_steps)
            left += seconds * (math.ceil(self.total_steps / every) - (step - 1) // every)
        return left

    @contextmanager
    def speed_paused(self, doing: str) -> Iterator[None]:
        """Inside, time does not count towards the characters per second; the progress line says `doing`."""
        began, shown = time.perf_counter(), self.shown
        self._show(f", {doing}")
        self.bar.refresh()
        try:
            yield
        finally:
            self._show(shown)
            self.bar.refresh()
        took = time.perf_counter() - began
        self.paused_seconds += took
        if doing in self.cadences:
            self.newest_pauses[doing] = took

    def log_training(self, update: StepReport, learning_rate: float, hedge: Hedge | None = None) -> None:
        """Record the losses of an update, and the weights that `hedge` gives the layers after it."""
        if not self.main:
            return
        step, parts, seconds = update.step, update.parts, self.training_seconds
        speed = (step - self.logged_step) * self.symbols_per_step / (seconds - self.logged_seconds)
        self.logged_step, self.logged_seconds = step, seconds
        # The update used the weights of the progress before it.
        weights = {term.name: weight for term, weight in active(self.terms, (step - 1) / self.total_steps)}
        main_loss = next((parts[name] for name in self.main_names if name in parts), None)
        bits = None if main_loss is None else main_loss * self.bits_per_nat
        row = {
            "loss": update.loss,
            "bits_per_character": bits,
            "learning_rate": learning_rate,
            "characters_per_second": speed,
            "seconds": self.seconds,
            "memory": peak_memory(),
            "terms": {name: {"loss": part, "weight": weights[name]} for name, part in parts.items()},
        }
        if hedge is not None:
            by_layer = zip(hedge.layers, hedge.weights.tolist(), strict=True)
            row["hedge"] = {f"layer{layer}": weight for layer, weight in by_layer}
        self.record(step, row)
        self.time_left = tqdm.format_interval(self.seconds_left(step))
        shown_bits = "" if bits is None else f" {bits:.3f} bpc"  # the line fits into 80 columns
        shown_speed = f"{speed / 1000:.1f}k" if speed >= 1000 else f"{speed:.0f}"
        terms = counted(len(parts), "term")
        self._show(f" loss {update.loss:.4g}{shown_bits} lr {learning_rate:.1e} {terms} {shown_speed} ch/s")
        self.bar.update(step - self.bar.n)

    def log_validation(self, step: int, bits_per_character: float, bits_per_byte: float, best: bool) -> None:
        """Record a validation."""
        valid = {"bits_per_character": bits_per_character, "bits_per_byte": bits_per_byte}
        self.record(step, {"seconds": self.seconds, "valid": valid})
        self.say(f"step {step}: valid {bits_per_character:.4f} bits per character{' (best so far)' if best else ''}")

    def say(self, line: str) -> None:
        """Print a line above the progress line."""
        if self.main:
            tqdm.write(fitted(line), file=sys.stderr)

    def conclude(self, best_step: int | None, best_bits: float | None) -> None:
        """Print the best score and the time this process took."""
        self.time_left = tqdm.format_interval(0.0)
        self._show(self.shown)
        if best_bits is not None:
            at = f"at step {best_step:,} of {self.total_steps:,}"
            self.say(f"best: {best_bits:.4f} bits per character on valid, {at}")
        took = time.perf_counter() - self.began
        aside = self.paused_seconds / took if took else 0.0
        self.say(f"time: {tqdm.format_interval(took)}, {aside:.0%} of it for validations, checkpoints and diagnostics")

    def close(self) -> None:
        """Finish the trackers and close the progress line."""
        for tracker in self.trackers:
            self._keeping_on(tracker.name, tracker.finish)
        self.bar.close()

    def record(self, step: int, values: dict[str, Any]) -> None:
        """Write a row of metrics.jsonl, for trackers, too."""
        if not self.main:
            return
        row = {"step": step, "progress": step / self.total_steps} | values
        try:
            self.run.append_metrics(row)
        except OSError as error:
            if not self.loses_rows:
                self.say(f"metrics.jsonl lacks rows from step {step} on ({error.strerror}); the run goes on")
            self.loses_rows = True
        self.trackers = [
            tracker for tracker in self.trackers if self._keeping_on(tracker.name, tracker.log, numbers(row), step=step)
        ]

    def _show(self, rest: str) -> None:
        """Put the time left and `rest` on the line. tqdm's estimate would jump with every validation."""
        self.shown = rest
        self.bar.set_description_str(f"{self.time_left} left{rest}", refresh=False)

    def _keeping_on(self, name: str, call: Callable[..., None], *arguments: Any, **options: Any) -> bool:
        """Whether the call succeeded. A tracker that fails does not end the run."""
        try:
            call(*arguments, **options)
        except Exception as error:
            self.say(f"run.tracker={name} failed and is no longer used: {error!r}")
            return False
        return True


def check_installed(names: Sequence[str]) -> None:
    """Raise UserError if a tracker's package is missing."""
    missing = [name for name in names if name not in map(str, get_available_trackers())]
    if missing:
        differing = {"aim": "'aim<4'", "comet_ml": "comet-ml"}
        packages = " ".join(differing.get(name, name) for name in missing)
        raise UserError(
            f"run.tracker={','.join(missing)}: not installed; pip install {packages}, or leave it out", "run.tracker"
        )


def start_trackers(config: Config, run: Run, step: int) -> list[GeneralTracker]:
    """Start the trackers of a run that has completed `step` steps, and record its options.

    Raises UserError if one does not start, and then removes the folder of a run without checkpoints.
    """
    trackers: list[GeneralTracker] = []
    options = flatten(config.model_dump(), ".")
    options = {
        name: value if isinstance(value, int | float | str) else written(value) for name, value in options.items()
    }
    try:
        for name in config.run.tracker:
            tracker = _build(name, config, run, step)
            tracker.start()
            trackers.append(tracker)
            tracker.store_init_configuration(options)
    except Exception as error:  # any kind: no login, no server, a folder of another version
        for tracker in trackers:
            tracker.finish()
        if not any(run.checkpoints_path.iterdir()):
            shutil.rmtree(run.path)  # otherwise it would block the corrected command
        text = f"run.tracker={name}: did not start: {error}; mend that, or leave it out"
        raise UserError(text, "run.tracker") from error
    return trackers


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row of metrics.jsonl by path, such as `terms/layer3/offset1/all/loss`, without its step.

    A tracker keeps one value per name and step. So all of a validation gets the prefix `valid/`, and of diagnostics
    the progress, which the training row has, is left out.
    """
    if "valid" in row:
        row = {"valid": {name: value for name, value in row.items() if name not in ("step", "valid")} | row["valid"]}
    elif "diagnostics" in row:
        row = {"diagnostics": row["diagnostics"]}
    return {
        path: value for path, value in flatten(row, "/").items() if path != "step" and isinstance(value, int | float)
    }


def _build(name: str, config: Config, run: Run, step: int) -> GeneralTracker:
    folder, title, resumed = run.path / "trackers", run.path.resolve().name, step > 0
    key_path = folder / "key"  # the run's unique name, kept for its resumption
    if not key_path.exists():
        folder.mkdir(exist_ok=True)
        key_path.write_text(uuid4().hex)
    key = key_path.read_text()
    options: dict[str, Any] = {
        "aim": {"experiment": config.run.project},
        "clearml": {"task_name": title, "auto_connect_frameworks": False, "reuse_last_task_id": False},
        "comet_ml": {"experiment_key": key},
        "dvclive": {"dir": str(folder / "dvclive"), "resume": resumed, "save_dvc_exp": False, "dvcyaml": None},
        "mlflow": {"run_name": title},
        "swanlab": {"log_dir": str(folder / "swanlab"), "name": title, "id": key, "resume": "allow"},
        "tensorboard": {"purge_step": step + 1 if resumed else None},
        "trackio": {"name": f"{title}-{key[:8]}", "resume": "allow"},  # resumed by name
        "wandb": {"dir": str(folder), "name": title, "id": key, "resume": "allow"},
    }.get(name, {})
    # tensorboard takes the project for a folder; aim looks for the nearest .aim, unless given a folder.
    places = {"tensorboard": ("tensorboard", folder), "aim": (title, None)}.get(name, (config.run.project,))
    return LOGGER_TYPE_TO_CLASS[name](*places, **options)
