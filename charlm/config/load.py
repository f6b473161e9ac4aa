"""YAML files, flags and mappings -> Config, and back.

What is read stays text until the type of its option makes it a number, a path or a word. YAML's own guesses, for which
`no` is false and `1e-3` is text, play no part, and files and flags are read alike.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple, TypeVar

import yaml

from charlm.config import Config, Section, UserError
from charlm.config.errors import did_you_mean, shown
from charlm.config.types import NULLS, Lines, options_of, read_yaml, sections_of

S = TypeVar("S", bound=Section)
SECTIONS, OPTIONS = sections_of(Config), options_of(Config)
RENAMED = {"model.positions": "model.position_encoding"}  # former names of options, and the present ones


class Setting(NamedTuple):
    """The value of an option before it is checked, the file and line that set it, and the name used there."""

    value: Any
    place: str = ""
    name: str = ""


def load_config(
    files: str | Path | Sequence[str | Path] = (), overrides: Sequence[str] | Mapping[str, Any] = ()
) -> Config:
    """The configuration that YAML files make, the later over the earlier, and overrides over all files.

    Overrides are flags, `["--train.steps=60"]`, or a mapping, `{"train.steps": 60}` or `{"train": {"steps": 60}}`.

    Raises:
        UserError: missing or unreadable file.
        ConfigError: unknown names (similar ones are named) and values that cannot work, all in one message.
    """
    if not isinstance(overrides, Mapping):
        overrides = dict(flag.removeprefix("--").split("=", 1) if "=" in flag else (flag, "") for flag in overrides)
    return validate(Config, settings_of([files] if isinstance(files, (str, Path)) else files, overrides))


def settings_of(files: Sequence[str | Path], overrides: Mapping[str, Any]) -> dict[str, Setting]:
    """The settings that files and overrides make. `reset: true` in a section drops what earlier files set there."""
    settings: dict[str, Setting] = {}
    for file in map(Path, files):
        found = dict(_settings(_read(file), str(file)))
        for name in [name for name, (value, *_) in found.items() if name.endswith(".reset") and value == "true"]:
            del found[name]
            settings = {one: set_ for one, set_ in settings.items() if not one.startswith(name.removesuffix("reset"))}
        settings |= found
    return settings | dict(_settings(overrides, ""))


def validate(kind: type[S], settings: Mapping[str, Setting]) -> S:
    """A `kind` of settings by dotted name. Raises ConfigError, with the places that set what is wrong."""
    tree: dict[str, Any] = {}
    for name, setting in settings.items():
        *sections, option = name.split(".") if name in options_of(kind) else [name]
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[option] = setting.value
    return kind.read(tree, {name: setting.place for name, setting in settings.items()})


def to_yaml(config: Config, **how: Any) -> str:
    """The config as YAML, which `load_config` reads back; `how` goes to pydantic's `model_dump`."""
    return yaml.dump(config.model_dump(**how), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Writes paths, too, and a file that is named null as ./null."""


def _write_text(dumper: yaml.SafeDumper, value: str | PurePath) -> yaml.ScalarNode:
    text = f"./{value}" if isinstance(value, PurePath) and str(value).lower() in NULLS else str(value)
    ends_line = any(character in text for character in "\x85\u2028\u2029")  # for PyYAML, which leaves them unquoted
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if ends_line else None)


_Dumper.add_representer(str, _write_text)
_Dumper.add_multi_representer(PurePath, _write_text)


def _read(file: Path) -> Mapping[str, Any]:
    try:
        tree = read_yaml(file.read_text(encoding="utf-8")) or {}
        if not isinstance(tree, dict):
            raise ValueError(f"must hold `name: value` lines, not {shown(tree)}")
    except FileNotFoundError:
        hint = did_you_mean(str(file), map(str, file.parent.glob("*.yaml")))
        raise UserError(f"config file {file} does not exist{hint}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"config file {file} cannot be read: {error}") from None
    return tree


def _settings(tree: Mapping[str, Any], source: str, section: str = "") -> Iterator[tuple[str, Setting]]:
    """Each option that a mapping sets. Sections may be nested, dotted or empty, and names may have dashes."""
    for key, value in tree.items():
        name = f"{section}.{key}".lstrip(".").replace("-", "_")
        place = f"{source}, line {tree.lines[key]}" if isinstance(tree, Lines) else source
        if name not in SECTIONS:
            yield RENAMED.get(name, name), Setting(value, place, name)
        elif isinstance(value, Mapping):
            yield from _settings(value, source, name)
        elif value is not None and str(value).lower() not in NULLS:
            raise UserError(f"{place}: {name}={shown(value)}: is a section, which holds `name: value` lines", name)
