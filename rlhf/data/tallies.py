"""Counts taken while rows are read: positions of preferred replies, annotators, slices.

Rows are counted as they come, before votes are merged and pairs are sampled. Rows that can't be
used are not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.data.collect import exact_key
from rlhf.data.columns import plain_name
from rlhf.data.records import Comparison, Converted

#: Columns that name who decided, the surest first: `user_id` may be the author of the prompt.
ANNOTATOR_COLUMNS = (
    "annotator", "annotator_id", "annotator_name", "annotated_by", "labeler", "labeler_id",
    "labeller", "labeller_id", "labeled_by", "rater", "rater_id", "worker", "worker_id", "judge",
    "judge_id", "judge_name", "judge_model", "evaluator", "evaluator_id", "reviewer",
    "reviewer_id", "completed_by", "user_id", "_annotator_id",
)  # fmt: skip
#: Columns that divide the rows into slices.
SLICE_COLUMNS = (
    "group", "category", "task", "task_type", "subset", "domain", "topic", "language", "lang",
    "source", "dataset", "difficulty",
)  # fmt: skip
#: Most values of a column of slices; one with more, such as a URL, divides rows into nothing.
MAX_SLICES = 40
#: Pairs whose votes are held for the agreement of annotators: those that come first.
MAX_BALLOTS = 200_000
#: Longest name of a slice or annotator, in characters.
MAX_NAME = 60


@dataclass
class LengthCounts:
    """Comparisons in which the longer reply was preferred, and all of them."""

    comparisons: int = 0
    longer: float = 0.0
    """Comparisons whose preferred reply is the longer one; ties of length count a half."""

    def add(self, chosen: str, rejected: str) -> None:
        """Count a comparison."""
        self.comparisons += 1
        self.longer += (len(chosen) > len(rejected)) + (len(chosen) == len(rejected)) / 2


@dataclass
class Tallies:
    """Counts over the rows of a source."""

    positions: Counter[str] = field(default_factory=Counter[str])
    """Rows by the position of the preferred reply: first or second."""
    annotator_column: str | None = None
    """Of the first file that has one."""
    annotators: Counter[str] = field(default_factory=Counter[str])
    """Rows by annotator."""
    slices: dict[str, dict[str, LengthCounts]] = field(
        default_factory=dict[str, dict[str, LengthCounts]]
    )
    """By column and value; rows without comparisons are not counted."""
    ballots: dict[int, list[tuple[str, bool]]] = field(
        default_factory=dict[int, list[tuple[str, bool]]]
    )
    """Votes for each pair as (annotator, whether the reply that sorts first was preferred)."""
    _names: dict[str, str] = field(default_factory=dict[str, str])
    """Names of slices and annotators as they are shown."""
    _annotator: str | None = None
    _slice_columns: tuple[str, ...] = ()

    def set_columns(self, columns: Sequence[str]) -> tuple[str, ...]:
        """Find the columns to count in a file, of those that hold no prompt, reply or label."""
        names = {plain_name(column): column for column in reversed(columns)}
        found = [names[name] for name in ANNOTATOR_COLUMNS if name in names]
        self._annotator = found[0] if found else None
        self.annotator_column = self.annotator_column or self._annotator
        self._slice_columns = tuple(names[name] for name in SLICE_COLUMNS if name in names)
        return (*found[:1], *self._slice_columns)

    def add(
        self, row: Mapping[str, Any], converted: Converted, hide: Callable[[str], str] = str
    ) -> None:
        """Count a row that is used; `hide` takes personal data out of names."""
        for item in converted.comparisons:
            if item.position is not None:
                self.positions[item.position] += 1
        for column in self._slice_columns:
            if name := self._shown(row.get(column), hide):
                counts = self.slices.setdefault(column, {})
                if len(counts) > MAX_SLICES:
                    continue
                slice_ = counts.setdefault(name, LengthCounts())
                for item in converted.comparisons:
                    slice_.add(item.chosen, item.rejected)
        for annotator, comparisons in converted.ballots:
            self.annotator_column = self.annotator_column or "answers of the export"
            name = self._shown(annotator, hide)
            self.annotators[name] += 1
            for item in comparisons:
                self._vote(name, item)
        if converted.ballots:
            return
        if self._annotator and (name := self._shown(row.get(self._annotator), hide)):
            self.annotators[name] += 1
            for item in converted.comparisons:
                self._vote(name, item)

    def _shown(self, value: Any, hide: Callable[[str], str]) -> str:
        """Return a cell as a name; names that are personal data are numbered instead."""
        name = _name(value)
        if name not in self._names and len(self._names) < MAX_BALLOTS:
            hidden = hide(name)
            self._names[name] = name if hidden == name else f"{hidden} {len(self._names) + 1}"
        return self._names.get(name) or hide(name)

    def usable_slices(self) -> dict[str, dict[str, LengthCounts]]:
        """Return the columns with 2 to MAX_SLICES values, and the values with comparisons."""
        return {
            column: {name: c for name, c in counts.items() if c.comparisons}
            for column, counts in self.slices.items()
            if 2 <= sum(c.comparisons > 0 for c in counts.values()) <= len(counts) <= MAX_SLICES
        }

    def _vote(self, annotator: str, item: Comparison) -> None:
        first, second = sorted((item.chosen, item.rejected))
        # A 64-bit hash: two of a million pairs share one with a probability of 3e-8.
        key = hash((exact_key(item.prompt), first, second))
        if key in self.ballots or len(self.ballots) < MAX_BALLOTS:
            self.ballots.setdefault(key, []).append((annotator, item.chosen == first))


def _name(value: Any) -> str:
    """Return a cell as the name of a slice or annotator; empty for anything but text or numbers."""
    if isinstance(value, bool | int | str):
        # Half of a surrogate pair can't be written to a file.
        text = str(value).encode("utf-8", "replace").decode()
        return " ".join(text.split())[:MAX_NAME]
    return ""
