"""Prompts and replies from the cells of a row: parsed, cleaned, or left out with a reason."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.data.chat import (
    COLUMN_SETTINGS,
    REPLY_KEYS,
    ROLE_KEYS,
    common_prefix,
    split_reply,
    text_of_parts,
    to_messages,
    to_text,
    unread_reasoning,
)
from rlhf.data.columns import Row, cell_of
from rlhf.data.markup import LISTS, Markup, parse_turns
from rlhf.data.records import LeftOutError
from rlhf.data.rows import Message, Prompt, messages_of
from rlhf.data.shared_marks import CUT_SPEAKER, MarkWatch
from rlhf.data.special_tokens import (
    break_token,
    is_missing_word,
    strip_end_tokens,
    without_prompt,
)
from rlhf.data.strays import check_reply, check_stray

#: What a finder of formats returns: cells, the replies' names in reasons, the converter, sentences.
Found = tuple["Cells", tuple[str, str], Any, tuple[str, ...]]


@dataclass(frozen=True)
class Cells:
    """Columns of prompt and replies, and how their text is written.

    Args:
        prompt: Column of the prompt; None if the replies are whole conversations.
        first: Column of one reply.
        second: Column of the other; equal to `first` for formats with one reply.
        system: Column of the system prompt.
        more: Column whose text follows the prompt's after a blank line (Alpaca's `input`).
        history: Column of earlier turns, pairs of a user's and an assistant's text.
        markups: Markup by column.
        text_cells: True if all cells are text, so that a missing value is a word.
        named: Columns whose replies begin with the speaker: "Assistant: …".
        ended: Columns whose replies end with an end token.
        repeats: True if replies begin with their prompt.
        plain: Columns that the user declares to be text, in which nothing is looked for.
        watch: Counts the marks of later rows.
    """

    prompt: str | None
    first: str
    second: str
    system: str | None = None
    more: str | None = None
    history: str | None = None
    markups: Mapping[str, Markup] | None = None
    text_cells: bool = False
    named: frozenset[str] = frozenset()
    ended: frozenset[str] = frozenset()
    repeats: bool = False
    plain: frozenset[str] = frozenset()
    watch: MarkWatch | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are read."""
        names = (self.prompt, self.first, self.second, self.system, self.more, self.history)
        return tuple(dict.fromkeys(name for name in names if name is not None))

    def read(self, row: Row, roles: Sequence[str], notes: set[str]) -> tuple[Prompt, str, str]:
        """Return the prompt and both replies of a row.

        Args:
            row: Values by column.
            roles: Names of the two replies in reasons: "chosen" and "rejected".
            notes: Receives a sentence for each conversion that a user should know of.

        Raises:
            LeftOutError: A value can't be used.
        """
        first, second = cell_of(row, self.first), cell_of(row, self.second)
        if self.prompt is None:
            prompt, first, second = self._conversations(first, second, roles)
            prompt = self._framed(row, self._checked(prompt), notes)
            asked = messages_of(prompt)[-1]["content"]
            first = self._clean(first, self.first, asked, roles[0], notes)
            second = self._clean(second, self.second, asked, roles[1], notes)
        else:
            prompt = self.read_prompt(row, notes)
            first = self.read_reply(first, self.first, prompt, roles[0], notes)
            second = self.read_reply(second, self.second, prompt, roles[1], notes)
        for column in (self.first, self.second):
            _note_reasoning(cell_of(row, column), column, notes)
        if not self.repeats:
            return prompt, first, second
        asked = messages_of(prompt)[-1]["content"]
        rest, other = without_prompt(asked, first), without_prompt(asked, second)
        if rest is None or other is None:
            return prompt, first, second
        notes.add(
            "the prompt is repeated in front of both replies, and cut from them "
            f"(data.text_columns={self.first},{self.second} keeps it)"
        )
        return prompt, _without_speaker(rest), _without_speaker(other)

    def read_prompt(self, row: Row, notes: set[str]) -> Prompt:
        """Return a row's prompt with everything that belongs in front of it.

        Raises:
            LeftOutError: It can't be used, or ends with a reply.
        """
        assert self.prompt is not None
        value = cell_of(row, self.prompt)
        self._watch(self.prompt, value)
        if isinstance(value, str):
            prompt: Prompt = self._text_prompt(value, notes)
        elif isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], str):
            prompt = self._text_prompt(value[0], notes)
        elif isinstance(value, list | tuple | dict):
            prompt = self._checked(to_messages(value, "prompt", self.prompt))
        else:
            prompt = to_text(value, "prompt", self.prompt)
        return self._framed(row, prompt, notes)

    def read_reply(
        self, value: Any, column: str, prompt: Prompt, role: str, notes: set[str]
    ) -> str:
        """Return one reply to a prompt, without end tokens.

        Raises:
            LeftOutError: It can't be used.
        """
        asked = messages_of(prompt)[-1]["content"]
        self._watch(column, value)
        if isinstance(value, str):
            if column not in self.plain:
                self._check_word(value, role)
            if column in self.named and (match := CUT_SPEAKER.match(value)):
                notes.add(f"{match.group().strip()!r} in front of replies is cut")
                value = value[match.end() :]
            markup = self._markup(column)
            if markup is None or markup in LISTS:
                return self._clean(to_text(value, role, column), column, asked, role, notes)
            value = _parsed(markup, value, role)
        elif role not in COLUMN_SETTINGS and isinstance(text := _own_text(value), str):
            notes.add(f"the text of {column} is taken from a field of it")
            return self._clean(to_text(text, role, column), column, asked, role, notes)
        elif not isinstance(value, list | tuple | dict):
            return to_text(value, role, column)
        reply = split_reply(to_messages(value, role, column), prompt, role)[1]
        return self._clean(reply, column, asked, role, notes)

    def read_messages(self, row: Row, role: str) -> list[Message]:
        """Return all messages of a whole conversation, without the system column.

        Raises:
            LeftOutError: The cell holds none.
        """
        return self._conversation(cell_of(row, self.first), self.first, role)

    def read_conversation(
        self, row: Mapping[str, Any], role: str, notes: set[str]
    ) -> tuple[Prompt, str]:
        """Return the prompt and the last reply of a whole conversation.

        Raises:
            LeftOutError: It can't be used, or is a reply alone.
        """
        messages = self._conversation(cell_of(row, self.first), self.first, role)
        prompt, reply = split_reply(messages, None, role)
        if prompt is None:
            raise _no_prompt(role, reply)
        asked = messages_of(prompt)[-1]["content"]
        reply = self._clean(reply, self.first, asked, role, notes)
        return self._framed(row, self._checked(prompt), notes), reply

    def _text_prompt(self, value: str, notes: set[str]) -> Prompt:
        assert self.prompt is not None
        if self.prompt in self.plain:
            return to_text(value, "prompt", self.prompt)
        self._check_word(value, "prompt")
        markup = self._markup(self.prompt)
        if markup in LISTS and (texts := markup.parse(value) if markup.parse else None):
            value = _only_text(texts, "prompt")
            notes.add(f"{self.prompt} holds lists with one text, which is taken")
        if markup is None and "<extra_id_1>" in value and (turns := parse_turns(value)):
            notes.add(f"turns marked <extra_id_1> in {self.prompt} are parsed")
            return self._checked(to_messages(turns, "prompt", self.prompt))
        if markup is None or markup in LISTS:
            check_stray(value, "prompt")
            return to_text(value, "prompt", self.prompt)
        return self._checked(to_messages(_parsed(markup, value, "prompt"), "prompt", self.prompt))

    def _watch(self, column: str, value: Any) -> None:
        """Count the marks of a value that is not parsed.

        Raises:
            ConfigError: Most values have marks of a template.
        """
        if self.watch is not None and column not in (self.markups or {}):
            self.watch.see(column, value)

    def _framed(self, row: Row, prompt: Prompt, notes: set[str]) -> Prompt:
        """Add the further input, the history and the system turn."""
        if more := self._beside(row, self.more):
            if not isinstance(prompt, str):
                raise LeftOutError(f"{self.more} beside a prompt of messages", more[:60])
            prompt = f"{prompt}\n\n{more}"
            notes.add(f"{self.more} follows the prompt after an empty line")
        messages = messages_of(prompt)
        if self.history and (turns := cell_of(row, self.history)) not in (None, [], "", "[]"):
            earlier = _history(_unwritten(turns), self.history)
            if messages[: len(earlier)] != earlier:
                messages = [*earlier, *messages]
                notes.add(f"{self.history} holds the turns before the prompt")
        if system := self._beside(row, self.system):
            if messages[0]["role"] == "system" and messages[0]["content"] != system:
                raise LeftOutError(
                    "two system turns", f"one in the prompt and one in {self.system}",
                    "leave one of them out",
                )  # fmt: skip
            if messages[0]["role"] != "system":
                messages = [{"role": "system", "content": system}, *messages]
        if (
            len(messages) > 1
            and messages[0]["role"] == "system"
            and not messages[0]["content"].strip()
        ):
            messages = messages[1:]  # templates write an empty one where there is none
        if messages[-1]["role"] == "assistant":
            raise LeftOutError(
                "prompt ends with a reply", messages[-1]["content"][:60],
                "end prompts with a user's turn, or name a column of tasks on transcripts in "
                "data.text_columns",
            )  # fmt: skip
        return prompt if len(messages) == 1 and isinstance(prompt, str) else messages

    def _beside(self, row: Row, column: str | None) -> str | None:
        """Return the text of a column beside the prompt, None where it is empty.

        Raises:
            LeftOutError: It is neither text nor a number, or a chat written as text.
        """
        value = cell_of(row, column) if column else None
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        if isinstance(value, float) and math.isnan(value):
            return None
        if self.text_cells and isinstance(value, str) and is_missing_word(value):
            return None
        parts = text_of_parts(value, column or "")
        if parts is not None and not parts.strip():
            return None
        text = to_text(value if parts is None else parts, column or "")
        if column not in self.plain:
            check_stray(text, column or "")
        return text

    def _conversations(
        self, first: Any, second: Any, roles: Sequence[str]
    ) -> tuple[Prompt, str, str]:
        """Split two whole conversations at the end of what they share."""
        one = self._conversation(first, self.first, roles[0])
        if isinstance(second, str) and self._markup(self.second) is None:
            prompt, reply = split_reply(one, None, roles[0])  # a conversation, and a reply alone
            if prompt is None:
                raise _no_prompt(roles[0], reply)
            return prompt, reply, to_text(second, roles[1], self.second)
        two = self._conversation(second, self.second, roles[1])
        shared = min(common_prefix(one, two), len(one) - 1, len(two) - 1)
        if shared < 1:
            raise LeftOutError(
                f"{roles[0]} and {roles[1]} share no prompt", f"{one[0]['content'][:40]!r}",
                "give conversations that begin with the same turns, or a prompt column",
            )  # fmt: skip
        prompt = one[:shared]
        replies = [
            split_reply(messages[shared:], None, role)
            for messages, role in ((one, roles[0]), (two, roles[1]))
        ]
        for (rest, _), role in zip(replies, roles, strict=False):
            if rest:
                raise LeftOutError(
                    "conversations differ before their last reply", f"{role}: {len(rest)} turns",
                    "compare replies to one prompt", is_choice=True,
                )  # fmt: skip
        return prompt, replies[0][1], replies[1][1]

    def _conversation(self, value: Any, column: str, role: str) -> list[Message]:
        self._watch(column, value)
        if isinstance(value, str):
            markup = self._markup(column)
            if markup is not None and markup not in LISTS:
                value = _parsed(markup, value, role)
        return to_messages(value, role, column)

    def _markup(self, column: str) -> Markup | None:
        return (self.markups or {}).get(column)

    def _checked(self, prompt: Prompt) -> Prompt:
        """Return a prompt of messages.

        Raises:
            LeftOutError: A message is a chat written as text.
        """
        for message in messages_of(prompt) if (self.prompt or self.first) not in self.plain else ():
            if message["role"] != "assistant":
                check_stray(message["content"], f"a message of the {message['role']}")
        return prompt

    def _clean(self, reply: str, column: str, asked: str, role: str, notes: set[str]) -> str:
        """Return a reply without end tokens behind it.

        Args:
            reply: The reply.
            column: Its column.
            asked: Text of the turn that it answers.
            role: Name of the reply in reasons.
            notes: Receives a sentence if tokens are cut.

        Raises:
            LeftOutError: It goes on behind an end token, holds nothing else, or is a chat.
        """
        if column in self.plain:
            return reply
        check_reply(reply, role, asked)
        if "<" not in reply and "[" not in reply:
            return reply  # nine replies of ten, and no token is without one of these
        reply, had_tokens = strip_end_tokens(reply, column in self.ended, asked)
        if had_tokens:
            notes.add("end tokens that are spelled out behind replies are cut")
        if not reply.strip():
            raise LeftOutError(f"{role} is empty")
        if token := break_token(reply, asked):
            raise LeftOutError(
                f"{role} goes on behind a control token of a chat template", repr(token),
                "cut the reply where the token stands, or name its column in data.text_columns",
            )  # fmt: skip
        return reply

    def _check_word(self, value: str, role: str) -> None:
        if self.text_cells and is_missing_word(value):
            raise LeftOutError(
                f"{role} is a missing value written as text", repr(value.strip()),
                "remove the row, or export missing values as empty cells",
            )  # fmt: skip


