"""Rendering of prompts and replies as tokens, by one chat template for all stages."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.rows import Message, Prompt, Row, messages_of
from rlhf.errors import DataError

ASSISTANT = "<|assistant|>"
END = "<|end|>"
PAD = "<|pad|>"
USER = "<|user|>"
SYSTEM = "<|system|>"
#: Largest share of a stage's rows that the model's chat template may refuse.
MAX_REFUSED = 0.1
SPECIAL_TOKENS = [PAD, END, USER, ASSISTANT, SYSTEM]

#: Chat template of a model trained from scratch; each marker is a single token.
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
#: Chat template for a base model without one: plain text, so that no token is added.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"
)


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt with the start of a reply, and of the reply."""

    prompt: list[int]
    response: list[int]
    is_cut: bool = False
    """True if the reply lost its end."""

    @property
    def ids(self) -> list[int]:
        """The whole sequence."""
        return self.prompt + self.response


class Renderer:
    """Renders prompts and replies with a tokenizer's chat template.

    Prompt and reply are tokenised separately: the tokens before a reply are the same in training
    and when it is sampled.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @property
    def template_hash(self) -> str:
        """Hex sha256 of the chat template, the end-of-reply token and the vocabulary."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        parts = repr((self.tokenizer.chat_template, self.tokenizer.eos_token, vocabulary))
        return hashlib.sha256(parts.encode()).hexdigest()

    def prompt_text(self, prompt: Prompt) -> str:
        """Render a prompt up to the start of its reply.

        Where the template has no system turn, its text goes before the first user's, after which
        an empty line follows.

        Raises:
            DataError: The template refuses the order of roles.
        """
        messages: list[Message] = [
            {**m, "content": self._escape(m["content"])} for m in messages_of(prompt)
        ]
        if messages[0]["role"] != "system":
            return self._render(messages)
        try:
            text = self._render(messages)
            if messages[0]["content"].strip() in text:
                return text
        except DataError:
            if len(messages) == 1:
                raise
        return self._render(_folded(messages))

    def _render(self, messages: list[Message]) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"the model's chat template refuses a prompt of the roles {roles} "
                f"({' '.join(str(error).split())[:100]}); leave such rows out, or use a model "
                "whose template takes them"
            ) from None

    def _escape(self, content: str) -> str:
        """Break up special tokens, so that a user's text can't end or begin a turn."""
        for token in self.tokenizer.all_special_tokens:
            content = content.replace(token, f"{token[0]} {token[1:]}")
        return content

    def encode_prompt(self, prompt: Prompt, max_length: int) -> list[int]:
        """Return token ids of the prompt, at most `max_length`.

        Of a prompt that is too long, the oldest turns after the system turn are left out as a
        whole. If the last user's turn and the system turn still don't fit, that turn loses its
        beginning, so that the system turn and all headers stay.
        """
        ids = self._prompt_ids(prompt)
        if len(ids) <= max_length:
            return ids
        messages = messages_of(prompt)
        system = messages[:1] if messages[0]["role"] == "system" else []
        starts = [i for i, m in enumerate(messages) if m["role"] == "user" and i > len(system)]
        for start in starts:
            ids = self._prompt_ids([*system, *messages[start:]])
            if len(ids) <= max_length:
                return ids
        rest = messages[starts[-1] :] if starts else messages[len(system) :]
        return self._cut_first(system, rest or system, max_length) or ids[-max_length:]

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        return self.tokenizer(self.prompt_text(prompt), add_special_tokens=False)["input_ids"]

    def _cut_first(
        self, system: list[Message], messages: list[Message], max_length: int
    ) -> list[int] | None:
        """Return the ids of the messages with the longest end of the first one that fits."""
        first, *rest = messages
        low, high = 0, len(first["content"])
        best = None
        while low <= high:
            kept = (low + high) // 2
            content = first["content"][len(first["content"]) - kept :]
            ids = self._prompt_ids([*system, {**first, "content": content}, *rest])
            if len(ids) <= max_length:
                best, low = ids, kept + 1
            else:
                high = kept - 1
        return best

    def encode(self, prompt: Prompt, response: str, max_length: int, beside: str = "") -> Encoded:
        """Return token ids of prompt and reply, at most `max_length` together.

        The prompt gets what the reply leaves, and at least half. A reply that does not fit loses
        its end, and so the end-of-reply token: the model must not learn to stop there.

        Args:
            prompt: Text or messages.
            response: The reply.
            max_length: Tokens of both.
            beside: Another reply to the same prompt, which must be cut alike: that of a pair.
        """
        ids = self._reply_ids(response)
        prompt_ids = self._prompt_ids(prompt)
        if len(prompt_ids) > max_length // 2:
            longest = max(len(ids), len(self._reply_ids(beside)) if beside else 0)
            prompt_ids = self.encode_prompt(prompt, max_length - min(longest, max_length // 2))
        room = max_length - len(prompt_ids)
        return Encoded(prompt_ids, ids[:room], is_cut=len(ids) > room)

    def _reply_ids(self, response: str) -> list[int]:
        ids = self.tokenizer(response, add_special_tokens=False, split_special_tokens=True)
        return [*ids["input_ids"], self.tokenizer.eos_token_id]

    def decode(self, response_ids: list[int]) -> str:
        """Return the reply's text, without special tokens."""
        return self.tokenizer.decode(response_ids, skip_special_tokens=True).strip()


def _folded(messages: list[Message]) -> list[Message]:
    """Return messages whose system turn stands at the beginning of the first user's turn."""
    system, *rest = messages
    for index, message in enumerate(rest):
        if message["role"] == "user":
            text = f"{system['content']}\n\n{message['content']}"
            return [*rest[:index], {**message, "content": text}, *rest[index + 1 :]]
    return [{**system, "role": "user"}, *rest]


def renderable(rows: Sequence[Row], renderer: Renderer) -> tuple[list[Row], int]:
    """Return the rows whose prompts the chat template takes, and the number of those it refuses.

    Templates refuse an order of roles, so that one prompt of each order is rendered.

    Args:
        rows: Demonstrations, pairs or prompts.
        renderer: The model's.

    Raises:
        DataError: More than `MAX_REFUSED` of them are refused.
    """
    refused: dict[tuple[str, ...], DataError | None] = {}
    taken: list[Row] = []
    fault: DataError | None = None
    for row in rows:
        roles = tuple(message["role"] for message in messages_of(row.prompt))
        if roles not in refused:
            try:
                renderer.prompt_text(row.prompt)
            except DataError as error:
                refused[roles] = error
            else:
                refused[roles] = None
        if refused[roles] is None:
            taken.append(row)
        else:
            fault = fault or refused[roles]
    count = len(rows) - len(taken)
    if count > MAX_REFUSED * len(rows):
        raise DataError(f"{count:,} of {len(rows):,} rows can't be rendered: {fault}")
    return taken, count


def load_renderer(folder: Path | str) -> Renderer:
    """Load the tokenizer in a model's folder."""
    from transformers import AutoTokenizer

    return Renderer(AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False))
