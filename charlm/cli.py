"""Reads the arguments of all scripts and prints their errors. Imports nothing heavy."""

import os
import sys

# Ctrl-C while libraries load, before `script` can answer it.
sys.excepthook = lambda kind, *rest: os._exit(130) if kind is KeyboardInterrupt else sys.__excepthook__(kind, *rest)

import argparse
import logging
import re
import shlex
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, NoReturn

import argcomplete
from argcomplete.completers import ChoicesCompleter
from pydantic import Field
from pydantic.fields import FieldInfo

from charlm.config import Config, DataConfig, Section, Stopped, UserError
from charlm.config.adapt import AdaptConfig
from charlm.config.errors import did_you_mean, shown
from charlm.config.load import OPTIONS, RENAMED, S, Setting, settings_of, typed, validate
from charlm.config.types import sections_of
from charlm.process import is_main_process, keep_streams
from charlm.text import fitted

KINDS = {"string": "TEXT", "boolean": "true | false", "null": "null"}  # else the name in capitals
LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


class Flag:
    """Arguments of `add_argument` for an option that is not typed `--its-name VALUE`."""

    def __init__(self, *names: str, **how: Any):
        self.names, self.how = names, how


class WithConfig(Section):
    """Options of a script that also takes --config FILE and every option of `Config`."""

    help: Annotated[bool, Flag("--help", "-h")] = False
    """Show this text, with the values of the --config files as defaults."""
    config_files: Annotated[
        tuple[Path, ...], Flag("--config", dest="config_files", action="append", metavar="FILE")
    ] = ()
    """A YAML file of options, or the name of one in configs/, such as demo. Of several the later wins, and flags win
    over files."""
    flags: dict[str, Any]

    @cached_property
    def config(self) -> Config:
        settings = settings_of(self.config_files, self.flags)
        for name, setting in settings.items():
            if name != setting.name and is_main_process():
                print(f"{setting.name} is now called {name}", file=sys.stderr)
        return validate(Config, settings)


class MovedCorpus(Section):
    """Where the corpus of a model is now, if it was moved after training."""

    path: Path | None = None
    """A local copy of the corpus, or the file or folder that it was made from."""
    as_is: bool | None = None
    """Take the corpus's files as they are, also hidden, packed and binary ones."""
    hub_id: str | None = None
    """Another copy of a dataset, such as a folder of its parquet files."""
    cache_dir: Path | None = None
    """Folder for prepared corpora."""
    mixture: Annotated[dict[str, dict[str, str]], Flag("--data.mixture", metavar="PLACES")] = Field({})
    """The same for sources of a mixture: {own: {path: my.txt}}."""

    def where(self, config: DataConfig) -> DataConfig:
        """The config with these places."""
        places = self.model_dump(exclude_none=True)
        moved = {name: dict(config.mixture.get(name, ())) | own for name, own in self.mixture.items()}
        return config.replace(**places | {"mixture": config.mixture | moved})


def adapt_of(adapt: AdaptConfig, switch: object) -> AdaptConfig | None:
    """The options of --adapt if it was given; UserError if they were given without it."""
    if not switch and adapt != AdaptConfig():
        raise UserError("adapt: options of learning while reading need the flag --adapt; add it", "adapt")
    return adapt if switch else None


def parse(kind: type[S], argv: Sequence[str] | None = None) -> S:
    """Read the options of a script. Raises UserError, with all that is wrong with their values."""
    parser = _Parser(kind)
    argcomplete.autocomplete(parser)
    parser.words = words = [_spelt(word) for word in (sys.argv[1:] if argv is None else argv)]
    for word in words:  # argparse would complain about a missing option first
        if re.match("--.", word) and word.partition("=")[0] not in parser.flags:
            parser.error(f"unrecognized arguments: {word}")
    given = vars(parser.parse_args(words))
    if issubclass(kind, WithConfig):
        given["flags"] = typed({name: given.pop(name) for name in list(given) if "." in name})
    options = validate(kind, {name: Setting(value) for name, value in given.items()})
    if isinstance(options, WithConfig):
        config = options.config  # is checked
        if options.help:
            parser.set_defaults(**{name: shown(attrgetter(name)(config)) for name in OPTIONS})
            parser.print_help()
            sys.exit(0)
    return options


def _spelt(word: str) -> str:
    """A word with its flag as in --help: underscores in options of sections, else dashes."""
    name, equals, value = word.partition("=")
    if name.startswith("--"):
        name = "--" + name[2:].replace("-", "_") if "." in name else name.replace("_", "-")
    return name + equals + value


