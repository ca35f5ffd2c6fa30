"""The one place that turns (prompt, reply) into text and tokens, for every stage alike."""

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

#: Template of a model trained from scratch; its markers are single tokens.
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
#: Template for a base model that brings none: plain text, no tokens to add.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"
)


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt, ready to be continued, and of a reply."""

    prompt: list[int]
    response: list[int]

    @property
    def ids(self) -> list[int]:
        """The whole sequence."""
        return self.prompt + self.response


class Renderer:
    """Renders with a tokenizer's chat template; prompt and reply are tokenised separately, so that
    a sampled reply and the same reply in training data have the same tokens before them.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @property
    def template_hash(self) -> str:
        """Identity of the rendering: template, end-of-reply token and vocabulary."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        parts = repr((self.tokenizer.chat_template, self.tokenizer.eos_token, vocabulary))
        return hashlib.sha256(parts.encode()).hexdigest()

    def prompt_text(self, prompt: Prompt) -> str:
        """The prompt as the model sees it, up to where its reply begins."""
        messages: list[Message] = (
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        )
        messages = [{**m, "content": self._defanged(m["content"])} for m in messages]
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )

    def _defanged(self, content: str) -> str:
        """Content in which no special token is left: a user can't end a turn or begin a reply."""
        for token in self.tokenizer.all_special_tokens:
            content = content.replace(token, f"{token[0]} {token[1:]}")
        return content

    def encode_prompt(self, prompt: Prompt, max_length: int) -> list[int]:
        """Token ids of the prompt; one that is too long keeps its end."""
        ids = self.tokenizer(self.prompt_text(prompt), add_special_tokens=False)["input_ids"]
        return ids[-max_length:]

    def encode(self, prompt: Prompt, response: str, max_length: int) -> Encoded:
        """Token ids of prompt and reply, at most `max_length` together.

        A prompt may take half of the room; a reply that does not fit loses its end, and then has
        no end-of-reply token: the model must not learn that replies end there.
        """
        prompt_ids = self.encode_prompt(prompt, max_length // 2)
        reply = self.tokenizer(response, add_special_tokens=False, split_special_tokens=True)
        response_ids = [*reply["input_ids"], self.tokenizer.eos_token_id]
        return Encoded(prompt_ids, response_ids[: max_length - len(prompt_ids)])

    def decode(self, response_ids: list[int]) -> str:
        """The reply's text, without special tokens."""
        return self.tokenizer.decode(response_ids, skip_special_tokens=True).strip()


def load_renderer(folder: Path | str) -> Renderer:
    """Load the tokenizer that lies beside a model."""
    from transformers import AutoTokenizer

    return Renderer(AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False))
