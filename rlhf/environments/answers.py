"""Correctness: comparison of a reply with the reference answer of its prompt."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from decimal import Context, Decimal

import regex

from rlhf.config import CorrectnessConfig
from rlhf.data.rows import PromptRow
from rlhf.environments.contract import Reply
from rlhf.errors import ConfigError, TrainingError

#: A number, with a sign that is not a hyphen, and commas between thousands.
NUMBER = regex.compile(
    r"(?:(?<![\w.)\]])[-+−])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?"
    r"|(?:(?<![\w.)\]])[-+−])?(?<!\d)\.\d+(?:[eE][-+]?\d+)?"
)
ARTICLES = ("a", "an", "the")
#: Rounds numbers of any length and never raises.
ARITHMETIC = Context(prec=60, traps=[])


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
        for number, row in enumerate(rows, start=1):
            reason = self._reference_error(row.reference)
            if reason:
                prompt = row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"]
                raise ConfigError(
                    f"ppo: {label} needs a reference answer for every prompt, and training "
                    f"prompt {number} ({prompt[:60]!r}) {reason}; mend data.reference_column's "
                    "values, or leave the row out"
                )

    def _reference_error(self, reference: str | None) -> str | None:
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
            try:
                regex.compile(reference)
            except regex.error as error:
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
    return match is not None
