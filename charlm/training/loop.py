"""The training loop.

Shapes: B windows of this process, W characters of a window.
"""

from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from charlm.config import Config, steps_of
from charlm.data.corpus import Corpus, load_corpus
from charlm.data.windows import training_windows
from charlm.inference.evaluation import AUTOCAST_DTYPES, bits_per, count_units, negative_log_likelihoods
from charlm.model.memory import keep_freed_memory
from charlm.objective.objective import LossReport, Objective
from charlm.report.figures import draw_run
from charlm.runs.checkpoints import save_checkpoint
from charlm.runs.folder import Run
from charlm.runs.loading import build_objective
from charlm.runs.snapshot import take_snapshot
from charlm.training.hardware import build_accelerator, choose_compile, torch_settings
from charlm.training.opening import TrainState, check_fits, describe, open_run
from charlm.training.optimizers import build_optimizers, learning_rate_factor, set_learning_rates, sparse_parameters
from charlm.training.sharding import no_sync, prepare, shard, unsharded
from charlm.training.trackers import check_installed
from charlm.training.tracking import Tracker


def train(config: Config) -> Path:
    """Train as `config` says, on all the processes of the launcher, and return the run's folder.

    Raises:
        UserError: the options, the corpus or the run's folder do not allow it; nothing has been written then.
    """
    check_installed(config.run.tracker)
    keep_freed_memory()
    with torch_settings(config.train):
        accelerator, precision_reason = build_accelerator(config.train)
        corpus = load_corpus(config.data, progress=accelerator.is_main_process)
        torch.manual_seed(config.train.seed)
        objective = build_objective(config, corpus.vocabulary.size).to(accelerator.device)
        check_fits(config, corpus, objective, accelerator.num_processes)
        shard(config, objective, accelerator.num_processes)
        optimizers = build_optimizers(config.train, objective)
        run, state, news = open_run(config, corpus, accelerator, objective, optimizers)
        tracker = Tracker(
            run,
            config,
            objective.terms,
            step=state.step,
            seconds=state.seconds,
            bits_per_nat=corpus.splits["train"].symbols / corpus.splits["train"].characters / np.log(2),
            main=accelerator.is_main_process,
        )
        with closing(tracker):
            for line in (*describe(config, corpus, objective, accelerator, precision_reason), *news):
                tracker.say(line)
            fit(config, corpus, accelerator, objective, optimizers, run, state, tracker)
        if accelerator.is_main_process:
            draw_run(run.path)
        accelerator.wait_for_everyone()
        return run.path


def fit(
    config: Config,
    corpus: Corpus,
    accelerator: Accelerator,
    objective: Objective,
    optimizers: list[Optimizer],
    run: Run,
    state: TrainState,
    tracker: Tracker,
) -> None:
    """The loop: everything that a step needs follows from the config, the corpus and the number of completed steps."""
    steps = config.train.steps
    log_every, valid_every = steps_of(config.train.log_every, steps), steps_of(config.train.valid_every, steps)
    objective.cross_entropy = config.train.cross_entropy
    objective.transformer.activation_checkpointing = config.train.activation_checkpointing
    for block in objective.transformer.blocks:
        block.attention.backend = config.train.attention
    if choose_compile(config.train):
        for block in objective.transformer.blocks:
            block.compile()
    model, *prepared = prepare(accelerator, objective, optimizers)
    sparse = sparse_parameters(objective)
    clipped = [parameter for parameter in objective.parameters() if parameter not in sparse]

    while state.step < steps:
        factor = learning_rate_factor(config.train, state.step)
        set_learning_rates(prepared, factor)
        reports = accumulate_gradients(config, corpus.splits["train"].ids, accelerator, model, objective, state.step)
        if config.train.clip_norm:
            accelerator.clip_grad_norm_(clipped, config.train.clip_norm)
        for optimizer in prepared:
            optimizer.step()
            optimizer.zero_grad()
        state.step += 1

        if state.step % log_every == 0 or state.step == steps:
            loss, parts = global_mean(accelerator, reports)
            tracker.log_training(state.step, factor * config.train.learning_rate, loss, parts)
        if state.step % valid_every == 0 or state.step == steps:
            with tracker.speed_paused():
                bits_per_character, bits_per_byte = validate(config, corpus, objective, accelerator.mixed_precision)
                best = bits_per_character < state.best_bits
                if best:
                    state.best_step, state.best_bits = state.step, bits_per_character
                tracker.log_validation(state.step, bits_per_character, bits_per_byte, best)
                state.seconds = tracker.seconds
                scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
                snapshot = take_snapshot(objective, optimizers, asdict(state) | {"scaler": scaler})
                if snapshot is not None:
                    save_checkpoint(run, snapshot, best=best, keep=config.train.keep_checkpoints)
                accelerator.wait_for_everyone()


