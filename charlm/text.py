"""Text for people: lines as wide as the terminal, and tables in Markdown."""

import os
import sys
import textwrap
from collections.abc import Sequence


def fitted(text: str) -> str:
    """`text` with lines that are too wide for the terminal broken at spaces; as it is if stderr is no terminal."""
    try:
        width = os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, AttributeError):  # no terminal, or not even a file
        width = 0
    if not width:
        return text
    wrap = textwrap.TextWrapper(width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join("\n".join(wrap.wrap(line)) for line in text.split("\n"))


def counted(count: int, noun: str) -> str:
    """Such as "1 term" and "2 terms"."""
    return f"{count:,} {noun}" + ("s" if count > 1 else "")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The lines of a table. The source is aligned, and a column whose cells all begin with a number stands right."""
    columns = [[cell.replace("|", "\\|") for cell in column] for column in zip(header, *rows, strict=True)]
    lines = zip(*map(_aligned, columns), strict=True)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _aligned(column: Sequence[str]) -> list[str]:
    """A column's cells at equal width, with the rule below the first."""
    title, *cells = column
    width = max(3, *map(len, column))
    filled = [cell for cell in cells if cell]
    if filled and all(cell.lstrip("+-")[:1].isdigit() for cell in filled):
        return [title.rjust(width), "-" * (width - 1) + ":", *(cell.rjust(width) for cell in cells)]
    return [title.ljust(width), "-" * width, *(cell.ljust(width) for cell in cells)]
