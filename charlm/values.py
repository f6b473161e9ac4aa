"""Values as people write them: text -> a value of a type, and back.

A value is always one piece of text: `true` and `false` in any case, `1e6` where a whole number is meant, `null` for
None, and lists and mappings as one YAML string, `--aux.layers.at=[3,6]`, `--aux.layers.weights={4: 0.3}`, where a list
of any length may go without its brackets. So YAML files can be turned into flags (see `charlm.config_files`).
"""

import contextlib
import dataclasses
import functools
import operator
import os
import re
import types
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from charlm.config import Depth

NULLS = ("null", "none", "~", "")
LARGEST = 32_000
"""Characters of a YAML text, its aliases written out. A whole configuration has some 4,000, and PyYAML is slow."""
DEEPEST = 20
"""Levels of lists and mappings in a YAML text."""
LONGEST = 1000
"""Values in a list or a mapping."""


def value_of(kind: Any, text: str) -> Any:
    """The value of type `kind` that `text` spells.

    Raises:
        ValueError: `text` spells no such value; the message says what was expected.
    """
    options = get_args(kind)
    if is_optional(kind):
        return None if text.strip().lower() in NULLS else value_of(_inner(kind), text)
    if kind == Depth:
        return _depth(text)
    if is_structured(kind):
        return _structure_of(kind, text)
    if is_union(kind):  # of a number and words, such as auto
        words = [option for option in options if text in get_args(option)]
        return value_of(words[0] if words else options[0], text)
    if get_origin(kind) is Literal:
        if text not in options:
            raise ValueError(f"{_quoted(text)} is none of {', '.join(options)}")
        return text
    if kind is bool:
        if text.strip().lower() not in ("true", "false"):
            raise ValueError(f"{_quoted(text)} is neither true nor false")
        return text.strip().lower() == "true"
    if kind is int:
        return _whole_number(text)
    if not text:
        raise ValueError("the value is empty")
    if kind is Path:
        return _path(text)
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{_quoted(text)} is not a number") from None


