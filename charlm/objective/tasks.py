"""The user's own auxiliary tasks, registered by name and switched on by `aux.tasks`.

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
    """A decorator that registers a task; `--aux.tasks='{NAME: 0.1}'` then adds 0.1 times its loss to the objective.

        @charlm.auxiliary_task("order")
        class Order(nn.Module):
            def __init__(self, config, vocabulary_size): ...
            def forward(self, hidden_BTD, windows_BW): ...

    The decorated class or function builds the module from the model's options and the size of the vocabulary. The
    module maps the hidden states of its layer, and the windows whose first T characters they were computed from, to
    losses in nats: one for each prediction, in any shape; their mean is used. The module is trained and saved with the
    model; `charlm.load` leaves it out. Under pre-norm the states of a layer below the last are not normalised.

    Any randomness must come from torch, whose seed is set before each micro-batch, so that a resumed run repeats it.
    Registering a name again replaces the earlier task.

    Raises:
        UserError: the name cannot be a module's.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]{0,63}", name) or hasattr(nn.ModuleDict(), name):
        raise UserError(f"auxiliary task {name!r}: choose a plain name of letters, digits, _ and -, at most 64")

    def register(build: Builder) -> Builder:
        _builders[name] = build
        return build

    return register


def check_registered(names: Iterable[str]) -> None:
    """Raise UserError unless all tasks are registered."""
    for name in names:
        if name not in _builders:
            known = ", ".join(sorted(_builders)) or "none"
            raise UserError(
                f"aux.tasks: {name!r} is not registered; registered: {known}. Register it with "
                "charlm.auxiliary_task in a script of your own, and train from there (docs/tasks.md)"
            )


def build_tasks(config: Config, vocabulary_size: int) -> nn.ModuleDict | None:
    """Fresh modules for the tasks in `aux.tasks`; None if there are none. UserError if one is not registered."""
    check_registered(config.aux.tasks)
    names = sorted(config.aux.tasks)
    return nn.ModuleDict({name: _builders[name](config.model, vocabulary_size) for name in names}) if names else None
