"""What the scripts share: arguments in, errors for people out. Imports nothing heavy: --help answers at once."""

import argparse
import inspect
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import Field
from pydantic.fields import FieldInfo

from charlm.config import Config, DataConfig, Section, Stopped, UserError
from charlm.config.load import (
    OPTIONS,
    RENAMED,
    SECTIONS,
    did_you_mean,
    options_of,
    resolve,
    sections_of,
    settings_of,
    validate,
)
from charlm.config.wording import in_words, shown, words_of
from charlm.terminal import filled, fitted, is_main_process

S = TypeVar("S", bound=Section)
PATIENCE = 10.0
"""Seconds that a process waits for the first one's message before it prints its own."""


LONGEST_METAVAR = 55
"""A longer list of words stands in the text of --help, where it can be broken."""


class Flag:
    """How an option of a script is typed, if not as `--its-name VALUE`; stands in the `Annotated` of its type.

    Takes the arguments of `argparse.ArgumentParser.add_argument`; a name without dashes is a positional argument.
    """

    def __init__(self, *names: str, **how: Any):
        self.names, self.how = names, how


class WithConfig(Section):
    """Base of the options of a script that takes `--config FILE` and every option of `Config` as a flag."""

    config_files: Annotated[tuple[Path, ...], Flag("--config", action="append", metavar="FILE")] = ()
    """A YAML file of options. May be given several times: the later wins, and flags win over files."""
    config: Config = Config()
    flags: dict[str, Any] = Field(default_factory=dict)


class MovedCorpus(Section):
    """The corpus of a model, if it is no longer where it was in training."""

    path: Path | None = None
    """A local copy of the corpus, or the file or folder that it was made from."""
    hub_id: str | None = None
    """Another copy of a dataset, such as a folder of its parquet files."""
    cache_dir: Path | None = None
    """Folder for prepared corpora."""

    def where(self, config: DataConfig) -> DataConfig:
        """The config with these places."""
        return config.replace(**{name: value for name, value in self if value is not None})


