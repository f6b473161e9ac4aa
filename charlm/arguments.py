"""One parser for everything that people type: tyro over dataclasses, with our rules for values and our errors.

A value is always one piece of text: `true` and `false` in any case, `1e6` where a whole number is meant, `null` for
None, and lists as one YAML string, `--aux.layers.at=[3,6]`, where a list of any length may go without its brackets.
So YAML files can be turned into flags (see `charlm.config_files`) and every mistake is found and worded in one place.
"""

import contextlib
import io
import os
import types
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import tyro
import yaml
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from charlm.config import UserError

T = TypeVar("T")
NULLS = ("null", "none", "~", "")
LARGEST = 32_000
"""Characters of a YAML text, its aliases written out. A whole configuration has some 4,000, and PyYAML is slow."""
DEEPEST = 20
"""Levels of lists and mappings in a YAML text."""
LONGEST = 1000
"""Values in a list."""
_RULES = ConstructorRegistry()


def value_of(kind: Any, text: str) -> Any:
    """The value of type `kind` that `text` spells.

    Raises:
        ValueError: `text` spells no such value; the message says what was expected.
    """
    options = get_args(kind)
    if _is_optional(kind):
        return None if text.strip().lower() in NULLS else value_of(_inner(kind), text)
    if get_origin(kind) is tuple:
        return _tuple_of(options, text)
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
    if isinstance(value, tuple):
        return f"[{', '.join(map(text_of, value))}]"
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


def _tuple_of(kinds: tuple[Any, ...], text: str) -> tuple[Any, ...]:
    try:
        node = compose(text)
    except ValueError:
        node = None
    items = yaml.constructor.BaseConstructor().construct_document(node) if node else None
    if isinstance(items, str) and items and kinds[-1] is Ellipsis:
        items = [item.strip() for item in items.split(",")]
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ValueError(f"{_quoted(text)} is not a list such as [3, 6]")
    if len(items) > LONGEST:
        raise ValueError(f"{_quoted(text)} has {len(items):,} values, more than the {LONGEST:,} that a list may have")
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(items)
    if len(items) != len(kinds):
        raise ValueError(f"{_quoted(text)} has {len(items)} values where {len(kinds)} are needed")
    return tuple(map(value_of, kinds, items))


def _quoted(text: str) -> str:
    return repr(text) if len(text) <= 120 else f"{text[:80]!r}... ({len(text):,} characters)"


def _is_optional(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType) and type(None) in get_args(kind)


def _inner(kind: Any) -> Any:
    return next(option for option in get_args(kind) if option is not type(None))


def _metavar(kind: Any) -> str:
    if _is_optional(kind):
        return f"{_metavar(_inner(kind))}|null"
    if get_origin(kind) is tuple:
        return f"[{','.join('...' if part is Ellipsis else _metavar(part) for part in get_args(kind))}]"
    if get_origin(kind) is Literal:
        return f"{{{','.join(get_args(kind))}}}"
    return "{true,false}" if kind is bool else kind.__name__.upper()


@_RULES.primitive_rule
def _one_piece_of_text(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    kind = info.type
    is_ours = kind in (bool, int, float, Path) or get_origin(kind) is tuple or _is_optional(kind)
    if not is_ours or tyro.conf.UseAppendAction in info.markers:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=_metavar(kind),
        instance_from_str=lambda texts: value_of(kind, texts[0]),
        is_instance=lambda _: True,
        str_from_instance=lambda value: [text_of(value)],
    )


def parse(kind: type[T], arguments: Sequence[str], *, underscores: bool = False) -> T:
    """The dataclass `kind`, filled from command-line `arguments`; `underscores` is how names are shown, not read.

    Raises:
        UserError: unknown flag (similar ones are named), wrong type, missing value.
    """
    return _tyro_raising(kind, arguments, use_underscores=underscores)


def parse_known(kind: type[T], arguments: Sequence[str]) -> T:
    """As `parse`, but flags that `kind` doesn't know are left to another parser."""
    return _tyro_raising(kind, arguments, return_unknown_args=True)[0]


def show_help(kind: type[T], default: T | None = None, *, underscores: bool = False) -> NoReturn:
    """Print the help of `kind`, with the values of `default`, and exit with code 0."""
    options = {} if default is None else {"default": default}
    _tyro(kind, ["--help"], use_underscores=underscores, **options)
    raise AssertionError("tyro exits after its help")


def _tyro(kind: type[T], arguments: Sequence[str], **options: Any) -> Any:
    return tyro.cli(kind, args=arguments, registry=_RULES, config=(tyro.conf.FlagCreatePairsOff,), **options)


def _tyro_raising(kind: type[T], arguments: Sequence[str], **options: Any) -> Any:
    parsed, complaint = _attempt(kind, arguments, **options)
    if complaint is None:
        return parsed
    if complaint.startswith("Unrecognized"):
        # tyro compares `--name=value` as a whole with the names that it knows: show it the names alone.
        parts = [part for token in arguments for part in token.split("=", maxsplit=token.startswith("--"))]
        better = _attempt(kind, parts, **options)[1] or ""
        if better.startswith("Unrecognized"):
            complaint = "".join([complaint.partition("\n")[0], *better.partition("\n")[1:]])
    raise UserError(complaint)


def _attempt(kind: type[T], arguments: Sequence[str], **options: Any) -> tuple[Any, str | None]:
    """What tyro makes of the arguments, or what it prints before it exits."""
    with _plain_wide_output(), contextlib.redirect_stderr(io.StringIO()) as printed:
        try:
            return _tyro(kind, arguments, add_help=False, **options), None
        except SystemExit:
            return None, _unboxed(printed.getvalue())


@contextlib.contextmanager
def _plain_wide_output() -> Iterator[None]:
    """Have tyro draw what `_unboxed` reads, whatever stdout is: UTF-8, no colours, no line broken."""
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100000"
    try:
        with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")):
            yield
    finally:
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns


def _unboxed(box: str) -> str:
    """The text inside the box that tyro draws: what is wrong on one line, then its hints as they are laid out."""
    rows = [row[2:-2].rstrip() for row in box.splitlines() if row.startswith("│")]
    if not rows:  # PYTHON_TYRO_UTF8_BOXES and its like: take what there is
        return box.strip()
    rules = [number for number, row in enumerate(rows) if row and not row.strip("─")] or [len(rows)]
    message = " ".join(" ".join(rows[: rules[0]]).split())
    return "\n".join([message, *(row for number, row in enumerate(rows) if number > rules[0] and number not in rules)])
