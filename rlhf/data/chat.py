"""Values of a cell as text or chat messages, and the split of a conversation into prompt and reply.

A value that is neither leaves its row out: `LeftOutError` names the kind of value, and the cure.
"""

from __future__ import annotations

import math
import reprlib
import unicodedata
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from rlhf.data.records import LeftOutError
from rlhf.data.rows import Message, Prompt, joined, messages_of

#: Names of roles in public data sets, in lower case.
ROLES: Mapping[str, str] = {
    **dict.fromkeys(("user", "human", "prompter", "customer", "instruction", "question"), "user"),
    **dict.fromkeys(
        (
            *("assistant", "gpt", "bot", "chatbot", "model", "ai", "chatgpt", "bard", "bing"),
            *("agent", "response", "answer"),
        ),
        "assistant",
    ),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
}

#: Keys of a message, the usual one first: OpenAI's, ShareGPT's, then those of single data sets, and
#: Gemini's.
ROLE_KEYS = ("role", "from", "speaker", "sender")
CONTENT_KEYS = ("content", "value", "text", "message", "utterance", "parts")

#: Fields of a reply that is an object, one of which holds its text.
REPLY_KEYS = ("response", "text", "content", "completion", "answer", "output", "reply")
#: Fields that hold the text of an object.
_TEXT_FIELDS = ("full_text", "prompt", "question", "instruction", "query", "response", "answer",
                "output", "completion", "body", "post")  # fmt: skip
#: Fields of a pair that have a setting for their column.
COLUMN_SETTINGS = ("prompt", "chosen", "rejected")

_REASONING = ("reasoning_content", "reasoning", "thinking")
_CALL_KEYS = ("tool_calls", "function_call")
#: Calls and their results as parts of a message: OpenAI's, Bedrock's, Gemini's.
_CALL_PARTS = ("tool_use", "tool_call", "function_call", "toolUse", "toolResult", "functionCall",
               "functionResponse", "function_response")  # fmt: skip
_CALL_ROLES = ("function_call", "tool_call", "tool_calls")  # LLaMA-Factory's roles
_TEXT_PARTS = ("text", "input_text", "output_text")
_MEDIA = {
    **dict.fromkeys(("image", "image_url", "input_image"), "an image"),
    **dict.fromkeys(("audio", "audio_url", "input_audio"), "audio"),
    **dict.fromkeys(("video", "video_url", "input_video"), "a video"),
    **dict.fromkeys(("inlineData", "inline_data", "fileData", "file_data", "document"), "a file"),
}
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 40
_SHOWN = 60


def to_text(value: object, field: str, column: str = "") -> str:
    """Return a cell as text; a number is written out.

    Args:
        value: The cell.
        field: Role of the column, with which every reason begins: "chosen".
        column: Its name in the source where that differs; used in the cure.

    Raises:
        LeftOutError: The value is missing, of another type, blank, or holds broken characters.
    """
    if isinstance(value, str):
        return _checked(value, field)
    if _is_missing(value):
        raise LeftOutError(f"{field} is missing")
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return _written_out(value, field)
    if isinstance(value, dict):
        raise LeftOutError(
            f"{field} is an object", _seen(value), _field_cure(value, field, column or field)
        )
    if isinstance(value, list | tuple):
        if not value:
            raise LeftOutError(f"{field} is an empty list")
        raise LeftOutError(f"{field} is a list", _seen(value), "give one text per row")
    if isinstance(value, bool):
        raise LeftOutError(f"{field} is true or false", _seen(value), "give a column of texts")
    raise LeftOutError(
        f"{field} is neither text nor a number", _seen(value), "give a column of texts"
    )


def text_of_parts(value: object, field: str) -> str | None:
    """Return the text of a list of `{"text"}`, or of Gemini's `{"parts": […]}`; None for others.

    Raises:
        LeftOutError: A part holds something else, such as an image.
    """
    if isinstance(value, dict) and "parts" in value:
        value = value["parts"]
    elif not isinstance(value, list | tuple):
        return None
    parts = value if isinstance(value, list | tuple) else [value]
    are_messages = any(isinstance(part, dict) and {*part} & {*ROLE_KEYS} for part in parts)
    if are_messages or not parts or not all(isinstance(part, dict) for part in parts):
        return None
    return _content(parts, field)


def to_messages(value: object, field: str, column: str = "") -> list[Message]:
    """Return a cell as chat messages with known roles.

    Messages are `{"role", "content"}`, ShareGPT's `{"from", "value"}`, Gemini's `{"role", "parts"}`
    or `[role, text]`; one message need not be in a list. A message's other keys are ignored.

    Raises:
        LeftOutError: The value is no chat, or a message can't be used.
    """
    if isinstance(value, dict) and _named(value, ROLE_KEYS) is not None:
        value = [value]
    if not isinstance(value, list | tuple) or not value:
        text = to_text(value, field, column)
        raise LeftOutError(
            f"{field} is no list of messages", _seen(text), "give a list of {role, content}"
        )
    if all(isinstance(item, str) for item in value):
        raise LeftOutError(
            f"{field} is a list of texts", _seen(value), "give a list of {role, content}"
        )
    messages = [_message(item, field) for item in value]
    for index, message in enumerate(messages):
        if not message["content"].strip() and message["role"] != "system":
            if len(messages) == 1:
                raise LeftOutError(f"{field} is empty")
            detail = f"message {index + 1} of {len(messages)}, of the {message['role']}"
            raise LeftOutError(f"{field} has an empty message", detail)
    return messages


