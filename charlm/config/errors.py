"""Errors whose messages are for the user, and the words that messages share."""

import difflib
import json
from collections.abc import Iterable
from typing import Any

from pydantic_core import to_jsonable_python

from charlm.text import visible


class UserError(Exception):
    """A fault that the user can fix; `option` is the dotted name of the option at fault."""

    def __init__(self, message: object = "", option: str | None = None):
        super().__init__(message)
        self.option = option


class Stopped(BaseException):
    """The process was asked to stop and saved its state. Loops over runs stop as well."""


class ConfigError(UserError):
    """Options with values that cannot work."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 200 characters."""
    message = str(error).strip() or type(error).__name__
    return message.splitlines()[0].strip()[:200]


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: one or two similar ones."""
    found = difflib.get_close_matches(name, names, n=2, cutoff=0.7)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def shown(value: Any, limit: int = 120) -> str:
    """A value as a config file has it, on one line, cut if it has more than `limit` characters."""
    if not isinstance(value, str) or not value.isprintable() or "\\" in value:
        plain = to_jsonable_python(value, fallback=str)
        value = json.dumps(plain, ensure_ascii=False).replace('"', "")
    value = visible(value)
    return value if len(value) <= limit else f"{value[:80]}... ({len(value):,} characters)"
