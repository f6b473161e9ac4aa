"""YAML files, flags and mappings -> Config, and back.

What is read stays text until the type of its option makes it a number, a path or a word. YAML's own guesses, for which
`no` is false and `1e-3` is text, play no part, and files and flags are read alike.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from charlm.config import Config, UserError
from charlm.config.types import NULLS, Formerly, Lines, Section, read_yaml
from charlm.config.wording import config_error, shown

S = TypeVar("S", bound=Section)
RESET = "reset"
"""A key of any section of a YAML file: `reset: true` drops what earlier files set in the section."""


@cache
def sections_of(kind: type[Section], name: str = "") -> dict[str, type[Section]]:
    """A section and those inside of it, by dotted name; its own is ""."""
    found = {name: kind}
    for field, info in kind.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            found |= sections_of(info.annotation, f"{name}.{field}".lstrip("."))
    return found


@cache
def options_of(kind: type[Section]) -> dict[str, FieldInfo]:
    """The fields of a section and of those inside of it, by dotted name."""
    sections = sections_of(kind)
    named = {f"{section}.{name}".lstrip("."): info for section in sections for name, info in _fields(sections[section])}
    return {name: info for name, info in named.items() if name not in sections}


def _fields(kind: type[Section]) -> Iterable[tuple[str, FieldInfo]]:
    return kind.model_fields.items()


SECTIONS = sections_of(Config)
OPTIONS = options_of(Config)
RENAMED = {
    name.rpartition(".")[0] + f".{mark.name}": name
    for name, info in OPTIONS.items()
    for mark in info.metadata
    if isinstance(mark, Formerly)
}
"""Former names of options, and the present ones."""


@dataclass(frozen=True)
class Setting:
    """The value of an option before it is checked."""

    value: Any
    place: str
    """The file and line that set it; "" for a flag."""
    name: str
    """The option's name as it was given, which may be a former one."""


def load_config(
    files: str | Path | Sequence[str | Path] = (), overrides: Sequence[str] | Mapping[str, Any] = ()
) -> Config:
    """The configuration that YAML files and overrides make together.

    Args:
        files: one or several YAML files; the later wins, and what none of them names keeps its default.
        overrides: win over the files. Flags, `["--train.steps=60"]`, or a mapping, `{"train.steps": 60}` or
            `{"train": {"steps": 60}}`.

    Raises:
        UserError: missing or unreadable file, unknown name (similar ones are named).
        ConfigError: values that cannot work; all of them are named.
    """
    if not isinstance(overrides, Mapping):
        overrides = dict(flag.removeprefix("--").split("=", 1) if "=" in flag else (flag, "") for flag in overrides)
    return resolve(settings_of([files] if isinstance(files, (str, Path)) else files, overrides))


def settings_of(files: Sequence[str | Path], overrides: Mapping[str, Any]) -> dict[str, Setting]:
    """What YAML files and overrides set, by the options' names."""
    settings: dict[str, Setting] = {}
    for file in map(Path, files):
        found = dict(_settings(_mapping_in(file), str(file)))
        for section in [name.removesuffix(f".{RESET}") for name in found if name.endswith(f".{RESET}")]:
            is_reset = shown(found.pop(f"{section}.{RESET}").value)
            if is_reset not in ("true", "false"):
                raise UserError(f"{file}: {section}.{RESET}={is_reset}: should be true or false")
            if is_reset == "true":
                settings = {name: one for name, one in settings.items() if not name.startswith(f"{section}.")}
        settings |= found
    return settings | dict(_settings(overrides, ""))


def resolve(settings: Mapping[str, Setting]) -> Config:
    """The configuration that settings make. Raises UserError for unknown names, ConfigError for values."""
    unknown = [name for name in settings if name not in OPTIONS]
    if unknown:
        raise UserError("\n".join(_unknown(name, settings[name].place) for name in unknown), unknown[0])
    return validate(
        Config,
        {name: setting.value for name, setting in settings.items()},
        {name: setting.place for name, setting in settings.items()},
    )


def validate(kind: type[S], values: Mapping[str, Any], places: Mapping[str, str] = {}) -> S:
    """A `kind` of values by dotted name. Raises ConfigError, with the places that set what is wrong."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *sections, option = name.split(".")
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
        section[option] = value
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise config_error(kind, error, lambda name: places.get(name, "")) from None


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML; `load_config` of a file that holds it returns an equal one."""
    return as_yaml(config.model_dump())


def as_yaml(tree: Mapping[str, Any]) -> str:
    """Options, or some of them, as YAML."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of a complaint about an unknown name: similar ones, if there are any."""
    found = difflib.get_close_matches(name, list(dict.fromkeys(names)), n=2, cutoff=0.7)
    return f"; did you mean {' or '.join(found)}?" if found else ""


class _Dumper(yaml.SafeDumper):
    """Writes paths, too."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _path_as_text(dumper: yaml.SafeDumper, path: PurePath) -> yaml.ScalarNode:
    return dumper.represent_str(f"./{path}" if str(path).lower() in NULLS else str(path))  # a file may be named null


_Dumper.add_multi_representer(PurePath, _path_as_text)


def _mapping_in(file: Path) -> Mapping[str, Any]:
    try:
        tree = read_yaml(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = did_you_mean(str(file), map(str, file.parent.glob("*.yaml")))
        raise UserError(f"config file {file} does not exist{hint}") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{file}{line}: is not valid YAML: {error.problem or error.context}") from None
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"config file {file} cannot be read as UTF-8 text: {error}") from None
    if tree in (None, *NULLS):
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{file}: must hold `name: value` lines, not {shown(tree)}")
    return tree


def _settings(tree: Mapping[str, Any], source: str, section: str = "") -> Iterator[tuple[str, Setting]]:
    """Each option that a mapping sets. Sections may be nested, dotted or empty, and names may have dashes."""
    for key, value in tree.items():
        name = f"{section}.{key}".lstrip(".").replace("-", "_")
        place = f"{source}, line {tree.lines[key]}" if isinstance(tree, Lines) else source
        is_empty = (isinstance(value, str) and value.lower() in NULLS) or value is None
        if name in SECTIONS and isinstance(value, Mapping):
            yield from _settings(value, source, name)
        elif name not in SECTIONS:
            yield RENAMED.get(name, name), Setting(value, place, name)
        elif not is_empty:
            raise UserError(
                f"{name}={shown(value)}: is a section; it holds `name: value` lines{_set_in(name, place)}", name
            )


def _unknown(name: str, place: str) -> str:
    choices = [other for other in [*OPTIONS, *SECTIONS] if other and not name.startswith(f"{other}.")]
    return f"{name}: is no option{did_you_mean(name, choices)}{_set_in(name, place)}"


def _set_in(name: str, place: str) -> str:
    return f"\n  {name} is set in {place}" if place else ""
