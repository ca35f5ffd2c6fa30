"""Whether a reply agrees with the reference answer of its prompt."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from decimal import Context, Decimal

import regex

from rlhf.config import CorrectnessConfig
from rlhf.data.rows import PromptRow
from rlhf.environments.contract import Reply
from rlhf.errors import ConfigError, TrainingError

#: A number, with a sign that is no hyphen and commas that part thousands.
NUMBER = regex.compile(
    r"(?:(?<![\w.)\]])[-+−])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?"
    r"|(?:(?<![\w.)\]])[-+−])?(?<!\d)\.\d+(?:[eE][-+]?\d+)?"
)
ARTICLES = ("a", "an", "the")
#: Rounds what a reply may write at any length, and never raises.
ARITHMETIC = Context(prec=60, traps=[])


class Correctness:
    """`right` for a reply that agrees with its reference, `wrong` for any other."""

    def __init__(self, config: CorrectnessConfig) -> None:
        self.config = config

    def __call__(self, batch: Sequence[Reply]) -> list[float]:
        """The value of each reply; every one must have a reference."""
        config = self.config
        return [
            config.right if self._agrees(r.response, str(r.reference)) else config.wrong
            for r in batch
        ]

    def check(self, rows: Sequence[PromptRow], needing: str) -> None:
        """Refuse prompts whose reference nothing could be held against.

        Raises:
            ConfigError: Names the first such row.
        """
        for number, row in enumerate(rows, start=1):
            reason = self._unusable(row.reference)
            if reason:
                prompt = row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"]
                raise ConfigError(
                    f"ppo: {needing} needs a reference answer for every prompt, and training "
                    f"prompt {number} ({prompt[:60]!r}) {reason}; mend data.reference_column's "
                    "values, or leave the row out"
                )

    def _unusable(self, reference: str | None) -> str | None:
        mode = self.config.mode
        if reference is None:
            return "has none"
        shown = repr(reference[:60])
        if mode == "numeric" and last_number(reference) is None:
            return f"has {shown}, which holds no number"
        if mode in ("normalised", "contains") and not normalised(reference):
            return f"has {shown}, of which nothing is left without articles and punctuation"
        if mode == "regex":
            try:
                regex.compile(reference)
            except regex.error as error:
                return f"has {shown}, which is no pattern ({error})"
        return None

    def _agrees(self, response: str, reference: str) -> bool:
        mode = self.config.mode
        if mode == "exact":
            return response.strip() == reference.strip()
        if mode == "numeric":
            return self._close(last_number(response), last_number(reference))
        if mode == "regex":
            return matches(regex.compile(reference), response, self.config.timeout_seconds)
        given, wanted = normalised(response), normalised(reference)
        return given == wanted if mode == "normalised" else f" {wanted} " in f" {given} "

    def _close(self, given: Decimal | None, wanted: Decimal | None) -> bool:
        """In decimals, so that 1.1 is within 0.1 of 1.0."""
        if given is None or wanted is None:
            return False
        share = Decimal(str(self.config.relative_tolerance))
        allowed = max(Decimal(str(self.config.tolerance)), ARITHMETIC.multiply(share, abs(wanted)))
        distance = ARITHMETIC.abs(ARITHMETIC.subtract(given, wanted))
        return distance.is_finite() and distance <= allowed


def last_number(text: str) -> Decimal | None:
    """The last number written in a text: `1,234.50`, `−3`, `2e5`, `.5`."""
    found = NUMBER.findall(text)
    if not found:
        return None
    number = ARITHMETIC.create_decimal(found[-1].replace(",", "").replace("−", "-"))
    return number if number.is_finite() else None


def normalised(text: str) -> str:
    """Without differences of case, spacing, punctuation and articles.

    A minus sign and a decimal point stay: −4 is not 4, and 3.5 is not 35.
    """
    text = unicodedata.normalize("NFKC", text).casefold().replace("−", "-")
    text = regex.sub(r"['’]|(?<=\d),(?=\d)", "", text)
    text = regex.sub(r"\.(?!\d)|(?<=\w)-|-(?!\.?\d)|[^\w\s.\-]|_", " ", text)
    return " ".join(word for word in text.split() if word not in ARTICLES)


def matches(pattern: regex.Pattern[str], text: str, seconds: float, full: bool = False) -> bool:
    """Whether a pattern is found in a text, within a time.

    Raises:
        TrainingError: It takes longer. That the time would decide a reward, and differently on
            every machine, is why this is no plain "not found".
    """
    try:
        found = (pattern.fullmatch if full else pattern.search)(text, timeout=seconds)
    except TimeoutError:
        raise TrainingError(
            f"the pattern {pattern.pattern[:80]!r} took more than timeout_seconds = {seconds:g} on "
            f"the reply {text[:80]!r}; write it without nested repeats, or raise the limit"
        ) from None
    return found is not None
