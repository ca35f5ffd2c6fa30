"""Most tokens of prompts and replies, the same in every stage that reads them."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field

from rlhf.config.section import Section

#: Treatment of a system turn where the chat template has none.
SystemPolicy = Literal["fold", "refuse"]


class TokenLimits(Section):
    """Most tokens of a prompt, a reply and both; derived from the configuration, not set in it.

    The limit of prompts does not depend on their replies, so that a prompt has the same tokens
    where a policy is trained, a reply is sampled or scored, and a gate judges.
    """

    max_length: int = Field(ge=2)
    """Prompt and reply together."""
    max_prompt: int | None = Field(default=None, ge=1)
    """A prompt; none is what `max_new_tokens` leave of `max_length`."""
    max_reply: int | None = Field(default=None, ge=1)
    """A reply with its end token; none is what its prompt leaves of `max_length`."""
    max_new_tokens: int = Field(default=1, ge=1)
    """Tokens that a reply to the longest prompt has room for."""
    system: SystemPolicy = "fold"
    """Where the chat template has no system turn: `fold` puts it into the first user turn, `refuse`
    leaves the row out."""
    max_bad_fraction: float = Field(default=0.1, ge=0, le=1)
    """Largest share of a stage's rows whose prompt can't be used."""

    @classmethod
    def of(cls, value: TokenLimits | int) -> TokenLimits:
        """Return limits; a number is `max_length`."""
        return cls(max_length=value) if isinstance(value, int) else value

    @property
    def prompt(self) -> int:
        """Most tokens of a prompt; below 1 if there is no room for any."""
        room = self.max_length - self.max_new_tokens
        return room if self.max_prompt is None else min(room, self.max_prompt)

    def reply_after(self, prompt: int) -> int:
        """Return the most tokens of a reply to a prompt of so many tokens."""
        room = self.max_length - prompt
        return room if self.max_reply is None else min(room, self.max_reply)

    def within(self, context: int) -> Self:
        """Return the limits of a model that reads at most `context` tokens."""
        return self.model_copy(update={"max_length": min(self.max_length, context)})
