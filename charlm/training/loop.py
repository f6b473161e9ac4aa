"""The training loop."""

import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from accelerate import Accelerator

from charlm.config import Config, Stopped, UserError, steps_of
from charlm.data.corpus import Corpus, load_corpus
from charlm.data.sources import check_outside
from charlm.data.windows import default_stride
from charlm.inference.evaluation import ScoredText
from charlm.inference.scoring import AUTOCAST_DTYPES, negative_log_likelihoods
from charlm.objective.objective import Objective
from charlm.objective.routes import Joint
from charlm.objective.tasks import check_registered, named_in_errors
from charlm.process import lasting
from charlm.runs.checkpoints import save_checkpoint
from charlm.runs.folder import Run
from charlm.runs.tensors import Snapshot, take_snapshot
from charlm.training.clock import Clock
from charlm.training.device import build_accelerator, choose_compile, torch_settings
from charlm.training.diagnose import diagnose
from charlm.training.gradients import accumulate_gradients, find_micro_batch_size, micro_batches
from charlm.training.log import Tracker, check_installed
from charlm.training.optimizers import WeightAverage, learning_rate_factor, set_learning_rates
from charlm.training.origin import resolved
from charlm.training.sharding import average_gradients, unsharded, wrap
from charlm.training.start import TrainState, build, check_folder, describe, open_run, refusal
from charlm.training.stop import StopRequests, explained
from charlm.training.update import Updates


def train(config: Config, kind: "type[Training] | None" = None, stop: StopRequests | None = None) -> Path:
    """Train on all processes of the launcher, and return the run's folder.

    `kind` replaces `Training`; `stop` is given if requests to stop are collected already.

    Raises:
        UserError: options, corpus or folder do not allow it; or too many updates were skipped.
        Stopped: by a signal, `run.max_time` or the launcher's death. A checkpoint holds all steps.
    """
    check_installed(config.run.tracker)
    check_registered(config.aux.tasks)
    check_outside(config.data, "run.dir", config.run.dir)
    config = resolved(config, check_folder(config.run))
    collected = StopRequests(config.run.max_time) if stop is None else nullcontext(stop)
    with collected as stop, torch_settings(config), redirect_stderr(lasting(sys.stderr)):
        accelerator, precision_reason = build_accelerator(config.train)
        main = accelerator.is_main_process
        with stop.interrupting():
            corpus = load_corpus(config.data, show_progress=main)
        stop.check()
        with ExitStack() as stack:
            if tasks := ", ".join(config.aux.tasks):  # torch does not say whose gradient failed
                stack.enter_context(named_in_errors(tasks, within="backward"))
            stack.enter_context(explained(config.train, stop))
            clock = Clock(config.train.time)
            config = clock.with_steps(config, corpus, accelerator, kind or Training, stop)
            objective, route, average = build(config, corpus, accelerator)
            restored = *route.optimizers, average
            run, state, news = stack.enter_context(open_run(config, corpus, accelerator, objective, restored))
            state.seconds += clock.spent
            tracker = Tracker(run, config, corpus, objective.terms, state, main)
            stack.enter_context(closing(tracker))
            for line in describe(config, corpus, objective, accelerator, precision_reason) + news:
                tracker.say(line)
            writer = CheckpointWriter(run, config.train.keep_checkpoints, tracker.say)
            stack.enter_context(closing(writer))
            parts = config, corpus, accelerator, objective, route, average, state, tracker, writer, stop, clock
            (kind or Training)(*parts).fit()
            tracker.conclude(state.best_step, state.best_bits)
        accelerator.wait_for_everyone()
        return run.path


