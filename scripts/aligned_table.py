"""Markdown tables that also read well as plain text. Knows nothing of what they show."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(cells: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table whose first row is its head."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|")
    return lines
