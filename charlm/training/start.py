"""Start or resumption of a run: checks, the run's folder and state, and the first lines of output."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.optim import Optimizer

from charlm.config import Config, Mark, RunConfig, UserError, differences, has_mark
from charlm.config.load import to_yaml
from charlm.data.corpus import Corpus
from charlm.data.vocabulary import vocabulary_from_dict
from charlm.files import write_whole
from charlm.objective.count import route_cost
from charlm.objective.objective import Objective
from charlm.objective.routes import check_route
from charlm.objective.terms import Term
from charlm.process import physical_memory
from charlm.runs.checkpoints import Checkpoint, checkpoint_folders, find_checkpoint, newest_whole_checkpoint, rewind
from charlm.runs.folder import Run
from charlm.training.device import describe_attention, on_cpu
from charlm.training.sharding import is_sharded, wants_shards


@dataclass
class TrainState:
    """State of a run beside parameters and optimizer state. Windows and dropout follow from (seed, step)."""

    step: int = 0
    """Completed optimizer steps."""
    seconds: float = 0.0
    best_step: int | None = None
    best_bits: float | None = None
    """Validation bits per character of the best checkpoint; None before the first validation."""
    validated_step: int = 0
    """Newest validated step; a run can stop between a step and its validation."""
    updated_step: int = 0
    """Newest step whose update was not skipped, as far as the losses have been read."""
    accepted_losses: list[float] = field(default_factory=list)
    """Losses that train.spike_threshold compares with."""
    processes: int | None = None
    """Number of processes the run last used."""
    threads: int | None = None
    """Number of threads per process the run last used; None on a GPU, where it makes no difference."""
    precision: str | None = None
    """Precision the run last used; train.mixed_precision=auto depends on the machine."""
    valid_symbols: int | None = None
    """Number of symbols that `best_bits` was scored on."""


def check_fits(config: Config, corpus: Corpus, objective: Objective, accelerator: Accelerator) -> None:
    """Raise UserError if a split or process has no window, or an option cannot be used on this machine."""
    num_processes = accelerator.num_processes
    check_route(config, accelerator.mixed_precision, sharded=num_processes > 1 and wants_shards(config.train))
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
    if config.train.micro_batch_size == "auto" and on_cpu():
        raise UserError("train.micro_batch_size=auto: searches the memory of a GPU; on a CPU give a number, or none")
    windows_bytes = 8 * config.train.batch_size * objective.window_length
    if windows_bytes > physical_memory():
        raise UserError(
            f"train.batch_size={config.train.batch_size}: its windows alone take {windows_bytes / 1e9:,.0f} GB, more "
            "than this machine has; lower it"
        )
    if config.train.batch_size < num_processes:
        raise UserError(
            f"train.batch_size={config.train.batch_size}: fewer windows than the {num_processes} processes; raise it"
        )


@contextmanager
def open_run(
    config: Config, corpus: Corpus, accelerator: Accelerator, objective: Objective, optimizers: Sequence[Optimizer]
) -> Iterator[tuple[Run, TrainState, list[str]]]:
    """Create a run or open one to continue. Yields its folder, its state, and lines to print.

    While the context is open, no other process can train into the folder.

    Raises:
        UserError: the folder holds something else, is in use, or holds a run that cannot be continued with this config.
    """
    main, run = accelerator.is_main_process, Run(config.run.dir)
    resumes = check_folder(config.run)
    with run.refused_unless("read"):
        config, news = _without_repetition(config)
    accelerator.wait_for_everyone()  # all processes have seen the folder as it was
    with run.lock() if main else nullcontext():
        accelerator.wait_for_everyone()
        state, checkpoint = TrainState(), None
        with run.refused_unless("read and written"):
            if resumes:
                checkpoint, more = _where_to_continue(run, config, corpus)
                news += more
            check_agreed(run, checkpoint.step if checkpoint else 0, accelerator)
            if checkpoint is not None:
                state, more = _continue_from(checkpoint, run.config(), config, accelerator, objective, optimizers)
                news += more
            accelerator.wait_for_everyone()
            if main and not resumes:
                Run.create(config, corpus.to_dict())
            elif main:
                run.checkpoints_path.mkdir(exist_ok=True)
                chosen = config.run.resume_from is not None
                news += rewind(run, checkpoint, discard=chosen) if checkpoint else run.forget_metrics_after(0)
                # Repeating this command later continues from the newest checkpoint, not from the chosen one again.
                write_whole(run.config_path, to_yaml(config.replace(run=config.run.replace(resume_from=None))))
        accelerator.wait_for_everyone()
        state.processes, state.threads = accelerator.num_processes, _threads(accelerator)
        state.precision = accelerator.mixed_precision
        state.valid_symbols = config.train.valid_symbols
        if state.validated_step == state.step == config.train.steps:
            news.append(f"finished before, at step {state.step:,}; to train on, give more --train.steps")
        yield run, state, news


def _where_to_continue(run: Run, config: Config, corpus: Corpus) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to continue from (None if the run stopped before its first one), and lines to print."""
    news = check_resumable(run.config(), config)
    check_same_corpus(run.provenance()["corpus"], corpus.to_dict())
    if config.run.resume_from is not None:
        checkpoint = find_checkpoint(run, config.run.resume_from)
    elif not checkpoint_folders(run):
        return None, [*news, "stopped before its first checkpoint: starts anew"]
    else:
        checkpoint, skipped = newest_whole_checkpoint(run)
        news += skipped
        if checkpoint is None:
            raise UserError(f"{run.path} has no checkpoint that is whole: " + "; ".join(skipped))
    if checkpoint.step > config.train.steps:
        raise UserError(f"train.steps={config.train.steps}: the checkpoint is past it, at step {checkpoint.step}")
    return checkpoint, [*news, f"resumed at step {checkpoint.step}"]


