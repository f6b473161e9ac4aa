"""One parser for everything that people type: tyro over dataclasses, with our rules for values and our errors, so that
every mistake is found and worded in one place."""

import contextlib
import dataclasses
import inspect
import io
import os
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from charlm.config import UserError
from charlm.values import is_optional, is_union, metavar, text_of, value_of

T = TypeVar("T")
_RULES = ConstructorRegistry()


@_RULES.primitive_rule
def _one_piece_of_text(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    kind = info.type
    is_ours = kind in (bool, int, float, str, Path) or get_origin(kind) in (tuple, dict) or is_optional(kind)
    if not is_ours or tyro.conf.UseAppendAction in info.markers:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar(kind),
        instance_from_str=lambda texts: texts[0] if kind is str else value_of(kind, texts[0]),
        is_instance=lambda _: True,
        str_from_instance=lambda value: [text_of(value).replace("\n", "\\n")],  # for help alone
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
    description = _description(kind)
    with _joined_docstrings(but=description):
        _tyro(kind, ["--help"], description=description, use_underscores=underscores, **options)
    raise AssertionError("tyro exits after its help")


def _description(kind: type) -> str:
    """The docstring of `kind`, as wide as the terminal; lines that begin with a word and a colon are a list."""
    lines = re.sub(r"(?<!\n)\n(?!\n|\w+: )", " ", inspect.cleandoc(kind.__doc__)).split("\n")
    width = shutil.get_terminal_size().columns
    return "\n".join(
        textwrap.fill(line, width, subsequent_indent="  " if re.match(r"\w+: ", line) else "") for line in lines
    )


@contextlib.contextmanager
def _joined_docstrings(but: str) -> Iterator[None]:
    """Have tyro join all lines of a docstring: by itself it keeps those apart that are indented."""
    before = tyro._strings.remove_single_line_breaks
    tyro._strings.remove_single_line_breaks = lambda text: text if text == but else " ".join(text.split())
    try:
        yield
    finally:
        tyro._strings.remove_single_line_breaks = before


def completions(kind: type, *, underscores: bool = False, prefix: str = "--", bare_flags: bool = True) -> Iterator[str]:
    """A line per option of `kind`: `--flag`, or `--option=` and the words that may follow, `/` meaning a path."""
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        annotated, name = hints[field.name], f"no_{field.name}" if bare_flags and field.default is True else field.name
        inner, *markers = get_args(annotated) if get_origin(annotated) is Annotated else (annotated,)
        shown = prefix + (name if underscores else name.replace("_", "-"))
        if dataclasses.is_dataclass(inner):
            below = prefix if any(getattr(marker, "name", None) == "" for marker in markers) else f"{shown}."
            bare = bare_flags and tyro.conf.FlagConversionOff not in markers
            yield from completions(inner, underscores=underscores, prefix=below, bare_flags=bare)
        elif tyro.conf.Positional not in markers:
            yield shown if inner is bool and bare_flags else f"{shown}={' '.join(_words(inner))}"


def _words(kind: Any) -> list[str]:
    if is_union(kind):
        return [word for option in get_args(kind) for word in _words(option)]
    if get_origin(kind) is tuple:
        return _words(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return {bool: ["true", "false"], Path: ["/"]}.get(kind, [])


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
            hints = re.sub(r" *\(default: .*\)$", "", better.partition("\n")[2], flags=re.M)  # files may set another
            complaint = "\n".join([complaint.partition("\n")[0], *([hints] if hints else [])])
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
