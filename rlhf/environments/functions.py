"""Reward functions of a reply's text and length, and of its reference answer."""

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
from rlhf.environments.contract import Reply, RewardFunction
from rlhf.statistics import repeated_ngrams


def length_penalty(config: LengthPenaltyConfig) -> RewardFunction:
    """−slope for each token above the target, or on both sides of it."""

    def values(batch: Sequence[Reply]) -> list[float]:
        excess = [reply.n_tokens - config.target for reply in batch]
        return [-config.slope * (abs(n) if config.side == "both" else max(n, 0)) for n in excess]

    return values


def length(config: LengthComponent) -> RewardFunction:
    """Piecewise linear function of the number of tokens, constant beyond the points."""

    def value(tokens: int) -> float:
        first, last = config.points[0], config.points[-1]
        for (x0, y0), (x1, y1) in pairwise(config.points):
            if x0 <= tokens <= x1:
                return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)
        return first[1] if tokens < first[0] else last[1]

    return lambda batch: [value(reply.n_tokens) for reply in batch]


def keyword(config: KeywordComponent) -> RewardFunction:
    """Fraction of the words that a reply contains, or 1 if it contains any or all."""
    flags = 0 if config.case_sensitive else regex.IGNORECASE | regex.FULLCASE
    edges = (r"(?<!\w)", r"(?!\w)") if config.whole_words else ("", "")
    patterns = [
        regex.compile(regex.escape(word.strip()).join(edges), flags) for word in config.words
    ]

    def value(text: str) -> float:
        hits = [pattern.search(text) is not None for pattern in patterns]
        if config.match == "fraction":
            return sum(hits) / len(hits)
        return float(any(hits) if config.match == "any" else all(hits))

    return lambda batch: [value(reply.response) for reply in batch]


def regex_match(config: RegexComponent) -> RewardFunction:
    """1 if the reply matches the pattern, else 0."""
    compiled = regex.compile(config.pattern)

    def values(batch: Sequence[Reply]) -> list[float]:
        limit = config.timeout_seconds
        return [float(matches(compiled, r.response, limit, full=config.full)) for r in batch]

    return values


def json_valid(config: JsonValidComponent) -> RewardFunction:
    """1 if the reply is JSON of the required type and has the required keys, else 0."""
    types: dict[str, Any] = {"any": object, "object": dict, "array": list}

    def value(text: str) -> float:
        try:
            document = json.loads(text, parse_constant=_reject_constant)
        except (ValueError, RecursionError):
            return 0.0
        return float(
            isinstance(document, types[config.require]) and all(k in document for k in config.keys)
        )

    return lambda batch: [value(reply.response) for reply in batch]


def _reject_constant(constant: str) -> float:
    """Refuse NaN and Infinity, which Python's parser would accept."""
    raise ValueError(f"{constant} is no JSON")


def repetition(config: RepetitionComponent) -> RewardFunction:
    """Minus the share of word n-grams that occurred earlier in the reply."""

    def value(text: str) -> float:
        # 0.0 - x, as a bare minus would turn 0 into -0.0.
        return 0.0 - repeated_ngrams(text.casefold().split(), config.ngram)

    return lambda batch: [value(reply.response) for reply in batch]
