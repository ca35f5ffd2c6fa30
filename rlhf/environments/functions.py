"""Rewards that are computed from a reply's text and length alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import regex

from rlhf.config import (
    JsonValidComponent,
    KeywordComponent,
    LengthComponent,
    LengthPenaltyConfig,
    RegexComponent,
    RepetitionComponent,
)
from rlhf.environments.answers import matches
from rlhf.environments.contract import Reply, Values
from rlhf.statistics import repeated_ngrams


def length_penalty(config: LengthPenaltyConfig) -> Values:
    """−slope for each token beyond the target, or (both sides) off it."""

    def values(batch: Sequence[Reply]) -> list[float]:
        off = [reply.n_tokens - config.target for reply in batch]
        return [-config.slope * (abs(n) if config.side == "both" else max(n, 0)) for n in off]

    return values


def length(config: LengthComponent) -> Values:
    """Linear between the points, constant outside of them."""

    def value(tokens: int) -> float:
        first, last = config.points[0], config.points[-1]
        for (x0, y0), (x1, y1) in pairwise(config.points):
            if x0 <= tokens <= x1:
                return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)
        return first[1] if tokens < first[0] else last[1]

    return lambda batch: [value(reply.n_tokens) for reply in batch]


def keyword(config: KeywordComponent) -> Values:
    """Which of the words stand in a reply."""
    flags = 0 if config.case_sensitive else regex.IGNORECASE | regex.FULLCASE
    edges = (r"(?<!\w)", r"(?!\w)") if config.whole_words else ("", "")
    patterns = [
        regex.compile(regex.escape(word.strip()).join(edges), flags) for word in config.words
    ]

    def value(text: str) -> float:
        found = [pattern.search(text) is not None for pattern in patterns]
        if config.match == "fraction":
            return sum(found) / len(found)
        return float(any(found) if config.match == "any" else all(found))

    return lambda batch: [value(reply.response) for reply in batch]


def pattern(config: RegexComponent) -> Values:
    """1 where the pattern is found."""
    compiled = regex.compile(config.pattern)

    def values(batch: Sequence[Reply]) -> list[float]:
        limit = config.timeout_seconds
        return [float(matches(compiled, r.response, limit, full=config.full)) for r in batch]

    return values


def json_valid(config: JsonValidComponent) -> Values:
    """1 where the reply is JSON of the kind wanted."""
    kinds: dict[str, Any] = {"any": object, "object": dict, "array": list}

    def value(text: str) -> float:
        try:
            read = json.loads(text, parse_constant=_no_number)
        except (ValueError, RecursionError):
            return 0.0
        return float(
            isinstance(read, kinds[config.require]) and all(k in read for k in config.keys)
        )

    return lambda batch: [value(reply.response) for reply in batch]


def _no_number(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")


def repetition(config: RepetitionComponent) -> Values:
    """Score minus the share of word n-grams that occurred before in the reply."""

    def value(text: str) -> float:
        # 0.0 - x, as a bare minus would turn 0 into -0.0.
        return 0.0 - repeated_ngrams(text.casefold().split(), config.ngram)

    return lambda batch: [value(reply.response) for reply in batch]
