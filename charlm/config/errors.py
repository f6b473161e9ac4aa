"""Errors whose messages are for the user, and the words that messages share."""

import difflib
import json
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel

from charlm.text import visible


class UserError(Exception):
    """A fault that the user can fix, shown as one message; `option` is the dotted name of the option at fault."""

    def __init__(self, message: object = "", option: str | None = None):
        super().__init__(message)
        self.option = option


class Stopped(BaseException):
    """The process was asked to stop and saved its state. Not an Exception, so loops over runs stop as well."""


class ConfigError(UserError):
    """Options with values that cannot work. The message names each option, its value and the way out."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 200 characters, to quote in a message of ours."""
    message = str(error).strip() or type(error).__name__
    return message.splitlines()[0].strip()[:200]


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: one or two similar names, if there are any."""
    found = difflib.get_close_matches(name, names, n=2, cutoff=0.7)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def shown(value: Any, limit: int = 120) -> str:
    """A value as a config file has it, on one line, cut if it has more than `limit` characters."""
    if not isinstance(value, str) or not value.isprintable() or "\\" in value:
        text = json.dumps(value, ensure_ascii=False, default=lambda v: dict(v) if isinstance(v, BaseModel) else str(v))
        value = text.replace('"', "")
    value = visible(value)
    return value if len(value) <= limit else f"{value[:80]}... ({len(value):,} characters)"
