"""How values stand in a message: short, on one line, and without passwords."""

from __future__ import annotations

import json
import re
from typing import Any


def shown_value(value: Any) -> str:
    """The value as it may stand in a message: short."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def as_written(value: Any) -> str:
    """The value as one would write it: text bare, anything else as YAML and JSON have it."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def one_line(text: str) -> str:
    """No line breaks, and nothing of a URI's user info, which may be a password."""
    return re.sub(r"//[^\s'\"]*@", "//…@", " ".join(text.split()))