def _continue_from(
    checkpoint: Checkpoint,
    old: Config,
    new: Config,
    accelerator: Accelerator,
    objective: Objective,
    optimizers: Sequence[Optimizer],
) -> tuple[TrainState, list[str]]:
    """Restore model, optimizers and scaler; return the state of the checkpoint, and lines on what changed."""
    checkpoint.restore(objective, optimizers)
    record = dict(checkpoint.state)
    scaler = record.pop("scaler", None)
    try:
        state = TrainState(**record)
        if scaler and accelerator.scaler:
            accelerator.scaler.load_state_dict(scaler)
    except (TypeError, KeyError) as error:
        raise UserError(f"{checkpoint.path / 'state.json'} is not what training writes: {error}") from error
    news = []
    if old.train.steps != new.train.steps:
        before, now = (state.step / steps for steps in (old.train.steps, new.train.steps))
        news.append(f"train.steps changed: progress at this step was {before:.3f} and is now {now:.3f}")
    news += rescaled_rows(objective.terms, state.step, old.train.steps, new.train.steps)
    for name, before, now in (
        ("processes", state.processes, accelerator.num_processes),
        ("threads", state.threads, _threads(accelerator)),
        ("precision", state.precision, accelerator.mixed_precision),
    ):
        if None not in (before, now) and before != now:
            news.append(f"{name}: {before} -> {now}; results may differ in rounding from here")
    scored = state.valid_symbols or old.train.valid_symbols
    if state.best_bits is not None and scored != new.train.valid_symbols:
        state.best_bits = None
        news.append(f"train.valid_symbols was {scored}: scores cannot be compared, the next validation is the best")
    return state, news


def check_resumable(old: Config, new: Config) -> list[str]:
    """Lines to print about the changes from `old` to `new`.

    Raises:
        UserError: options changed that may not; the message names all of them.
    """
    changed = differences(old, new)
    lines = {name: f"{name}: {before} -> {after}" for name, (before, after) in changed.items()}
    refused = [name for name in changed if not has_mark(name, Mark.MAY_CHANGE)]
    if refused:
        text = "; ".join(lines[name] for name in refused)
        raise UserError(
            f"the run cannot be resumed with a changed {text}. Put it back, or start another --run.dir", refused[0]
        )
    return [line for name, line in lines.items() if not name.startswith("run.")]


