"""Logging of a run: metrics.jsonl, accelerate's trackers, and a progress line.

`init_trackers` gives all trackers one place; `end_training` ends the process group.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import mul
from typing import Any
from uuid import uuid4

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from tqdm import tqdm

from charlm.config import Config, UserError, flatten
from charlm.config.errors import shown
from charlm.data.corpus import Corpus
from charlm.files import write_whole
from charlm.objective.hedge import Hedge
from charlm.objective.terms import Term, active
from charlm.process import peak_memory
from charlm.runs.folder import Run
from charlm.text import counted, fitted
from charlm.training.start import TrainState
from charlm.training.update import StepReport


class Tracker:
    """Writes metrics and shows progress, on the main process only."""

    def __init__(self, run: Run, config: Config, corpus: Corpus, terms: Sequence[Term], state: TrainState, main: bool):
        """Raises UserError if one of run.tracker does not start."""
        self.run, self.terms, self.main = run, terms, main
        splits = [source["splits"]["train"] for source in corpus.sources.values()]
        ratios = [split["symbols"] / split["characters"] for split in splits or [dict(corpus.splits["train"])]]
        self.bits_per_nat = sum(map(mul, config.data.shares, ratios)) / math.log(2)
        self.train = config.train
        self.symbols_per_step = config.train.batch_size * config.model.context_length
        main_head = f"layer{config.model.num_layers}/offset1"
        self.main_names = [f"{main_head}/all", f"{main_head}/last"]
        self.trackers = start_trackers(config, run, state.step) if main else []
        self.began = time.perf_counter()
        self.earlier_seconds = state.seconds
        self.paused_seconds = 0.0
        self.logged_step = state.step
        self.logged_seconds = 0.0
        self.loses_rows = False
        self.shown = ""
        self.bar = tqdm(
            total=self.train.steps,
            initial=state.step,
            disable=None if main else True,
            dynamic_ncols=True,
            bar_format="{n}/{total} {remaining} left{desc}",
            smoothing=0,
        )

    @property
    def seconds(self) -> float:
        """Duration of the run, earlier sessions included."""
        return self.earlier_seconds + time.perf_counter() - self.began

    @contextmanager
    def speed_paused(self, doing: str) -> Iterator[None]:
        """Inside, time does not count as training; the progress line says `doing`."""
        began = time.perf_counter()
        self.bar.set_description_str(f", {doing}")
        try:
            yield
        finally:
            self.bar.set_description_str(self.shown)
        self.paused_seconds += time.perf_counter() - began

    def log_training(self, update: StepReport, learning_rate: float, hedge: Hedge | None = None) -> None:
        """Record an update, and the weights of `hedge` after it."""
        if not self.main:
            return
        step, parts = update.step, update.parts
        seconds = time.perf_counter() - self.began - self.paused_seconds
        symbols = (step - self.logged_step) * self.symbols_per_step
        speed = symbols / (seconds - self.logged_seconds)
        self.logged_step, self.logged_seconds = step, seconds
        main_losses = [parts[name] for name in self.main_names if name in parts]
        bits = main_losses[0] * self.bits_per_nat if main_losses else None
        # The update used the weights of the progress before it.
        weighted = active(self.terms, self.train.progress(step - 1))
        weights = {term.name: weight for term, weight in weighted}
        row = {
            "loss": update.loss,
            "bits_per_character": bits,
            "learning_rate": learning_rate,
            "characters_per_second": speed,
            "seconds": self.seconds,
            "memory": peak_memory(),
            "terms": {name: {"loss": parts[name], "weight": weights[name]} for name in parts},
        }
        if hedge is not None:
            layers = [f"layer{layer}" for layer in hedge.layers]
            row["hedge"] = dict(zip(layers, hedge.weights.tolist(), strict=True))
        self.record(step, row)
        shown_bits = "" if bits is None else f" {bits:.3f} bpc"  # the line fits into 80 columns
        shown_speed = f"{speed / 1000:.1f}k" if speed >= 1000 else f"{speed:.0f}"
        losses = f" loss {update.loss:.4g}{shown_bits} lr {learning_rate:.1e}"
        self.shown = f"{losses} {counted(len(parts), 'term')} {shown_speed} ch/s"
        self.bar.set_description_str(self.shown, refresh=False)
        self.bar.update(step - self.bar.n)

    def log_validation(
        self, step: int, bits_per_character: float, bits_per_byte: float, best: bool, sources: dict[str, float]
    ) -> None:
        """Record a validation. Of a mixture, `sources` are the bits per character of each."""
        valid = {"bits_per_character": bits_per_character, "bits_per_byte": bits_per_byte}
        if len(sources) > 1:
            valid |= {f"bits_per_character/{name}": bits for name, bits in sources.items()}
        self.record(step, {"seconds": self.seconds, "valid": valid})
        mark = " (best so far)" if best else ""
        self.say(f"step {step}: valid {bits_per_character:.4f} bits per character{mark}")

    def say(self, line: str) -> None:
        """Print a line above the progress line."""
        if self.main:
            tqdm.write(fitted(line), file=sys.stderr)

    def conclude(self, best_step: int | None, best_bits: float | None) -> None:
        """Print the best score and the time taken."""
        if best_bits is not None:
            at = f"at step {best_step:,} of {self.train.steps:,}"
            self.say(f"best: {best_bits:.4f} bits per character on valid, {at}")
        took = time.perf_counter() - self.began
        aside = f"{self.paused_seconds / took:.0%} of it for"
        purpose = "validations, checkpoints and diagnostics"
        self.say(f"time: {tqdm.format_interval(took)}, {aside} {purpose}")

    def close(self) -> None:
        """Finish the trackers and close the progress line."""
        for tracker in self.trackers:
            self._keeping_on(tracker.name, tracker.finish)
        self.bar.close()

    def record(self, step: int, values: dict[str, Any]) -> None:
        """Write a row of metrics.jsonl, and pass it to the trackers."""
        if not self.main:
            return
        row = {"step": step, "progress": self.train.progress(step)} | values
        try:
            self.run.append_metrics(row)
        except OSError as error:
            if not self.loses_rows:
                self.say(f"metrics.jsonl lacks rows from step {step} on: {error.strerror}")
            self.loses_rows = True
        values = numbers(row)
        for tracker in list(self.trackers):
            if not self._keeping_on(tracker.name, tracker.log, values, step=step):
                self.trackers.remove(tracker)

    def _keeping_on(self, name: str, call: Callable[..., None], *args: Any, **options: Any) -> bool:
        try:
            call(*args, **options)
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
        fault = f"run.tracker={','.join(missing)}: not installed"
        raise UserError(f"{fault}; pip install {packages}, or leave it out", "run.tracker")


def start_trackers(config: Config, run: Run, step: int) -> list[GeneralTracker]:
    """Start the trackers of a run at `step`. Raises UserError if one does not start."""
    trackers = []
    options = {
        name: value if isinstance(value, int | float | str) else shown(value, limit=10_000)
        for name, value in flatten(config.model_dump(), ".").items()
    }
    try:
        for name in config.run.tracker:
            tracker = _build(name, config, run, step)
            tracker.start()
            trackers.append(tracker)
            tracker.store_init_configuration(options)
    except Exception as error:  # no login, no server, a folder of another version
        for tracker in trackers:
            tracker.finish()
        text = f"run.tracker={name}: did not start: {error}"
        raise UserError(f"{text}; fix that, or leave it out", "run.tracker") from error
    return trackers


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row but its step, by path: `terms/layer3/offset1/all/loss`."""
    row = {name: value for name, value in row.items() if name != "step"}
    # A tracker keeps one value per name and step.
    if "valid" in row:
        valid = row.pop("valid")
        row = {"valid": row | valid}
    elif "diagnostics" in row:
        row = {"diagnostics": row["diagnostics"]}
    values = flatten(row, "/").items()
    return {path: own for path, own in values if isinstance(own, int | float)}


