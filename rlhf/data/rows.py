"""Rows of a dataset artifact, as JSON lines.

| file | fields |
|---|---|
| `demonstrations.jsonl` | prompt, response |
| `pairs-train.jsonl`, `pairs-eval.jsonl` | prompt, chosen, rejected, group |
| `prompts-train.jsonl`, `prompts-eval.jsonl` | prompt, group, reference, metadata |
| `quarantine.jsonl` | source, line, reason, detail, row |
| `card.json`, `card.md` | findings and figures of the audit (rlhf/data/audit.py) |

A prompt is a string or a list of chat messages `{"role", "content"}`. `group` names a slice that
evaluation reports separately, or is null. `reference` is the right answer, or null. `metadata` maps
columns of the source to their values.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

Message = dict[str, str]
Prompt = str | list[Message]


def messages_of(prompt: Prompt) -> list[Message]:
    """Return a prompt as chat messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


DEMONSTRATIONS = "demonstrations.jsonl"
PAIRS_TRAIN = "pairs-train.jsonl"
PAIRS_EVAL = "pairs-eval.jsonl"
PROMPTS_TRAIN = "prompts-train.jsonl"
PROMPTS_EVAL = "prompts-eval.jsonl"
SUMMARY = "summary.json"
QUARANTINE = "quarantine.jsonl"
#: Data card for programs and for people.
CARD = "card.json"
CARD_TEXT = "card.md"


@dataclass(frozen=True)
class Demonstration:
    """A reply to imitate."""

    prompt: Prompt
    response: str


@dataclass(frozen=True)
class Pair:
    """Two replies to one prompt, the first preferred."""

    prompt: Prompt
    chosen: str
    rejected: str
    group: str | None = None


@dataclass(frozen=True)
class PromptRow:
    """A prompt to answer, with fields for reward functions."""

    prompt: Prompt
    group: str | None = None
    reference: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


Row = TypeVar("Row", Demonstration, Pair, PromptRow)


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """Write dataclass rows as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            # Not asdict(), which copies every value: half of the time of a large source.
            file.write(json.dumps(vars(row), ensure_ascii=False) + "\n")


def read_rows(path: Path, row_type: type[Row]) -> list[Row]:
    """Read rows written by `write_rows`."""
    with path.open(encoding="utf-8") as file:
        return [row_type(**json.loads(line)) for line in file]
