"""What is said when something cannot work."""


class UserError(Exception):
    """Something the user can mend: shown as one message without a traceback; scripts exit with code 2."""


class Stopped(BaseException):
    """The process was asked to stop, and has saved what there was to save: scripts exit with code 0.

    Like KeyboardInterrupt no Exception, so that whoever trains several runs in a row stops, too.
    """


class ConfigError(UserError):
    """An option whose value cannot work. The message names the field, the value and the way out."""


def first_line(error: Exception) -> str:
    """What `error` says, short enough to stand in a message of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()[:200]


def require(condition: bool, name: str, value: object, way_out: str) -> None:
    """Raise ConfigError, which names the option `name` and its `value`, unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{name}={value}: {way_out}")
