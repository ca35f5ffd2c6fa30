"""Cleaning of preference rows: pairs to train on, and counts of the rows skipped."""

from __future__ import annotations

import json
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from rlhf.config import DataConfig
from rlhf.data.rows import Message, Pair, Prompt, PromptRow


def clean(
    rows: Iterable[dict[str, Any]], config: DataConfig, fields: PromptFields | None = None
) -> tuple[list[Pair], dict[str, int]]:
    """Return the usable pairs, and the number of rows left out by reason.

    The prompts' reference answers and metadata in usable rows are added to `fields`.
    """
    fields = fields or PromptFields(config)
    pairs: dict[str, Pair] = {}
    left_out: Counter[str] = Counter()
    for row in rows:
        try:
            pair = _pair(row, config)
            add_fields = fields.read(row, pair.prompt)
            if repr(pair) in pairs:
                raise _LeftOutError("duplicate")
            pairs[repr(pair)] = pair
            add_fields()
        except _LeftOutError as reason:
            left_out[str(reason)] += 1
    return list(pairs.values()), dict(sorted(left_out.items()))


class PromptFields:
    """Reference answers and metadata by prompt, the same for every row of a prompt."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.references: dict[str, str] = {}
        self.metadata: dict[str, dict[str, Any]] = {}

    def read(self, row: dict[str, Any], prompt: Prompt) -> Callable[[], None]:
        """Check a row's fields, and return a function that adds them once the row is used."""
        columns = self.config.metadata_columns
        if self.config.reference_column is None and not columns:
            return lambda: None
        name, reference = prompt_key(prompt), self._reference(row)
        if reference is not None and self.references.get(name, reference) != reference:
            raise _LeftOutError("another reference for the same prompt")
        metadata = {column: _plain_json(row.get(column)) for column in columns}

        def add() -> None:
            if reference is not None:
                self.references[name] = reference
            self.metadata.setdefault(name, metadata)

        return add

    def complete(self, row: PromptRow) -> PromptRow:
        """Return the row with its prompt's reference, and the metadata of its first row."""
        name = prompt_key(row.prompt)
        return replace(
            row, reference=self.references.get(name), metadata=self.metadata.get(name, {})
        )

    def _reference(self, row: dict[str, Any]) -> str | None:
        if self.config.reference_column is None:
            return None
        value: Any = row.get(self.config.reference_column)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return None if math.isnan(value) else str(value)  # a missing number in Parquet
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        if not _is_text(value):
            raise _LeftOutError("the reference is no text or number")
        return str(value)


def prompt_key(prompt: Prompt) -> str:
    """Return a key of a prompt that ignores Unicode form, spacing and case.

    Prompts with one key stay on one side of the split: a held-out copy would raise the score.
    """

    def plain(text: str) -> str:
        return " ".join(unicodedata.normalize("NFKC", text).casefold().split())

    return json.dumps([(m["role"], plain(m["content"])) for m in _messages(prompt)])


class _LeftOutError(Exception):
    """The reason for leaving out a row."""


def _pair(row: dict[str, Any], config: DataConfig) -> Pair:
    prompt = _prompt(row.get(config.prompt_column))
    chosen = _reply(row.get(config.chosen_column), prompt)
    rejected = _reply(row.get(config.rejected_column), prompt)
    if chosen.strip() == rejected.strip():
        raise _LeftOutError("both replies are the same")
    if sum(len(m["content"]) for m in _messages(prompt)) > config.max_prompt_chars:
        raise _LeftOutError("prompt too long")
    if max(len(chosen), len(rejected)) > config.max_reply_chars:
        raise _LeftOutError("reply too long")
    return Pair(prompt, chosen, rejected)


def _prompt(value: Any) -> Prompt:
    """Check a prompt: text, or chat messages that end before a reply."""
    no_text = _LeftOutError("prompt is empty or no text")
    if not isinstance(value, list):
        if not _is_text(value):
            raise no_text
        return value
    messages = _chat(value)
    if not messages or not messages[-1]["content"].strip():
        raise no_text
    if messages[-1]["role"] == "assistant":
        raise _LeftOutError("prompt ends with a reply")
    return messages


def _reply(value: Any, prompt: Prompt) -> str:
    """Return a reply's text: of a chat the last message, if it follows the prompt."""
    if isinstance(value, list):
        messages = _chat(value)
        if messages and messages[-1]["role"] != "assistant":
            raise _LeftOutError("a reply is not the assistant's")
        if len(messages) > 1 and prompt_key(messages[:-1]) != prompt_key(prompt):
            raise _LeftOutError("a reply belongs to another prompt")
        value = messages[-1]["content"] if messages else None
    if not _is_text(value):
        raise _LeftOutError("a reply is empty or no text")
    return value


def _chat(value: list[Any]) -> list[Message]:
    """Return role and content of each message; an empty list if one is no message."""
    messages: list[Message] = []
    for item in value:
        if not isinstance(item, dict):
            return []
        role, content = item.get("role"), item.get("content")
        if not all(isinstance(text, str) and _is_unicode(text) for text in (role, content)):
            return []
        messages.append({"role": str(role), "content": str(content)})
    return messages


def _messages(prompt: Prompt) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _plain_json(value: Any) -> Any:
    """Convert a cell to JSON values; dates and other types become text."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)
    except (TypeError, ValueError):
        raise _LeftOutError("metadata can't be written as JSON") from None
    if not _is_unicode(text):
        raise _LeftOutError("metadata is no text")
    return json.loads(text)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and _is_unicode(value)


def _is_unicode(text: str) -> bool:
    """Return False for a lone surrogate, which JSON can hold and UTF-8 can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
