"""Rendering of prompt and reply as a pair of texts, for reward models without a chat template.

Encoders such as BERT are trained on pairs of texts, around which their tokenizer writes special
tokens: `[CLS] prompt [SEP] reply [SEP]`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from rlhf.config.lengths import TokenLimits
from rlhf.data.rendering import Encoded, Renderer, load_renderer
from rlhf.data.rows import Prompt
from rlhf.errors import ConfigError

#: Text that is encoded to find what the tokenizer writes around two texts.
_PROBE = "Probe7391x"


class PairRenderer(Renderer):
    """Renders prompt and reply as a pair of texts, with the tokenizer's own special tokens.

    A prompt of one user turn is its text. The turns of any other are `Role: text`, with an empty
    line between them. A text can't produce a special token.

    Args:
        tokenizer: Tokenizer without chat template.

    Raises:
        ConfigError: The tokenizer encodes no pairs.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        pair = tokenizer(_PROBE, _PROBE)
        ids, types = pair["input_ids"], pair.get("token_type_ids")
        text = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        starts = [i for i in range(len(ids)) if ids[i : i + len(text)] == text]
        if len(starts) != 2:
            raise ConfigError(
                f"{type(tokenizer).__name__} encodes no pairs of texts; give the model a chat "
                "template (chat_template.jinja)"
            )
        self._around = _cut(ids, starts, len(text))
        self._types = None if types is None else _cut(types, starts, len(text))
        self._text_types = None if types is None else [types[start] for start in starts]

    @property
    def end_ids(self) -> list[int]:
        """An empty list: such a model samples no replies."""
        return []

    @property
    def template_hash(self) -> str:
        """Hex sha256 of the special tokens around a pair, and the vocabulary."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        parts = repr(("pair of texts", self._around, vocabulary))
        return hashlib.sha256(parts.encode()).hexdigest()

    def prompt_text(self, prompt: Prompt) -> str:
        """Return the text of a prompt, without special tokens."""
        messages = self._escaped(prompt)
        if [message["role"] for message in messages] == ["user"]:
            return messages[0]["content"]
        return "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in messages)

    def folds(self, prompt: Prompt) -> bool:
        """Return False: a system turn has its place."""
        return False

    def fit_prompt(self, prompt: Prompt, max_prompt: int) -> tuple[list[int], int]:
        """Return token ids up to the reply, and how many turns the prompt lost.

        They leave room for the special tokens behind the reply: with these they are at most
        `max_prompt`.

        Raises:
            PromptUnusable: See `Renderer.fit_prompt`.
        """
        return super().fit_prompt(prompt, max_prompt - len(self._around[2]))

    def encode(self, prompt: Prompt, response: str, limits: TokenLimits | int) -> Encoded:
        """Return token ids of prompt and reply by the rule of `Renderer.encode`.

        But a reply that is cut keeps the special tokens behind it.

        Raises:
            PromptUnusable: See `Renderer.fit_prompt`.
        """
        limits = TokenLimits.of(limits)
        start, dropped = self.fit_prompt(prompt, limits.prompt)
        ids, end = self.control.encode(response), self._around[2]
        room = limits.reply_after(len(start)) - len(end)
        reply = [*ids[:room], *end]
        return Encoded(start, reply, len(ids) > room, dropped, self._types_of(start, reply))

    def encode_reply(self, response: str) -> list[int]:
        """Return token ids of a whole reply, with the special tokens behind it."""
        return [*self.control.encode(response), *self._around[2]]

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        before, between, _ = self._around
        return [*before, *super()._prompt_ids(prompt), *between]

    def _types_of(self, start: list[int], reply: list[int]) -> tuple[int, ...] | None:
        """Return the token types of a sequence; None if the tokenizer writes none."""
        if self._types is None or self._text_types is None:
            return None
        before, between, behind = self._types
        prompt, response = self._text_types
        return (
            *before, *[prompt] * (len(start) - len(before) - len(between)), *between,
            *[response] * (len(reply) - len(behind)), *behind,
        )  # fmt: skip


def load_reward_renderer(folder: Path | str) -> Renderer:
    """Load the renderer of a published reward model: of pairs, if it has no chat template."""
    renderer = load_renderer(folder)
    return renderer if renderer.tokenizer.chat_template else PairRenderer(renderer.tokenizer)


def _cut(items: list[int], starts: list[int], length: int) -> list[list[int]]:
    """Return what lies before, between and behind two texts of one length."""
    first, second = starts
    return [items[:first], items[first + length : second], items[second + length :]]
