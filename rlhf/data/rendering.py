"""Rendering of prompts and replies as tokens, by one chat template for all stages."""

from __future__ import annotations

import bisect
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config.lengths import TokenLimits
from rlhf.data.rows import Message, Prompt, messages_of
from rlhf.errors import ConfigError, PromptUnusable

ASSISTANT = "<|assistant|>"
END = "<|end|>"
PAD = "<|pad|>"
USER = "<|user|>"
SYSTEM = "<|system|>"
#: Reasons for which a model can't answer a prompt.
REFUSED = "prompt refused by the chat template"
TOO_LONG = "prompt too long for the model"
SPECIAL_TOKENS = [PAD, END, USER, ASSISTANT, SYSTEM]

#: Text that no template and no prompt holds.
_PROBE = "Probe7391x"

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
    """True if the reply lost its end, and so its end-of-reply token."""
    turns_dropped: int = 0
    """Turns of the prompt that are left out."""
    types: tuple[int, ...] | None = None
    """Token types of the whole sequence (BERT's segments); None if the model gets none."""

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
        self._shows_system: dict[tuple[str, ...], bool] = {}
        """By order of roles."""

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
            PromptUnusable: The template refuses the order of roles.
        """
        messages = self._escaped(prompt)
        if messages[0]["role"] != "system":
            return self._render(messages)
        text = self._with_system_turn(messages)
        return self._render(_folded(messages)) if text is None else text

    def folds(self, prompt: Prompt) -> bool:
        """Return whether the prompt's system turn has no place of its own in the template."""
        messages = messages_of(prompt)
        return messages[0]["role"] == "system" and not self._shows_system_turn(messages)

    def _shows_system_turn(self, messages: list[Message]) -> bool:
        """Return whether the template writes the system turn of messages of these roles.

        Asked by texts that nothing else repeats, once for each order of roles.
        """
        roles = tuple(message["role"] for message in messages)
        if roles not in self._shows_system:
            probe: list[Message] = [
                {"role": role, "content": f"{_PROBE}{index}."} for index, role in enumerate(roles)
            ]
            try:
                self._shows_system[roles] = f"{_PROBE}0." in self._render(probe)
            except PromptUnusable:
                self._shows_system[roles] = False
        return self._shows_system[roles]

    def _with_system_turn(self, messages: list[Message]) -> str | None:
        """Render messages as they are; None if the template has no place for a system turn."""
        try:
            text = self._render(messages)
        except PromptUnusable:
            if len(messages) == 1:
                raise
            return None
        return text if self._shows_system_turn(messages) else None

    def _render(self, messages: list[Message]) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise PromptUnusable(
                REFUSED,
                f"the model's chat template refuses a prompt of the roles {roles} "
                f"({' '.join(str(error).split())[:100]})",
                "leave such rows out, or use a model whose template takes them",
            ) from None

    def _escaped(self, prompt: Prompt) -> list[Message]:
        """Break up special tokens, so that a user's text can't end or begin a turn."""
        return [{**m, "content": self._escape(m["content"])} for m in messages_of(prompt)]

    def _escape(self, content: str) -> str:
        for token in self.tokenizer.all_special_tokens:
            content = content.replace(token, f"{token[0]} {token[1:]}")
        return content

    def encode_prompt(self, prompt: Prompt, max_prompt: int) -> list[int]:
        """Return token ids of the prompt, at most `max_prompt`; see `fit_prompt`."""
        return self.fit_prompt(prompt, max_prompt)[0]

    def fit_prompt(self, prompt: Prompt, max_prompt: int) -> tuple[list[int], int]:
        """Return token ids of the prompt, at most `max_prompt`, and how many turns it lost.

        Of a prompt that is too long, the fewest turns after the system turn are left out, each as a
        whole, so that the rest begins with a user's turn. The system turn and the last user's turn,
        with what follows it, always stay.

        Raises:
            PromptUnusable: They alone are too long, or the template refuses the order of roles.
        """
        ids = self._prompt_ids(prompt)
        if len(ids) <= max_prompt:
            return ids, 0
        messages = messages_of(prompt)
        system = messages[:1] if messages[0]["role"] == "system" else []
        starts = [i for i, m in enumerate(messages) if m["role"] == "user" and i > len(system)]

        def length(start: int) -> int:
            return len(self._prompt_ids([*system, *messages[start:]]))

        # The later the start, the shorter the prompt.
        first = bisect.bisect_left(starts, -max_prompt, key=lambda start: -length(start))
        if first < len(starts):
            start = starts[first]
            return self._prompt_ids([*system, *messages[start:]]), start - len(system)
        shortest = length(starts[-1]) if starts else len(ids)
        raise PromptUnusable(
            TOO_LONG,
            f"{shortest:,} tokens with {'the system turn and ' if system else ''}the last user "
            f"turn alone, and {max_prompt:,} fit",
            "raise sft.max_length and reward_model.max_length, or lower ppo.max_new_tokens",
        )

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        return self.tokenizer(self.prompt_text(prompt), add_special_tokens=False)["input_ids"]

    def encode(self, prompt: Prompt, response: str, limits: TokenLimits | int) -> Encoded:
        """Return token ids of prompt and reply: the one rule of cutting, for all stages.

        The prompt's ids depend on the prompt alone; see `fit_prompt`. A reply that is longer than
        the limits allow loses its end, and so the end-of-reply token: the model must not learn to
        stop there.

        Args:
            prompt: Text or messages.
            response: The reply.
            limits: Most tokens of prompt and reply; a number is that of both together.

        Raises:
            PromptUnusable: See `fit_prompt`.
        """
        limits = TokenLimits.of(limits)
        prompt_ids, dropped = self.fit_prompt(prompt, limits.prompt)
        ids, room = self.encode_reply(response), limits.reply_after(len(prompt_ids))
        return Encoded(prompt_ids, ids[:room], len(ids) > room, dropped)

    def encode_reply(self, response: str) -> list[int]:
        """Return token ids of a whole reply, with the end-of-reply token."""
        ids = self.tokenizer(response, add_special_tokens=False, split_special_tokens=True)
        return [*ids["input_ids"], self.tokenizer.eos_token_id]

    def decode(self, response_ids: list[int]) -> str:
        """Return the reply's text, without special tokens."""
        return self.tokenizer.decode(response_ids, skip_special_tokens=True).strip()


