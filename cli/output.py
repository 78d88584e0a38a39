"""How commands write: tables for people at a terminal, aligned plain text elsewhere, JSON when asked.

Standard output has the answer and nothing else; what went wrong goes to standard error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def write_json(value: Any) -> None:
    print(json.dumps(value, indent=2, sort_keys=True))


def write_table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: frozenset[int] = frozenset()
) -> None:
    """A table with its columns; ``right`` holds the numbers of those that are aligned to the right."""
    console = Console()
    if console.is_terminal:
        table = Table(box=None, header_style="bold", padding=(0, 3, 0, 0))
        for number, header in enumerate(headers):
            table.add_column(header, justify="right" if number in right else "left")
        for row in rows:
            # Text, not markup: names of objects may hold brackets.
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
        return
    widths = [max(len(row[number]) for row in (headers, *rows)) for number in range(len(headers))]
    for row in (headers, *rows):
        cells = (
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(cells).rstrip())


def styled(text: str, style: str) -> None:
    """One line, in colour at a terminal."""
    console = Console()
    if console.is_terminal:
        console.print(Text(text, style=style), soft_wrap=True)
    else:
        print(text)


def fail(message: str, hint: str = "") -> None:
    """Say on standard error what went wrong and what to do about it."""
    print(f"mycel: {message}", file=sys.stderr)
    if hint:
        print(f"  {hint}", file=sys.stderr)
