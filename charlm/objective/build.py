"""A fresh model, its heads, the user's own tasks and the objective that a config describes."""

import re
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import nn

from charlm.config import Config, ConfigError, ModelConfig, UserError
from charlm.model.heads import Heads
from charlm.model.transformer import CharTransformer
from charlm.objective.count import check_memory
from charlm.objective.objective import Hedge, Objective, head_pairs
from charlm.objective.terms import build_terms

Builder = TypeVar("Builder", bound=Callable[[ModelConfig, int], nn.Module])

_task_builders: dict[str, Callable[[ModelConfig, int], nn.Module]] = {}


def auxiliary_task(name: str) -> Callable[[Builder], Builder]:
    """A decorator that registers a task; `--aux.tasks='{NAME: 0.1}'` adds 0.1 times its loss.

        @charlm.auxiliary_task("order")
        class Order(nn.Module):
            def __init__(self, config, vocabulary_size): ...
            def forward(self, hidden_BTD, windows_BW): ...

    The decorated class or function builds a module from the model's options and the vocabulary's size.
    The module maps hidden states of its layer, [B, T, D], and windows, [B, W], whose first T characters
    the layer has read, to losses in nats, of any shape; their mean is used. It is trained and saved with
    the model; `charlm.load` leaves it out. Under pre-norm only the last layer's states are normalised.

    Draw random numbers from torch alone: it is seeded before each micro-batch, so that a resumed run
    repeats them. Registering a name again replaces the earlier task.

    Raises:
        UserError: the name cannot be a module's.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]{0,63}", name) or hasattr(nn.ModuleDict(), name):
        raise UserError(f"auxiliary task {name!r}: choose a plain name of up to 64 letters, digits, _ and -")

    def register(build: Builder) -> Builder:
        _task_builders[name] = build
        return build

    return register


def check_registered(names: Iterable[str]) -> None:
    """Raise UserError unless all tasks are registered."""
    for name in names:
        if name not in _task_builders:
            known = ", ".join(sorted(_task_builders)) or "none"
            raise UserError(
                f"aux.tasks: {name!r} is not registered; registered: {known}. "
                "Register it with charlm.auxiliary_task in a script of your own, "
                "and train from there (docs/tasks.md)",
                "aux.tasks",
            )


def build_objective(config: Config, vocabulary_size: int, *, training: bool = True) -> Objective:
    """A fresh model, with the heads and terms of the config; the user's tasks only for `training`.

    Raises:
        UserError: a task of aux.tasks is not registered.
        ConfigError: the parameters do not fit in memory, no row weighs anything at some point of
            training, or aux.hedge has fewer than two layers to weigh.
    """
    model, aux, train = config.model, config.aux, config.train
    if torch.get_default_device().type != "meta":
        check_memory(model, vocabulary_size)
    terms = build_terms(aux, model.num_layers, train.steps)
    if not training:
        terms = tuple(term for term in terms if term.task is None)
    transformer = CharTransformer(
        model,
        vocabulary_size,
        attention=train.attention if training else "auto",  # the device of a run may be another
        activation_checkpointing=train.activation_checkpointing,
    )
    pairs = head_pairs(terms, model.num_layers)
    heads = Heads(model, vocabulary_size, pairs, layers=aux.layers, final_norm=transformer.final_norm)
    next_character = {term.layer for term in terms if term.offset == 1}
    if aux.hedge.enabled and len(next_character) < 2:
        raise ConfigError(
            "aux.hedge.enabled=true: weighs layers against each other, "
            f"but only {len(next_character)} predicts the next character; "
            "give more layers a head (aux.layers), or switch it off",
            "aux.hedge.enabled",
        )
    hedge = Hedge(next_character, aux.hedge.beta, aux.hedge.smoothing) if aux.hedge.enabled else None
    tasks = None
    if training and aux.tasks:
        check_registered(aux.tasks)
        tasks = nn.ModuleDict()
        for name in sorted(aux.tasks):
            tasks[name] = _task_builders[name](model, vocabulary_size)
    return Objective(transformer, heads, terms, hedge=hedge, tasks=tasks, cross_entropy=train.cross_entropy)
