"""Parses the arguments of all scripts and prints their errors. Imports nothing heavy: --help answers at once."""

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import Field
from pydantic.fields import FieldInfo

from charlm.config import Config, DataConfig, Section, Stopped, UserError
from charlm.config.load import OPTIONS, RENAMED, S, Setting, settings_of, validate
from charlm.config.types import sections_of
from charlm.config.wording import did_you_mean, in_words, shown
from charlm.terminal import fitted, is_main_process

PATIENCE = 10.0
"""Seconds that a process waits for the first one's message before it prints its own."""


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

    Dashes and underscores are alike. A bool of a script is a bare flag (`--json`), one of the configuration takes a
    value. Help shows the values of the `--config` files as defaults.

    Raises:
        UserError: unknown option (similar ones are named), missing value or file.
        ConfigError: values that cannot work.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser, has_config = _Parser(kind), issubclass(kind, WithConfig)
    if "_ARGCOMPLETE" in os.environ:  # a shell asks for completions
        import argcomplete

        argcomplete.autocomplete(parser)
    words = [_spelt(word) if word.startswith("--") else word for word in argv if word not in ("-h", "--help")]
    wants_help = len(words) < len(argv)
    given = parser.read(words) if has_config or not wants_help else {}
    parsed: dict[str, Any] = {}
    if has_config:
        flags = {name: given.pop(name) for name in list(given) if "." in name}
        settings = settings_of(given.get("config_files", ()), flags)
        for name, setting in settings.items():
            if name != setting.name and is_main_process():
                print(f"{setting.name} is now called {name}", file=sys.stderr)
        parsed = {"config": validate(Config, settings), "flags": flags}
    if wants_help:
        defaults = {name: info.default for name, info in kind.model_fields.items() if not info.is_required()}
        if has_config:
            defaults |= {name: reduce(getattr, name.split("."), parsed["config"]) for name in OPTIONS}
        parser.set_defaults(**{name: shown(value) for name, value in defaults.items() if value or "." in name})
        parser.print_help()
        sys.exit(0)
    return validate(kind, {name: Setting(value) for name, value in given.items()}).replace(**parsed)


def _spelt(flag: str) -> str:
    """A flag as help has it: with underscores if it belongs to a section, else with dashes."""
    name, *value = flag.split("=", 1)
    name = "--" + name[2:].replace("-", "_") if "." in name else name.replace("_", "-")
    return "=".join([name, *value])


class _Parser(argparse.ArgumentParser):
    """argparse for a script's options, and for those of `Config` if it is a `WithConfig`.

    It raises UserError where argparse would print its usage and exit.
    """

    def __init__(self, kind: type[Section]):
        has_config = issubclass(kind, WithConfig)
        super().__init__(
            usage="%(prog)s [--config FILE ...] [--section.option=VALUE ...] [options]" if has_config else None,
            description=kind.__doc__,
            formatter_class=partial(argparse.ArgumentDefaultsHelpFormatter, max_help_position=8),
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        self.flags: list[str] = []
        for name, part in sections_of(kind).items():
            section = name.removeprefix("config").lstrip(".")
            group = self.add_argument_group(section, part.__doc__) if section else self
            schemas = part.model_json_schema()["properties"]
            for option, info in part.model_fields.items():
                if info.description:  # sections have none
                    is_own = not name.startswith("config")
                    self._add(group, f"{section}.{option}".lstrip("."), info, in_words(schemas[option]), is_own)
        for former in RENAMED if has_config else ():
            self.flags += self.add_argument(f"--{former}", help=argparse.SUPPRESS).option_strings

    def _add(self, group: Any, dest: str, info: FieldInfo, kinds: str, is_own: bool) -> None:
        flag = next((mark for mark in info.metadata if isinstance(mark, Flag)), Flag())
        names = flag.names or (_spelt(f"--{dest}"),)
        text, metavar = " ".join(info.description.split()), kinds.removesuffix(" | null") if is_own else kinds
        if flag.how:  # a list that is given item by item
            metavar = metavar.removeprefix("[").removesuffix(", ...]")
        if len(metavar) > 55:  # in the text it can be broken
            text, metavar = f"{metavar}. {text}", "WORD"
        how = {"metavar": metavar, "help": text.replace("%", "%%")} | flag.how
        if info.annotation is bool and is_own:
            del how["metavar"]
            how["action"] = argparse.BooleanOptionalAction if info.default else "store_true"
        if names[0].startswith("-"):
            how |= {"dest": dest, "required": info.is_required()}
        action = group.add_argument(*names, **how)
        self.flags += action.option_strings
        if words := re.findall(r"\b(?!null)[a-z][\w-]*", kinds):
            action.completer = lambda **_: words  # for argcomplete

    def read(self, words: Sequence[str]) -> dict[str, Any]:
        """The options that `words` set, as text."""
        for word in words:  # argparse would complain of a missing option first
            if re.match("--.", word) and word.partition("=")[0] not in self.flags:
                self.error(f"unrecognized arguments: {word}")
        return vars(self.parse_args(words))

    def error(self, message: str) -> NoReturn:
        option = re.search(r"--([^=\s:,/]+)", message)
        if unknown := re.match(r"unrecognized arguments: ([^\s=]+)", message):
            message += did_you_mean(unknown[1], self.flags)
            if unknown[1].endswith((".yaml", ".yml")):
                message += f"; a file of options is given as --config {unknown[1]}"
        raise UserError(message, option and option[1].replace("-", "_"))


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
