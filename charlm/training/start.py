"""Start or resumption of a run: checks, folder and state, first lines of output."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from pydantic import BaseModel
from torch.optim import Optimizer

from charlm.config import Config, RunConfig, UserError
from charlm.data.corpus import Corpus
from charlm.data.sources import located
from charlm.data.text_files import changes
from charlm.data.vocabulary import vocabulary_from_dict
from charlm.files import read_json
from charlm.model.rowwise import ROW_STATE, RowwiseRMS
from charlm.objective.build import build_objective
from charlm.objective.count import num_parameters, route_cost
from charlm.objective.objective import Objective
from charlm.objective.routes import ROUTES, Joint, check_route
from charlm.objective.terms import Term
from charlm.runs.checkpoints import STATE, Checkpoint, find_checkpoint, newest_whole_checkpoint, rewind
from charlm.runs.folder import Run
from charlm.text import counted
from charlm.training.device import describe_attention, describe_lacks, on_cpu
from charlm.training.optimizers import WeightAverage, build_optimizers
from charlm.training.origin import begin, check_resumable, refusal
from charlm.training.sharding import is_sharded, shard, wants_shards
from charlm.training.stop import MISSING


class TrainState(BaseModel, strict=True, extra="forbid"):
    """State beside model and optimizers. Windows and dropout follow from (seed, step)."""

    step: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_bits: float | None = None  # None before the first validation
    validated_step: int = 0  # a run can stop between a step and its validation
    updated_step: int = 0  # the newest step known to have made its update
    accepted_losses: list[float] = []
    processes: int | None = None  # these three: last used
    threads: int | None = None  # per process; None on a GPU
    precision: str | None = None
    valid_symbols: int | None = None  # length of the text of `best_bits`
    scaler: dict[str, int | float] | None = None


def build(config: Config, corpus: Corpus, accelerator: Accelerator) -> tuple[Objective, Joint, WeightAverage]:
    """A fresh objective, maybe in shards, the route with its optimizers, and averages; UserError as `check_fits`."""
    torch.manual_seed(config.train.seed)
    objective = build_objective(config, corpus.vocabulary.size).to(accelerator.device)
    sharded = wants_shards(config.train, accelerator.num_processes)
    check_fits(config, corpus, objective, accelerator, sharded)
    if sharded:
        shard(objective)
    optimizers = partial(build_optimizers, config.train, objective)
    route = ROUTES[config.aux.route](objective, config.aux, optimizers)
    return objective, route, WeightAverage(config.train, objective)


def check_fits(config: Config, corpus: Corpus, objective: Objective, accelerator: Accelerator, sharded: bool) -> None:
    """Raise UserError if a split or process has no window, or an option cannot work."""
    train, length = config.train, objective.window_length
    num_processes = accelerator.num_processes
    check_route(config, accelerator.mixed_precision, sharded)
    for name in corpus.splits:
        shortest = min(map(len, corpus.texts(name)))
        if shortest < length:
            text = f"its {name} split of {shortest} symbols is shorter than a window of {length}"
            way_out = f"raise --data.{name}_fraction or --data.{name}_split"
            if name == "train":
                way_out = "lower --data.valid_fraction or --data.test_fraction"
            way_out += ", or lower --model.context_length"
            raise refusal(config, "data.corpus", f"{text}; {way_out}")
    if train.micro_batch_size == "auto" and (sharded or on_cpu()):
        text = "needs a GPU that holds the whole model; give a number, or none"
        raise refusal(config, "train.micro_batch_size", text)
    if 8 * train.batch_size * length > psutil.virtual_memory().total:
        raise refusal(config, "train.batch_size", "its windows do not fit in memory; lower it")
    if train.batch_size < num_processes:
        raise refusal(config, "train.batch_size", f"too few for {num_processes} processes; raise it")
    for divisor in (1, train.context_divisor) if sharded else ():
        fewest, more = divmod(train.batch_size * divisor, num_processes)
        most = fewest + bool(more)
        micro_batch = (train.micro_batch_size or most) * divisor
        if -(-most // micro_batch) != -(-fewest // micro_batch):
            text = f"some processes would have more micro-batches; use a multiple of {num_processes}"
            raise refusal(config, "train.batch_size", text)


@contextmanager
def open_run(
    config: Config, corpus: Corpus, accelerator: Accelerator, objective: Objective, optimizers: Sequence[Optimizer]
) -> Iterator[tuple[Run, TrainState, list[str]]]:
    """A new or continued run, its state, and lines to print. Locks its folder; UserError if that cannot be its own."""
    main, run = accelerator.is_main_process, Run(config.run.dir)
    resumes, chosen = check_folder(config.run), config.run.resume_from
    news = []
    restarted = os.environ.get("SLURM_RESTART_COUNT", "0") != "0" or _begun_by_this_launcher(run)
    if chosen is not None and restarted:
        news.append(f"run.resume_from={chosen}: ignored after a restart, to keep the steps since")
        chosen = None
    accelerator.wait_for_everyone()  # all processes have seen the folder as it was
    with run.lock() if main else nullcontext():
        accelerator.wait_for_everyone()
        state, checkpoint, record = TrainState(), None, {}
        with run.os_errors_explained(cannot_be="read and written"):
            if resumes:
                checkpoint = _where_to_continue(run, config, corpus, chosen, news)
            check_agreed(run, checkpoint.step if checkpoint else 0, accelerator)
            source = checkpoint
            if checkpoint is None:
                source, record = begin(config, objective)
                news += [f"begins with {', '.join(record.values())}"] if record else []
                if resumes and record != run.provenance().get("started_from", {}):
                    raise UserError(f"{run.path}: what it began with has changed; choose another --run.dir", "run.dir")
            if source is not None:
                source.restore(objective, optimizers)
                states = [own.state.values() for own in optimizers if isinstance(own, RowwiseRMS)]
                if any(ROW_STATE not in state for state in chain(*states)):
                    news.append("n-gram tables: another optimizer than at first, whose state begins anew")
                state = read_json(source.path / STATE, kind=TrainState)
                if state.scaler and accelerator.scaler:
                    accelerator.scaler.load_state_dict(state.scaler)
                begun = Run(source.path.parents[1])
                news += _changes(state, begun.config(), config, objective, accelerator)
                if checkpoint is None:  # a branch, which has not the best checkpoint of the run that was held
                    check_same_corpus(begun.provenance()["corpus"], corpus)
                    state = state.model_copy(update={"best_step": None, "best_bits": None, "validated_step": 0})
            accelerator.wait_for_everyone()
            if main and not resumes:
                Run.create(config, corpus.model_dump(), record)
            elif main:
                run.checkpoints_path.mkdir(exist_ok=True)
                if checkpoint is None:
                    run.metrics_path.unlink(missing_ok=True)
                else:
                    news += rewind(run, checkpoint, discard=chosen is not None)
                run.write_config(config)
        accelerator.wait_for_everyone()
        now = {"valid_symbols": config.train.valid_symbols} | _machine(accelerator)
        state = state.model_copy(update=now)
        if state.validated_step == state.step == config.train.steps:
            news.append(f"finished before, at step {state.step:,}; give more --train.steps")
        yield run, state, news


def _where_to_continue(
    run: Run, config: Config, corpus: Corpus, chosen: int | None, news: list[str]
) -> Checkpoint | None:
    """The checkpoint to continue from, if there is one. Adds to `news`."""
    news += check_resumable(located(run.config()), located(config))
    check_same_corpus(run.provenance()["corpus"], corpus)
    if chosen is not None:
        checkpoint, damaged = find_checkpoint(run, chosen), []
    else:
        checkpoint, damaged = newest_whole_checkpoint(run)
    news += damaged
    if checkpoint is None and damaged:
        raise UserError(f"{run.path} has no checkpoint that is whole: " + "; ".join(damaged))
    if checkpoint is None:
        news.append("stopped before its first checkpoint: starts from the beginning")
    elif checkpoint.step > config.train.steps:
        raise refusal(config, "train.steps", f"the checkpoint is past it, at step {checkpoint.step}")
    else:
        news.append(f"resumed at step {checkpoint.step}")
    return checkpoint


def _changes(
    state: TrainState, old: Config, new: Config, objective: Objective, accelerator: Accelerator
) -> Iterator[str]:
    """Lines about changes. Removes an incomparable best score from `state`."""
    if old.train.steps != new.train.steps:
        yield from rescaled(objective.terms, old.train.progress(state.step), new.train.progress(state.step))
    for name, now in _machine(accelerator).items():
        before = getattr(state, name)
        if None not in (before, now) and before != now:
            yield f"{name}: {before} -> {now}; results may differ in rounding from here"
    scored = state.valid_symbols or old.train.valid_symbols
    if state.best_bits is not None and scored != new.train.valid_symbols:
        state.best_bits = None
        yield f"train.valid_symbols was {scored}: scores cannot be compared, the next is the best"


def check_same_corpus(recorded: dict[str, Any], corpus: Corpus) -> None:
    """Raise UserError if text or vocabulary differ from those of the run."""
    before, now = recorded["sha256"], corpus.sha256
    if before != now:
        text = f"another corpus: sha256 was {before}, now {now}{changes(recorded.get('files'), corpus.files)}"
        way_out = "give the run's data.path or data.hub_id, or another --run.dir"
        raise UserError(f"{text}; {way_out}", "data.path")
    if vocabulary_from_dict(recorded.get("vocabulary")) != corpus.vocabulary:
        way_out = "use the run's release of sentencepiece, or another --run.dir"
        raise UserError(f"another vocabulary of the run's text; {way_out}")


def rescaled(terms: Sequence[Term], old: float, new: float) -> Iterator[str]:
    """Lines about the changed progress, and terms that become active or silent."""
    yield f"train.steps changed: progress at this step was {old:.3f} and is now {new:.3f}"
    before, after = (
        {term.name for term in terms if term.weight.at_next_turn(progress) > 0.0} for progress in (old, new)
    )
    for what, names in (("on", after - before), ("off", before - after)):
        if names:
            yield f"terms switched {what}: {', '.join(sorted(names))}"


def check_agreed(run: Run, step: int, accelerator: Accelerator) -> None:
    """Raise UserError unless all processes found the same step in the folder."""
    steps = accelerator.gather(torch.tensor([step], device=accelerator.device)).tolist()
    if min(steps) != max(steps):
        text = f"processes found different steps, {min(steps)} to {max(steps)}"
        raise UserError(f"{run.path}: {text}; make sure that all machines read it")


def check_folder(config: RunConfig) -> bool:
    """Whether to continue the run in the folder, by an option or after a launcher's restart.

    Raises UserError if there is none, or the folder of a new one is not empty.
    """
    run = Run(config.dir)
    with run.os_errors_explained(cannot_be="read"):
        asked = config.resume or config.resume_from is not None or _begun_by_this_launcher(run)
        if asked or (config.auto_resume and run.config_path.exists()):
            Run.open(run.path)
            if config.resume_from is not None or not run.is_untrained():
                return True
        run.check_absent()
    return False


def _begun_by_this_launcher(run: Run) -> bool:
    path, launcher = run.config_path, psutil.Process(os.getppid())
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    return restarted and path.exists() and path.stat().st_mtime > launcher.create_time()


def _machine(accelerator: Accelerator) -> dict[str, Any]:
    return {
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads() if accelerator.device.type == "cpu" else None,
        "precision": accelerator.mixed_precision,
    }


def describe(
    config: Config, corpus: Corpus, objective: Objective, accelerator: Accelerator, precision_reason: str
) -> list[str]:
    """First lines of output: run, corpus and device."""
    train, threads = config.train, _machine(accelerator)["threads"]
    characters = train.batch_size * config.model.context_length
    millions = num_parameters(objective) / 1e6
    terms = counted(len(objective.terms), "term")
    symbols = corpus.splits["train"].symbols
    device = f"{accelerator.num_processes} x {accelerator.device.type}"
    if threads is not None:
        device += f" ({counted(threads, 'thread')})"
    if is_sharded(objective):
        device += ", sharded by FSDP2"
    lines = [
        f"{config.run.dir}: {train.steps:,} steps of {characters:,} characters, "
        f"{millions:.1f}M parameters, {config.model.num_layers} layers, {terms}",
        f"{corpus.name}: {symbols:,} symbols of vocabulary {corpus.vocabulary.name}, seed {train.seed}",
        f"{device}, precision {accelerator.mixed_precision} ({precision_reason})",
        describe_attention(config, accelerator.device, accelerator.mixed_precision),
        *describe_lacks(accelerator.device),
    ]
    if config.aux.route != "joint":
        cost = f"{route_cost(config, objective).total:.2f} times the operations of joint"
        lines.append(f"gradients by {config.aux.route}: at first {cost}")
    if train.diagnose_every and is_sharded(objective):
        lines.append("diagnostics: bits per character alone, as the gradients are in shards")
    if MISSING:
        lines.append(f"no {' or '.join(MISSING)} here: stop with Ctrl-C or run.max_time")
    return lines
