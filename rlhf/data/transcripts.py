"""Chats written as transcripts: a name before every turn, on lines of their own or on one.

Every parser takes linear time, and returns None for text in another form.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from rlhf.data.chat import ROLES
from rlhf.data.rows import Message
from rlhf.data.special_tokens import strip_end_tokens


def role_of_name(name: str) -> str:
    """Return a known role's usual name; another is kept for the message that names it."""
    return ROLES.get(name.strip().lower(), name.strip())


def before_reply(messages: list[Message]) -> list[Message]:
    """Cut the assistant's empty last turn: there the reply begins."""
    is_open = messages[-1]["role"] == "assistant" and not messages[-1]["content"].strip()
    return messages[:-1] if is_open else messages


def without_lines(text: str) -> str:
    """Return a text without line breaks around it."""
    return text.strip("\r\n")


def _parse_transcript(
    text: str, mark: re.Pattern[str], name: str, preambles: tuple[str, ...] = ()
) -> list[Message] | None:
    """Return the messages of a text with a name before every turn.

    Args:
        text: The text.
        mark: What begins a turn; its group is the name.
        name: The user's name with its colon.
        preambles: How a system turn without a name may begin.
    """
    if name not in text:
        return None
    turns = _turns(text, mark)
    if len(turns) < 3:
        return None
    (_, prefix), *named = turns
    if prefix.strip() and not prefix.lstrip().startswith(preambles):
        return None
    messages = [{"role": "system", "content": prefix.strip()}] if prefix.strip() else []
    messages += [{"role": role_of_name(name), "content": content} for name, content in named]
    if messages[0]["role"] == "assistant" or not {"user", "assistant"} <= {
        message["role"] for message in messages
    }:
        return None
    return before_reply(messages)


def _parse_vicuna(text: str) -> list[Message] | None:
    if "USER:" not in text:
        return None
    text = text.lstrip().removeprefix("BEGINNING OF CONVERSATION:")  # PKU's template
    return _parse_transcript(strip_end_tokens(text)[0], _VICUNA, "USER:", _PREAMBLES)


def _parse_speakers(text: str, mark: re.Pattern[str], user: str) -> list[Message] | None:
    """Return the messages of a text with marks like `Q:` and `A:`, the user's first."""
    turns = _turns(text, mark)
    if len(turns) < 3 or turns[0][1].strip() or turns[1][0] != user:
        return None
    messages = [
        {"role": "user" if name == user else "assistant", "content": _without_mark(content)}
        for name, content in turns[1:]
    ]
    if all(message["role"] == "user" for message in messages):
        return None
    return before_reply(messages)


def _without_mark(content: str) -> str:
    return content.removesuffix("<|end_of_turn|>")


def _parse_one_line(text: str) -> list[Message] | None:
    """Return the messages of `Human: … Assistant:` on one line, where the reply is to begin."""
    if not text.rstrip().endswith("Assistant:"):
        return None
    return _parse_transcript(text, _ONE_LINE, "Human:")


def _parse_alpaca(text: str) -> list[Message] | None:
    """Return the messages of Alpaca's template, whose own first sentences are left out."""
    if "### Instruction:" not in text:
        return None
    (_, prefix), *named = _turns(text, _ALPACA)
    names = [name for name, _ in named]
    if names[:1] != ["Instruction"] or "Response" not in names:
        return None
    if prefix.strip() and not prefix.lstrip().startswith("Below is an instruction"):
        return None
    messages: list[Message] = []
    for before, (name, content) in zip(["", *names], named, strict=False):
        if name != "Input":
            messages.append({"role": role_of_name(name), "content": content})
        elif before != "Instruction":
            return None
        elif content.strip():
            messages[-1]["content"] += f"\n\n{content}"
    return before_reply(messages)


def _turns(text: str, mark: re.Pattern[str]) -> list[tuple[str, str]]:
    """Return name and text of each turn; the first is the text before all names."""
    parts = mark.split(text)
    turns = [("", parts[0])]
    for index in range(1, len(parts), 2):
        content = parts[index + 1].removeprefix(" ")
        if index + 2 < len(parts) and not content.endswith(("\n", "\r")):
            content = content.removesuffix(" ")  # the next name follows on the same line
        turns.append((parts[index], without_lines(content)))
    return turns


_PREAMBLES = ("A chat between", "You are ")
_VICUNA = re.compile(r"(?:</s>|(?<!\S))(USER|ASSISTANT):")
_ONE_LINE = re.compile(r"(?:(?<=^)|(?<=\s))(Human|Assistant):")

_ALPACA = re.compile(r"^### (Instruction|Input|Response):", re.MULTILINE)


def _names(*names: str) -> Any:
    pattern = re.compile(rf"^({'|'.join(names)}):", re.MULTILINE)
    return partial(_parse_transcript, mark=pattern, name=f"{names[0]}:")


def _speakers(user: str, assistant: str, pattern: str = "^({}){}", colon: str = ":") -> Any:
    names = f"{re.escape(user)}|{re.escape(assistant)}"
    mark = re.compile(pattern.format(names, re.escape(colon)), re.MULTILINE)
    return partial(_parse_speakers, mark=mark, user=user)


#: Marks that texts other than chats have too: columns of them are parsed, single texts are not.
WEAK_TRANSCRIPTS = tuple(
    (f"{user}{colon} {assistant}{colon} transcript", _speakers(user, assistant, colon=colon))
    for user, assistant, colon in (
        ("Q", "A", ":"), ("Question", "Answer", ":"), ("Instruct", "Output", ":"), ("H", "A", ":"),
        ("User", "Bot", ":"), ("Human", "Bot", ":"), ("Customer", "Agent", ":"), ("问", "答", "："),
        ("用户", "助手", "："), ("User", "AI", ":"), ("Instruction", "Response", ":"),
    )
)  # fmt: skip

TRANSCRIPTS = (
    ("Alpaca ### Instruction", _parse_alpaca),
    (
        "### Human ### Assistant",
        partial(
            _parse_transcript,
            mark=re.compile("### (Human|Assistant|System):"),
            name="### Human:",
            preambles=_PREAMBLES,
        ),
    ),
    (
        "### User ### Assistant",
        partial(
            _parse_transcript,
            mark=re.compile("### (User|Assistant|System):"),
            name="### User:",
        ),
    ),
    ("Vicuna USER: ASSISTANT:", _parse_vicuna),
    ("Human/Assistant transcript", _names("Human", "Assistant", "System")),
    ("User/Assistant transcript", _names("User", "Assistant", "System")),
    ("Human/AI transcript", _names("Human", "AI", "System")),
    ("human/assistant transcript", _names("human", "assistant", "system")),
    ("user/assistant transcript", _names("user", "assistant", "system")),
    ("HUMAN/ASSISTANT transcript", _names("HUMAN", "ASSISTANT", "SYSTEM")),
    ("Human: Assistant: on one line", _parse_one_line),
    ("<human> <bot>", _speakers("<human>", "<bot>")),
    ("**User:** **Assistant:**", _speakers("**User", "**Assistant", colon=":**")),
    (
        "OpenChat GPT4 Correct User",
        _speakers("GPT4 Correct User", "GPT4 Correct Assistant", "({}){}"),
    ),
)
