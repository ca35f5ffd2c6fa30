"""Rendering of prompts and replies as tokens, by one chat template for all stages."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.rows import Message, Prompt

ASSISTANT = "<|assistant|>"
END = "<|end|>"
PAD = "<|pad|>"
USER = "<|user|>"
SYSTEM = "<|system|>"
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
        """Render a prompt up to the start of its reply."""
        messages: list[Message] = (
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        )
        messages = [{**m, "content": self._escape(m["content"])} for m in messages]
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )

    def _escape(self, content: str) -> str:
        """Break up special tokens, so that a user's text can't end or begin a turn."""
        for token in self.tokenizer.all_special_tokens:
            content = content.replace(token, f"{token[0]} {token[1:]}")
        return content

    def encode_prompt(self, prompt: Prompt, max_length: int) -> list[int]:
        """Return token ids of the prompt; a prompt that is too long loses its start."""
        ids = self.tokenizer(self.prompt_text(prompt), add_special_tokens=False)["input_ids"]
        return ids[-max_length:]

    def encode(self, prompt: Prompt, response: str, max_length: int) -> Encoded:
        """Return token ids of prompt and reply, at most `max_length` together.

        The prompt takes at most half of them. A reply that does not fit loses its end, and so the
        end-of-reply token: the model must not learn to stop there.
        """
        prompt_ids = self.encode_prompt(prompt, max_length // 2)
        reply = self.tokenizer(response, add_special_tokens=False, split_special_tokens=True)
        response_ids = [*reply["input_ids"], self.tokenizer.eos_token_id]
        return Encoded(prompt_ids, response_ids[: max_length - len(prompt_ids)])

    def decode(self, response_ids: list[int]) -> str:
        """Return the reply's text, without special tokens."""
        return self.tokenizer.decode(response_ids, skip_special_tokens=True).strip()


def load_renderer(folder: Path | str) -> Renderer:
    """Load the tokenizer in a model's folder."""
    from transformers import AutoTokenizer

    return Renderer(AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False))