@dataclass
class Training:
    """A run in progress. All processes call its methods at the same steps."""

    config: Config
    corpus: Corpus
    accelerator: Accelerator
    objective: Objective
    route: Joint
    average: WeightAverage
    state: TrainState
    tracker: Tracker
    writer: "CheckpointWriter"
    stop: StopRequests
    clock: Clock | None = None  # a trial of the speed has none

    def fit(self) -> None:
        """Train to the last step. A step depends only on config, corpus and those before."""
        train, state = self.config.train, self.state
        self.prepare()
        try:
            while True:
                if self.due(train.valid_every) and state.validated_step < state.step:
                    self.validate()  # and save
                elif self.due(train.checkpoint_every) and self.saved_step < state.step:
                    with self.tracker.speed_paused("saving"):
                        self.save()
                if state.step == self.config.train.steps:
                    return
                self.clock.look(self)
                self.stop.check()
                self.step()
                if self.due(train.log_every):
                    self.log()
                if self.due(train.diagnose_every):
                    self.diagnose()
        except Stopped:
            if state.step == 0 or self.saved_step < state.step:
                self.save()
            run = self.config.run
            again = "" if run.auto_resume else " with --run.resume=true"
            if run.resume_from is not None:
                again += f" and without --run.resume_from={run.resume_from}"
            done = f"stopped after step {state.step:,} of {self.config.train.steps:,}"
            raise Stopped(f"{done}: {self.stop.reason}; the same command{again} continues") from None

    def prepare(self) -> None:
        """Choose the micro-batch, compile, and wrap the objective in autocast and DDP."""
        train = self.config.train
        self.micro_batch_size = train.micro_batch_size
        if train.micro_batch_size == "auto":
            copies = 2 if train.average == "no" else 3  # of the parameters
            most = -(-train.batch_size // self.accelerator.num_processes)
            self.micro_batch_size = find_micro_batch_size(self.objective, self.accelerator, most, copies)
            self.tracker.say(f"train.micro_batch_size=auto: {self.micro_batch_size} windows fit")
        if choose_compile(train, self.accelerator.device):
            self.objective.compile()
        self.model, self.to_average = wrap(self.accelerator, self.objective, self.route.one_backward)
        adapt = self.objective.adapt if self.objective.hedge is not None else None
        self.updates = Updates(train, self.accelerator, self.route, self.state.accepted_losses, adapt)
        self.saved_step = self.state.step
        self.newest_update = None

    def due(self, cadence: float) -> bool:
        """Whether a cadence is due now. Every cadence but 0 is due at the last step."""
        step, train = self.state.step, self.config.train
        every = steps_of(cadence, train.planned)
        return every > 0 and (step % every == 0 or step == train.steps)

    def step(self) -> None:
        """Forward, backward, clip, and step or skip."""
        config, accelerator, route = self.config, self.accelerator, self.route
        step, size = self.state.step, self.micro_batch_size
        progress, factor = config.train.progress(step), learning_rate_factor(config.train, step)
        windows = micro_batches(config, size, self.corpus.texts("train"), accelerator, self.objective, step)
        passes = route.passes(progress)
        for number, layers in enumerate(passes, start=1):
            losses = accumulate_gradients(config, accelerator, self.model, route, step, windows, layers)
            updates = route.updates(progress)
            for update in updates:
                set_learning_rates(update.step_sizes, factor)
                with update.in_place():
                    average_gradients(accelerator, self.to_average)
            self.updates.apply(step, losses, updates, last=number == len(passes))
        self.state.step += 1
        self.average.update(config.train, self.state.step)

    def log(self) -> None:
        """Record the newest update; end the run if too many were skipped."""
        self.read_updates()
        train, made = self.config.train, self.newest_update
        if made is not None:
            rate = train.learning_rate * learning_rate_factor(train, made.step - 1)
            self.tracker.log_training(made, rate, self.objective.hedge)
            self.newest_update = None
        if self.state.step - self.state.updated_step >= train.max_skipped:
            self.give_up()

    def read_updates(self) -> None:
        """Record skipped updates, and remember the newest made."""
        for report in self.updates.read():
            if report.skipped:
                self.tracker.record(report.step, {"skipped": 1, "reason": report.skipped})
                self.tracker.say(f"step {report.step}: update skipped, {report.skipped}")
            else:
                self.newest_update, self.state.updated_step = report, report.step

    def give_up(self) -> NoReturn:
        """Save a checkpoint of the last update made, and raise UserError."""
        state = self.state
        skipped = state.step - state.updated_step
        state.step = state.updated_step
        state.validated_step = min(state.validated_step, state.step)
        if self.saved_step < state.step:
            self.save()
        text = f"the last {skipped} updates were skipped; begin another --run.dir"
        ways_out = "with a smaller --train.learning_rate or --train.clip_norm=1"
        raise refusal(self.config, "train.max_skipped", f"{text} {ways_out}")

    def diagnose(self) -> None:
        self.read_updates()
        config, step, size = self.config, self.state.step, self.micro_batch_size
        progress = config.train.progress(step - 1)
        with self.tracker.speed_paused("diagnosing"):
            row = diagnose(config, self.corpus, self.objective, self.accelerator, progress, size)
            self.tracker.record(step, {"diagnostics": row})

    def validate(self) -> None:
        """Score the validation split, and save."""
        config, state = self.config, self.state
        text = ScoredText(self.corpus, config.data.shares, "valid", config.train.valid_symbols)
        with self.tracker.speed_paused("validating"):
            with self.average, unsharded(self.objective):
                nats = negative_log_likelihoods(
                    self.objective.transformer,
                    self.objective.heads,
                    text.ids,
                    lengths=text.lengths,
                    stride=default_stride(config.model.context_length),
                    autocast_dtype=AUTOCAST_DTYPES.get(self.accelerator.mixed_precision),
                    before_batch=self.stop.check,
                )[config.model.num_layers]
            bits = text.bits(nats)
            best = bits < (float("inf") if state.best_bits is None else state.best_bits)
            if best:
                state.best_step, state.best_bits = state.step, bits
            state.validated_step = state.step
            self.tracker.log_validation(state.step, bits, text.bits(nats, 1), best, text.by_source(nats))
            self.save(best)

    def save(self, best: bool = False) -> None:
        """Start to write a checkpoint, while the loop continues."""
        self.read_updates()
        self.writer.wait()  # otherwise two snapshots would be in memory
        state, scaler = self.state, self.accelerator.scaler
        state.seconds = self.tracker.seconds
        state.accepted_losses = self.updates.accepted_losses()
        state.scaler = scaler.state_dict() if scaler else None
        snapshot = take_snapshot(self.objective, (*self.route.optimizers, self.average), state.model_dump())
        if snapshot is not None:
            # A sum is finite only if all its terms are, and takes no memory: a tenth of the time of isfinite().all().
            if all(tensor.sum().isfinite() for tensor in snapshot.model.values()):
                # The newest counts as the best before the first validation.
                self.writer.save(snapshot, best or state.best_step is None)
            else:
                self.tracker.say(f"step {state.step}: no checkpoint: parameters are not finite")
        self.saved_step = state.step


class CheckpointWriter:
    """Writes snapshots one by one in a thread. A failed write does not end the run."""

    def __init__(self, run: Run, keep: int, say: Callable[[str], None]):
        """`keep`: number of newest checkpoints to keep; `say` is called from the thread."""
        self.run, self.keep, self.say = run, keep, say
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._newest: Future[str | None] | None = None

    def save(self, snapshot: Snapshot, best: bool) -> None:
        """Start to write. The snapshot must not change any more."""
        self.wait()
        self._newest = self._thread.submit(self._write, snapshot, best)

    def wait(self) -> str | None:
        """Wait for the newest write; return the reason if it failed."""
        return self._newest.result() if self._newest is not None else None

    def close(self) -> None:
        """End the thread. Raises UserError if the newest snapshot could not be written."""
        self._thread.shutdown()
        if complaint := self.wait():
            self.run.check_held()
            text = f"{self.run.path}: the newest checkpoint is missing: {complaint}"
            raise UserError(f"{text}; make room, and continue with --run.resume=true")

    def _write(self, snapshot: Snapshot, best: bool) -> str | None:
        self.run.check_held()
        try:
            save_checkpoint(self.run, snapshot, best=best, keep=self.keep)
        except (OSError, UserError) as error:
            reason = getattr(error, "strerror", None) or error
            complaint = f"step {snapshot.state['step']:,}: checkpoint not written ({reason})"
            self.say(f"{complaint}; the run continues, and tries again")
            return complaint
        return None
