"""Tables for people, on stdout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

WIDTH = 140  # where nobody watches a terminal
WORDS = (
    "op",
    "runtime and precision",
    "kind",
    "layers that make them",
    "why",
    "why not",
    "note",
    "kernel",
)  # columns that hold no numbers, beside the first


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table: numbers stand at the right, the first column and those of WORDS at the left."""
    grid = Table(title=escape(title), title_justify="left")
    for number, name in enumerate(columns):
        grid.add_column(name, overflow="fold", justify="left" if number == 0 or name in WORDS else "right")
    for row in rows:
        grid.add_row(*(escape(str(cell)) for cell in row))
    console = Console()
    (console if console.is_terminal else Console(width=WIDTH)).print(grid)