def split_reply(
    messages: list[Message], prompt: Prompt | None, field: str
) -> tuple[Prompt | None, str]:
    """Return the prompt of a conversation and the reply that ends it.

    `messages` are a reply alone, the prompt's messages and the reply, or, without `prompt`, a
    whole conversation. A given prompt is returned as it is; the messages may differ from it in
    spacing and case, and may lack its system turn.

    Raises:
        LeftOutError: The last message is not the assistant's, the reply has several messages, or
            it follows another prompt.
    """
    if not messages:
        raise LeftOutError(f"{field} is an empty list")
    *before, last = messages
    if last["role"] != "assistant":
        detail = f"the last message is the {last['role']}'s: {_seen(last['content'])}"
        raise LeftOutError(
            f"{field} does not end with an assistant message",
            detail,
            "remove what follows the reply",
        )
    if prompt is None:
        if before and before[-1]["role"] == "assistant":
            raise _several(2, field)
        return before or None, last["content"]
    known, found = _key(messages_of(prompt)), _key(before)
    if found in ([], known, _without_system(known)):
        return prompt, last["content"]
    raise _other_prompt(found, known, field)


def unread_reasoning(value: object) -> str | None:
    """Return the field of a message that holds reasoning beside its content, if one does."""
    for item in value if isinstance(value, list | tuple) else (value,):
        if isinstance(item, dict) and item.get("content"):
            found = next((key for key in _REASONING if item.get(key)), None)
            if found is not None:
                return found
    return None


def common_prefix(a: list[Message], b: list[Message]) -> int:
    """Return the number of leading messages that are equal but for blanks around their text."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x["role"] != y["role"] or x["content"].strip() != y["content"].strip():
            break
        count += 1
    return count


def loose_text(text: str) -> str:
    """Return a text without differences in Unicode form, spacing and case."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(text.lower().split())


def loose_key(prompt: Prompt) -> str:
    """Return a key that ignores Unicode form, spacing and case.

    Only for keeping prompts on one side of the split, where a copy would raise the score: two
    prompts of one key may still differ, like 2² and 22.
    """
    return joined((m["role"], loose_text(m["content"])) for m in messages_of(prompt))


# --- text -------------------------------------------------------------------------------------


def _checked(text: str, field: str, *, may_be_blank: bool = False) -> str:
    if not text.strip() and not may_be_blank:
        raise LeftOutError(f"{field} is empty", _seen(text) if text else "")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can hold a lone surrogate, UTF-8 can't
        raise LeftOutError(
            f"{field} holds half a character",
            f"a lone surrogate in {_seen(text[max(0, error.start - 20) :])}",
            "write the file as UTF-8",
        ) from None
    if "\0" in text:
        raise LeftOutError(
            f"{field} holds NUL characters",
            _seen(text[max(0, text.index("\0") - 20) :]),
            "remove them; a file with one after every letter is UTF-16: save it as UTF-8",
        )
    return text


def _is_missing(value: object) -> bool:
    """Return True for null, and for the NaN that Parquet and pandas put in its place."""
    return value is None or (isinstance(value, float | Decimal) and math.isnan(value))


def _written_out(value: float | Decimal, field: str) -> str:
    if not isinstance(value, int) and math.isinf(value):
        raise LeftOutError(f"{field} is an infinite number")
    try:
        return str(value)
    except ValueError:  # Python writes out at most 4300 digits
        raise LeftOutError(f"{field} is a number of thousands of digits") from None


def _field_cure(value: dict[Any, Any], field: str, column: str) -> str:
    """Return the setting that reads a field of an object, where a field holds text or messages."""
    names = [name for name in value if isinstance(name, str) and name and "." not in name]
    texts = [name for name in names if isinstance(value[name], str) and value[name].strip()]
    chats = [
        name
        for name in names
        if isinstance(value[name], list) and value[name] and isinstance(value[name][0], dict)
    ]
    usual = [name for name in (*CONTENT_KEYS, *_TEXT_FIELDS) if name in texts]
    # A single word, such as an id, is no reply beside a field with a sentence.
    sentences = [name for name in texts if len(value[name].split()) > 1]
    if sentences and usual and usual[0] not in sentences:
        usual = [name for name in usual if name in sentences]
        texts = sentences
    found = [*usual, *chats, *texts]
    if field not in COLUMN_SETTINGS or (not usual and len(found) != 1):
        return "give a column of texts"  # a guess among fields may name an id
    shown = found[0].encode("utf-8", "backslashreplace").decode()
    return f"data.{field}_column={column}.{shown}"


