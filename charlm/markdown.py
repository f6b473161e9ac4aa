"""Tables in Markdown."""

from collections.abc import Sequence


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