def accumulate_gradients(
    config: Config, ids: np.ndarray, accelerator: Accelerator, model: nn.Module, objective: Objective, step: int
) -> list[tuple[float, LossReport]]:
    """The gradient of the global batch's mean loss, in `.grad`; each micro-batch's report with its share of the batch.

    A process takes its slice of the global batch, at most `micro_batch_size` windows at a time. The reducer averages
    over processes, so that each micro-batch counts by its share of the batch times their number.
    """
    train = config.train
    divisor = train.context_divisor if step / train.steps < train.full_context_from else 1
    windows = training_windows(
        ids,
        seed=train.seed,
        step=step,
        batch_size=train.batch_size * divisor,
        window_length=max(1, config.model.context_length // divisor) + objective.longest_offset,
    )
    own = torch.from_numpy(np.array_split(windows, accelerator.num_processes)[accelerator.process_index])
    micro_batches = own.split((train.micro_batch_size or len(own)) * divisor)
    reports = []
    for index, windows_BW in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        torch.manual_seed(noise_seed(train.seed, step, accelerator.process_index, index))
        with nullcontext() if last else no_sync(accelerator, model):
            report = model(windows_BW.to(accelerator.device, non_blocking=True), step / train.steps)
            share = len(windows_BW) / len(windows)
            accelerator.backward(report.total * (share * accelerator.num_processes))
        reports.append((share, LossReport(report.total.detach(), report.parts)))
    return reports


def noise_seed(seed: int, step: int, rank: int, micro_batch: int) -> int:
    """The seed of dropout: one that no other (step, rank, micro-batch) has, so that resuming repeats it."""
    return int(np.random.SeedSequence([seed, step, rank, micro_batch]).generate_state(1, np.uint64)[0])


def global_mean(
    accelerator: Accelerator, reports: Sequence[tuple[float, LossReport]]
) -> tuple[float, dict[str, float]]:
    """Total and parts over all micro-batches and processes, in nats per symbol. Waits for the device."""
    names = list(reports[0][1].parts)
    rows = [share * torch.stack([report.total, *report.parts.values()]) for share, report in reports]
    total, *parts = accelerator.reduce(torch.stack(rows).sum(dim=0), reduction="sum").tolist()
    return total, dict(zip(names, parts, strict=True))


def validate(config: Config, corpus: Corpus, objective: Objective, precision: str) -> tuple[float, float]:
    """Bits per character and per byte of the first `train.valid_symbols` symbols of the validation split.

    In the precision of training, at a stride of half the context; all processes share the work and get the figures.
    """
    ids = corpus.splits["valid"].ids[: config.train.valid_symbols]
    with unsharded(objective):
        nats = negative_log_likelihoods(
            objective.transformer,
            objective.heads,
            ids,
            stride=max(1, config.model.context_length // 2),
            autocast_dtype=AUTOCAST_DTYPES.get(precision),
        )[config.model.num_layers]
    characters, num_bytes = count_units(ids, corpus.vocabulary)
    return bits_per(nats, characters), bits_per(nats, num_bytes)
