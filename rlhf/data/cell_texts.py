"""Texts of a cell, whatever form it has: a text, a chat's turns, several replies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rlhf.data.chat import REPLY_KEYS, ROLE_KEYS
from rlhf.data.role_words import USERS


def texts_of(value: Any, is_reply: bool) -> Iterable[str]:
    """Return the texts of a cell: its own, its last turn's, or those of several replies."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple) or not value:
        return []
    if all(isinstance(item, Mapping) and any(k in item for k in ROLE_KEYS) for item in value):
        asked = [item for item in value if _role_of(item) in USERS]
        value = value[-1:] if is_reply else asked[-1:]
    texts = []
    for item in value:
        keys = ("content", "value", *REPLY_KEYS) if isinstance(item, Mapping) else ()
        text = next((item[key] for key in keys if isinstance(item.get(key), str)), item)
        text = _text_in_parts(text)
        texts += [text] if isinstance(text, str) else []
    return texts


def _text_in_parts(message: Any) -> Any:
    """Return the text of a message whose content is a list of parts; others as they are."""
    for key in ("content", "parts") if isinstance(message, Mapping) else ():
        parts = message.get(key)
        if isinstance(parts, list | tuple) and parts:
            texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
            return "".join(text for text in texts if isinstance(text, str))
    return message


def _role_of(message: Mapping[str, Any]) -> str:
    return str(next((message[key] for key in ROLE_KEYS if key in message), "")).lower()
