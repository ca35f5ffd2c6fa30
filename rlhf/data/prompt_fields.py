"""Reference answers and metadata of prompts, for reward functions."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rlhf.config import DataConfig
from rlhf.data.collect import exact_key
from rlhf.data.columns import Row, cell_of
from rlhf.data.records import LeftOutError
from rlhf.data.rows import Prompt, PromptRow
from rlhf.data.spill import digest


class PromptFields:
    """Reference answers and metadata by prompt, the same for every row of a prompt.

    They are held in memory, by digests of the prompts' exact keys.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.references: dict[bytes, str] = {}
        self.metadata: dict[bytes, str] = {}
        """As JSON, which takes half of the memory."""

    def of(self, config: DataConfig) -> PromptFields:
        """Return the reader of another source, which shares what was read."""
        other = PromptFields(config)
        other.references, other.metadata = self.references, self.metadata
        return other

    def read(self, row: Row, prompt: Prompt) -> Callable[[], None]:
        """Check a row's fields, and return a function that adds them once the row is used.

        Raises:
            LeftOutError: A field is unusable, or the prompt has another reference already.
        """
        columns = self.config.metadata_columns
        if self.config.reference_column is None and not columns:
            return lambda: None
        name, reference = digest(exact_key(prompt)), self._reference(row)
        if reference is not None and self.references.get(name, reference) != reference:
            raise LeftOutError(
                "another reference for the same prompt", repr(reference)[:100],
                "give each prompt one reference",
            )  # fmt: skip
        metadata = {column: _plain_json(cell_of(row, column)) for column in columns}

        def add() -> None:
            if reference is not None:
                self.references[name] = reference
            if name not in self.metadata:
                self.metadata[name] = json.dumps(metadata)

        return add

    def complete(self, row: PromptRow) -> PromptRow:
        """Return the row with its prompt's reference, and the metadata of its first row."""
        name = digest(exact_key(row.prompt))
        metadata = json.loads(self.metadata.get(name, "{}"))
        return replace(row, reference=self.references.get(name), metadata=metadata)

    def _reference(self, row: Row) -> str | None:
        if self.config.reference_column is None:
            return None
        value = cell_of(row, self.config.reference_column)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return None if math.isnan(value) else str(value)  # a missing number in Parquet
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        if not isinstance(value, str) or not _is_unicode(value):
            raise LeftOutError(
                "the reference is no text or number", f"{type(value).__name__} {value!r}"[:100],
                "mend the column of data.reference_column",
            )  # fmt: skip
        return value


def _plain_json(value: Any) -> Any:
    """Convert a cell to JSON values; dates and other types become text."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)
    except (TypeError, ValueError, RecursionError):
        raise LeftOutError("metadata can't be written as JSON", str(value)[:100]) from None
    if not _is_unicode(text):
        raise LeftOutError("metadata is no text", ascii(value)[:100])
    return json.loads(text)


def _is_unicode(text: str) -> bool:
    """Return False for a lone surrogate, which JSON can hold and UTF-8 can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