def _seen(value: object) -> str:
    """Describe a value for a message: its type, and how it begins."""
    if isinstance(value, str):
        more = "…" if len(value) > _SHOWN else ""
        return f"text {value[:_SHOWN]!r}{more}"
    if isinstance(value, dict):
        return f"an object with {_beginning(list(value))}"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}: {_beginning(value)}"
    return f"{type(value).__name__} {_beginning(value)}"


def _beginning(value: object) -> str:
    try:
        text = _REPR.repr(value)
    except ValueError:  # an integer with more digits than Python writes out
        return "a number of thousands of digits"
    return text[:_SHOWN] + ("…" if len(text) > _SHOWN else "")


# --- messages ---------------------------------------------------------------------------------


def _message(item: object, field: str) -> Message:
    if isinstance(item, list | tuple) and len(item) == 2:
        item = {"role": item[0], "content": item[1]}
    if not isinstance(item, dict):
        raise LeftOutError(
            f"{field} has an item that is no message", _seen(item), "give {role, content}"
        )
    role, content = _named(item, ROLE_KEYS), _named(item, CONTENT_KEYS)
    if role is None:
        raise LeftOutError(f"{field} has a message without a role", _seen(item))
    name = role.strip().lower() if isinstance(role, str) else ""
    if name in _CALL_ROLES or any(item.get(key) for key in _CALL_KEYS):
        raise _calls(item, field)
    if name not in ROLES:
        detail = f"the role is {_seen(role)}"
        raise LeftOutError(f"{field} has an unknown role", detail, "rename it to user or assistant")
    if _is_missing(content):
        raise LeftOutError(f"{field} has a message without content", _seen(item))
    return {"role": ROLES[name], "content": _content(content, field)}


def _named(item: dict[Any, Any], names: tuple[str, ...]) -> Any:
    """Return the first value that is not null: Parquet adds other rows' keys to every message."""
    return next((item[name] for name in names if item.get(name) is not None), None)


def _content(content: object, field: str) -> str:
    """Return a message's text, which may be empty; text parts are joined as chat templates do."""
    if isinstance(content, int | float | Decimal) and not isinstance(content, bool):
        return _written_out(content, field)
    if isinstance(content, dict):
        content = [content]
    if isinstance(content, list | tuple):
        content = "".join(_part(part, field) for part in content)
    if not isinstance(content, str):
        raise LeftOutError(f"{field} has a message that is no text", _seen(content))
    return _checked(content, field, may_be_blank=True)


def _part(part: object, field: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict):
        kind, text = part.get("type"), part.get("text")
        for medium, name in _MEDIA.items():
            if kind == medium or part.get(medium) is not None:
                raise LeftOutError(f"{field} holds {name}", _seen(part), "leave such rows out")
        if kind in _CALL_PARTS or any(part.get(key) is not None for key in _CALL_PARTS):
            raise _calls(part, field)
        if part.get("thought") is True:
            raise LeftOutError(f"{field} holds a thought", _seen(part), "leave thoughts out")
        if isinstance(text, str) and (kind is None or kind in _TEXT_PARTS):
            return text
    raise LeftOutError(f"{field} has a message with a part that is no text", _seen(part))


def _calls(item: dict[Any, Any], field: str) -> LeftOutError:
    return LeftOutError(
        f"{field} holds tool calls", _seen(item), "leave such rows out, or write the call as text"
    )


# --- conversations ----------------------------------------------------------------------------


def _key(messages: list[Message]) -> list[tuple[str, str]]:
    """Return messages without Unicode form, spacing and case."""
    return [(m["role"], loose_text(m["content"])) for m in messages]


def _without_system(key: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [message for message in key if message[0] != "system"]


def _other_prompt(
    found: list[tuple[str, str]], known: list[tuple[str, str]], field: str
) -> LeftOutError:
    """Return the reason for which the messages before a reply are not the prompt's."""
    if known == _without_system(found):
        return LeftOutError(
            f"{field} has a system turn that the prompt lacks",
            cure="give the prompt with its system turn",
        )
    for start in (known, _without_system(known), []):
        rest = found[len(start) :]
        if found[: len(start)] == start and {role for role, _ in rest} <= {"assistant", "tool"}:
            return _several(len(rest) + 1, field)
    for start in (known, _without_system(known)):
        if start and found[: len(start)] == start:
            return LeftOutError(
                f"{field} goes on after the prompt with more turns than a reply",
                f"{len(found) - len(start) + 1} messages after the prompt",
                "give the whole conversation before the last reply as the prompt",
            )
    return LeftOutError(
        f"{field} belongs to another prompt",
        f"{_seen(found[-1][1])} comes before the reply",
        "the messages before a reply must be the prompt's",
    )


def _several(count: int, field: str) -> LeftOutError:
    return LeftOutError(
        f"{field} is a reply of several messages",
        f"{count} messages after the prompt",
        "give the earlier ones as part of the prompt",
    )
