"""The user's own auxiliary tasks: registered by name, switched on by `aux.tasks`."""

import re
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from charlm.config import ModelConfig, UserError
from charlm.process import is_about_memory

Builder = TypeVar("Builder", bound=Callable[[ModelConfig, int], nn.Module])

_builders: dict[str, Callable[[ModelConfig, int], nn.Module]] = {}


def auxiliary_task(name: str) -> Callable[[Builder], Builder]:
    """A decorator that registers a task; `--aux.tasks='{NAME: 0.1}'` adds 0.1 times its loss.

        @charlm.auxiliary_task("order")
        class Order(nn.Module):
            def __init__(self, config, vocabulary_size): ...
            def forward(self, hidden_BTD, windows_BW): ...

    The decorated class or function builds a module from the model's options and the vocabulary's
    size. The module maps its layer's hidden states, [B, T, D], and windows, [B, W], whose first T
    characters the layer has read, to losses in nats of any shape, whose mean is used. It is saved
    with the model; `charlm.load` leaves it out. Under pre-norm only the last layer's states are
    normalised. Draw random numbers from torch alone, which is seeded before each micro-batch, so
    that a resumed run repeats them. Registering a name again replaces the earlier task.

    Raises UserError if the name cannot be a module's.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]{0,63}", name) or hasattr(nn.ModuleDict(), name):
        raise UserError(f"auxiliary task {name!r}: choose a name of up to 64 letters, digits, _ and -")

    def register(build: Builder) -> Builder:
        _builders[name] = build
        return build

    return register


def check_registered(names: Iterable[str]) -> None:
    """Raise UserError unless all tasks are registered."""
    for name in names:
        if name not in _builders:
            known = ", ".join(sorted(_builders)) or "none"
            way_out = "register it with charlm.auxiliary_task in a script that trains (docs/tasks.md)"
            text = f"aux.tasks: {name!r} is not registered; registered: {known}; {way_out}"
            raise UserError(text, "aux.tasks")


def build_tasks(names: Iterable[str], config: ModelConfig, vocabulary_size: int) -> nn.ModuleDict:
    """Fresh modules of the tasks. Raises UserError if one is not registered."""
    check_registered(names)
    tasks = nn.ModuleDict()
    for name in sorted(names):
        with named_in_errors(name):
            tasks[name] = _builders[name](config, vocabulary_size)
    return tasks


@contextmanager
def named_in_errors(name: str, within: str = "") -> Iterator[None]:
    """Inside, an exception that passes a function named *within* raises a UserError with the user's own lines."""
    try:
        yield
    except Exception as error:
        stack = traceback.extract_tb(error.__traceback__)
        elsewhere = not any(within in call.name for call in stack)
        lost_process = re.search("gloo|NCCL", str(error))
        if elsewhere or lost_process or isinstance(error, UserError) or is_about_memory(error):
            raise
        torch_folder = Path(torch.__file__).parent
        libraries = {Path(__file__).parents[1], torch_folder, torch_folder.with_name("accelerate")}
        own = [call for call in stack if libraries.isdisjoint(Path(call.filename).parents)]
        lines = [f"\n  {call.filename}, line {call.lineno}, in {call.name}: {call.line}" for call in own[-8:]]
        raise UserError(f"aux.tasks: {name!r} raised {error!r}{''.join(lines)}", "aux.tasks") from error
