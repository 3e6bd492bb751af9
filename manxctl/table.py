"""Text in columns."""

from __future__ import annotations

from collections.abc import Sequence

GAP = "   "


class Table:
    """Rows under titles. Columns are as wide as the widest cell so far; rows may follow later."""

    def __init__(self, titles: Sequence[str]) -> None:
        self._titles = list(titles)
        self._widths = list(map(len, titles))

    def head(self, rows: Sequence[Sequence[str]] = ()) -> str:
        """The titles, and the rows beneath them, as lines."""
        lines = [_filled(row) for row in rows]
        self._widths = [max(map(len, each)) for each in zip(self._titles, *lines, strict=True)]
        return "\n".join(map(self._line, [self._titles, *lines]))

    def row(self, cells: Sequence[str]) -> str:
        """A further row, as a line."""
        line = _filled(cells)
        self._widths = [max(w, len(cell)) for w, cell in zip(self._widths, line, strict=True)]
        return self._line(line)

    def _line(self, cells: Sequence[str]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(cells, self._widths, strict=True))
        return GAP.join(padded).rstrip()


def render(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under titles, each column as wide as its widest cell; no space at the ends of lines."""
    return Table(titles).head(rows)


def _filled(cells: Sequence[str]) -> list[str]:
    return [cell or "-" for cell in cells]
