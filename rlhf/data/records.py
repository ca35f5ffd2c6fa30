"""Records of a source, what they are turned into, and the reasons for leaving one out."""

from __future__ import annotations

import hashlib
import json
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

    @property
    def id(self) -> str:
        """The row's id: 32 hex digits of the sha256 of all its columns.

        The content alone decides, so that the id stays when rows are added, moved or their file is
        renamed; rows that are equal share it. A column `id` is content like any other: exports
        number their rows anew, and two sources may use one number. The order of columns, and of
        keys in objects, is ignored.
        """
        content = self.text if self.fields is None else self.fields
        try:
            text = _encode(content)
        except (TypeError, ValueError, RecursionError):  # keys of several types, or deep nesting
            text = _bounded_repr(content)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


#: Made once: `json.dumps` makes an encoder for each call with arguments.
_encode = json.JSONEncoder(sort_keys=True, default=repr).encode


def _bounded_repr(content: Any) -> str:
    """Return a text for what JSON can't write; what is nested too deeply is left out."""
    try:
        return ascii(content)
    except RecursionError:
        return ascii(sorted(map(str, content))) if isinstance(content, dict) else "nested"


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

    @property
    def shown_cure(self) -> str:
        """The cure, or what to do where none is given."""
        return self.cure or (
            "nothing is wrong with such rows" if self.is_choice else "mend or remove the row"
        )


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
    counted: frozenset[str] = frozenset()
    """Sentences of which a user should know how many rows they hold for."""
    skipped: int = 0
    """Pairs beyond the most that are made of one row."""
    ballots: tuple[tuple[str, list[Comparison]], ...] = ()
    """Annotators whose answers the row holds, each with what these alone compare."""
