"""Errors whose messages are for the user, and the words that messages share."""

import difflib
import json
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel


class UserError(Exception):
    """Something the user can mend, shown as one message; `option` is the dotted name of the option at fault, if any."""

    def __init__(self, message: object = "", option: str | None = None):
        super().__init__(message)
        self.option = option


class Stopped(BaseException):
    """The process was asked to stop and has saved its state. No Exception, so that a loop over several runs stops."""


class ConfigError(UserError):
    """Options whose values cannot work. The message names each option, its value and the way out."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, short enough to stand in a message of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()[:200]


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of a complaint about an unknown name: similar ones, else all of its section, if there are any."""
    names = list(dict.fromkeys(names))
    if found := difflib.get_close_matches(name, names, n=2, cutoff=0.7):
        return f"; did you mean {' or '.join(found)}?"
    section = name.rpartition(".")[0] + "."
    options = [other.removeprefix(section) for other in names if other.startswith(section)]
    return f"; {section.strip('-.')} has {', '.join(options)}" if options else ""


def written(value: Any) -> str:
    """A value as it is written in a config file, on one line."""
    if isinstance(value, str) and value.isprintable():
        return value
    text = json.dumps(value, ensure_ascii=False, default=lambda v: dict(v) if isinstance(v, BaseModel) else str(v))
    return text.replace('"', "")


def shown(value: Any) -> str:
    """A value as it is written in a config file, cut where it is long."""
    text = written(value)
    return text if len(text) <= 120 else f"{text[:80]}... ({len(text):,} characters)"