def text_of(value: Any) -> str:
    """The text that `value_of` reads back as `value`."""
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(text_of, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{text_of(key)}: {text_of(item)}' for key, item in value.items())}}}"
    if dataclasses.is_dataclass(value):
        return text_of(dataclasses.asdict(value))
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def compose(text: str) -> yaml.Node | None:
    """The one YAML document in `text`, every scalar a piece of text, its aliases small enough to be written out.

    Raises:
        ValueError: there is none such; the message says what the text is or holds.
    """
    if len(text) > LARGEST:
        raise ValueError(f"is longer than {LARGEST:,} characters, too long to be a configuration")
    try:
        root = yaml.compose(text, _Loader)
    except _TooDeep:
        raise ValueError("is nested too deeply to be a configuration") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"is not valid YAML: {place}{error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"is not valid YAML: {' '.join(str(error).split())}") from None
    if root is not None and _weight(root, {}) > LARGEST:
        raise ValueError(f"is longer than {LARGEST:,} characters, or endless, with its aliases written out")
    return root


class _TooDeep(Exception):
    """A YAML text has too many levels."""


class _Loader(yaml.BaseLoader):
    """Text only: no tags, which name types and functions, and no more levels than a configuration has."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if (tag := getattr(event, "tag", None)) is not None:
            raise yaml.composer.ComposerError(None, None, f"the tag {_quoted(tag)} has no place here", event.start_mark)
        if self.depth > DEEPEST:
            raise _TooDeep
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _weight(node: yaml.Node, weights: dict[yaml.Node, int]) -> int:
    """Characters and nodes of `node`, each alias counted as what it stands for."""
    if isinstance(node, yaml.ScalarNode):
        return 1 + len(node.value)
    if node not in weights:
        weights[node] = LARGEST + 1  # as long as it is being counted: one that holds itself has no end
        parts = chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
        weights[node] = 1 + sum(_weight(part, weights) for part in parts)
    return weights[node]


def _whole_number(text: str) -> int:
    try:
        number = float(text)  # 1e6; of a large one, not all its digits
    except ValueError:
        number = 0.5
    if not number.is_integer() and abs(number) != float("inf"):
        raise ValueError(f"{_quoted(text)} is not a whole number")
    if abs(number) > 2**64:  # the options' own limits are all below
        raise ValueError(f"{_quoted(text)} is too large a number")
    with contextlib.suppress(ValueError):
        return int(text)
    return int(number)


def _path(text: str) -> Path:
    try:
        longest = max(map(len, os.fsencode(text).split(b"/")))
    except UnicodeEncodeError:
        raise ValueError(f"{_quoted(text)} holds a character that no path has") from None
    if "\0" in text:
        raise ValueError(f"{_quoted(text)} holds a NUL character, which no path has")
    if longest > 255 or len(os.fsencode(text)) > 4095:
        raise ValueError(f"{_quoted(text)} is too long a path")
    return Path(text)


def _depth(text: str) -> int | float | str:
    with contextlib.suppress(ValueError):
        return _whole_number(text) if re.fullmatch(r"[+-]?\d[\d_]*", text) else float(text)
    if re.fullmatch(r"[+-]?\d+/\d+", text):
        return text
    raise ValueError(f"{_quoted(text)} is not a whole number, nor a fraction such as 1/3 or 0.5")


class _Misshapen(Exception):
    """Lists and mappings that are not those of a kind; the message, if there is one, says in what way."""


def is_structured(kind: Any) -> bool:
    """Whether values of `kind` are written as YAML lists or mappings."""
    return any(get_origin(option) in (tuple, dict) or dataclasses.is_dataclass(option) for option in members(kind))


def _structure_of(kind: Any, text: str) -> Any:
    try:
        return _structure(kind, _plain(text, kind))
    except _Misshapen as error:
        raise ValueError(f"{_quoted(text)} {str(error) or f'is not {_example(kind)}'}") from None


def _plain(text: str, kind: Any) -> list[Any] | dict[str, Any]:
    """The lists and mappings of text that `text` holds; values that lack their brackets are a list of any length."""
    with contextlib.suppress(ValueError):
        plain = _unfolded(node) if (node := compose(text)) else None
        if isinstance(plain, str) and plain and any(get_args(option)[-1:] == (Ellipsis,) for option in members(kind)):
            return [item.strip() for item in plain.split(",")]
        if isinstance(plain, (list, dict)):
            return plain
    raise _Misshapen


def _unfolded(node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_unfolded(item) for item in node.value]
    if isinstance(node, yaml.ScalarNode):
        return node.value
    plain = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _Misshapen("has a key that is no plain text")
        if key.value in plain:
            raise _Misshapen(f"has {_quoted(key.value)} twice; keep one of the two")
        plain[key.value] = _unfolded(value)
    return plain


def _structure(kind: Any, plain: Any) -> Any:
    """The value of `kind` that text, lists and mappings spell."""
    for option in members(kind):
        if get_origin(option) is tuple and isinstance(plain, list):
            return _tuple_of(get_args(option), plain)
        if get_origin(option) is dict and isinstance(plain, dict):
            key_kind, item_kind = get_args(option)
            _require_size(plain)
            return {value_of(key_kind, key): _structure(item_kind, item) for key, item in plain.items()}
        if dataclasses.is_dataclass(option):
            return _record_of(option, plain)
    if not isinstance(plain, str):
        raise _Misshapen
    return value_of(kind, plain)


def _tuple_of(kinds: tuple[Any, ...], items: list[Any]) -> tuple[Any, ...]:
    _require_size(items)
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(items)
    if len(items) != len(kinds):
        raise _Misshapen(f"has {len(items)} values where {len(kinds)} are needed")
    return tuple(map(_structure, kinds, items))


def _record_of(kind: Any, plain: Any) -> Any:
    """A dataclass from a mapping; what is none is the value of its one required field."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    required = [name for name, field in fields.items() if _is_required(field)]
    if not isinstance(plain, dict):
        plain = {required[0]: plain}
    for name in plain:
        if name not in fields:
            raise _Misshapen(f"names {_quoted(name)}, which is none of {', '.join(fields)}")
    for name in required:
        if name not in plain:
            raise _Misshapen(f"lacks {name}")
    return kind(**{name: _structure(fields[name].type, value) for name, value in plain.items()})


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _require_size(values: Sequence[Any] | Mapping[str, Any]) -> None:
    if len(values) > LONGEST:
        raise _Misshapen(f"has {len(values):,} values, more than the {LONGEST:,} that a list may have")


def _example(kind: Any) -> str:
    """What text of a structured `kind` looks like."""
    examples = []
    for option in members(kind):
        if get_origin(option) is dict:
            examples.append(f"a mapping such as {metavar(option)}")
        else:
            of_numbers = not dataclasses.is_dataclass(get_args(option)[0])
            examples.append(f"a list such as {'[3, 6]' if of_numbers else metavar(option)}")
    return " or ".join(examples)


def _quoted(text: str) -> str:
    return repr(text) if len(text) <= 120 else f"{text[:80]!r}... ({len(text):,} characters)"


def is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def is_optional(kind: Any) -> bool:
    """Whether None, written `null`, is a value of `kind`."""
    return is_union(kind) and type(None) in get_args(kind)


def _inner(kind: Any) -> Any:
    """What an optional `kind` is when it isn't None."""
    return functools.reduce(operator.or_, members(kind))


def members(kind: Any) -> tuple[Any, ...]:
    """The kinds of a union, None apart, or `kind` itself."""
    return tuple(option for option in get_args(kind) if option is not type(None)) if is_union(kind) else (kind,)


def metavar(kind: Any) -> str:
    """What help says that a value of `kind` looks like."""
    if is_optional(kind):
        return f"{metavar(_inner(kind))}|null"
    if kind == Depth:
        return "LAYER"
    if is_union(kind):
        return "|".join(map(metavar, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"[{','.join('...' if part is Ellipsis else metavar(part) for part in get_args(kind))}]"
    if get_origin(kind) is dict:
        key, item = get_args(kind)
        return f"{{{'NAME' if key is str else metavar(key)}: {metavar(item)},...}}"
    if get_origin(kind) is Literal:
        return f"{{{','.join(get_args(kind))}}}" if len(get_args(kind)) > 1 else get_args(kind)[0]
    if dataclasses.is_dataclass(kind):
        return f"{{{', '.join(field.name for field in dataclasses.fields(kind))}}}"
    return "{true,false}" if kind is bool else kind.__name__.upper()
