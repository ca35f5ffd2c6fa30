"""How values stand in a message: short, on one line, and without passwords."""

from __future__ import annotations

import re
from typing import Any


def shown_value(value: Any) -> str:
    """The value as it may stand in a message: short."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def one_line(text: str) -> str:
    """No line breaks, and nothing of a URI's user info, which may be a password."""
    return re.sub(r"//[^\s'\"]*@", "//…@", " ".join(text.split()))
