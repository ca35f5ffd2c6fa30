"""Values in messages: short, on one line, without passwords."""

from __future__ import annotations

import json
import re
from typing import Any


def shown_value(value: Any) -> str:
    """The value's repr, cut off after 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def as_written(value: Any) -> str:
    """The value as in a preset: text bare, null as `none`, others as JSON."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def one_line(text: str) -> str:
    """The text without line breaks and without user info, such as passwords, in URIs."""
    return re.sub(r"//[^\s'\"]*@", "//…@", " ".join(text.split()))
