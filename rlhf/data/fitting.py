"""Rows whose prompts a model can be given; the others are left out, and counted by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from rlhf.config.lengths import TokenLimits
from rlhf.data.rendering import REFUSED, TOO_LONG, Encoded, Renderer
from rlhf.data.rows import Prompt, Row
from rlhf.data.token_bound import TokenBound
from rlhf.errors import DataError, PromptUnusable

#: Reason of prompts with a system turn, with `data.system: refuse`.
NO_SYSTEM = "system turn refused by data.system"
#: Metric that counts the rows left out for each reason.
_METRICS = {
    REFUSED: "prompts_refused",
    NO_SYSTEM: "system_turns_refused",
    TOO_LONG: "prompts_too_long",
}
T = TypeVar("T")


class Fitting:
    """Encodes the rows of a stage within its limits, and counts what was cut and left out.

    Args:
        renderer: The model's.
        limits: Most tokens of prompts and replies.
    """

    def __init__(self, renderer: Renderer, limits: TokenLimits | int) -> None:
        self.renderer, self.limits = renderer, TokenLimits.of(limits)
        self.counts: Counter[str] = Counter()
        """Rows by metric: `prompts_refused`, `system_turns_refused`, `prompts_too_long`,
        `prompts_shortened`."""
        self.bound = TokenBound(renderer)
        """Tells without tokenising that a text is short."""

    def encode(self, prompt: Prompt, response: str) -> Encoded:
        """Return the ids of prompt and reply, by `Renderer.encode`.

        Raises:
            PromptUnusable: The model can't be given the prompt.
        """
        self._check_system_turn(prompt)
        return self.renderer.encode(prompt, response, self.limits)

    def check(self, prompt: Prompt) -> int:
        """Return the number of turns that the prompt loses.

        Raises:
            PromptUnusable: The model can't be given the prompt.
        """
        self._check_system_turn(prompt)
        if self.bound.is_within(prompt, self.limits.prompt):
            return 0
        return self.renderer.fit_prompt(prompt, self.limits.prompt)[1]

    def fitting(self, rows: Sequence[Row]) -> list[Row]:
        """Return the rows whose prompts fit; see `map`."""

        def fit(row: Row) -> Row:
            self.count_dropped(self.check(row.prompt))
            return row

        return self.map(rows, fit)

    def fitting_both(
        self, rows: Sequence[Row], renderer: Renderer, limits: TokenLimits
    ) -> list[Row]:
        """Return the rows that fit the model and a reward model, with its own tokenizer."""
        rows = self.fitting(rows)
        if renderer.template_hash == self.renderer.template_hash and limits == self.limits:
            return rows
        other = Fitting(renderer, limits)
        fitting = other.fitting(rows)
        for name in _METRICS.values():
            self.counts[name] += other.counts[name]
        return fitting

    def map(self, rows: Sequence[Row], encode: Callable[[Row], T]) -> list[T]:
        """Return what `encode` makes of every row, without those whose prompt can't be used.

        Raises:
            DataError: They are more than `limits.max_bad_fraction` of the rows.
        """
        encoded: list[T] = []
        reasons: Counter[str] = Counter()
        examples: dict[str, PromptUnusable] = {}
        for row in rows:
            try:
                encoded.append(encode(row))
            except PromptUnusable as error:
                reasons[error.reason] += 1
                examples.setdefault(error.reason, error)
        for reason, count in reasons.items():
            self.counts[_METRICS[reason]] += count
        bad = reasons.total()
        if bad > self.limits.max_bad_fraction * len(rows):
            (reason, count), *_ = reasons.most_common(1)
            raise DataError(
                f"{bad:,} of {len(rows):,} rows can't be used with this model, more than "
                f"data.max_bad_fraction = {self.limits.max_bad_fraction:g} allows: {count:,} × "
                f"{examples[reason]}"
            )
        return encoded

    def count_dropped(self, turns: int) -> None:
        """Count a prompt that lost turns."""
        self.counts["prompts_shortened"] += turns > 0

    def metrics(self) -> dict[str, int]:
        """Return the counts that are not zero."""
        return {name: count for name, count in self.counts.items() if count}

    def _check_system_turn(self, prompt: Prompt) -> None:
        if self.limits.system == "refuse" and self.renderer.folds(prompt):
            raise PromptUnusable(
                NO_SYSTEM,
                "the model's chat template has no system turn",
                "set data.system to fold, which puts it into the first user turn",
            )