class _Parser(argparse.ArgumentParser):
    """argparse that raises UserError where it would print its usage and exit."""

    def __init__(self, kind: type[Section]):
        has_config = issubclass(kind, WithConfig)
        usage = "%(prog)s [--config FILE ...] [--section.option=VALUE ...] [options]"
        super().__init__(
            usage=usage if has_config else None,
            description=kind.__doc__,
            formatter_class=partial(argparse.ArgumentDefaultsHelpFormatter, max_help_position=8),
            add_help=not has_config,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        self.flags, self.valued, self.words = ["--help"], [], []
        for former in RENAMED if has_config else ():
            self.flags += self.add_argument(f"--{former}", help=argparse.SUPPRESS).option_strings
        for options in (kind, Config) if has_config else (kind,):
            for section, part in sections_of(options).items():
                group = self.add_argument_group(section, part.__doc__) if section else self
                schemas = part.model_json_schema()["properties"]
                for option, info in part.model_fields.items():
                    if info.description:  # sections have none
                        name = f"{section}.{option}".lstrip(".")
                        self._add(group, name, info, in_words(schemas[option]), is_own=options is kind)

    def _add(self, group: Any, name: str, info: FieldInfo, kinds: str, *, is_own: bool) -> None:
        flag = next((mark for mark in info.metadata if isinstance(mark, Flag)), Flag(_spelt(f"--{name}")))
        text = info.description.replace("%", "%%")
        how = {"metavar": kinds.removesuffix(" | null") if is_own else kinds, "help": text}
        if len(kinds) > 55:  # in the text it can be broken
            how = {"metavar": "WORD", "help": f"{kinds}. {text}"}
        if is_own and info.annotation is bool:  # a bare flag
            action = argparse.BooleanOptionalAction if info.default else "store_true"
            how = {"help": text, "action": action}
        if info.is_required() and flag.names[0].startswith("-"):
            how["required"] = True
        elif is_own and info.default and not info.is_required():
            how["default"] = shown(info.default)
        action = group.add_argument(*flag.names, **how | flag.how)
        self.flags += action.option_strings
        self.valued += action.option_strings if action.nargs != 0 else []
        if words := re.findall(r"\b(?!null)[a-z][\w-]*", kinds):
            action.completer = ChoicesCompleter(words)

    def error(self, message: str) -> NoReturn:
        option = re.search(r"--([^=\s:,/]+)", message)
        if unknown := re.match(r"unrecognized arguments: ([^\s=]+)", message):
            message += did_you_mean(unknown[1], self.flags) or "; --help lists all options"
            if unknown[1].endswith((".yaml", ".yml")):
                message += f"; give a file of options as --config {unknown[1]}"
        for name, value in pairwise(self.words):
            takes_it = name in self.valued and value.startswith("-") and value not in self.flags
            if takes_it and ("expected" in message or value in message):
                message += f"; give a value with a dash as {shlex.quote(f'{name}={value}')}"
        raise UserError(message, option and option[1].replace("-", "_"))


def in_words(schema: dict[str, Any]) -> str:
    """The values that a JSON schema allows, as words of a help text."""
    match schema:
        case {"anyOf": members} | {"oneOf": members}:
            return " | ".join(map(in_words, members))
        case {"enum": words}:
            return " | ".join(words)
        case {"const": word}:
            return word
        case {"prefixItems": items}:
            return f"[{', '.join(map(in_words, items))}]"
        case {"items": item}:
            return f"[{in_words(item)}, ...]"
        case {"type": "object", "additionalProperties": item}:
            key = schema.get("propertyNames", {"const": "NAME"})
            return f"{{{in_words(key)}: {in_words(item)}, ...}}"
        case {"$ref": reference}:
            return reference.rpartition("/")[2].removesuffix("Config").upper()
    limits = [f"{sign} {schema[limit]:g}" for limit, sign in LIMITS.items() if limit in schema]
    kind = schema.get("format") or schema["type"]
    return f"{KINDS.get(kind, kind.upper())} {', '.join(limits)}".rstrip()


def script(main: Callable[[], None]) -> NoReturn:
    """Run `main` and exit: 0, also when asked to stop; 2 after an error; 130 on Ctrl-C."""
    keep_streams()
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # warns where there is no home
    try:
        main()
    except (UserError, OSError) as error:
        if not is_main_process():
            time.sleep(10)  # a launcher usually ends this process first: one message is enough
        print(fitted(f"error: {error}"), file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        if is_main_process():
            print(fitted(str(stopped)), file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
