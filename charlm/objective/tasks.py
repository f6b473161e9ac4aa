"""Auxiliary tasks of your own, registered by name and switched on by `aux.tasks`.

Shapes: B batch, T positions, D d_model, W characters of a window (T + the longest offset).
"""

import re
from collections.abc import Callable, Iterable
from typing import TypeVar

from torch import nn

from charlm.config import Config, ModelConfig, UserError

TaskBuilder = Callable[[ModelConfig, int], nn.Module]
Builder = TypeVar("Builder", bound=TaskBuilder)

_builders: dict[str, TaskBuilder] = {}


def auxiliary_task(name: str) -> Callable[[Builder], Builder]:
    """A decorator: `--aux.tasks='{NAME: 0.1}'` then adds that loss, times 0.1, to what is minimised.

        @charlm.auxiliary_task("order")
        class Order(nn.Module):
            def __init__(self, config, vocabulary_size): ...
            def forward(self, hidden_BTD, windows_BW): ...

    What is decorated builds the module from the model's options and the size of the vocabulary. The module maps the
    hidden states of its layer and the windows that they were computed from, T inputs first, to losses in nats: one
    for each prediction, in any shape, of which the mean is taken. It is trained and saved with the model, and
    `charlm.load` does without it. Under pre-norm the states of a layer below the last are not normalised.

    Its randomness must come from torch, whose seed is set before each micro-batch, so that a resumed run repeats it.
    A name registered again means the newer one.

    Raises:
        UserError: a name that no module can have.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]{0,63}", name) or hasattr(nn.ModuleDict(), name):
        raise UserError(f"auxiliary task {name!r}: choose a plain name of letters, digits, _ and -, at most 64")

    def register(build: Builder) -> Builder:
        _builders[name] = build
        return build

    return register


def check_registered(names: Iterable[str]) -> None:
    """Raise UserError if one of the tasks is not registered."""
    for name in names:
        if name not in _builders:
            known = ", ".join(sorted(_builders)) or "none"
            raise UserError(
                f"aux.tasks: {name!r} is not registered; registered are: {known}. "
                "Run a script of your own that registers it with charlm.auxiliary_task (docs/tasks.md)"
            )


def build_tasks(config: Config, vocabulary_size: int) -> nn.ModuleDict | None:
    """The modules of the tasks in `aux.tasks`, fresh; None if there are none. UserError if one is not registered."""
    check_registered(config.aux.tasks)
    names = sorted(config.aux.tasks)
    return nn.ModuleDict({name: _builders[name](config.model, vocabulary_size) for name in names}) if names else None
