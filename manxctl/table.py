"""Text in columns."""

from __future__ import annotations

from collections.abc import Sequence

GAP = "   "


def render(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under titles, each column as wide as its widest cell; no space at the ends of lines."""
    lines = [list(titles), *([cell or "-" for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        GAP.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
