"""How a run begins: anew, as a continuation, with the weights of a model, or as a branch of a held run."""

import re
from operator import attrgetter
from pathlib import Path

from charlm.config import Config, DataConfig, Mark, RunConfig, UserError, differences, has_mark, steps_of
from charlm.config.errors import shown
from charlm.config.load import over, settings_of, validate
from charlm.data.sources import located
from charlm.files import sha256_of
from charlm.objective.objective import Objective
from charlm.runs.checkpoints import Checkpoint, find_checkpoint
from charlm.runs.folder import Run
from charlm.runs.load import load
from charlm.runs.tensors import placed
from charlm.runs.trained import TrainedModel, fitting
from charlm.training.optimizers import learning_rate_factor

MAY_DIFFER = {  # options of a model with which another's weights can still be used
    *("model.num_layers", "model.context_length", "model.ngrams", "model.ngram_buckets", "model.ngram_width"),
    *("model.attention_dropout", "model.activation_dropout", "model.residual_dropout", "model.residual_init"),
}


def refusal(config: Config, option: str, text: str) -> UserError:
    """The error for an option's value; `text` says what is wrong, and a way out."""
    return UserError(f"{option}={shown(attrgetter(option)(config))}: {text}", option)


def resolved(config: Config, continues: bool) -> Config:
    """The config, with what was not given from run.dir if that `continues`, or from run.init_from or branch_from."""
    run, places = config.run, {}
    if run.init_from and (local := Path(run.init_from).expanduser()).parent.exists():  # else it is on the hub
        places["init_from"] = str(local.absolute())
    config = config.model_copy(update={"run": run.model_copy(update=places)})  # which options were given is kept
    if continues:
        begun = Run(run.dir).config()
        for name in ("init_from", "branch_from", "branch_step"):
            before, now = getattr(begun.run, name), getattr(config.run, name)
            if now not in (None, before):
                raise refusal(config, f"run.{name}", f"the run began with {shown(before)}; leave it out")
        return _over(begun, config) if begun.run.init_from or begun.run.branch_from else config
    if run.init_from:
        return _for_model(config)
    return _for_branch(config) if run.branch_from else config


def begin(config: Config, objective: Objective) -> tuple[Checkpoint | None, dict[str, str]]:
    """Give a new run its model's weights, or return the checkpoint that it branches off; and a record."""
    run = config.run
    if not run.init_from and not run.branch_from:
        return None, {}
    model, own = _model(config), objective.state_dict()
    place = Path(run.init_from or run.branch_from)
    record = {
        "name": place.name if place.is_absolute() else str(place),  # a card shows no places of this machine
        "checkpoint": model.checkpoint,
        "SHA-256": sha256_of(model.file),
        "trained on": f"{model.corpus.get('name')} (SHA-256 {model.corpus.get('sha256')})",
    }
    if run.branch_from:
        return find_checkpoint(Run(place), run.branch_step), record
    taken = fitting(model, objective.transformer, objective.heads)
    objective.load_state_dict({name: placed(tensor, own[name]) for name, tensor in taken.items()}, strict=False)
    return None, record | {"tensors": f"{len(taken)} of {len(own)}"}


def _model(config: Config) -> TrainedModel:
    run, option, which = config.run, "run.init_from", "best"
    if run.branch_from:
        option, place, which = "run.branch_step", run.branch_from, run.branch_step
    elif (found := re.fullmatch(r"(/.+)@(\w+)", place := run.init_from)) and not Path(place).exists():
        place, which = found.groups()
    try:
        return load(place, which, "cpu")
    except UserError as error:
        raise refusal(config, option, str(error)) from error


def _for_model(config: Config) -> Config:
    model = _model(config)
    vocabulary, characters = model.vocabulary, None
    if vocabulary.name != "bytes":
        characters = b"".join(vocabulary.symbols[vocabulary.first_character :]).decode()
    data = DataConfig(vocabulary=vocabulary.name, characters=characters)
    base = Config(model=model.config.model, data=data)
    new = _over(base, config)
    for name, (theirs, ours) in differences(base, new).items():
        is_fixed = name in ("data.vocabulary", "data.characters") or name.startswith("model.")
        has_table = name == "model.context_length" and new.model.position_encoding != "rotary"
        if (is_fixed and name not in MAY_DIFFER) or (has_table and ours > theirs):
            raise refusal(new, name, f"{config.run.init_from} has {shown(theirs)}; leave it out")
    return new


def _for_branch(config: Config) -> Config:
    step, given, held = config.run.branch_step, config.train, _model(config).config
    if given.time is not None:
        raise refusal(config, "train.time", "a branch ends with its decay; give --train.decay_steps")
    decay = given.decay_steps if "decay_steps" in given.model_fields_set else held.train.decay_steps
    length = int(decay) if decay >= 1 else round(step * decay / (1 - decay))
    train = held.train.model_copy(update={"steps": step + length, "steps_before": (), "lr_schedule": "wsd"})
    if learning_rate_factor(held.train, step - 1) < 1 - 1e-9:
        text = f"the learning rate of {config.run.branch_from} is not at its peak there; choose another step"
        raise refusal(config, "run.branch_step", text)
    branch = held.replace(train=train, run=RunConfig())
    new = _over(branch, config)
    check_resumable(located(branch), located(new))
    begins = new.train.steps - steps_of(new.train.decay_steps, new.train.steps)
    if not step <= begins < new.train.steps:
        raise refusal(new, "train.decay_steps", f"begins at step {begins}, the branch at {step}; leave out train.steps")
    return new


def _over(base: Config, config: Config) -> Config:
    """`base`, with the options that were given in `config`."""
    trees = (base.model_dump(mode="json"), config.model_dump(mode="json", exclude_unset=True))
    return validate(Config, over(*(settings_of((), tree) for tree in trees)))


def check_resumable(old: Config, new: Config) -> list[str]:
    """Lines about the changes. Raises UserError if an option may not change."""
    changed = differences(old, new)
    lines = {name: f"{name}: {shown(before)} -> {shown(after)}" for name, (before, after) in changed.items()}
    refused = [name for name in changed if not has_mark(name, Mark.MAY_CHANGE)]
    if refused:
        text = "; ".join(lines[name] for name in refused)
        raise UserError(f"{text}: may not change; put it back, or give another --run.dir", refused[0])
    return [line for name, line in lines.items() if not name.startswith("run.")]
