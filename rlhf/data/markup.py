"""Text that is a chat written out: as JSON, as Python's repr, as a transcript, by a chat template.

Such text reads as one long turn, so a model would learn the marks. Every scanner takes linear time.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from rlhf.data.chat import CONTENT_KEYS, ROLE_KEYS, ROLES
from rlhf.data.role_words import is_label
from rlhf.data.rows import Message
from rlhf.data.special_tokens import after_begin_tokens, ends_at
from rlhf.data.transcripts import (
    TRANSCRIPTS,
    WEAK_TRANSCRIPTS,
    before_reply,
    role_of_name,
    without_lines,
)


@dataclass(frozen=True)
class Markup:
    """A way of writing a chat as text."""

    name: str
    parse: Callable[[str], Any] | None
    """Returns the messages, of JSON and Python the value, or None for text in another form.
    Without the function, such text is recognised but can't be parsed."""


#: Keys of an object that holds nothing but messages.
CHAT_KEYS = ("messages", "conversations", "conversation", "turns", "chat", "dialogue", "history")

_ENOUGH = 0.6
_MAX_REPR = 1_000_000  # characters; a syntax tree takes a hundred times its text


def recognise(texts: Sequence[str]) -> Markup | None:
    """Return the markup in which at least 60 % of a column's non-blank texts are written."""
    filled = [text for text in texts if text.strip()]
    counts = Counter(markup_of(text) for text in filled)
    if counts[NUMPY]:  # which writes a list of one message as Python does
        counts[NUMPY] += counts.pop(PYTHON, 0)
    markup, count = max(counts.items(), key=lambda item: item[1], default=(None, 0))
    return markup if count >= _ENOUGH * len(filled) else None


def markup_of(text: str) -> Markup | None:
    """Return the markup that a text consists of from beginning to end."""
    for markup in _PARSED:
        if markup.parse is not None and markup.parse(text) is not None:
            return markup
    return next((markup for markup, is_written in _UNPARSED if is_written(text)), None)


# --- JSON and Python --------------------------------------------------------------------------


def _json_value(text: str) -> Any:
    text = text.strip()
    if not text.startswith(("[", "{")):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _json_chat(text: str) -> Any:
    value = _json_value(text)
    if isinstance(value, dict) and len(value) == 1:
        (name, items), *_ = value.items()
        value = items if name in CHAT_KEYS and isinstance(items, list) else value
    if value is None and text.lstrip().startswith("{") and "}\n" in text:
        value = [_json_value(line) for line in text.strip().split("\n") if line.strip()]
    return value if _is_chat(value) else None


def _is_wrapped_chat(text: str) -> bool:
    """Return True for an object of messages and further fields, whose meaning is not known."""
    value = _json_value(text) if text.lstrip().startswith("{") else None
    return isinstance(value, dict) and any(_is_chat(value.get(key)) for key in CHAT_KEYS)


def _is_wrapped_text(text: str) -> bool:
    """Return True for an object whose only field is a prompt: {"question": "…"}."""
    value = _json_value(text) if text.lstrip().startswith("{") else None
    return (
        isinstance(value, dict)
        and len(value) == 1
        and all(is_label(name) and isinstance(inner, str) for name, inner in value.items())
    )


def _json_texts(text: str) -> Any:
    value = _json_value(text)
    return value if _is_texts(value) else None


def _python_value(text: str) -> Any:
    return _literal(text) if text.lstrip().startswith(("[", "{")) else None


def _literal(text: str) -> Any:
    """Return the value of a Python literal, None for other text."""
    text = text.strip()
    if len(text) > _MAX_REPR:
        return None
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes such as "\d" in the text
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _python_chat(text: str) -> Any:
    # other text with a bracket in front is no chat, and a syntax tree takes time
    is_likely = text.lstrip().startswith(("[['", "[('")) or _quotes_keys(text)
    value = _python_value(text) if is_likely else None
    return value if _is_chat(value) else None


def _python_texts(text: str) -> Any:
    value = _python_value(text) if text.lstrip().startswith(("['", '["')) else None
    return value if _is_texts(value) else None


def _are_parts(text: str) -> bool:
    """Return True for the content of one message in parts: [{"type": "text", "text": …}]."""
    value = _json_value(text) if text.lstrip().startswith("[{") else None
    return isinstance(value, list) and all(
        isinstance(part, dict) and "type" in part and not set(ROLE_KEYS) & set(part)
        for part in value
    )


def _is_numpy_repr(text: str) -> bool:
    """Return True for a NumPy array of messages as text, or for a list with NumPy's values."""
    text = text.strip()
    return (
        text.startswith(("[{", "array([{"))
        and text.endswith(("}]", "dtype=object)"))
        and _quotes_keys(text)
    )


def _quotes_keys(text: str) -> bool:
    return "{'" in text and any(
        f"'{role}':" in text and f"'{content}':" in text
        for role in ROLE_KEYS
        for content in CONTENT_KEYS
    )


def _is_bytes(text: str) -> bool:
    is_likely = text.lstrip().startswith(("b'", 'b"'))
    return is_likely and isinstance(_literal(text), bytes)