def _note_reasoning(value: Any, column: str, notes: set[str]) -> None:
    if isinstance(value, list | tuple | dict) and (field := unread_reasoning(value)):
        notes.add(f"{field} of messages in {column} is not read")


def _without_speaker(rest: str) -> str:
    """Return what follows a repeated prompt without the mark of the reply's turn."""
    match = CUT_SPEAKER.match(rest)
    return rest[match.end() :] if match else rest


def _no_prompt(role: str, reply: str) -> LeftOutError:
    return LeftOutError(
        f"{role} is a conversation without a prompt", reply[:60],
        "give the messages before the reply too",
    )  # fmt: skip


def _parsed(markup: Markup, text: str, role: str) -> Any:
    assert markup.parse is not None
    value = markup.parse(text)
    if value is None:
        to_text(text, role)  # an empty text has its own reason
        raise LeftOutError(
            f"{role} is not written as {markup.name} like other rows", repr(text[:60]),
            "write all rows alike",
        )  # fmt: skip
    return value


def _own_text(reply: Any) -> str | None:
    """Return the text of a reply that is an object with its model's name and the like."""
    if not isinstance(reply, dict) or any(key in reply for key in ROLE_KEYS):
        return None
    texts = [reply[key] for key in REPLY_KEYS if isinstance(reply.get(key), str)]
    return texts[0] if len(texts) == 1 else None


