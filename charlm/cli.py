"""What the scripts share: arguments in, errors for people out. Imports nothing heavy: --help answers at once."""

import argparse
import inspect
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import Field
from pydantic.fields import FieldInfo

from charlm.config import Config, DataConfig, Section, Stopped, UserError
from charlm.config.load import OPTIONS, RENAMED, SECTIONS, Setting, options_of, sections_of, settings_of, validate
from charlm.config.wording import did_you_mean, in_words, shown, words_of
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

        argcomplete.autocomplete(_Parser(kind, describes=True))
    has_config, wants_help = issubclass(kind, WithConfig), not {"-h", "--help"}.isdisjoint(argv)
    given, config = {}, {}
    if has_config or not wants_help:
        given = _Parser(kind).read([token for token in argv if token not in ("-h", "--help")])
    if has_config:
        flags = {name: given.pop(name) for name in [*OPTIONS, *RENAMED] if name in given}
        settings = settings_of(given.get("config_files", ()), flags)
        for name, setting in settings.items():
            if name != setting.name and is_main_process():
                print(f"{setting.name} is now called {name}", file=sys.stderr)
        config = {"config": validate(Config, settings), "flags": flags}
    if wants_help:
        _Parser(kind, config.get("config"), describes=True).print_help()
        sys.exit(0)
    return validate(kind, {name: Setting(value) for name, value in given.items()}).replace(**config)


class _Parser(argparse.ArgumentParser):
    """argparse for a script's options, and for those of `Config` if it is a `WithConfig`.

    It takes dashes and underscores alike, and raises UserError where argparse would print its usage and exit.

    Args:
        kind: the script's options.
        config: the values to show as defaults in help.
        describes: whether to say what may be written for each option, for help and completion.
    """

    def __init__(self, kind: type[Section], config: Config | None = None, *, describes: bool = False):
        own = {name: info for name, info in options_of(kind).items() if not re.match(r"flags$|config\.", name)}
        has_config = issubclass(kind, WithConfig)
        words = ["%(prog)s", *["[--config FILE ...]", "[--section.option=VALUE ...]"] * has_config]
        words += [info.metadata[0].how["metavar"] for info in own.values() if _is_positional(info)]
        super().__init__(
            usage=" ".join([*words, "[options]"]),
            description=filled(inspect.cleandoc(kind.__doc__)),
            formatter_class=_Layout,
            allow_abbrev=False,
        )
        self.spellings: dict[str, str] = {}
        schemas = _schemas(kind) if describes else {}
        for name, info in own.items():
            value = None if info.is_required() else info.get_default(call_default_factory=True)
            default = "" if value in (None, False, ()) else f" (default: {shown(value)})"
            self._add(self, f"--{name.replace('_', '-')}", name, info, schemas.get(name), default)
        if not has_config:
            return
        schemas = _schemas(Config) if describes else {}
        groups = {
            name: self.add_argument_group(name, filled(inspect.cleandoc(section.__doc__)))
            for name, section in SECTIONS.items()
            if name
        }
        for name, info in OPTIONS.items():
            default = f" (default: {shown(reduce(getattr, name.split('.'), config))})" if config else ""
            self._add(groups[name.rpartition(".")[0]], f"--{name}", name, info, schemas.get(name), default)
        for former in RENAMED:
            self.add_argument(f"--{former}", dest=former, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
            self.spellings[f"--{former}".replace("_", "-")] = f"--{former}"

    def _add(self, group: Any, name: str, dest: str, info: FieldInfo, schema: Any, default: str) -> None:
        flag = next((mark for mark in info.metadata if isinstance(mark, Flag)), Flag())
        text, how, is_own = " ".join(info.description.split()), dict(flag.how), group is self
        if not _is_positional(info):
            how |= {"dest": dest, "required": info.is_required()}
        if info.annotation is bool and is_own:
            how["action"] = argparse.BooleanOptionalAction if info.default else "store_true"
        elif schema is not None:
            metavar = in_words(schema)
            if len(metavar) > LONGEST_METAVAR:
                text, metavar = f"One of {', '.join(words_of(schema))}. {text}", "word"
            how.setdefault("metavar", metavar.removesuffix(" or null") if is_own else metavar)
        how["help"] = f"{text}{default}".replace("%", "%%")
        action = group.add_argument(*flag.names or (name,), default=argparse.SUPPRESS, **how)
        self.spellings |= {spelling.replace("_", "-"): spelling for spelling in action.option_strings}
        if schema is not None and (words := words_of(schema)):
            action.completer = lambda **_: words  # for argcomplete

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
            message += did_you_mean(word, self.spellings.values())
            if word.endswith((".yaml", ".yml")):
                message += f"; a file of options is given as --config {word}"
        raise UserError(message, option and option[1].replace("-", "_"))


class _Layout(argparse.RawDescriptionHelpFormatter):
    """Texts begin below their option, and leave the docstrings' lines as they are filled."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=8)


def _is_positional(info: FieldInfo) -> bool:
    return any(isinstance(mark, Flag) and not mark.names[0].startswith("-") for mark in info.metadata)


def _schemas(kind: type[Section]) -> dict[str, Any]:
    """What the JSON schemas of a section and of those inside of it say of each option, by dotted name."""
    return {
        f"{section}.{name}".lstrip("."): schema
        for section, part in sections_of(kind).items()
        for name, schema in part.model_json_schema()["properties"].items()
    }


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
