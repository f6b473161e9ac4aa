"""YAML files, flags and mappings -> Config, and back.

Values stay text until their option's type reads them, without YAML's guesses (`no` is false).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple, TypeVar

import yaml

from charlm.config import Config, Section, UserError
from charlm.config.errors import did_you_mean, shown
from charlm.config.types import MAX_YAML, NULLS, Lines, Mark, options_of, read_yaml, sections_of
from charlm.text import SHIPPED

S = TypeVar("S", bound=Section)
CONFIGS = SHIPPED / "configs"
SECTIONS, OPTIONS = sections_of(Config), options_of(Config)
ESCAPE = re.compile(r"\\(?:[\\abfnrtv]|x[0-9A-Fa-f]{2}|u(?![dD][89a-fA-F])[0-9A-Fa-f]{4})")
RENAMED = {"model.positions": "model.position_encoding"}  # former names of options, and the present ones
LENGTH = ("train.steps", "train.time", "train.steps_before")  # where one of the first two is given later, all go


class Setting(NamedTuple):
    """The unchecked value of an option, the file and line that set it, and the name used there."""

    value: Any
    place: str = ""
    name: str = ""


def load_config(
    files: str | Path | Sequence[str | Path] = (), overrides: Sequence[str] | Mapping[str, Any] = ()
) -> Config:
    """Read a configuration from YAML files, of which the later wins, and overrides of their values.

    These are flags, `["--train.steps=60"]`, or a mapping, `{"train.steps": 60}`, maybe nested.
    Raises UserError for an unreadable file, and ConfigError for names and values that cannot work.
    """
    if not isinstance(overrides, Mapping):
        overrides = typed(dict(flag.removeprefix("--").partition("=")[::2] for flag in overrides))
    files = [files] if isinstance(files, (str, Path)) else files
    return validate(Config, settings_of(files, overrides))


def typed(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Values of flags: null is None, and options with Mark.ESCAPES may contain escapes."""
    values = {name: None if value == "null" else value for name, value in flags.items()}
    for name, value in values.items():
        if value is not None and name in OPTIONS and Mark.ESCAPES in OPTIONS[name].metadata:
            values[name] = ESCAPE.sub(lambda found: found[0].encode().decode("unicode_escape"), value)
    return values


def settings_of(files: Sequence[str | Path], overrides: Mapping[str, Any]) -> dict[str, Setting]:
    """Settings by name. `reset: true` in a section drops what earlier files set there."""
    settings: dict[str, Setting] = {}
    sources = []
    for file in files:
        shipped = CONFIGS / f"{file}.yaml"  # of the name demo, or methods/keras
        file = shipped if shipped.is_file() and not Path(file).is_file() else Path(file)
        sources.append((_read(file), str(file)))
    for tree, source in (*sources, (overrides, "")):
        found = dict(_settings(tree, source))
        for reset in [name for name in found if name.endswith(".reset") and found[name].value == "true"]:
            del found[reset]
            section = reset.removesuffix("reset")
            settings = {name: settings[name] for name in settings if not name.startswith(section)}
        settings = over(settings, found)
    return settings


def over(settings: Mapping[str, Setting], later: Mapping[str, Setting]) -> dict[str, Setting]:
    """`settings` and `later` ones; a new length of the run takes the place of all that was said of it."""
    given = {name for name, setting in later.items() if str(setting.value).lower() not in NULLS}
    gone = () if given.isdisjoint(LENGTH[:2]) else LENGTH
    return {name: own for name, own in settings.items() if name not in gone} | later


def validate(kind: type[S], settings: Mapping[str, Setting]) -> S:
    """A `kind` with these settings. Raises ConfigError, with the place of each fault."""
    tree: dict[str, Any] = {}
    for name, setting in settings.items():
        *sections, option = name.split(".") if name in options_of(kind) else [name]
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[option] = setting.value
    return kind.read(tree, {name: setting.place for name, setting in settings.items()})


def to_yaml(config: Config, **how: Any) -> str:
    """The config as YAML; `how` goes to pydantic's `model_dump`."""
    return yaml.dump(config.model_dump(**how), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Also writes paths, and ./null for a file called null."""


def _write_text(dumper: yaml.SafeDumper, value: str | PurePath) -> yaml.ScalarNode:
    text = f"./{value}" if isinstance(value, PurePath) and str(value).lower() in NULLS else str(value)
    style = None if text.isprintable() else '"'  # by itself, PyYAML does not quote every end of line
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _write_text)
_Dumper.add_multi_representer(PurePath, _write_text)


def _read(file: Path) -> Mapping[str, Any]:
    try:
        with file.open(encoding="utf-8") as opened:
            tree = read_yaml(opened.read(MAX_YAML + 1)) or {}
        if not isinstance(tree, dict):
            raise ValueError(f"must hold `name: value` lines, not {shown(tree)}")
    except FileNotFoundError:
        names = [*map(str, file.parent.glob("*.yaml")), *(path.stem for path in CONFIGS.glob("*.yaml"))]
        hint = did_you_mean(str(file), names)
        raise UserError(f"config file {file} does not exist{hint}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"config file {file} cannot be read: {error}") from None
    return tree


def _settings(tree: Mapping[str, Any], source: str, section: str = "") -> Iterator[tuple[str, Setting]]:
    """The options in a mapping. Sections may be nested, dotted or empty, names may have dashes."""
    for key, value in tree.items():
        name = f"{section}.{key}".lstrip(".").replace("-", "_")
        place = f"{source}, line {tree.lines[key]}" if isinstance(tree, Lines) else source
        if name not in SECTIONS:
            yield RENAMED.get(name, name), Setting(value, place, name)
        elif isinstance(value, Mapping):
            yield from _settings(value, source, name)
        elif str(value).lower() not in NULLS:
            text = f"{name}={shown(value)}: is a section of `name: value` lines"
            raise UserError(f"{place}: {text}", name)
