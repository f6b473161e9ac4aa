"""The training loop."""

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from accelerate import Accelerator

from charlm.config import Config, Stopped, UserError, steps_of
from charlm.data.corpus import Corpus, load_corpus
from charlm.data.windows import default_stride
from charlm.inference.evaluation import AUTOCAST_DTYPES, bits_per, count_units, negative_log_likelihoods
from charlm.objective.build import build_objective, check_registered
from charlm.objective.objective import Objective
from charlm.objective.routes import ROUTES, Joint
from charlm.runs.tensors import take_snapshot
from charlm.training.checkpointing import CheckpointWriter
from charlm.training.device import build_accelerator, choose_compile, torch_settings
from charlm.training.diagnose import diagnose
from charlm.training.errors import explained
from charlm.training.gradients import accumulate_gradients, find_micro_batch_size, micro_batches
from charlm.training.log import Tracker
from charlm.training.optimizers import build_optimizers, learning_rate_factor, set_learning_rates
from charlm.training.sharding import average, prepare, shard, unsharded
from charlm.training.start import TrainState, check_fits, check_folder, describe, open_run
from charlm.training.stop import StopRequests
from charlm.training.trackers import check_installed
from charlm.training.update import Updates


def train(config: Config, kind: "type[Training] | None" = None) -> Path:
    """Train as `config` says, on all processes of the launcher, and return the run's folder.

    `kind` is a subclass of `Training` to use in its place, by which a benchmark times the steps.

    Raises:
        UserError: options, corpus or the run's folder do not allow it, and nothing was written; or no update can be
            made any more, and the checkpoint from before remains.
        Stopped: SIGTERM, SIGINT, SIGUSR1, `run.max_time` or the death of the launcher asked for it. A checkpoint holds
            all steps, including the one in progress.
    """
    check_installed(config.run.tracker)
    check_registered(config.aux.tasks)
    check_folder(config.run)
    with StopRequests(config.run.max_seconds) as stop, torch_settings(config):
        accelerator, precision_reason = build_accelerator(config.train)
        with stop.interrupting():
            corpus = load_corpus(config.data, show_progress=accelerator.is_main_process)
        if stop.agreed():
            raise Stopped(f"stopped before training began: {stop.reason}; there is nothing new to save")
        torch.manual_seed(config.train.seed)
        objective = build_objective(config, corpus.vocabulary.size).to(accelerator.device)
        check_fits(config, corpus, objective, accelerator)
        shard(config, objective, accelerator.num_processes)
        route = ROUTES[config.aux.route](objective, config.aux, partial(build_optimizers, config.train, objective))
        with ExitStack() as stack:
            stack.enter_context(explained(config.train))
            run, state, news = stack.enter_context(open_run(config, corpus, accelerator, objective, route.optimizers))
            tracker = Tracker(
                run,
                config,
                objective.terms,
                step=state.step,
                seconds=state.seconds,
                bits_per_nat=corpus.splits["train"].symbols / corpus.splits["train"].characters / np.log(2),
                main=accelerator.is_main_process,
            )
            stack.enter_context(closing(tracker))
            for line in (*describe(config, corpus, objective, accelerator, precision_reason), *news):
                tracker.say(line)
            writer = CheckpointWriter(run, config.train.keep_checkpoints, tracker.say)
            stack.enter_context(closing(writer))
            (kind or Training)(config, corpus, accelerator, objective, route, state, tracker, writer, stop).fit()
            writer.wait()
            tracker.conclude(state.best_step, state.best_bits)
        accelerator.wait_for_everyone()
        return run.path


