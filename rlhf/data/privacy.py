"""Policy for rows that hold personal data: flag, redact, quarantine or ignore them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from rlhf.config import DataConfig
from rlhf.data.columns import Row, cell_of
from rlhf.data.personal import find_personal_data, redact_text, redact_value
from rlhf.data.records import Converted, LeftOutError
from rlhf.data.rows import Prompt, messages_of


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
        self._columns = (*filter(None, [config.reference_column]), *config.metadata_columns)

    def apply(self, converted: Converted, row: Row) -> tuple[Converted, Row]:
        """Count a row, and return what may be used of it.

        Raises:
            LeftOutError: It holds personal data and is to be quarantined, or nothing is left of it.
        """
        if self.policy == "ignore":
            return converted, row
        kinds = {s.kind for text in _texts(converted) for s in find_personal_data(text)}
        extra = [_redacted(cell_of(row, column)) for column in self._columns]
        kinds.update(*(found for _, found in extra))
        if not kinds:
            return converted, row
        self.rows += 1
        self.kinds.update(kinds)
        if self.policy == "flag":
            return converted, row
        if self.policy == "quarantine":
            raise LeftOutError(
                "holds personal data", ", ".join(sorted(kinds)),
                "set data.personal_data=redact to use the row without them", is_choice=True,
            )  # fmt: skip
        return _without_personal_data(converted), _redacted(row)[0] if self._columns else row

    def hide(self, text: str) -> str:
        """Return a sentence or a column's name without personal data, for messages."""
        if self.policy == "ignore":
            return text
        try:
            return redact_text(text)[0]
        except ValueError:
            return "[PERSONAL DATA]"

    @property
    def note(self) -> str | None:
        """Sentence on what was found; it holds no value."""
        if not self.rows:
            return None
        kinds = ", ".join(f"{kind} in {n:,}" for kind, n in self.kinds.most_common())
        outcome = {
            "flag": "kept as they are; data.personal_data=redact or quarantine removes them",
            "redact": "replaced by placeholders such as [EMAIL]",
            "quarantine": "left out",
        }[self.policy]
        return f"{self.rows:,} rows hold personal data ({kinds}): {outcome}"


def _texts(converted: Converted) -> set[str]:
    """Return every text of a row once: a ranking repeats its prompt and replies."""
    texts: set[str] = set()
    for item in converted.comparisons:
        texts.update((item.chosen, item.rejected, *_turns(item.prompt)))
    for one in converted.rated:
        texts.update((one.reply, *_turns(one.prompt)))
    return texts


def _turns(prompt: Prompt) -> list[str]:
    return [m["content"] for m in messages_of(prompt)]


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