def _only_text(texts: Any, field: str) -> str:
    """Return the text of a list with one text.

    Raises:
        LeftOutError: There are several, which may be turns.
    """
    if len(texts) != 1:
        raise LeftOutError(
            f"{field} is a list of texts", f"{len(texts)} texts", "give a list of {role, content}"
        )
    return str(texts[0])


def _history(turns: Any, column: str) -> list[Message]:
    """Return earlier turns: pairs of a user's and an assistant's text, or messages."""
    if isinstance(turns, list | tuple) and turns and all(_is_exchange(turn) for turn in turns):
        messages: list[Message] = []
        for asked, answered in turns:
            messages.append({"role": "user", "content": to_text(asked, column)})
            messages.append({"role": "assistant", "content": to_text(answered, column)})
        return messages
    return to_messages(turns, column)


def _unwritten(turns: Any) -> Any:
    """Return the value of a cell of CSV that holds it as JSON."""
    if not isinstance(turns, str) or not turns.lstrip().startswith("["):
        return turns
    try:
        return json.loads(turns)
    except (ValueError, RecursionError):
        return turns


def _is_exchange(turn: Any) -> bool:
    return (
        isinstance(turn, list | tuple)
        and len(turn) == 2
        and all(isinstance(text, str) for text in turn)
    )
