"""Policy for rows that hold personal data: flag, redact, quarantine or ignore them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from rlhf.config import DataConfig
from rlhf.data.columns import Row, cell_of
from rlhf.data.personal import find_personal_data, redact_text, redact_value
from rlhf.data.records import Converted, LeftOutError
from rlhf.data.rows import Prompt


class PersonalData:
    """Policy for rows with personal data, and their count.

    All text of a row that a dataset would hold is read: every turn of the prompt, the replies,
    reference and metadata columns.
    """

    def __init__(self, config: DataConfig) -> None:
        self.policy = config.personal_data
        self.rows = 0
        """Rows that hold some, as long as their format was understood."""
        self.kinds: Counter[str] = Counter()
        """Rows by kind; a row may have several."""

    def apply(
        self, converted: Converted, row: Row, columns: Collection[str] = ()
    ) -> tuple[Converted, Row]:
        """Count a row, and return what may be used of it.

        Args:
            converted: Prompts and replies of the row.
            row: Its values.
            columns: Reference and metadata columns.

        Raises:
            LeftOutError: It holds personal data and is to be quarantined, or nothing is left of it.
        """
        if not self.must_redact(_texts(converted), row, columns):
            return converted, row
        return _without_personal_data(converted), redacted_row(row) if columns else row

    def must_redact(self, texts: Collection[str], row: Row, columns: Collection[str]) -> bool:
        """Count a row by its texts and columns; return whether it must be redacted.

        Raises:
            LeftOutError: It holds personal data and is to be quarantined.
        """
        if self.policy == "ignore":
            return False
        kinds = {s.kind for text in texts for s in find_personal_data(text)}
        kinds.update(*(_redacted(cell_of(row, column))[1] for column in columns))
        if not kinds:
            return False
        self.rows += 1
        self.kinds.update(kinds)
        if self.policy == "quarantine":
            raise LeftOutError(
                "holds personal data", ", ".join(sorted(kinds)),
                "set data.personal_data=redact to use the row without them", is_choice=True,
            )  # fmt: skip
        return self.policy == "redact"

    def hide(self, text: str) -> str:
        """Return a sentence or a column's name without personal data, for messages."""
        if self.policy == "ignore":
            return text
        try:
            return redact_text(text)[0]
        except ValueError:
            return "[PERSONAL DATA]"

    @property
    def notes(self) -> list[str]:
        """Sentence on what was found, if anything was; it holds no value."""
        if not self.rows:
            return []
        kinds = ", ".join(f"{kind} in {n:,}" for kind, n in self.kinds.most_common())
        outcome = {
            "flag": "kept as they are; data.personal_data=redact or quarantine removes them",
            "redact": "replaced by placeholders such as [EMAIL]",
            "quarantine": "left out",
        }[self.policy]
        return [f"{self.rows:,} rows hold personal data ({kinds}): {outcome}"]


def redacted_row(row: Row) -> Row:
    """Return a row with placeholders for its personal data.

    Raises:
        LeftOutError: They can't be separated from the rest.
    """
    return _redacted(row)[0]


def _texts(converted: Converted) -> set[str]:
    """Return every text of a row once: a ranking repeats its prompt and replies."""
    texts: set[str] = set()
    for item in converted.comparisons:
        texts.update((item.chosen, item.rejected, *_turns(item.prompt)))
    for one in converted.rated:
        texts.update((one.reply, *_turns(one.prompt)))
    return texts


def _turns(prompt: Prompt) -> list[str]:
    return [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt]


def _without_personal_data(converted: Converted) -> Converted:
    """Replace the personal data of a row's prompts and replies.

    Raises:
        LeftOutError: No two replies differ any more.
    """
    comparisons = []
    for item in converted.comparisons:
        prompt = _redacted_prompt(item.prompt)
        chosen, rejected = _redacted(item.chosen)[0], _redacted(item.rejected)[0]
        # Replies that were the same before keep their own reason.
        if chosen.strip() != rejected.strip() or item.chosen.strip() == item.rejected.strip():
            comparisons.append(replace(item, prompt=prompt, chosen=chosen, rejected=rejected))
    rated = [
        replace(one, prompt=_redacted_prompt(one.prompt), reply=_redacted(one.reply)[0])
        for one in converted.rated
    ]
    if converted.comparisons and not comparisons:
        raise LeftOutError(
            "replies differ in personal data alone", cure="remove the row", is_choice=True
        )
    return replace(converted, comparisons=comparisons, rated=rated)


def _redacted_prompt(prompt: Prompt) -> Prompt:
    if isinstance(prompt, str):
        return _redacted(prompt)[0]
    return [{**m, "content": _redacted(m["content"])[0]} for m in prompt]


def _redacted(value: Any) -> tuple[Any, frozenset[str]]:
    try:
        return redact_value(value)
    except (ValueError, RecursionError):
        raise LeftOutError(
            "personal data can't be separated from the rest", cure="remove the row", is_choice=True
        ) from None
