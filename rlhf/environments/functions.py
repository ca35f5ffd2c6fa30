"""Reward functions of a reply's text and length, and of its reference answer."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from decimal import Context, Decimal
from itertools import pairwise
from typing import Any

import regex

from rlhf.config import (
    CorrectnessConfig,
    JsonValidComponent,
    KeywordComponent,
    LengthComponent,
    LengthPenaltyConfig,
    RegexComponent,
    RepetitionComponent,
)
from rlhf.data.rows import PromptRow
from rlhf.environments.contract import Reply, RewardFunction
from rlhf.errors import ConfigError, TrainingError
from rlhf.limits import pattern_errors
from rlhf.statistics import repeated_ngrams

#: A number, with a sign that is not a hyphen, and commas between thousands.
NUMBER = regex.compile(
    r"(?:(?<![\w.)\]])[-+−])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?"
    r"|(?:(?<![\w.)\]])[-+−])?(?<!\d)\.\d+(?:[eE][-+]?\d+)?"
)

ARTICLES = ("a", "an", "the")

#: Rounds numbers of any length and never raises.
ARITHMETIC = Context(prec=60, traps=[])


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


def repetition(config: RepetitionComponent) -> RewardFunction:
    """Minus the share of word n-grams that occurred earlier in the reply."""

    def value(text: str) -> float:
        # 0.0 - x, as a bare minus would turn 0 into -0.0.
        return 0.0 - repeated_ngrams(text.casefold().split(), config.ngram)

    return lambda batch: [value(reply.response) for reply in batch]


class Correctness:
    """Rewards replies that agree with their reference by `right`, others by `wrong`."""

    def __init__(self, config: CorrectnessConfig) -> None:
        self.config = config

    def __call__(self, batch: Sequence[Reply]) -> list[float]:
        """Return the value of each reply; every reply must have a reference."""
        config = self.config
        return [
            config.right if self._agrees(r.response, str(r.reference)) else config.wrong
            for r in batch
        ]

    def check(self, rows: Sequence[PromptRow], label: str) -> None:
        """Check that every prompt has a reference that the mode can compare with.

        Args:
            rows: Training prompts.
            label: The reward function's name in errors.

        Raises:
            ConfigError: Names the first row without one.
        """
        patterns = [row.reference or "" for row in rows] if self.config.mode == "regex" else []
        broken = pattern_errors(tuple(dict.fromkeys(patterns)))
        for number, row in enumerate(rows, start=1):
            reason = self._reference_error(row.reference, broken)
            if reason:
                prompt = row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"]
                raise ConfigError(
                    f"ppo: {label} needs a reference answer for every prompt, and training "
                    f"prompt {number} ({prompt[:60]!r}) {reason}; mend data.reference_column's "
                    "values, or leave the row out"
                )

    def _reference_error(self, reference: str | None, broken: Mapping[str, str]) -> str | None:
        """Return why the mode can't use a reference, None if it can."""
        mode = self.config.mode
        if reference is None:
            return "has none"
        shown = repr(reference[:60])
        if mode == "numeric" and last_number(reference) is None:
            return f"has {shown}, which holds no number"
        if mode in ("normalised", "contains") and not normalise_answer(reference):
            return f"has {shown}, of which nothing is left without articles and punctuation"
        if mode == "regex":
            error = broken.get(reference)
            if error:
                return f"has {shown}, which is no pattern ({error})"
        return None

    def _agrees(self, response: str, reference: str) -> bool:
        """Return whether a reply agrees with its reference by the configured mode."""
        mode = self.config.mode
        if mode == "exact":
            return response.strip() == reference.strip()
        if mode == "numeric":
            return self._is_close(last_number(response), last_number(reference))
        if mode == "regex":
            return matches(regex.compile(reference), response, self.config.timeout_seconds)
        actual, expected = normalise_answer(response), normalise_answer(reference)
        return actual == expected if mode == "normalised" else f" {expected} " in f" {actual} "

    def _is_close(self, actual: Decimal | None, expected: Decimal | None) -> bool:
        """Compare two numbers as decimals, so that 1.1 is within 0.1 of 1.0."""
        if actual is None or expected is None:
            return False
        relative = Decimal(str(self.config.relative_tolerance))
        tolerance = max(
            Decimal(str(self.config.tolerance)), ARITHMETIC.multiply(relative, abs(expected))
        )
        distance = ARITHMETIC.abs(ARITHMETIC.subtract(actual, expected))
        return distance.is_finite() and distance <= tolerance


def last_number(text: str) -> Decimal | None:
    """Return the last number in a text, such as `1,234.50`, `−3`, `2e5` or `.5`."""
    numbers = NUMBER.findall(text)
    if not numbers:
        return None
    number = ARITHMETIC.create_decimal(numbers[-1].replace(",", "").replace("−", "-"))
    return number if number.is_finite() else None


def normalise_answer(text: str) -> str:
    """Remove differences of case, spacing, punctuation and articles.

    Minus signs and decimal points stay: −4 is not 4, and 3.5 is not 35.
    """
    text = unicodedata.normalize("NFKC", text).casefold().replace("−", "-")
    text = regex.sub(r"['’]|(?<=\d),(?=\d)", "", text)
    text = regex.sub(r"\.(?!\d)|(?<=\w)-|-(?!\.?\d)|[^\w\s.\-]|_", " ", text)
    return " ".join(word for word in text.split() if word not in ARTICLES)


def matches(pattern: regex.Pattern[str], text: str, seconds: float, full: bool = False) -> bool:
    """Return whether a text matches a pattern: anywhere, or with `full` as a whole.

    Raises:
        TrainingError: The search takes longer than `seconds`. Returning False would make the
            reward depend on the speed of the machine.
    """
    try:
        match = (pattern.fullmatch if full else pattern.search)(text, timeout=seconds)
    except TimeoutError:
        raise TrainingError(
            f"the pattern {pattern.pattern[:80]!r} took more than timeout_seconds = {seconds:g} on "
            f"the reply {text[:80]!r}; write it without nested repeats, or raise the limit"
        ) from None
    except MemoryError:
        raise TrainingError(
            f"the pattern {pattern.pattern[:80]!r} took too much memory on the reply "
            f"{text[:80]!r}; write it without recursion"
        ) from None
    return match is not None


def _reject_constant(constant: str) -> float:
    """Refuse NaN and Infinity, which Python's parser would accept."""
    raise ValueError(f"{constant} is no JSON")
