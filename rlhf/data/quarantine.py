"""Rows that are left out: written with their reasons, counted, and refused above a limit."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any

from rlhf.config.data import PersonalDataPolicy
from rlhf.data.collect import Origin
from rlhf.data.personal import redact_value
from rlhf.data.records import LeftOutError
from rlhf.errors import DataError

#: Reasons that a message lists.
SHOWN = 3
#: Rows from which on their reason is the one to mend, where it is that of most rows.
MANY = 10
#: Longest text of a row in the file, in characters: a row may hold megabytes.
MAX_TEXT = 100_000


class Quarantine:
    """Writes rows that are left out as JSON lines, each with its source, line and reason.

    Args:
        path: The file, which is made anew; None counts only.
        parent: Quarantine of all sources, which writes and counts the rows too, and whose policies
            hold.
        forgotten: Ids of rows to leave out whatever they hold; their content is not written.
        personal_data: Policy for rows with personal data: details, which messages show, never
            repeat any, and with `redact` and `quarantine` the file holds placeholders too.
    """

    def __init__(
        self,
        path: Path | None = None,
        parent: Quarantine | None = None,
        forgotten: frozenset[str] = frozenset(),
        personal_data: PersonalDataPolicy = "ignore",
    ) -> None:
        self.forgotten = parent.forgotten if parent else forgotten
        self._policy: PersonalDataPolicy = parent._policy if parent else personal_data
        self._file = path.open("w", encoding="utf-8") if path else None
        self._parent = parent
        self.reasons: Counter[str] = Counter()
        self.examples: dict[str, tuple[Origin, LeftOutError]] = {}
        """The first row with each reason."""
        self.found_forgotten: set[str] = set()
        """Ids of the forgotten rows that the sources hold."""
        self.bad = 0
        """Rows with something wrong: all but ties, lost votes and the like."""

    def __enter__(self) -> Quarantine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file:
            self._file.close()

    def add(self, origin: Origin, reason: LeftOutError, row: Any) -> None:
        """Write and count a row."""
        if self._parent:
            self._parent.add(origin, reason, row)
        row, reason = self._without_personal_data(row, reason)
        if origin.id in self.forgotten:
            self.found_forgotten.add(origin.id)
        self.reasons[reason.reason] += 1
        self.examples.setdefault(reason.reason, (origin, reason))
        self.bad += not reason.is_choice
        if self._file:
            line = {
                "source": origin.file,
                "line": origin.line,
                "id": origin.id,
                "reason": reason.reason,
                "detail": reason.detail,
                "row": row,
            }
            self._file.write(_json(line) + "\n")

    def _without_personal_data(
        self, row: Any, reason: LeftOutError
    ) -> tuple[Any, LeftOutError]:  # fmt: skip
        if self._policy == "ignore":
            return row, reason
        try:
            redacted, kinds = redact_value(row)
        except (ValueError, RecursionError):
            redacted, kinds = "not shown", frozenset({"of unknown kind"})
        if not kinds:
            return row, reason
        # A detail is the beginning of a value, where half an address is not recognised.
        detail = f"the row holds personal data ({', '.join(sorted(kinds))})"
        reason = LeftOutError(reason.reason, detail, reason.cure, is_choice=reason.is_choice)
        return (row if self._policy == "flag" else redacted), reason

    def missing_note(self) -> str | None:
        """Return a sentence on forgotten rows that no source holds, None if all are there."""
        missing = len(self.forgotten - self.found_forgotten)
        if not missing:
            return None
        return (
            f"{missing:,} of {len(self.forgotten):,} forgotten rows are not in the sources: they "
            "were removed, or changed (a changed row has another id)"
        )

    @property
    def total(self) -> int:
        """Number of rows."""
        return sum(self.reasons.values())

    def ordered(self) -> list[tuple[str, int]]:
        """Return reasons and counts, the most frequent first."""
        return sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))

    def in_words(self) -> str:
        """Return the commonest reasons with their counts: `8 × chosen is empty`."""
        shown = [f"{count:,} × {reason}" for reason, count in self.ordered()[:SHOWN]]
        rest = self.total - sum(count for _, count in self.ordered()[:SHOWN])
        return ", ".join([*shown, *([f"{rest:,} × other"] if rest else [])])

    def main_cure(self, rows: int) -> str:
        """Return the cure for the reason that leaves out most rows, "" if there is none such.

        Of a handful of rows the usual cure is to give more.
        """
        for reason, count in self.ordered()[:1]:
            if count > rows / 2 and count >= MANY:
                return self.examples[reason][1].cure
        return ""

    def explained(self) -> str:
        """Return the commonest faults, each with an example and a cure."""
        parts = []
        for reason, count in self.ordered():
            origin, example = self.examples[reason]
            if example.is_choice:
                continue
            detail = f": {example.detail}" if example.detail else ""
            cure = f" → {example.cure}" if example.cure else ""
            parts.append(f"{count:,} × {reason} ({origin.file}:{origin.line}{detail}){cure}")
        return "; ".join(parts[:SHOWN])

    def check(self, rows: int, limit: float, source: str, field: str, inspect: str) -> None:
        """Refuse a source of which too many rows are faulty.

        Args:
            rows: Number of its rows.
            limit: Largest share of them that may be faulty.
            source: Its URI.
            field: The setting that names it.
            inspect: Command that shows all reasons.

        Raises:
            DataError: More than `limit` of the rows have something wrong.
        """
        if self.bad > limit * rows:
            raise DataError(
                f"{field} = {source!r}: {self.bad:,} of {rows:,} rows can't be used, more than "
                f"data.max_bad_fraction = {limit:g} allows: {self.explained()}; mend the rows or "
                f"the settings, or raise data.max_bad_fraction; all reasons: {inspect}"
            )


def _json(value: Any) -> str:
    """Return JSON that every reader can read: other types and NaN as text, long text cut."""
    try:
        return json.dumps(_plain(value), allow_nan=False)
    except (ValueError, RecursionError):
        return json.dumps({**_plain({**value, "row": None}), "row": ascii(value["row"])[:MAX_TEXT]})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return value if len(value) <= MAX_TEXT else value[:MAX_TEXT] + "…"
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    return str(value)
