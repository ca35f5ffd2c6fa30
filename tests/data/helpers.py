"""Helpers for the tests of data: rows, messages, and reading a source."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from rlhf.config import DataConfig, StoreConfig
from rlhf.data.sources import open_source, source_digest
from rlhf.errors import NoPreferences, RLHFError


def rows(count: int = 3) -> list[dict[str, Any]]:
    """Return pairs, each with a prompt of its own."""
    return [
        {"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(count)
    ]


def read(source: object, options: StoreConfig | None = None, **settings: Any) -> list[Any]:
    """Return the fields of every record; for one that can't be parsed, the reason."""
    config = DataConfig(source=str(source), **settings)
    with open_source(config, options or StoreConfig(), lambda _: None) as parts:
        records = [record for part in parts for record in part.records()]
    return [record.fault if record.fields is None else record.fields for record in records]


def digest(source: object) -> str:
    return source_digest(DataConfig(source=str(source)), StoreConfig())


def message(kind: type[RLHFError], call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Return the one-line message of the error that a call raises."""
    with pytest.raises(kind) as caught:
        call(*args, **kwargs)
    assert type(caught.value) is kind or isinstance(caught.value, NoPreferences)
    text = str(caught.value)
    assert "\n" not in text
    return text


def pair(prompt: Any = "p", chosen: Any = "c", rejected: Any = "r") -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


WORDS = [
    "".join(random.Random(i).choices("abcdefghijklmnopqrstuvwxyz", k=3 + i % 7)) for i in range(800)
]


def sentence(rng: random.Random, words: int = 30) -> str:
    """Return a text that shares nothing much with another one."""
    return " ".join(rng.choices(WORDS, k=words))
