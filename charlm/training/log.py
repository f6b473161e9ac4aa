"""Logging of a run: rows of metrics.jsonl, the same rows to trackers, and a live progress line."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from charlm.config import Config, steps_of
from charlm.objective.terms import Term, active
from charlm.process import peak_memory
from charlm.runs.folder import Run
from charlm.text import fitted
from charlm.training.trackers import numbers, start_trackers


class Tracker:
    """Writes metrics and shows progress; does nothing on any process but the main one.

    In a terminal one line is redrawn in place; elsewhere only validations are printed, so that logs stay short.
    """

    def __init__(
        self,
        run: Run,
        config: Config,
        terms: Sequence[Term],
        *,
        step: int,
        seconds: float,
        bits_per_nat: float,
        main: bool,
    ):
        """
        Args:
            step: completed steps.
            seconds: duration of the run before it was resumed.
            bits_per_nat: factor from nats per symbol to bits per character.

        Raises:
            UserError: one of run.tracker did not start.
        """
        self.run, self.terms, self.main, self.bits_per_nat = run, terms, main, bits_per_nat
        self.total_steps = config.train.steps
        self.symbols_per_step = config.train.batch_size * config.model.context_length
        self.main_names = [f"layer{config.model.num_layers}/offset1/{positions}" for positions in ("all", "last")]
        self.trackers = start_trackers(config, run, step) if main else []
        self.began = time.perf_counter()
        self.started = self.began - seconds
        self.paused_seconds = 0.0
        """Time this process has spent on validations, checkpoints and diagnostics."""
        self.first_step = step
        self.cadences = {"validating": config.train.valid_every, "diagnosing": config.train.diagnose_every}
        self.newest_pauses: dict[str, float] = {}
        """Seconds that the newest pause of each kind took. Saving is left out: it takes next to no time to begin."""
        self.time_left = "?"
        self.logged_step, self.logged_time = step, time.perf_counter()
        self.lost_rows = 0
        self.bar = tqdm(
            total=self.total_steps,
            initial=step,
            disable=None if main else True,
            dynamic_ncols=True,
            bar_format="{n}/{total} {desc}",
            desc=f"{self.time_left} left",
        )
        self.shown = ""
        """Text of the progress line after the time left."""

    @property
    def seconds(self) -> float:
        """Duration of the run in seconds, including the time before it was resumed."""
        return time.perf_counter() - self.started

    def seconds_left(self, step: int) -> float:
        """Estimate of the time left after `step`, from the mean speed so far and the newest pause of each kind."""
        trained = time.perf_counter() - self.began - self.paused_seconds
        left = (self.total_steps - step) * trained / max(1, step - self.first_step)
        for doing, seconds in self.newest_pauses.items():
            every = steps_of(self.cadences[doing], self.total_steps)
            left += seconds * (math.ceil(self.total_steps / every) - (step - 1) // every) if every else 0.0
        return left

    @contextmanager
    def speed_paused(self, doing: str) -> Iterator[None]:
        """Time spent inside does not count towards the characters per second; the progress line says `doing`."""
        began = time.perf_counter()
        shown = self.shown
        self._show(f", {doing}")
        self.bar.refresh()
        try:
            yield
        finally:
            self._show(shown)
            self.bar.refresh()
        took = time.perf_counter() - began
        self.logged_time += took
        self.paused_seconds += took
        if doing in self.cadences:
            self.newest_pauses[doing] = took

    def log_training(
        self,
        step: int,
        learning_rate: float,
        loss: float,
        parts: dict[str, float],
        hedge_weights: dict[int, float] | None = None,
    ) -> None:
        """Record a training row: the losses of the update that completed `step`, in nats per symbol, and the weights
        that aux.hedge gives the layers after it."""
        if not self.main:
            return
        now = time.perf_counter()
        speed = (step - self.logged_step) * self.symbols_per_step / (now - self.logged_time)
        self.logged_step, self.logged_time = step, now
        # The update used the weights of the progress before it.
        weights = {term.name: weight for term, weight in active(self.terms, (step - 1) / self.total_steps)}
        main_loss = next((parts[name] for name in self.main_names if name in parts), None)
        bits = None if main_loss is None else main_loss * self.bits_per_nat
        row = {
            "loss": loss,
            "bits_per_character": bits,
            "learning_rate": learning_rate,
            "characters_per_second": speed,
            "seconds": self.seconds,
            "memory": peak_memory(),
            "terms": {name: {"loss": part, "weight": weights[name]} for name, part in parts.items()},
        }
        if hedge_weights is not None:
            row["hedge"] = {f"layer{layer}": weight for layer, weight in hedge_weights.items()}
        self._record(step, row)
        shown_bits = "" if bits is None else f" {bits:.3f} bpc"  # the line fits into 80 columns
        terms = f"{len(parts)} term" + ("s" if len(parts) > 1 else "")
        shown_speed = f"{speed / 1000:.1f}k" if speed >= 1000 else f"{speed:.0f}"
        self.time_left = tqdm.format_interval(self.seconds_left(step))
        self._show(f" loss {loss:.4g}{shown_bits} lr {learning_rate:.1e} {terms} {shown_speed} ch/s")
        self.bar.update(step - self.bar.n)

    def log_skipped(self, step: int, reason: str) -> None:
        """Record a skipped update."""
        self._record(step, {"skipped": 1, "reason": reason})
        self.say(f"step {step}: update skipped, {reason}")

    def log_validation(self, step: int, bits_per_character: float, bits_per_byte: float, best: bool) -> None:
        """Record a validation."""
        valid = {"bits_per_character": bits_per_character, "bits_per_byte": bits_per_byte}
        self._record(step, {"seconds": self.seconds, "valid": valid})
        self.say(f"step {step}: valid {bits_per_character:.4f} bits per character{' (best so far)' if best else ''}")

    def log_diagnostics(self, step: int, diagnostics: dict[str, Any]) -> None:
        """Record the result of `charlm.training.diagnose.diagnose`."""
        self._record(step, {"diagnostics": diagnostics})

    def say(self, line: str) -> None:
        """Print a line above the progress line."""
        if self.main:
            tqdm.write(fitted(line), file=sys.stderr)

    def conclude(self, best_step: int | None, best_bits: float | None) -> None:
        """Print the best score and the time this process took."""
        self.time_left = tqdm.format_interval(0.0)
        self._show(self.shown)
        if best_bits is not None:
            self.say(
                f"best: {best_bits:.4f} bits per character on valid, at step {best_step:,} of {self.total_steps:,}"
            )
        took = time.perf_counter() - self.began
        aside = self.paused_seconds / took if took else 0.0
        self.say(f"time: {tqdm.format_interval(took)}, {aside:.0%} of it for validations, checkpoints and diagnostics")

    def close(self) -> None:
        """Finish the trackers and close the progress line."""
        for tracker in self.trackers:
            self._keeping_on(tracker.name, tracker.finish)
        self.bar.close()

    def _show(self, rest: str) -> None:
        """Put the time left and `rest` on the progress line. tqdm's own estimate would jump with every validation."""
        self.shown = rest
        self.bar.set_description_str(f"{self.time_left} left{rest}", refresh=False)

    def _record(self, step: int, values: dict[str, Any]) -> None:
        """Write a row on the main process."""
        if not self.main:
            return
        row = {"step": step, "progress": step / self.total_steps} | values
        try:
            self.run.append_metrics(row)
        except OSError as error:
            if not self.lost_rows:
                self.say(f"metrics.jsonl lacks rows from step {step} on ({error.strerror}); the run goes on")
            self.lost_rows += 1
        self.trackers = [
            tracker for tracker in self.trackers if self._keeping_on(tracker.name, tracker.log, numbers(row), step=step)
        ]

    def _keeping_on(self, name: str, call: Callable[..., None], *arguments: Any, **options: Any) -> bool:
        """Whether the call succeeded. A tracker that fails does not end the run: metrics.jsonl has everything."""
        try:
            call(*arguments, **options)
        except Exception as error:
            self.say(f"run.tracker={name} failed and is no longer used: {error!r}")
            return False
        return True