@dataclass
class Training:
    """A run in progress. All processes call each method at the same step."""

    config: Config
    corpus: Corpus
    accelerator: Accelerator
    objective: Objective
    route: Joint
    state: TrainState
    tracker: Tracker
    writer: CheckpointWriter
    stop: StopRequests

    def fit(self) -> None:
        """Train to the last step. A step depends on the config, the corpus and the number of completed steps only."""
        train, state = self.config.train, self.state
        self.prepare()
        try:
            while True:
                if self.due(train.valid_every) and state.validated_step < state.step:
                    self.validate()
                elif self.due(train.checkpoint_every) and self.saved_step < state.step:
                    with self.tracker.speed_paused("saving"):
                        self.save()
                if state.step == train.steps:
                    return
                self.stop.check()
                self.step()
                if self.due(train.log_every):
                    self.log()
                if self.due(train.diagnose_every):
                    self.diagnose()
        except Stopped:
            if state.step == 0 or self.saved_step < state.step:
                self.save()
            self.writer.wait()
            run = self.config.run
            again = "the same command" + ("" if run.auto_resume else " with --run.resume=true")
            again += "" if run.resume_from is None else f" and without --run.resume_from={run.resume_from}"
            raise Stopped(
                f"stopped after step {state.step:,} of {train.steps:,}: {self.stop.reason}; {again} continues"
            ) from None

    def prepare(self) -> None:
        """Compile the blocks if `train` says so, and hand the model to accelerate."""
        train = self.config.train
        if choose_compile(train):
            for block in self.objective.transformer.blocks:
                block.compile()
        self.micro_batch_size = train.micro_batch_size
        if train.micro_batch_size == "auto":
            most = -(-train.batch_size // self.accelerator.num_processes)
            self.micro_batch_size = find_micro_batch_size(self.objective, self.accelerator, most)
            self.tracker.say(f"train.micro_batch_size=auto: {self.micro_batch_size} windows fit")
        self.model = prepare(self.accelerator, self.objective, self.route.one_backward)
        adapt = self.objective.adapt if self.objective.hedge is not None else None
        self.updates = Updates(
            train, self.accelerator, self.route.parameters, self.route.optimizers, self.state.accepted_losses, adapt
        )
        self.saved_step, self.newest_update = self.state.step, None

    def due(self, cadence: float) -> bool:
        """Whether something that happens every `cadence` is due now. All but cadence 0 are due at the last step."""
        every, step = steps_of(cadence, self.config.train.steps), self.state.step
        return every > 0 and (step % every == 0 or step == self.config.train.steps)

    def step(self) -> None:
        """Forward, backward, clip, and step or skip. Other routes than joint have several passes or updates."""
        config, accelerator, step = self.config, self.accelerator, self.state.step
        progress, factor = step / config.train.steps, learning_rate_factor(config.train, step)
        ids = self.corpus.splits["train"].ids
        windows = micro_batches(config, self.micro_batch_size, ids, accelerator, self.objective, step)
        passes = self.route.passes(progress)
        for number, layers in enumerate(passes, start=1):
            losses = accumulate_gradients(config, accelerator, self.model, self.route, step, windows, layers)
            updates = self.route.updates(progress)
            for update in updates:
                set_learning_rates(update.step_sizes, factor)
                if not self.route.one_backward:
                    with update.in_place():
                        average(accelerator, self.route.parameters)
            self.updates.apply(step, losses, updates, last=number == len(passes))
        self.state.step += 1

    def log(self) -> None:
        """Record the losses of the newest update; end the run if too many were skipped."""
        self.read_updates()
        train, made = self.config.train, self.newest_update
        if made is not None:
            rate = train.learning_rate * learning_rate_factor(train, made.step - 1)
            hedge = self.objective.hedge
            hedge_weights = dict(zip(hedge.layers, hedge.weights.tolist(), strict=True)) if hedge is not None else None
            self.tracker.log_training(made.step, rate, made.loss, made.parts, hedge_weights)
            self.newest_update = None
        if self.state.step - self.state.updated_step >= train.max_skipped:
            self.give_up()

    def read_updates(self) -> None:
        """Read the reports of updates since the last call, and record the skipped ones."""
        for report in self.updates.read():
            if report.skipped:
                self.tracker.log_skipped(report.step, report.skipped)
            else:
                self.newest_update, self.state.updated_step = report, report.step

    def give_up(self) -> NoReturn:
        """Save a checkpoint of the last update made, and raise UserError."""
        skipped = self.state.step - self.state.updated_step
        self.state.step = self.state.updated_step
        self.state.validated_step = min(self.state.validated_step, self.state.step)
        if self.saved_step < self.state.step:
            self.save()
        raise UserError(
            f"train.max_skipped={self.config.train.max_skipped}: the last {skipped} updates were skipped, see above, "
            "and the newest checkpoint has the parameters from before them; begin another --run.dir with a smaller "
            "--train.learning_rate, a longer --train.warmup or --train.clip_norm=1"
        )

    def diagnose(self) -> None:
        """Record the diagnostics of the newest step."""
        self.read_updates()
        with self.tracker.speed_paused("diagnosing"):
            progress = (self.state.step - 1) / self.config.train.steps
            diagnostics = diagnose(
                self.config, self.corpus, self.objective, self.accelerator, progress, self.micro_batch_size
            )
            self.tracker.log_diagnostics(self.state.step, diagnostics)

    def validate(self) -> None:
        """Score the validation split, and save."""
        state = self.state
        with self.tracker.speed_paused("validating"):
            bits_per_character, bits_per_byte = validate(
                self.config, self.corpus, self.objective, self.accelerator.mixed_precision, self.stop.check
            )
            best = bits_per_character < (float("inf") if state.best_bits is None else state.best_bits)
            if best:
                state.best_step, state.best_bits = state.step, bits_per_character
            state.validated_step = state.step
            self.tracker.log_validation(state.step, bits_per_character, bits_per_byte, best)
            self.save(best)

    def save(self, best: bool = False) -> None:
        """Start to write a checkpoint of the completed steps, while the loop continues."""
        self.read_updates()
        self.writer.wait()  # otherwise two snapshots would be in memory
        state, scaler = self.state, self.accelerator.scaler
        state.seconds, state.accepted_losses = self.tracker.seconds, self.updates.accepted_losses()
        record = asdict(state) | {"scaler": scaler.state_dict() if scaler else None}
        snapshot = take_snapshot(self.objective, self.route.optimizers, record)
        if snapshot is not None and not all(tensor.isfinite().all() for tensor in snapshot.model.values()):
            self.tracker.say(f"step {state.step}: no checkpoint: the parameters are no longer finite")
        elif snapshot is not None:
            # The newest is the best until there is a validation.
            self.writer.save(snapshot, best or state.best_step is None)
        self.saved_step = state.step


def validate(
    config: Config, corpus: Corpus, objective: Objective, precision: str, before_batch: Callable[[], None]
) -> tuple[float, float]:
    """Bits per character and per byte of the first `train.valid_symbols` symbols of the validation split.

    Uses the precision of training and a stride of half the context. All processes share the work and get the result.
    """
    ids = corpus.splits["valid"].ids[: config.train.valid_symbols]
    with unsharded(objective):
        nats = negative_log_likelihoods(
            objective.transformer,
            objective.heads,
            ids,
            stride=default_stride(config.model.context_length),
            autocast_dtype=AUTOCAST_DTYPES.get(precision),
            before_batch=before_batch,
        )[config.model.num_layers]
    characters, num_bytes = count_units(ids, corpus.vocabulary)
    return bits_per(nats, characters), bits_per(nats, num_bytes)
