"""Errors whose messages are for the user."""

from collections.abc import Sequence
from typing import Any


class UserError(Exception):
    """Something the user can mend: shown as one message without a traceback; scripts exit with code 2.

    `option` is the dotted name of the option that is at fault, if it is about one.
    """

    def __init__(self, message: object = "", option: str | None = None):
        super().__init__(message)
        self.option = option


class Stopped(BaseException):
    """The process was asked to stop and has saved its state: scripts exit with code 0.

    It is no Exception, like KeyboardInterrupt, so that a loop over several runs stops, too.
    """


class ConfigError(UserError):
    """Options whose values cannot work. The message names each option, its value and the way out."""


class Mistake(ValueError):
    """Raised in the checks of a section, see `Section.mistake`; becomes a part of a ConfigError."""

    def __init__(self, option: str, value: Any, text: str, others: Sequence[str] = ()):
        super().__init__(text)
        self.option, self.value, self.others = option, value, others


def first_line(error: Exception) -> str:
    """The first line of an error's message, short enough to stand in a message of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()[:200]
