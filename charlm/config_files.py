"""YAML files and flags -> Config, and back. Files are turned into flags, so that one parser reads both."""

import contextlib
import dataclasses
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tyro
import yaml

from charlm.arguments import parse
from charlm.config import Config, UserError
from charlm.values import LARGEST, NULLS, compose, is_structured


class Setting(NamedTuple):
    """One option found in a file, as the flag that says the same."""

    name: str
    text: str
    origin: str

    @property
    def flag(self) -> str:
        return f"--{self.name}={self.text}"


def load_config(
    files: str | Path | Sequence[str | Path] = (), overrides: Sequence[str] | Mapping[str, Any] = ()
) -> Config:
    """The configuration that YAML files and overrides make together.

    Args:
        files: one or several YAML files; the later wins, and what none of them names keeps its default.
        overrides: win over the files. Flags as on the command line, `["--train.steps=60"]`, or a mapping,
            `{"train.steps": 60}` or `{"train": {"steps": 60}}`.

    Raises:
        UserError: missing or unreadable file, unknown name (similar ones are named), wrong type.
        ConfigError: a value that cannot work.
    """
    settings = settings_in_files([files] if isinstance(files, (str, Path)) else files)
    if isinstance(overrides, Mapping):
        settings += _settings_in(_dump(overrides), "the overrides")
        overrides = ()
    with explaining(settings, overrides):
        return parse(OPTIONS, [*(setting.flag for setting in settings), *overrides], underscores=True)


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML; `load_config` of a file that holds it returns an equal one."""
    return _dump(dataclasses.asdict(config))


def settings_in_files(files: Sequence[str | Path]) -> list[Setting]:
    """The options set in YAML `files`, in order.

    Raises:
        UserError: missing or unreadable file, broken YAML, no mapping of sections, a key given twice.
    """
    return [setting for file in files for setting in _settings_in(_read(Path(file)), str(file))]


@contextlib.contextmanager
def explaining(settings: Sequence[Setting] = (), flags: Sequence[str] = ()) -> Iterator[None]:
    """Add to a UserError what it leaves open: the choices, and where an option was set unless one of `flags` set it."""
    try:
        yield
    except UserError as error:
        complaint, *hints = str(error).split("\n")
        origins = {setting.name: setting.origin for setting in settings}
        for flag in flags:
            origins.pop(flag.lstrip("-").partition("=")[0].replace("-", "_"), None)
        places = [
            f"{name} was set in {origin}"
            for name, origin in origins.items()
            if re.search(rf"(?<![\w.]){re.escape(name)}(?!\w|\.\w)", complaint)
        ]
        raise type(error)("\n".join([complaint, *places, *hints, *_choices(error)])) from None


def _choices(error: UserError) -> list[str]:
    """What may stand where a name or a choice is unknown, or a name missing."""
    complaint, has_hints, _ = str(error).partition("\n")
    if found := re.search(r"invalid choice '(.*?)' .*\((.*)\)", complaint):
        similar = difflib.get_close_matches(found[1], re.findall(r"'(.*?)'", found[2]), n=1)
        return [f"Did you mean {word}?" for word in similar]
    if not complaint.startswith(("Unrecognized", "Missing")):
        return []
    sections = dict.fromkeys(re.findall(r"--([\w.-]+)\.", complaint))
    options = [f"Options of {name}: {', '.join(_names_in(name))}" for name in sections if name in _SECTIONS]
    return options or ([] if has_hints else ["--help lists every option"])


def _read(file: Path) -> str:
    try:
        if file.exists() and not file.is_file() and not file.is_dir():
            raise UserError(f"config file {file} is a pipe or a device; give the path of a YAML file")
        with file.open("rb") as stream:
            return stream.read(LARGEST + 1).decode("utf-8")
    except FileNotFoundError:
        similar = difflib.get_close_matches(file.stem, [path.stem for path in file.parent.glob("*.yaml")], n=1)
        way_out = f"did you mean {file.with_name(similar[0])}.yaml?" if similar else "give the path of a YAML file"
        raise UserError(f"config file {file} does not exist: {way_out}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"config file {file} cannot be read as UTF-8 text: {error}") from None


def _settings_in(text: str, source: str) -> list[Setting]:
    try:
        root = compose(text)
    except ValueError as error:
        raise UserError(f"{source} {error}") from None
    settings = list(_settings_below(root, "", f"{source}, line 1", source)) if root else []
    if len(settings) > len(_NAMES):
        raise UserError(f"{source} sets {len(settings):,} options, more than there are: --help lists them")
    return settings


def _settings_below(node: yaml.Node, name: str, origin: str, source: str) -> Iterator[Setting]:
    if isinstance(node, yaml.MappingNode) and name not in _STRUCTURED:
        seen = set()
        for key, value in node.value:
            place = f"{source}, line {key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode) or not re.fullmatch(r"\w[\w.-]*", key.value):
                raise UserError(f"{place}: a key must be the name of a section or an option")
            child = f"{name}.{key.value}".lstrip(".").replace("-", "_")
            if child in seen:
                raise UserError(f"{place}: {child} is set twice; keep one of the two")
            if "." not in child and child not in _SECTIONS:
                raise UserError(f"{place}: {child} is no section; sections are {', '.join(_names_in(''))}")
            seen.add(child)
            yield from _settings_below(value, child, place, source)
    elif name and name not in _SECTIONS:
        yield Setting(name, _text_of(node), origin)
    elif isinstance(node, yaml.SequenceNode) or node.value not in ("", "~", "null"):
        what = name or "a configuration"
        raise UserError(f"{origin}: {what} must hold `name: value` lines, not {_text_of(node)[:40]!r}")


def _text_of(node: yaml.Node) -> str:
    return node.value if isinstance(node, yaml.ScalarNode) else _one_line(node)


def _one_line(node: yaml.Node) -> str:
    """The same YAML, a key that is given twice included."""
    if isinstance(node, yaml.ScalarNode):
        return json.dumps(node.value)
    if isinstance(node, yaml.SequenceNode):
        return f"[{', '.join(map(_one_line, node.value))}]"
    return f"{{{', '.join(f'{_one_line(key)}: {_one_line(value)}' for key, value in node.value)}}}"


def _dump(tree: Mapping[str, Any]) -> str:
    return yaml.safe_dump(_plain(tree), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, Path):
        return f"./{value}" if str(value).lower() in NULLS else str(value)  # a file may be named null
    return value


def _kinds_below(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(kind):
        yield f"{prefix}{field.name}", field.type
        if dataclasses.is_dataclass(field.type):
            yield from _kinds_below(field.type, f"{prefix}{field.name}.")


OPTIONS = tyro.conf.FlagConversionOff[Config]  # --run.resume=true, never a bare --run.resume
_KINDS = dict(_kinds_below(Config))
_NAMES = tuple(_KINDS)
_SECTIONS = {name.rpartition(".")[0] for name in _NAMES}
_STRUCTURED = {name for name, kind in _KINDS.items() if name not in _SECTIONS and is_structured(kind)}


def _names_in(section: str) -> list[str]:
    return [name.rpartition(".")[2] for name in _NAMES if name.rpartition(".")[0] == section]
