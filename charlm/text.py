"""Text for people: made visible, in lines that fit the terminal, and in tables in Markdown."""

import html
import os
import shlex
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
INSTALLED = (PACKAGE / "shipped").is_dir()
SHIPPED = PACKAGE / "shipped" if INSTALLED else PACKAGE.parent
"""The folder that holds scripts/ and configs/: in an installed package, or the checkout."""
SIGNS = {code: chr(0x2400 + code) for code in range(0x20)} | {ord("\n"): "↵", ord("\t"): "⇥"}
SIGNS |= {ord(sign): f"\\u{ord(sign):04X}" for sign in SIGNS.values()}
SIGNS |= {0xDC00 + byte: f"\\x{byte:02X}" for byte in range(0x80, 0x100)}
"""For control characters, for these signs themselves, and for stray bytes."""


def visible(text: str | bytes, kept: str = "") -> str:
    """Text without commands to a terminal: what is not printable, nor in `kept`, is made visible."""
    text = text.decode("utf-8", "surrogateescape") if isinstance(text, bytes) else text
    shown = text.translate({code: sign for code, sign in SIGNS.items() if chr(code) not in kept})
    own = [c in kept or c.isprintable() or unicodedata.category(c) == "Zs" for c in shown]
    return "".join(c if is_own else f"\\u{ord(c):04X}" for c, is_own in zip(shown, own, strict=True))


def say(*parts: object, **how: Any) -> None:
    """`print` with `visible` parts."""
    print(*(visible(str(part), kept="\n\t") for part in parts), **how)


def fitted(text: str) -> str:
    """A visible `text`, with lines wrapped at spaces if stderr is a terminal."""
    lines = visible(text, kept="\n").split("\n")
    how = {"subsequent_indent": "  ", "break_long_words": False, "break_on_hyphens": False}
    with suppress(OSError, AttributeError):  # no terminal, or not even a file
        if width := os.get_terminal_size(sys.stderr.fileno()).columns:
            lines = [textwrap.fill(line, width, **how) for line in lines]
    return "\n".join(lines)


def command(script: str, *words: object) -> str:
    """A line for this shell, in this folder, that runs a script, or its `charlm` command."""
    start = [sys.executable, "-m", "charlm"] if INSTALLED else [sys.executable]
    short = "charlm" if INSTALLED else "python"
    if os.path.dirname(shutil.which(short) or "") == os.path.dirname(sys.executable):
        start = [short]
    words = [f"./{word}" if isinstance(word, Path) and str(word)[0] == "-" else str(word) for word in words]
    place = SHIPPED / "scripts" / script
    with suppress(OSError, ValueError):  # no working folder, or one on another drive
        place = os.path.relpath(place)
    return shlex.join([*start, Path(script).stem if INSTALLED else str(place), *words])


def counted(count: int, noun: str) -> str:
    """A count with its noun: 1 term, 2 terms."""
    return f"{count:,} {noun}" + ("s" if count > 1 else "")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose source is aligned: to the right in columns of numbers, else to the left."""
    columns = [[cell.replace("|", "\\|") for cell in column] for column in zip(header, *rows, strict=True)]
    lines = zip(*map(_aligned, columns), strict=True)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _aligned(column: Sequence[str]) -> list[str]:
    title, *cells = column
    width = max(3, *map(len, column))
    filled = [cell for cell in cells if cell]
    if filled and all(cell.lstrip("+-")[:1].isdigit() for cell in filled):
        lines = [title, "-" * (width - 1) + ":", *cells]
        return [line.rjust(width) for line in lines]
    return [line.ljust(width) for line in [title, "-" * width, *cells]]


def html_table(rows: Mapping[Any, Any]) -> str:
    """A table for notebooks, with all text in it escaped; a mapping becomes a table within."""
    lines = []
    for name, own in rows.items():
        text = f"{own:.4f}" if isinstance(own, float) else str(own)
        cell = html_table(own) if isinstance(own, Mapping) else html.escape(visible(text))
        lines.append(f"<tr><th>{html.escape(visible(str(name)))}</th><td>{cell}</td></tr>")
    return f"<table>{''.join(lines)}</table>"
