"""YAML files, flags and mappings -> Config, and back.

What is read stays text until the type of its option makes it a number, a path or a word. YAML's own guesses, for which
`no` is false and `1e-3` is text, play no part, and files and flags are read alike.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path, PurePath
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from charlm.config import Config, UserError
from charlm.config.types import NULLS, Formerly, Lines, Section, read_yaml
from charlm.config.wording import config_error, did_you_mean, shown

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
    found, sections = {}, sections_of(kind)
    for section, part in sections.items():
        found |= {f"{section}.{name}".lstrip("."): info for name, info in part.model_fields.items()}
    return {name: info for name, info in found.items() if name not in sections}


SECTIONS, OPTIONS = sections_of(Config), options_of(Config)
RENAMED = {
    f"{name.rpartition('.')[0]}.{mark.name}": name
    for name, info in OPTIONS.items()
    for mark in info.metadata
    if isinstance(mark, Formerly)
}
"""Former names of options, and the present ones."""


class Setting(NamedTuple):
    """The value of an option before it is checked, the file and line that set it, and the name used there."""

    value: Any
    place: str = ""
    name: str = ""


def load_config(
    files: str | Path | Sequence[str | Path] = (), overrides: Sequence[str] | Mapping[str, Any] = ()
) -> Config:
    """The configuration that YAML files and overrides make together.

    Args:
        files: one or several YAML files; the later wins, and what none of them names keeps its default.
        overrides: win over the files. Flags, `["--train.steps=60"]`, or a mapping, `{"train.steps": 60}` or
            `{"train": {"steps": 60}}`.

    Raises:
        UserError: missing or unreadable file.
        ConfigError: unknown names (similar ones are named) and values that cannot work, all in one message.
    """
    if not isinstance(overrides, Mapping):
        overrides = dict(flag.removeprefix("--").split("=", 1) if "=" in flag else (flag, "") for flag in overrides)
    return validate(Config, settings_of([files] if isinstance(files, (str, Path)) else files, overrides))


def settings_of(files: Sequence[str | Path], overrides: Mapping[str, Any]) -> dict[str, Setting]:
    """What YAML files and overrides set, by the options' names."""
    settings: dict[str, Setting] = {}
    for file in map(Path, files):
        found = dict(_settings(_read(file), str(file)))
        for name in [name for name in found if name.endswith(f".{RESET}")]:
            if (is_reset := found.pop(name).value) not in ("true", "false"):
                raise UserError(f"{file}: {name}={shown(is_reset)}: should be true or false", name)
            section = name.removesuffix(RESET) if is_reset == "true" else None
            settings = {name: one for name, one in settings.items() if not section or not name.startswith(section)}
        settings |= found
    return settings | dict(_settings(overrides, ""))


def validate(kind: type[S], settings: Mapping[str, Setting]) -> S:
    """A `kind` of settings by dotted name. Raises ConfigError, with the places that set what is wrong."""
    tree: dict[str, Any] = {}
    for name, setting in settings.items():
        section = max((one for one in sections_of(kind) if not one or name.startswith(f"{one}.")), key=len)
        node = tree
        for part in filter(None, section.split(".")):
            node = node.setdefault(part, {})
        node[name.removeprefix(section).lstrip(".")] = setting.value
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        places = {name: setting.place for name, setting in settings.items()}
        raise config_error(kind, error, places, [*options_of(kind), *sections_of(kind)]) from None


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML; `load_config` of a file that holds it returns an equal one."""
    return as_yaml(config.model_dump())


def as_yaml(tree: Mapping[str, Any]) -> str:
    """Options, or some of them, as YAML."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Writes paths, too."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _path_as_text(dumper: yaml.SafeDumper, path: PurePath) -> yaml.ScalarNode:
    return dumper.represent_str(f"./{path}" if str(path).lower() in NULLS else str(path))  # a file may be named null


_Dumper.add_multi_representer(PurePath, _path_as_text)


def _read(file: Path) -> Mapping[str, Any]:
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
    tree = {} if tree in (None, *NULLS) else tree
    if not isinstance(tree, dict):
        raise UserError(f"{file}: must hold `name: value` lines, not {shown(tree)}")
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
