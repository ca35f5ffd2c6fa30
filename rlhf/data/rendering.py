"""Rendering of prompts and replies as tokens, by one chat template for all stages."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhf.config.lengths import TokenLimits
from rlhf.data.chat_template import TurnFormat, render, turn_format
from rlhf.data.control_tokens import ASSISTANT, ControlTokens
from rlhf.data.rows import Message, Prompt, messages_of
from rlhf.errors import PromptUnusable
from rlhf.files import read_json

END = "<|end|>"
PAD = "<|pad|>"
USER = "<|user|>"
SYSTEM = "<|system|>"
#: Reasons for which a model can't answer a prompt.
REFUSED = "prompt refused by the chat template"
TOO_LONG = "prompt has too many tokens"
SPECIAL_TOKENS = [PAD, END, USER, ASSISTANT, SYSTEM]

#: Text that no template and no prompt holds.
_PROBE = "Probe7391x"

#: Chat template of a model trained from scratch; each marker is a single token.
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
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

    Args:
        tokenizer: Tokenizer with a chat template; see `complete_template`.
        end_ids: Tokens that end a sampled reply besides those of tokenizer and template, such as
            those of a generation configuration.
    """

    def __init__(self, tokenizer: Any, end_ids: Iterable[int] = ()) -> None:
        self.tokenizer = tokenizer
        self._more_ends = tuple(end_ids)
        self._left_out: dict[tuple[str, ...], list[int]] = {}
        """Turns that the template does not write, by order of roles."""

    @cached_property
    def turn(self) -> TurnFormat:
        """Form of an assistant's turn in the template."""
        return turn_format(self.tokenizer)

    @property
    def end_id(self) -> int:
        """The end-of-reply token that is trained: the template's, otherwise the tokenizer's eos."""
        end = self.turn.end
        if end is None:
            return self.tokenizer.eos_token_id
        return self.tokenizer.convert_tokens_to_ids(end)

    @property
    def end_ids(self) -> list[int]:
        """All tokens that end a sampled reply; `end_id` is the first."""
        eos = self.tokenizer.eos_token_id
        ends = [self.end_id, *([] if eos is None else [eos]), *self._more_ends]
        return list(dict.fromkeys(ends))

    @cached_property
    def control(self) -> ControlTokens:
        """The tokens that no text of a prompt or reply may produce."""
        return ControlTokens(self.tokenizer, self.end_ids)

    @property
    def template_hash(self) -> str:
        """Hex sha256 of what decides the tokens of a prompt and its reply.

        Those are the chat template, the end-of-reply token, the vocabulary, and where they matter:
        another eos, the BOS that the template writes, and the form of replies.
        """
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        template, turn = self.tokenizer.chat_template, self.turn
        end = self.tokenizer.eos_token if turn.end is None else turn.end
        parts: tuple[Any, ...] = (template, end, vocabulary)
        if end != self.tokenizer.eos_token:
            parts += (self.tokenizer.eos_token,)
        if "bos_token" in str(template):
            parts += (self.tokenizer.bos_token,)
        form = (turn.parts, turn.strips, turn.lead, turn.anchor)
        if form != (False, (False, False), "", ""):
            parts += form
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def prompt_text(self, prompt: Prompt) -> str:
        """Render a prompt up to the start of its reply.

        Where the template has no system turn, its text goes before the first user's, after which
        an empty line follows.

        Raises:
            PromptUnusable: The template refuses the order of roles.
        """
        messages = self._escaped(prompt)
        self._check_shown(messages)
        if messages[0]["role"] != "system":
            return self._render(messages)
        text = self._with_system_turn(messages)
        return self._render(_folded(messages)) if text is None else text

    def folds(self, prompt: Prompt) -> bool:
        """Return whether the prompt's system turn has no place of its own in the template."""
        messages = messages_of(prompt)
        return messages[0]["role"] == "system" and 0 in self._turns_left_out(messages)

    def _turns_left_out(self, messages: list[Message]) -> list[int]:
        """Return which turns of messages of these roles the template does not write.

        Asked by texts that nothing else repeats, once for each order of roles. Where it refuses
        them it may still take them without a system turn, which is the first.
        """
        roles = tuple(message["role"] for message in messages)
        if roles not in self._left_out:
            texts = [f"{_PROBE}{index}." for index in range(len(roles))]
            probe: list[Message] = [
                {"role": role, "content": text} for role, text in zip(roles, texts, strict=True)
            ]
            try:
                shown = self._render(probe)
                self._left_out[roles] = [i for i, text in enumerate(texts) if text not in shown]
            except PromptUnusable:
                self._left_out[roles] = [0] if roles[0] == "system" else []
        return self._left_out[roles]

    def _check_shown(self, messages: list[Message]) -> None:
        """Refuse messages of which the template would leave out more than a system turn."""
        lost = [i for i in self._turns_left_out(messages) if messages[i]["role"] != "system"]
        if lost:
            raise PromptUnusable(
                REFUSED,
                f"the model's chat template leaves out what the {messages[lost[0]]['role']} writes "
                f"in turn {lost[0] + 1} of {len(messages)}",
                "leave such rows out, or use a model whose template writes all turns",
            )

    def _with_system_turn(self, messages: list[Message]) -> str | None:
        """Render messages as they are; None if the template has no place for a system turn."""
        try:
            text = self._render(messages)
        except PromptUnusable:
            if len(messages) == 1:
                raise
            return None
        return None if 0 in self._turns_left_out(messages) else text

    def _render(self, messages: list[Message]) -> str:
        try:
            return render(self.tokenizer, messages, parts=self.turn.parts)
        except Exception as error:  # a template can raise anything, such as an arithmetic error
            roles = ", ".join(message["role"] for message in messages)
            raise PromptUnusable(
                REFUSED,
                f"the model's chat template refuses a prompt of the roles {roles} "
                f"({' '.join(str(error).split())[:100]})",
                "leave such rows out, or use a model whose template takes them",
            ) from None

    def _escaped(self, prompt: Prompt) -> list[Message]:
        """Break up control tokens, so that a user's text can't end or begin a turn."""
        return [{**m, "content": self.control.escape(m["content"])} for m in messages_of(prompt)]

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
        text = self.prompt_text(prompt)
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=False)
        return ids["input_ids"]

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
        turn, text = self.turn, self.reply_text(response)
        return [*self.control.encode(text, turn.lead, turn.anchor), self.end_id]

    def reply_text(self, response: str) -> str:
        """Return a reply as the template writes it: without blanks around it if it strips them."""
        before, after = self.turn.strips
        response = response.lstrip() if before else response
        return response.rstrip() if after else response

    def decode(self, response_ids: list[int]) -> str:
        """Return the reply's text, without special tokens."""
        return self.texts([response_ids])[0].strip()

    def texts(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Decode replies without special and end tokens.

        Ids of a padded vocabulary that the tokenizer does not have are no text either.
        """
        known, ends = self._known_ids, set(self.end_ids)
        shown = [[i for i in row if i in known and i not in ends] for row in rows]
        return self.tokenizer.batch_decode(
            shown, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    @cached_property
    def _known_ids(self) -> frozenset[int]:
        return frozenset(self.tokenizer.get_vocab().values())


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


def load_renderer(folder: Path | str) -> Renderer:
    """Load the tokenizer in a published model's folder, and the ends of its replies."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    return Renderer(tokenizer, known_ends(tokenizer, configured_ends(folder)))


def configured_ends(folder: Path | str) -> int | list[int] | None:
    """Return `eos_token_id` of a model folder's generation configuration or configuration."""
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        ends = read_json(path).get("eos_token_id") if path.is_file() else None
        if ends is not None:
            return ends
    return None


def listed_ids(value: int | Sequence[int] | None) -> list[int]:
    """Return the token ids of a configuration's field, which may hold one, several or none."""
    return [value] if isinstance(value, int) else list(value or ())


def known_ends(tokenizer: Any, configured: int | list[int] | None) -> list[int]:
    """Return the configured ends of a reply that a tokenizer knows as control tokens.

    Other ids are defaults of a model's class, which may name any word of this vocabulary. The pad
    token is no end for being the only one configured: those are defaults too.
    """
    ends = listed_ids(configured)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if ends == [pad] and pad != eos:
        return []
    control = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    return [end for end in ends if end in control]
