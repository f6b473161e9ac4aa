"""docs/configuration.md: every option, as `--help` has it. `python -m tests.test_reference` writes it anew."""

import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from pydantic import TypeAdapter

from charlm import cli
from charlm.config import Config, Section
from charlm.config.errors import shown
from charlm.config.load import OPTIONS, SECTIONS
from charlm.config.objective import Depth, TaskConfig
from charlm.config.types import BelowOne, Count, Positive, parts_of

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"


def page(text: str) -> str:
    """The document: its introduction as it is, then all sections, each with its options."""
    introduction = text.partition("\n## ")[0]
    sections = [
        "\n".join([f"\n## {name}", "", inspect.getdoc(kind), "", *_entries(kind, f"{name}."), ""])
        for name, kind in SECTIONS.items()
        if kind is not Config
    ]
    return "".join([introduction, *sections])


def _entries(kind: type[Section], prefix: str, indent: str = "", above: type[Section] = Section) -> Iterator[str]:
    """An entry for each option; below it, indented, those of the records in its lists and mappings, but for options
    that are the same `above`."""
    schemas = kind.model_json_schema()["properties"]
    for name, info in kind.model_fields.items():
        if not info.description or repr(info) == repr(above.model_fields.get(name)):  # a section, or the same
            continue
        default = (
            "required" if info.is_required() else f"default `{shown(info.get_default(call_default_factory=True))}`"
        )
        text = info.description.replace("\n", f"\n{indent}  ")
        yield f"{indent}- **`{prefix}{name}`**: `{cli.in_words(schemas[name])}`; {default}.\n{indent}  {text}"
        for part in parts_of(info.annotation):
            if isinstance(part, type) and issubclass(part, Section):
                yield from _entries(part, "", f"{indent}  ", kind)


def test_the_document_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an option that was added, changed or removed without its line in docs/configuration.md."""
    monkeypatch.delenv("CHARLM_CACHE", raising=False)
    text = DOCUMENT.read_text(encoding="utf-8")
    assert page(text) == text, "write it anew: python -m tests.test_reference"
    assert re.findall(r"^- \*\*`([\w.]+)`\*\*: ", text, flags=re.MULTILINE) == list(OPTIONS)


def test_help_has_the_same_texts(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against an option that is missing from --help, or has another text there."""
    with pytest.raises(SystemExit):
        cli.parse(cli.WithConfig, ["--help"])
    printed = "".join(capsys.readouterr().out.split())
    for name, info in OPTIONS.items():
        assert f"--{name}" in printed
        assert "".join(info.description.split()) in printed


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (bool, "true | false"),
        (Path | None, "PATH | null"),
        (Literal["a", "b"], "a | b"),
        (Count | Literal["auto"] | None, "INTEGER >= 1 | auto | null"),
        (Positive, "NUMBER > 0"),
        (tuple[Literal["a", "b"], ...], "[a | b, ...]"),
        (tuple[BelowOne, BelowOne], "[NUMBER >= 0, < 1, NUMBER >= 0, < 1]"),
        (tuple[Depth, ...] | None, "[LAYER, ...] | null"),
        (dict[str, TaskConfig], "{NAME: TASK, ...}"),
    ],
)
def test_kinds_in_words(kind: object, text: str) -> None:
    """Guards against a layer called a number or a text, and limits left out."""
    assert cli.in_words(TypeAdapter(kind).json_schema()) == text


if __name__ == "__main__":
    os.environ.pop("CHARLM_CACHE", None)  # the page is for everyone
    DOCUMENT.write_text(page(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
