"""docs/notebook.ipynb runs from a fresh start, and its results show well in Jupyter and marimo."""

import ast
import json
import runpy
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

import charlm

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "notebook.ipynb"
HURT = "<script>alert(1)</script>\x1b[2J"


class Reader(HTMLParser):
    """Collects the tags of a text, and the text between them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        assert not attributes
        self.tags.append(tag)

    def handle_endtag(self, tag):
        self.tags.append(f"/{tag}")

    def handle_data(self, data):
        self.text += data


def read(shown) -> Reader:
    """The HTML of an object, in which all tags that open also close."""
    reader = Reader(shown._repr_html_())
    opened = [tag for tag in reader.tags if tag[0] != "/"]
    assert set(opened) <= {"table", "tr", "th", "td", "pre"}
    assert all(opened.count(tag) == reader.tags.count(f"/{tag}") for tag in opened)
    return reader


def test_the_notebook(tmp_path, monkeypatch):
    """Guards against cells that fail on a fresh start, results of someone's machine in git, and objects that show as
    a page of their fields. The last expression of each cell is what a notebook shows."""
    book = json.loads(NOTEBOOK.read_text("utf-8"))
    assert (book["nbformat"], len(book["cells"])) == (4, 10)
    codes = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in codes)
    assert len({cell["id"] for cell in book["cells"]}) == 10
    program = ast.parse("shown = []")
    for cell in codes:
        body = ast.parse("".join(cell["source"])).body
        if isinstance(body[-1], ast.Expr):
            body[-1] = ast.parse(f"shown.append({ast.unparse(body[-1])})").body[0]
        program.body += body
    (tmp_path / "cells.py").write_text(ast.unparse(program))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    _, explanation, trained, score, text, sizes = runpy.run_path("cells.py")["shown"]
    assert explanation.to_text() == read(explanation).text
    assert "2 layers of width 32, context 32" in read(trained).text and "step-00000060" in read(trained).text
    assert f"{score.bits_per_character:.4f}" in read(score).text and f"{score.layers['1']:.4f}" in read(score).text
    assert score.bits_per_character < 2.5 and len(text) == 80 and sizes["short.clm"] < sizes["short.txt"] / 2


@pytest.mark.parametrize("kind", ["score", "model"])
def test_names_are_escaped(kind, build_model, build_corpus):
    """Guards against a stranger's model whose names run as a page's code, or command a terminal."""
    trained = replace(build_model(), checkpoint=HURT, scores=({"corpus": HURT, HURT: 1.0},))
    shown = trained if kind == "model" else charlm.bits_per_character(trained, build_corpus(b"abcd" * 9))
    reader = read(shown)
    assert HURT.replace("\x1b", "\u241b") in reader.text and "script" not in reader.tags