def check_same_corpus(recorded: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise UserError if text or vocabulary differ from those that the run was trained on."""
    if recorded["sha256"] != current["sha256"]:
        raise UserError(
            f"the run was trained on another corpus: sha256 was {recorded['sha256']}, now {current['sha256']}; "
            "point data.path or data.hub_id at the same text, or start another --run.dir"
        )
    if vocabulary_from_dict(recorded.get("vocabulary")) != vocabulary_from_dict(current["vocabulary"]):
        raise UserError(
            "the run was trained with another vocabulary of this text; prepare it with the release of sentencepiece "
            "that the run had, or start another --run.dir"
        )


def rescaled_rows(terms: Sequence[Term], step: int, old_steps: int, new_steps: int) -> list[str]:
    """Lines to print about terms that become active or silent at `step` because train.steps changed."""
    before, after = (
        {term.name for term in terms if term.weight.at_next_turn(step / steps) > 0.0}
        for steps in (old_steps, new_steps)
    )
    changes = (("waking", sorted(after - before)), ("falling silent", sorted(before - after)))
    return [
        f"at step {step} progress is now {step / new_steps:.3f}; {what}: {', '.join(names)}"
        for what, names in changes
        if names
    ]


def _threads(accelerator: Accelerator) -> int | None:
    return torch.get_num_threads() if accelerator.device.type == "cpu" else None


def check_agreed(run: Run, step: int, accelerator: Accelerator) -> None:
    """Raise UserError unless all processes, each of which has read the folder, continue from the same step."""
    if accelerator.num_processes == 1:
        return
    bounds = torch.tensor([-step, step], device=accelerator.device)
    dist.all_reduce(bounds, dist.ReduceOp.MAX)
    lowest, highest = -int(bounds[0]), int(bounds[1])
    if lowest != highest:
        raise UserError(
            f"{run.path}: the processes would continue from different steps, {lowest} to {highest}; make sure that all "
            "machines can read the same checkpoints, and start again"
        )


def check_folder(config: RunConfig) -> bool:
    """Whether to continue the run in the folder: if the options say so, or leave it open and there is one.

    After a restart by the launcher (`--max_restarts`), processes continue the run that the launcher began, never an
    older one.

    Raises:
        UserError: there is no run to continue, or something is in the way of a new one.
    """
    run = Run(config.dir)
    with run.refused_unless("read"):
        if (
            config.resume
            or config.resume_from is not None
            or _begun_by_this_launcher(config)
            or (config.auto_resume and run.config_path.exists())
        ):
            Run.open(run.path)
            return True
        run.check_absent()
        return False


def _begun_by_this_launcher(run: RunConfig) -> bool:
    """Whether a launcher has restarted its processes after earlier ones had begun or continued the run."""
    begun = Run(run.dir).config_path
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or not begun.exists():
        return False
    return begun.stat().st_mtime > psutil.Process(os.getppid()).create_time()


def _without_repetition(config: Config) -> tuple[Config, list[str]]:
    """Drop run.resume_from after a restart, which would discard the steps after that checkpoint each time."""
    chosen = config.run.resume_from
    again = _begun_by_this_launcher(config.run) or os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    if chosen is None or not again:
        return config, []
    newest = config.replace(run=config.run.replace(resume=True, resume_from=None))
    return newest, [f"run.resume_from={chosen}: ignored after a restart; continues from the newest checkpoint"]


def describe(
    config: Config, corpus: Corpus, objective: Objective, accelerator: Accelerator, precision_reason: str
) -> list[str]:
    """First lines of output: size of the run, corpus, device and precision."""
    parameters = sum(parameter.numel() for parameter in objective.parameters())
    device = f"{accelerator.num_processes} x {accelerator.device.type}"
    if (threads := _threads(accelerator)) is not None:
        device += f" ({threads} thread{'s' if threads > 1 else ''})"
    if is_sharded(objective):
        device += ", sharded by FSDP2"
    terms = f"{len(objective.terms)} term" + ("s" if len(objective.terms) > 1 else "")
    lines = [
        f"{config.run.dir}: {config.train.steps:,} steps of {config.train.batch_size * config.model.context_length:,} "
        f"characters, {parameters / 1e6:.1f}M parameters, {config.model.num_layers} layers, {terms}",
        f"{corpus.name}: {corpus.splits['train'].symbols:,} symbols of vocabulary {corpus.vocabulary.name}, "
        f"seed {config.train.seed}",
        f"{device}, precision {accelerator.mixed_precision} ({precision_reason})",
        describe_attention(config),
    ]
    if config.aux.route != "joint":
        cost = route_cost(config, objective)
        lines.append(f"gradients by {config.aux.route}: at first {cost.total:.2f} times the operations of joint")
    if config.train.diagnose_every and is_sharded(objective):
        lines.append("diagnostics: bits per character alone, as the gradients are in shards")
    return lines
