"""Text for people: lines that fit the terminal, and tables in Markdown."""

import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def fitted(text: str) -> str:
    """`text` with lines wrapped at spaces to the terminal's width; unchanged if stderr is not a terminal."""
    try:
        width = os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, AttributeError):  # no terminal, or not even a file
        width = 0
    if not width:
        return text
    how = {"subsequent_indent": "  ", "break_long_words": False, "break_on_hyphens": False}
    lines = [textwrap.fill(line, width, **how) for line in text.split("\n")]
    return "\n".join(lines)


def command(script: str, *words: object) -> str:
    """A line for this shell, in this folder, that runs a script with these arguments."""
    python = shutil.which("python") or ""
    same = os.path.dirname(python) == os.path.dirname(sys.executable)
    path = SCRIPTS / script
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    words = (f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word) for word in words)
    return shlex.join(["python" if same else sys.executable, str(path), *words])


def counted(count: int, noun: str) -> str:
    """A count with its noun: "1 term", "2 terms"."""
    return f"{count:,} {noun}" + ("s" if count > 1 else "")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose source is aligned: to the right in columns of numbers, else to the left."""
    columns = [[cell.replace("|", "\\|") for cell in column] for column in zip(header, *rows, strict=True)]
    lines = zip(*map(_aligned, columns), strict=True)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _aligned(column: Sequence[str]) -> list[str]:
    """A column's cells at equal width, with the rule below the first."""
    title, *cells = column
    width = max(3, *map(len, column))
    filled = [cell for cell in cells if cell]
    has_numbers = bool(filled) and all(cell.lstrip("+-")[:1].isdigit() for cell in filled)
    if has_numbers:
        return [title.rjust(width), "-" * (width - 1) + ":", *(cell.rjust(width) for cell in cells)]
    return [title.ljust(width), "-" * width, *(cell.ljust(width) for cell in cells)]
