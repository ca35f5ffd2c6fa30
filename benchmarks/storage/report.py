"""Tables of `benchmarks.storage`, for the terminal and as Markdown for RESULTS.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import rich.box
from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.storage.runs import Run


@dataclass
class Table:
    """A title, a header, rows of cells, and notes."""

    title: str
    head: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def show(self, console: Console) -> None:
        """Print the table to the terminal."""
        rich_table = RichTable(title=self.title, box=rich.box.SIMPLE_HEAD, title_justify="left")
        for name in self.head:
            rich_table.add_column(name, overflow="fold")
        for row in self.rows:
            rich_table.add_row(*(cell.replace("**", "") for cell in row))
        console.print(rich_table)
        for note in self.notes:
            console.print(note, highlight=False)

    def markdown(self) -> str:
        """Return the table as Markdown."""
        lines = [f"**{self.title}**", "", _line(self.head), "|" + "---|" * len(self.head)]
        lines += [_line(row) for row in self.rows]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)]) + "\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def middle(runs: Sequence[Run], what: Callable[[Run], float]) -> float:
    """Return the median of one quantity."""
    return median(what(run) for run in runs)


def seconds(runs: Sequence[Run]) -> float:
    """Return the median time."""
    return middle(runs, lambda run: run.seconds)


def fastest(sides: Mapping[str, Sequence[Run]]) -> str:
    """Return the method with the smallest median time."""
    return min(sides, key=lambda side: seconds(sides[side]))


def against(value: float, bar: float, *, most: bool = False, digits: int = 2) -> str:
    """Format a value with its threshold: a minimum, or with `most` a maximum."""
    met = value <= bar if most else value >= bar
    return f"**{value:.{digits}f}** ({'≤' if most else '≥'} {bar:g} {'✓' if met else '**missed**'})"


def verdict(error: str | None, delivery: str) -> str:
    """Return the verdict on an operation under a fault, by error and delivery."""
    if error is None:
        return "survives" if delivery == "right" else "**silently wrong**"
    return "fails, **wrong files left**" if delivery == "wrong" else "fails cleanly"


def in_turn(sides: Sequence[str], repetition: int) -> list[str]:
    """Return the methods, in reverse order every other repetition.

    So none always follows the same one.
    """
    return list(sides if repetition % 2 == 0 else reversed(sides))
