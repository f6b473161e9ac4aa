"""docs/configuration.md: every option, as `--help` has it."""

import re
import runpy
from pathlib import Path
from typing import Literal

import pytest
from pydantic import TypeAdapter

from charlm import cli
from charlm.config import Depth, Section
from charlm.config.load import OPTIONS
from charlm.config.objective import TaskConfig
from charlm.config.types import BelowOne, Count, Positive
from charlm.config.wording import in_words, words_of
from charlm.report import reference

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"


def test_the_document_is_current(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an option that was added, changed or removed without its line in docs/configuration.md."""
    monkeypatch.setenv("CHARLM_CACHE", "elsewhere")
    runpy.run_path(reference.__file__, run_name="__main__")
    is_current = capsys.readouterr().out == DOCUMENT.read_text(encoding="utf-8")
    assert is_current, "write it anew: python -m charlm.report.reference > docs/configuration.md"


def test_it_says_what_help_says(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against an option that is missing, and texts that are others than those of --help."""
    with pytest.raises(SystemExit):
        cli.parse(cli.WithConfig, ["--help"])
    shown = "".join(capsys.readouterr().out.split())
    document = reference.page()
    assert re.findall(r"^- \*\*`([\w.]+)`\*\*: ", document, flags=re.MULTILINE) == list(OPTIONS)
    for name, info in OPTIONS.items():
        assert f"--{name}" in shown
        assert "".join(info.description.split()) in shown
        assert info.description.replace("\n", "\n  ") in document


class Part(Section):
    """Of a whole."""

    size: int
    """How large."""


class Parts(Section):
    """A section."""

    parts: tuple[Part, ...] = ()
    """All of them,
    in order."""
    end: str = "\n"
    """Behind each."""


class Whole(Section):
    """Not shown."""

    section: Parts = Parts()


def test_entries() -> None:
    """Guards against a default that breaks the page, and parts of a list that nothing explains."""
    assert reference.page(Whole).endswith(
        """

## section

A section.

- **`section.parts`**: `[part, ...]`; default `[]`.
  All of them,
  in order.
  - **`size`**: `whole number`; required.
    How large.
- **`section.end`**: `text`; default `\\n`.
  Behind each.
"""
    )


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        (bool, "true|false", ["true", "false"]),
        (Path | None, "path or null", []),
        (Literal["a", "b"], "a|b", ["a", "b"]),
        (Count | Literal["auto"] | None, "whole number >= 1 or auto or null", ["auto"]),
        (Positive, "number > 0", []),
        (tuple[Literal["a", "b"], ...], "[a|b, ...]", ["a", "b"]),
        (tuple[BelowOne, BelowOne], "[number in [0, 1), number in [0, 1)]", []),
        (tuple[Depth, ...] | None, "[layer, ...] or null", []),
        (dict[str, TaskConfig], "{name: task, ...}", []),
    ],
)
def test_kinds_in_words(kind: object, text: str, words: list[str]) -> None:
    """Guards against a layer called a number or a text, limits left out, and words that are not offered."""
    schema = TypeAdapter(kind).json_schema()
    assert (in_words(schema), words_of(schema)) == (text, words)
