"""Texts that are chats written out where other rows are not: left out, with the form's name.

A column is parsed only if most of it is written in one form (rlhf/data/markup.py). A single text
in such a form would be trained on as one turn, marks included.
"""

from __future__ import annotations

import re

from rlhf.data.markup import LISTS, WEAK, markup_of
from rlhf.data.records import LeftOutError
from rlhf.data.special_tokens import holds_control_tokens

#: Beginnings of all forms, so that few texts are parsed in vain.
_BEGINS = re.compile(
    r"\s*(?:[\[{]\s*[\[{]|\[\||\[[A-Z_]{3,30}\]|<[|｜/s<a-z]|b['\"]|array\(|\*\*[A-Z]\w+:|### \w+:|"
    r"A chat between|You are |Below is an instruction|BEGINNING OF CONVERSATION|"
    r"(?:GPT4 Correct )?(?:Human|User|HUMAN|USER|System|SYSTEM|human|user|system):)"
)
#: A further turn behind a reply that went on: "…\n\nHuman: …\n\nAssistant: …".
_USER = re.compile(r"\n[ \t]{0,8}(?:### )?(?:Human|User|USER):")
_ASSISTANT = re.compile(r"\n[ \t]{0,8}(?:### )?(?:Assistant|AI|ASSISTANT):")


def check_stray(text: str, field: str) -> None:
    """Refuse a text that is a chat written out, or holds control tokens of a chat template.

    Args:
        text: A prompt, a message or a system turn.
        field: Its role, with which the reason begins: "prompt".

    Raises:
        LeftOutError: It would be read as one turn.
    """
    name = _form(text)
    if name is None and ("<" in text or "[" in text):
        name = holds_control_tokens(text)
    if name is not None:
        raise _stray(field, name, text)


def check_reply(reply: str, field: str) -> None:
    """Refuse a reply that is a chat written out, or goes on with a further turn.

    Raises:
        LeftOutError: It would be learned with the marks of its turns.
    """
    if (name := _form(reply)) is not None:
        raise _stray(field, name, reply)
    if "Human:" not in reply and "User:" not in reply and "USER:" not in reply:
        return  # no text without a name is searched for turns
    if (turn := _USER.search(reply)) and _ASSISTANT.search(reply, turn.end()):
        raise LeftOutError(
            f"{field} goes on with a further turn", repr(reply[turn.start() :][:60]),
            "cut the reply where the next turn begins",
        )  # fmt: skip


def _form(text: str) -> str | None:
    """Return the name of the form that a text is written in from beginning to end."""
    if not _BEGINS.match(text):
        return None
    markup = markup_of(text)
    return None if markup is None or markup in (*LISTS, *WEAK) else markup.name


def _stray(field: str, name: str, text: str) -> LeftOutError:
    return LeftOutError(
        f"{field} is a chat written as text, unlike other rows", f"{name}: {text[:40]!r}",
        "write all rows alike",
    )  # fmt: skip