def _build(name: str, config: Config, run: Run, step: int) -> GeneralTracker:
    folder, title = run.path / "trackers", run.path.resolve().name
    folder.mkdir(exist_ok=True)
    path = folder / "key"  # unique name, kept for resumption
    if not path.is_file():
        write_whole(path, uuid4().hex)
    with path.open() as file:
        key = file.read(64)
    no_repository = {"save_dvc_exp": False, "dvcyaml": None}
    options = {
        "aim": {"experiment": config.run.project},
        "clearml": {"task_name": title, "auto_connect_frameworks": False, "reuse_last_task_id": False},
        "comet_ml": {"experiment_key": key},
        "dvclive": {"dir": f"{folder}/dvclive", "resume": step > 0} | no_repository,
        "mlflow": {"run_name": title},
        "swanlab": {"log_dir": f"{folder}/swanlab", "name": title, "id": key, "resume": "allow"},
        "tensorboard": {"purge_step": step + 1 if step > 0 else None},
        "trackio": {"name": f"{title}-{key[:8]}", "resume": "allow"},  # resumed by name
        "wandb": {"dir": str(folder), "name": title, "id": key, "resume": "allow"},
    }.get(name, {})
    # tensorboard takes the project for a folder; aim would look for the nearest .aim.
    places = {"tensorboard": ("tensorboard", folder), "aim": (title, None)}
    place = places.get(name, (config.run.project,))
    return LOGGER_TYPE_TO_CLASS[name](*place, **options)
