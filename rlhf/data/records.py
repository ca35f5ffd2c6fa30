"""Records of a source, what they are turned into, and the reasons for leaving one out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf.data.rows import Prompt


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a source with all its columns, and its position.

    `fields` is None for a row that can't be parsed; `fault` then holds the reason, and `text` the
    beginning of the row as it stands in the file.
    """

    file: str
    """Name of the file in the source."""
    line: int
    """Line of a text file, or item of a JSON array or a Parquet file, from 1."""
    fields: dict[str, Any] | None
    fault: str = ""
    text: str = ""


class LeftOutError(Exception):
    """A row can't be used.

    Args:
        reason: Kind of fault, equal for all rows with it: "reply is empty".
        detail: What is special in this row: the type and the beginning of the value.
        cure: What a user can do about it; one clause, without a full stop.
        is_choice: True where nothing is wrong with the row: a tie, a vote that lost, a duplicate.
            Such rows do not count against `data.max_bad_fraction`.
    """

    def __init__(
        self, reason: str, detail: str = "", cure: str = "", *, is_choice: bool = False
    ) -> None:
        super().__init__(reason)
        self.reason, self.detail, self.cure, self.is_choice = reason, detail, cure, is_choice


@dataclass(frozen=True)
class Comparison:
    """Two replies to one prompt, of which the first was preferred."""

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float | None = None
    """How much better the first is, in the source's units."""
    position: Literal["first", "second"] | None = None
    """Position of the preferred reply in its row, where two columns hold either reply."""


@dataclass(frozen=True)
class Rated:
    """One reply with a score: pairs come from replies to one prompt that differ in it."""

    prompt: Prompt
    reply: str
    score: float


@dataclass(frozen=True)
class Converted:
    """Comparisons and ratings that one row holds."""

    comparisons: list[Comparison] = field(default_factory=list)
    rated: list[Rated] = field(default_factory=list)
    notes: frozenset[str] = frozenset()
    """Conversions that a user should know of: "the prompt is cut from the front of replies"."""
