"""Texts that are chats written out where other rows are not: left out, with the form's name.

A form that most rows have is the file's format (rlhf/data/column_forms.py). In a few rows it is
content – a task on a transcript, a question on special tokens – unless a template must have
written it: a chat from beginning to end that awaits its reply, an end token that ends a sentence.
"""

from __future__ import annotations

import re
from typing import Any

from rlhf.data.chat import to_messages
from rlhf.data.markup import BYTES, LISTS, PARTS, SPOKEN, TEMPLATE, WEAK, Markup, markup_of
from rlhf.data.records import LeftOutError
from rlhf.data.rows import Message
from rlhf.data.shared_marks import NAME, TOKEN, closing_mark, opening_mark
from rlhf.data.special_tokens import break_token, edge_token

#: Beginnings of all forms, so that few texts are parsed in vain.
_BEGINS = re.compile(
    r"\s*(?:[\[{]\s*[\[{]|\{\s*[\"']\w+[\"']\s*:|\[\||\[g?[A-Z_]{3,30}\]|<[|｜/s<a-z]|b['\"]|array\(|"
    r"\*\*[A-Z]\w+:|### \w+:|\[?[A-Z]\w*Message\(|content=|- role|"
    r"A chat between|You are |Below is an instruction|BEGINNING OF CONVERSATION|"
    r"(?:GPT4 Correct )?(?:Human|User|HUMAN|USER|System|SYSTEM|human|user|system):)"
)
#: A further turn behind a reply that went on: "…\n\nHuman: …\n\nAssistant: …".
_USER = re.compile(r"\n[ \t]{0,8}(?:### )?(?:Human|User|USER):")
_ASSISTANT = re.compile(r"\n[ \t]{0,8}(?:### )?(?:Assistant|AI|ASSISTANT):")
#: Words of a prompt that asks for a text with speakers.
_ASKS_FOR_SPEAKERS = re.compile(
    r"dialog|conversation|transcript|\bchat|script|screenplay|\bscene|interview|role.?play|"
    r"\bUser:|\bHuman:|\bplay\b|\bskit|simulat|example",
    re.IGNORECASE,
)
_SENTENCE_ENDS = tuple(".!?…。！？\"')”*")


def check_stray(text: str, field: str) -> None:
    """Refuse a text that is a chat written out, or ends with a token of a chat template.

    Args:
        text: A prompt, a message or a system turn.
        field: Its role, with which the reason begins: "prompt".

    Raises:
        LeftOutError: It would be read as one turn.
    """
    markup = _form(text)
    name = markup.name if markup is not None and _is_rendered(markup, text) else None
    if name is None and ("<" in text or "[" in text):
        name = edge_token(text) or break_token(text)
    if name is not None:
        raise _stray(field, name, text)


def check_reply(reply: str, field: str, asked: str = "") -> None:
    """Refuse a reply that is a chat written out, or goes on with a further turn.

    Args:
        reply: The reply.
        field: Its role, with which the reason begins: "chosen".
        asked: Text of the turn that it answers, which may ask for a chat.

    Raises:
        LeftOutError: It would be learned with the marks of its turns.
    """
    markup = _form(reply)
    if markup is not None and markup not in (PARTS, BYTES):
        is_data = markup.name in _DATA
        if _holds(markup, reply, asked) if is_data else _is_rendered(markup, reply):
            raise _stray(field, markup.name, reply)
    if "Human:" not in reply and "User:" not in reply and "USER:" not in reply:
        return  # no text without a name is searched for turns
    turn = _USER.search(reply)
    if turn is None or not _ASSISTANT.search(reply, turn.end()):
        return
    before = reply[: turn.start()].rstrip()
    is_apart = before.endswith(_SENTENCE_ENDS) or (
        turn.group() == "\nHuman:" and reply[: turn.start()].endswith("\n")
    )
    begin = opening_mark(reply)  # of a dialogue that is the answer
    is_shown = before.endswith((":", "：")) or before.count("```") % 2 or begin is not None
    if is_apart and not is_shown and not _ASKS_FOR_SPEAKERS.search(asked):
        raise LeftOutError(
            f"{field} goes on with a further turn", repr(reply[turn.start() :][:60]),
            "cut the reply where the next turn begins",
        )  # fmt: skip


_DATA = ("JSON", "Python repr")


def _form(text: str) -> Markup | None:
    """Return the form that a text is written in from beginning to end."""
    if not _BEGINS.match(text):
        return None
    markup = markup_of(text)
    return None if markup is None or markup in (*LISTS, *WEAK) else markup


def _is_rendered(markup: Markup, text: str) -> bool:
    """Return whether a text in some form awaits a reply, where the form alone says too little."""
    if markup.name in _DATA and not text.lstrip().startswith("["):
        return [m["role"] for m in _messages(markup, text)][-1:] == ["user"]
    if markup is TEMPLATE:
        end = closing_mark(text)
        return end is not None and end.kind == TOKEN
    if markup in SPOKEN:
        end = closing_mark(text)
        return end is not None and end.kind != NAME
    return True


def _holds(markup: Markup, reply: str, asked: str) -> bool:
    """Return whether a reply that is a chat as data is this row's: the reply, or all turns."""
    messages = _messages(markup, reply)
    if [message["role"] for message in messages] == ["assistant"]:
        return True
    return bool(asked.strip()) and any(m["content"].strip() == asked.strip() for m in messages)


def _messages(markup: Markup, text: str) -> list[Message]:
    """Return the messages of a chat as data; none if a message can't be used."""
    value: Any = markup.parse(text) if markup.parse else None
    try:
        return to_messages(value, "text")
    except LeftOutError:
        return []


def _stray(field: str, name: str, text: str) -> LeftOutError:
    return LeftOutError(
        f"{field} is a chat written as text, unlike other rows", f"{name}: {text[:40]!r}",
        "write all rows alike, or name its column in data.text_columns if it is content",
    )  # fmt: skip
