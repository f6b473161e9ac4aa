"""How a run begins or goes on: what is checked, its folder, its state, and its first lines."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch.optim import Optimizer

from charlm.config import Config, UserError
from charlm.config_files import to_yaml
from charlm.data.corpus import Corpus
from charlm.objective.objective import Objective
from charlm.runs.checkpoints import checkpoint_folders, find_checkpoint, rewind
from charlm.runs.folder import Run, write_whole
from charlm.runs.snapshot import restore
from charlm.training.hardware import describe_attention, on_cpu
from charlm.training.resumption import check_resumable, check_same_corpus
from charlm.training.sharding import is_sharded


@dataclass
class TrainState:
    """All that a run remembers beside parameters and optimizer state: windows and dropout follow from (seed, step)."""

    step: int = 0
    """Completed optimizer steps."""
    seconds: float = 0.0
    best_step: int | None = None
    best_bits: float = float("inf")
    """Validation bits per character of the best checkpoint."""


def check_fits(config: Config, corpus: Corpus, objective: Objective, num_processes: int) -> None:
    """Raise UserError if a split holds no window, or a process would have no window of the batch."""
    for name, split in corpus.splits.items():
        if split.symbols < objective.window_length:
            raise UserError(
                f"data.corpus={config.data.corpus}: its {name} split of {split.symbols} symbols is shorter than one "
                f"window of {objective.window_length}; use more text or a smaller --model.context_length"
            )
    if config.model.ngrams and num_processes > 1 and not on_cpu():
        raise UserError(
            f"model.ngrams={list(config.model.ngrams)}: their sparse gradients cannot be exchanged between GPUs; "
            "train on one, or without them (--model.ngrams=[])"
        )
    if config.train.batch_size < num_processes:
        raise UserError(
            f"train.batch_size={config.train.batch_size}: fewer windows than the {num_processes} processes; raise it"
        )


def open_run(
    config: Config, corpus: Corpus, accelerator: Accelerator, objective: Objective, optimizers: Sequence[Optimizer]
) -> tuple[Run, TrainState, list[str]]:
    """A new run, or one to continue: its folder, its state, and what there is to say about it."""
    if not config.run.resume and config.run.resume_from is None:
        Run(config.run.dir).check_absent()
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            Run.create(config, corpus.to_dict())
        accelerator.wait_for_everyone()
        return Run.open(config.run.dir), TrainState(), []

    run = Run.open(config.run.dir)
    news = check_resumable(run.config(), config)
    check_same_corpus(run.provenance()["corpus"], corpus.to_dict())
    state, said = TrainState(), "stopped before its first checkpoint: starts anew"
    checkpoint = None
    if config.run.resume_from is not None or checkpoint_folders(run):
        checkpoint = find_checkpoint(run, "last" if config.run.resume_from is None else config.run.resume_from)
        if checkpoint.step > config.train.steps:
            raise UserError(f"train.steps={config.train.steps}: the checkpoint is past it, at step {checkpoint.step}")
        restore(checkpoint.snapshot(), objective, optimizers)
        scaler = checkpoint.state.pop("scaler")
        if scaler and accelerator.scaler:
            accelerator.scaler.load_state_dict(scaler)
        state, said = TrainState(**checkpoint.state), f"resumed at step {checkpoint.step}"
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if checkpoint is not None:
            rewind(run, checkpoint)
        else:
            run.forget_metrics_after(0)
        write_whole(run.config_path, to_yaml(config))
    accelerator.wait_for_everyone()
    return run, state, [*news, said]


def describe(
    config: Config, corpus: Corpus, objective: Objective, accelerator: Accelerator, precision_reason: str
) -> list[str]:
    """The first lines of a run: on what, how and why so, and what will be done."""
    parameters = sum(parameter.numel() for parameter in objective.parameters())
    device = f"{accelerator.num_processes} x {accelerator.device.type}"
    if accelerator.device.type == "cpu":
        device += f" ({torch.get_num_threads()} threads)"
    if is_sharded(objective):
        device += ", sharded by FSDP2"
    terms = f"{len(objective.terms)} term" + ("s" if len(objective.terms) > 1 else "")
    return [
        f"{device}, precision {accelerator.mixed_precision} ({precision_reason}), {describe_attention(config)}",
        f"{corpus.name}, {corpus.splits['train'].symbols:,} symbols of vocabulary {corpus.vocabulary.name}; "
        f"{config.model.num_layers} layers, {parameters / 1e6:.1f}M parameters, {terms}",
        f"{config.train.steps:,} steps of {config.train.batch_size * config.model.context_length:,} characters, "
        f"seed {config.train.seed}, into {config.run.dir}",
    ]