def _folded(messages: list[Message]) -> list[Message]:
    """Return messages whose system turn stands at the beginning of the first user's turn."""
    system, *rest = messages
    if rest and not system["content"].strip():
        return rest
    for index, message in enumerate(rest):
        if message["role"] == "user":
            text = f"{system['content']}\n\n{message['content']}"
            return [*rest[:index], {**message, "content": text}, *rest[index + 1 :]]
    return [{**system, "role": "user"}, *rest]


class PairRenderer(Renderer):
    """Renders prompt and reply as a text pair, for an encoder without a chat template.

    The special tokens are those that the tokenizer puts around a pair of texts, such as
    `[CLS] prompt [SEP] reply [SEP]`. A prompt of one user turn is its text; the turns of any other
    are `Role: text`, with an empty line between them.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        pair = tokenizer(_PROBE, _PROBE)
        text = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        starts = _starts(pair["input_ids"], text)
        if len(starts) != 2:
            raise ConfigError(
                f"{type(tokenizer).__name__} encodes no pairs of texts; give the model a chat "
                "template (chat_template.jinja)"
            )
        self._parts = _cut(pair["input_ids"], starts, len(text))
        """Special tokens before the prompt, before the reply, and behind it."""
        self._types = _cut(pair.get("token_type_ids") or [], starts, len(text))
        """Their token types; empty if the tokenizer writes none."""
        types = pair.get("token_type_ids")
        self._text_types = [types[start] for start in starts] if types else None

    @property
    def template_hash(self) -> str:
        """Hex sha256 of the special tokens around a pair, and the vocabulary."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        parts = repr(("text pair", self._parts, vocabulary))
        return hashlib.sha256(parts.encode()).hexdigest()

    def prompt_text(self, prompt: Prompt) -> str:
        """Return the prompt's text: that of a lone user turn, or all turns with their roles."""
        messages = self._escaped(prompt)
        if [message["role"] for message in messages] == ["user"]:
            return messages[0]["content"]
        return "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in messages)

    def folds(self, prompt: Prompt) -> bool:
        """Return False: every role has its place."""
        return False

    def fit_prompt(self, prompt: Prompt, max_prompt: int) -> tuple[list[int], int]:
        """Return ids up to the reply; leaves room for the special tokens behind it, too.

        Raises:
            PromptUnusable: See `Renderer.fit_prompt`.
        """
        return super().fit_prompt(prompt, max_prompt - len(self._parts[2]))

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        return [*self._parts[0], *super()._prompt_ids(prompt), *self._parts[1]]

    def encode(self, prompt: Prompt, response: str, limits: TokenLimits | int) -> Encoded:
        """Return token ids of prompt and reply, with all special tokens even if the reply is cut.

        Raises:
            PromptUnusable: See `Renderer.fit_prompt`.
        """
        limits = TokenLimits.of(limits)
        start, dropped = self.fit_prompt(prompt, limits.prompt)
        end = self._parts[2]
        ids = self._reply_ids(response)
        room = limits.reply_after(len(start)) - len(end)
        reply = [*ids[:room], *end]
        types = self._token_types(len(start), len(reply))
        return Encoded(start, reply, len(ids) > room, dropped, types)

    def encode_reply(self, response: str) -> list[int]:
        """Return token ids of a whole reply, with the special tokens behind it."""
        return [*self._reply_ids(response), *self._parts[2]]

    def _reply_ids(self, response: str) -> list[int]:
        return self.tokenizer(response, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]

    def _token_types(self, start: int, reply: int) -> tuple[int, ...] | None:
        """Return token types of a start with so many tokens and a reply with its end."""
        if self._text_types is None:
            return None
        before, between, behind = self._types
        prompt, response = self._text_types
        return (
            *before, *[prompt] * (start - len(before) - len(between)), *between,
            *[response] * (reply - len(behind)), *behind,
        )  # fmt: skip


def _starts(ids: list[int], text: list[int]) -> list[int]:
    """Return the places at which `text` begins in `ids`."""
    return [i for i in range(len(ids)) if ids[i : i + len(text)] == text]


def _cut(ids: list[int], starts: list[int], length: int) -> list[list[int]]:
    """Return what lies before, between and behind two texts of one length."""
    first, second = starts
    return [ids[:first], ids[first + length : second], ids[second + length :]]


def load_renderer(folder: Path | str) -> Renderer:
    """Load the tokenizer in a model's folder; one without chat template encodes text pairs."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    return Renderer(tokenizer) if tokenizer.chat_template else PairRenderer(tokenizer)