def parse(kind: type[S], argv: Sequence[str] | None = None) -> S:
    """The options of a script, from the command line; `--help` prints the fields' docstrings and exits.

    Scripts' own options are shown with dashes (`--top-k`), those of the configuration with underscores
    (`--model.num_layers`); both are understood everywhere. A bool of a script is a bare flag (`--json`), one of the
    configuration takes a value.

    Raises:
        UserError: unknown option (similar ones are named), missing value or file.
        ConfigError: values that cannot work.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if "_ARGCOMPLETE" in os.environ:  # a shell asks for completions
        import argcomplete

        argcomplete.autocomplete(_parser(kind, described=True))
    has_config, wants_help = issubclass(kind, WithConfig), not {"-h", "--help"}.isdisjoint(argv)
    if wants_help and not has_config:
        _show_help(kind)
    given = _parser(kind).read([token for token in argv if token not in ("-h", "--help")])
    if not has_config:
        return validate(kind, given)
    flags = {name: given.pop(name) for name in [*OPTIONS, *RENAMED] if name in given}
    settings = settings_of(given.get("config_files", ()), flags)
    for name, setting in settings.items():
        if name != setting.name and is_main_process():
            print(f"{setting.name} is now called {name}", file=sys.stderr)
    config = resolve(settings)
    if wants_help:
        _show_help(kind, {name: reduce(getattr, name.split("."), config) for name in OPTIONS})
    return validate(kind, given).replace(config=config, flags=flags)


class _Parser(argparse.ArgumentParser):
    """argparse, raising UserError where it would print its usage and exit, with dashes and underscores alike."""

    def __init__(self, **options: Any):
        super().__init__(**options, allow_abbrev=False, formatter_class=_Layout)
        self.spellings: dict[str, str] = {}

    def add(self, group: Any, *names: str, **how: Any) -> argparse.Action:
        """Add an option to a group of this parser."""
        action = group.add_argument(*names, default=argparse.SUPPRESS, **how)
        self.spellings |= {name.replace("_", "-"): name for name in action.option_strings}
        return action

    def read(self, argv: Sequence[str]) -> dict[str, Any]:
        """The options that `argv` sets, as text."""

        return vars(self.parse_args([re.sub(r"^--[^=]+", self._spelt, token) for token in argv]))

    def _spelt(self, name: re.Match) -> str:
        if (spelling := self.spellings.get(name[0].replace("_", "-"))) is None:  # even if a required one is missing
            self.error(f"unrecognized arguments: {name[0]}")
        return spelling

    def error(self, message: str) -> NoReturn:
        option = re.search(r"--([^=\s:,/]+)", message)
        if message.startswith("unrecognized arguments: "):
            word = message.split()[2]
            message += did_you_mean(word.partition("=")[0], self.spellings.values())
            if word.endswith((".yaml", ".yml")):
                message += f"; a file of options is given as --config {word}"
        raise UserError(message, option and option[1].replace("-", "_"))


class _Layout(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=8)


def _show_help(kind: type[Section], values: Mapping[str, Any] = {}) -> NoReturn:
    _parser(kind, described=True, values=values).print_help()
    sys.exit(0)


def _parser(kind: type[Section], *, described: bool = False, values: Mapping[str, Any] = {}) -> _Parser:
    """The parser of a script's options, and of those of `Config` for a `WithConfig`.

    Args:
        kind: the script's options.
        described: whether to say what may be written for each option, for help and completion.
        values: of the configuration's options, to be shown as defaults.
    """
    has_config = issubclass(kind, WithConfig)
    own = {name: info for name, info in options_of(kind).items() if not re.match(r"flags$|config\.", name)}
    words = ["[--config FILE ...]", "[--section.option=VALUE ...]"] if has_config else []
    words += [flag.how["metavar"] for flag in map(_flag_of, own.values()) if not _is_named(flag)]
    parser = _Parser(description=_filled_doc(kind), usage=" ".join(["%(prog)s", *words, "[options]"]))
    schemas = _schemas(kind) if described else {}
    for name, info in own.items():
        _add(parser, parser, f"--{name.replace('_', '-')}", name, info, schemas.get(name), _default(info))
    if has_config:
        schemas = _schemas(Config) if described else {}
        groups = {name: parser.add_argument_group(name, _filled_doc(SECTIONS[name])) for name in SECTIONS if name}
        for name, info in OPTIONS.items():
            group = groups[name.rpartition(".")[0]]
            _add(parser, group, f"--{name}", name, info, schemas.get(name), values.get(name), has_value=True)
        for name in RENAMED:
            parser.add(parser, f"--{name}", dest=name, help=argparse.SUPPRESS)
    return parser


def _add(
    parser: _Parser, group: Any, name: str, dest: str, info: FieldInfo, schema: Any, value: Any, has_value: bool = False
) -> None:
    flag = _flag_of(info)
    names, how = flag.names or (name,), dict(flag.how)
    if _is_named(flag):
        how |= {"dest": dest, "required": info.is_required()}
    text = " ".join(info.description.split())
    if info.annotation is bool and not has_value:
        how["action"] = argparse.BooleanOptionalAction if info.default else "store_true"
    elif schema is not None:
        written = in_words(schema)
        if len(written) > LONGEST_METAVAR:
            text, written = f"One of {', '.join(words_of(schema))}. {text}", "word"
        how.setdefault("metavar", written if has_value else written.removesuffix(" or null"))
    default = "" if not has_value and value in (None, False, ()) else f" (default: {shown(value)})"
    how["help"] = f"{text}{default}".replace("%", "%%")
    action = parser.add(group, *names, **how)
    if schema is not None and (words := words_of(schema)):
        action.completer = lambda **_: words  # for argcomplete


def _flag_of(info: FieldInfo) -> Flag:
    return next((mark for mark in info.metadata if isinstance(mark, Flag)), Flag())


def _is_named(flag: Flag) -> bool:
    return not flag.names or flag.names[0].startswith("-")


def _default(info: FieldInfo) -> Any:
    return None if info.is_required() else info.get_default(call_default_factory=True)


def _schemas(kind: type[Section]) -> dict[str, Any]:
    """What the JSON schemas of a section and of those inside of it say of each option, by dotted name."""
    return {
        f"{section}.{name}".lstrip("."): schema
        for section, part in sections_of(kind).items()
        for name, schema in part.model_json_schema()["properties"].items()
    }


def _filled_doc(kind: type[Section]) -> str:
    return filled(inspect.cleandoc(kind.__doc__))


def script(main: Callable[[], None]) -> NoReturn:
    """Run `main` and exit: 0, also when asked to stop; 2 after one message for a UserError; 130 when interrupted.

    If several processes fail alike, only the first prints the message: a launcher ends all as soon as one exits. The
    others wait for that, and print theirs only if they are still there after `PATIENCE` seconds.
    """
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        if not is_main_process():
            time.sleep(PATIENCE)
        print(fitted(f"error: {error}"), file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        if is_main_process():
            print(fitted(str(stopped)), file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader, `head` say, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    sys.exit(0)
