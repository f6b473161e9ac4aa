"""docs/configuration.md: every option, as `--help` has it."""

import re
import runpy
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import pytest

from charlm import cli
from charlm.config import Config, Depth
from charlm.report import reference
from charlm.report.reference import docstrings, in_words, page

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"


def test_the_document_is_current(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an option that was added, changed or removed without its line in docs/configuration.md."""
    monkeypatch.setenv("CHARLM_CACHE", "elsewhere")
    runpy.run_path(reference.__file__, run_name="__main__")
    is_current = capsys.readouterr().out == DOCUMENT.read_text(encoding="utf-8")
    assert is_current, "write it anew: python -m charlm.report.reference > docs/configuration.md"


def records(kind: type) -> Iterator[type]:
    """The dataclasses that `kind` is made of, those of tasks and stages left out."""
    yield kind
    for one in fields(kind):
        if hasattr(one.type, "__dataclass_fields__"):
            yield from records(one.type)


def test_it_says_what_help_says(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an option that is missing here, and texts that are others than those of --help."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        cli.parse(cli.WithConfig, ["--help"])
    shown, document = capsys.readouterr().out, page()
    names = re.findall(r"^[│ ]+--([\w.]+\.\w+) ", shown, flags=re.MULTILINE)
    assert len(names) > 90
    assert sorted(names) == sorted(re.findall(r"^- \*\*`([\w.]+)`\*\*: ", document, flags=re.MULTILINE))
    words = re.sub(r"[│\s]", "", shown)
    for kind in records(Config):
        for text in docstrings(kind).values():
            assert re.sub(r"\s", "", text) in words
            assert text.replace("\n", "\n  ") in document


@dataclass(frozen=True, kw_only=True)
class Part:
    """Of a whole."""

    size: int
    """How large."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section."""

    parts: tuple[Part, ...] = ()
    """All of them,
    in order."""
    end: str = "\n"
    """Behind each."""


@dataclass(frozen=True, kw_only=True)
class Whole:
    """Not shown."""

    section: Section = field(default_factory=Section)


def test_entries() -> None:
    """Guards against a default that breaks the page, and parts of a list that nothing explains."""
    assert page(Whole).endswith(
        """

## section

A section.

- **`section.parts`**: list of parts; default `[]`.
  All of them,
  in order.
  - **`size`**: whole number; to be given.
    How large.
- **`section.end`**: text; default `"\\n"`.
  Behind each.
"""
    )


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (bool, "`true` or `false`"),
        (Path | None, "path or `null`"),
        (Literal["a", "b"], "`a`, `b`"),
        (int | Literal["auto"] | None, "whole number or `auto` or `null`"),
        (tuple[Literal["a", "b"], ...], "list of `a`, `b`"),
        (tuple[float, float], "list of 2 numbers"),
        (tuple[Depth, ...] | None, "list of layers or `null`"),
        (Depth | None, "layer or `null`"),
        (tuple[float, ...] | dict[Depth, float] | None, "list of numbers or mapping of layer to number or `null`"),
        (dict[str, Part], "mapping of name to part"),
    ],
)
def test_kinds_in_words(kind: object, words: str) -> None:
    """Guards against a layer called a number or a text, and against Python's words for a kind."""
    assert in_words(kind) == words