def _are_objects(text: str) -> bool:
    text = text.strip()
    return text.endswith((")", "]", "}", "'", '"')) and _OBJECTS.match(text) is not None


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def _is_chat(value: Any) -> bool:
    """Return True for messages, but not for another list of objects, which may be an answer."""
    if isinstance(value, dict):
        return _is_message(value) and _is_known_role(_role_of(value))
    if not isinstance(value, list | tuple) or not value:
        return False
    if all(isinstance(item, list | tuple) and len(item) == 2 for item in value):
        return all(_is_known_role(role) and isinstance(text, str) for role, text in value)
    if not all(isinstance(item, dict) and _is_message(item) for item in value):
        return False
    return all({"role", "content"} <= item.keys() for item in value) or any(
        _is_known_role(_role_of(item)) for item in value
    )


def _is_message(item: dict[Any, Any]) -> bool:
    has_content = any(key in item for key in (*CONTENT_KEYS, "tool_calls", "function_call"))
    return has_content and isinstance(_role_of(item), str)


def _role_of(item: dict[Any, Any]) -> Any:
    return next((item[key] for key in ROLE_KEYS if item.get(key) is not None), None)


def _is_known_role(role: Any) -> bool:
    return isinstance(role, str) and role.strip().lower() in ROLES


# --- chat templates ---------------------------------------------------------------------------


def _parse_template(
    text: str,
    mark: re.Pattern[str],
    opening: str,
    ends: tuple[str, ...],
    system_first: bool = False,
) -> list[Message] | None:
    """Return the messages of a text that a chat template rendered.

    Args:
        text: The text.
        mark: What begins a turn; its group is the role's name.
        opening: Beginning of every mark, which may stand nowhere else in the text.
        ends: Tokens that end a turn.
        system_first: Whether the system turn has no mark, and follows the begin token.
    """
    if opening not in text:  # every text holds an empty one
        return None
    head = after_begin_tokens(text)
    marks = list(mark.finditer(text, head))
    if not marks or (opening and text.count(opening, head) != len(marks)):
        return None
    messages: list[Message] = []
    begun = len(text[:head].rstrip())
    if marks[0].start() != head:
        if not (system_first and begun):
            return None
        prefix = text[begun : marks[0].start()]
        messages.append({"role": "system", "content": prefix})
    bounds = [*(match.start() for match in marks), len(text)]
    for match, (_, end) in zip(marks, pairwise(bounds), strict=True):
        raw = text[match.end() : end]
        cut = min((at for token in ends if (at := raw.find(token)) >= 0), default=None)
        if cut is not None and not ends_at(raw, cut):
            return None
        content = raw.rstrip("\r\n") if cut is None else raw[:cut]
        messages.append({"role": role_of_name(match.group(1)), "content": content})
        if cut is None and end == len(text):
            messages = before_reply(messages)
    return messages or None


def _parse_llama_2(text: str) -> list[Message] | None:
    head = after_begin_tokens(text)
    if not text.startswith("[INST]", head):
        return None
    messages: list[Message] = []
    for index, turn in enumerate(text[head:].split("[INST]")[1:]):
        question, close, answer = turn.partition("[/INST]")
        if not close or "[/INST]" in answer:
            return None
        opening, is_system, rest = question.partition("<<SYS>>")
        system, closes, after = rest.partition("<</SYS>>")
        if is_system:
            if index or opening.strip() or not closes:
                return None
            messages.append({"role": "system", "content": without_lines(system)})
            question = after.lstrip("\r\n")
        else:
            question = question.removeprefix(" ")
        answer, is_closed = _before_tokens(answer)
        messages.append({"role": "user", "content": question.removesuffix(" ")})
        answer = answer.removeprefix(" ")
        answer = answer.removesuffix(" ") if is_closed else answer
        messages.append({"role": "assistant", "content": answer})
    return before_reply(messages)


def _before_tokens(text: str) -> tuple[str, bool]:
    """Return a turn without the tokens and line breaks behind it; whether it had tokens."""
    end, found = len(text), False
    while True:
        last = end
        while last and text[last - 1].isspace():
            last -= 1
        token = next((t for t in ("</s>", "<s>") if text.endswith(t, 0, last)), None)
        if token is None:
            return (text[:end] if found else without_lines(text)), found
        end, found = last - len(token), True


def parse_turns(text: str) -> list[Message] | None:
    """Return the messages of HelpSteer's later turns, of which the first has no mark.

    Returns:
        None for text without `<extra_id_1>User` and `<extra_id_1>Assistant` on lines of their own.
    """
    parts = _EXTRA_ID.split(text)
    if len(parts) < 3 or "<extra_id_" in "".join(parts[::2]):
        return None
    messages: list[Message] = [{"role": "user", "content": parts[0]}]
    for name, content in zip(parts[1::2], parts[2::2], strict=True):
        messages.append({"role": role_of_name(name), "content": content})
    return before_reply(messages)


# --- all of them ------------------------------------------------------------------------------

#: Messages as LangChain, LlamaIndex and JavaScript print them.
_OBJECTS = re.compile(
    r"\[?(?:[A-Z]\w*Message\(|ChatMessage\(|content=['\"]|\{\s*(?:role|from)\s*:\s*['\"])"
)
_EXTRA_ID = re.compile(r"\n<extra_id_1>(User|Assistant)(?:\n|\Z)")
_YAML = re.compile(r"\s*- (?:role|from): ?['\"]?\w+['\"]?\r?\n +(?:content|value):")
#: Special tokens at the beginning of a text, of templates that are not known.
_TEMPLATE = re.compile(
    r"(?:<s>|<bos>|\s)*"
    r"(?:<\|(?!(?:im_start|user|assistant|system|start_header_id)\|)[\w ]{1,30}\|>|"
    r"\[\|\w{1,30}\|\]|<(?:extra_id|reserved)_\d+>|\[gMASK\]|"
    r"\[SYSTEM_PROMPT\]|\[AVAILABLE_TOOLS\]|<｜[^｜]{1,30}｜>)"
)


def _template(mark: str, opening: str, *ends: str, system_first: bool = False) -> Any:
    return partial(
        _parse_template,
        mark=re.compile(mark),
        opening=opening,
        ends=ends,
        system_first=system_first,
    )


JSON = Markup("JSON", _json_chat)
JSON_LIST = Markup("JSON list", _json_texts)
PYTHON = Markup("Python repr", _python_chat)
PYTHON_LIST = Markup("Python list", _python_texts)
NUMPY = Markup("numpy repr", None)
BYTES = Markup("Python bytes", None)
PARTS = Markup("JSON content parts", None)
OBJECTS = Markup("objects of messages", None)
YAML = Markup("YAML", None)
TEMPLATE = Markup("an unknown chat template", None)
#: An object around a text, which is an answer as often as a prompt.
WRAPPED = Markup("JSON objects of one text", None)
#: Lists of texts, which are a model's answer as often as the turns of a chat.
LISTS = (JSON_LIST, PYTHON_LIST)
#: Marks that texts other than chats have too: columns of them are parsed, single texts are not.
WEAK = (WRAPPED, *(Markup(name, parse) for name, parse in WEAK_TRANSCRIPTS))
#: Transcripts, which a task or an answer may show too.
SPOKEN = tuple(Markup(name, parse) for name, parse in TRANSCRIPTS)

_HEADER = r"([\w-]{1,30})(?: name=[\w-]{1,60})?"  # OpenAI's examples have names
_PARSED = (
    JSON,
    JSON_LIST,
    PYTHON,
    PYTHON_LIST,
    Markup(
        "ChatML",
        _template(
            rf"<\|im_start\|>{_HEADER}(?:\n|<\|im_sep\|>|\Z)",
            "<|im_start|>",
            "<|im_end|>",
            "<|endoftext|>",
        ),
    ),
    Markup(
        "Llama 3",
        _template(
            rf"<\|start_header_id\|>{_HEADER}<\|end_header_id\|>\n{{0,2}}",
            "<|start_header_id|>",
            *("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
        ),
    ),
    Markup("Llama 2 [INST]", _parse_llama_2),
    Markup(
        "Gemma",
        _template(
            rf"<start_of_turn>{_HEADER}(?:\n|\Z)", "<start_of_turn>", "<end_of_turn>", "<eos>"
        ),
    ),
    Markup(
        "Zephyr/Phi <|user|>",
        _template(
            r"<\|(system|user|assistant|prompter)\|>\n?",
            "",
            *("</s>", "<|end|>", "<|endoftext|>"),
        ),
    ),
    Markup(
        "DeepSeek",
        _template(
            "<｜(User|Assistant)｜>",
            "",
            "<｜end▁of▁sentence｜>",
            system_first=True,
        ),
    ),
    Markup(
        "Command R",
        _template(
            r"<\|START_OF_TURN_TOKEN\|><\|(USER|CHATBOT|SYSTEM)_TOKEN\|>",
            "<|START_OF_TURN_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
        ),
    ),
    Markup(
        "Llama 4",
        _template(
            rf"<\|header_start\|>{_HEADER}<\|header_end\|>\n{{0,2}}",
            "<|header_start|>",
            "<|eot|>",
        ),
    ),
    Markup(
        "Granite",
        _template(
            rf"<\|start_of_role\|>{_HEADER}<\|end_of_role\|>",
            "<|start_of_role|>",
            "<|end_of_text|>",
        ),
    ),
    Markup("EXAONE", _template(r"\[\|(system|user|assistant)\|\]", "", "[|endofturn|]")),
    *SPOKEN,
    *(markup for markup in WEAK if markup.parse is not None),
)
#: Markups that can't be read back, and what tells whether a text is written in one.
_UNPARSED: tuple[tuple[Markup, Callable[[str], Any]], ...] = (
    (NUMPY, _is_numpy_repr),
    (BYTES, _is_bytes),
    (OBJECTS, _are_objects),
    (OBJECTS, _is_wrapped_chat),
    (YAML, _YAML.match),
    (PARTS, _are_parts),
    (WRAPPED, _is_wrapped_text),
    (TEMPLATE, _TEMPLATE.match),
)
