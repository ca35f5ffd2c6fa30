"""Numbers, times and names as text: the templates' filters.

None and values of a wrong type become a dash.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from markupsafe import Markup

MISSING = "–"
#: Numbers beyond this are damage; sums and ratios of smaller ones are finite.
LARGEST = 1e12
#: Control characters and overrides of the writing direction, which would falsify the page's text.
_HIDDEN = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
#: Decimal places from this size on.
_PLACES = ((1000, 0), (10, 1), (0.1, 2), (0.01, 3), (0, 4))
_BOUNDS = {">=": "≥", "<=": "≤", "==": "="}


def number_of(value: Any) -> float | None:
    """Return the value as a finite float, or None if it is not one."""
    if isinstance(value, bool) or value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def number(value: Any) -> str:
    """Format a number with about three significant digits; whole numbers stay whole."""
    x = number_of(value)
    if x is None:
        return "not finite" if isinstance(value, float) else MISSING
    size = abs(x)
    if isinstance(value, int) or (x.is_integer() and size >= 1000):
        text = f"{x:,.0f}".replace(",", "\u2009")
    elif x == 0:
        text = "0"
    elif size >= 1e6 or size < 1e-3:
        mantissa, exponent = f"{x:.1e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    else:
        places = next(p for bound, p in _PLACES if size >= bound)
        text = f"{x:,.{places}f}".replace(",", "\u2009")
    return text.replace("-", "−")


def figure(value: Any, form: str) -> str:
    """Format a number for a terminal's table by a format such as `.2f`; damage becomes a dash.

    That is none, or no finite number, or a number so large that it stands for an absent one.
    """
    x = number_of(value)
    return MISSING if x is None or abs(x) > LARGEST else f"{x:{form}}"


def figure_range(low: Any, high: Any, form: str, between: str = "–") -> str:
    """Format the ends of an interval as `figure` does; empty if either is missing."""
    a, b = figure(low, form), figure(high, form)
    return "" if MISSING in (a, b) else f"{a}{between}{b}"


def exact(value: Any) -> str:
    """Format with five digits, so that rounding hides no failure beside a bound."""
    x = number_of(value)
    if x is None:
        return "not finite" if isinstance(value, float) else "missing"
    return f"{x:.5g}".replace("-", "−")


def percent(value: Any) -> str:
    """Format a share as a percentage with one decimal."""
    x = number_of(value)
    return MISSING if x is None else f"{100 * x:.1f}\u00a0%".replace("-", "−")


def percent_range(low: Any, high: Any) -> str:
    """Format an interval of shares; empty if either end is missing."""
    a, b = number_of(low), number_of(high)
    return "" if a is None or b is None else f"{100 * a:.1f}–{100 * b:.1f}\u00a0%"


def points(value: Any) -> str:
    """Format a difference of two shares in percentage points, with its sign."""
    x = number_of(value)
    if x is None:
        return MISSING
    text = f"{100 * x:+.1f}".replace("-", "−")
    return "0.0" if text[1:] == "0.0" else text


def interval(low: Any, high: Any, form: Callable[[Any], str] = exact) -> str:
    """Format the ends of an interval; empty if either is missing."""
    if number_of(low) is None or number_of(high) is None:
        return ""
    a, b = form(low), form(high)
    # A dash before a sign could be read as a part of the number.
    return f"{a} to {b}" if "−" in a + b or "+" in a + b else f"{a}–{b}"


def p_value(value: Any) -> str:
    """Format a p-value; small ones are bounded."""
    x = number_of(value)
    if x is None:
        return MISSING
    return "<\u20090.001" if x < 0.001 else f"{x:.3f}"


def duration(seconds: Any) -> str:
    """Format seconds: `40 ms`, `0.4 s`, `12 s`, `3 min 05 s`, `2 h 14 min`."""
    x = number_of(seconds)
    if x is None:
        return MISSING
    if 0 < x < 0.1:
        return f"{max(1, round(1000 * x))} ms"
    if x < 9.95:
        return f"{x:.1f} s"
    whole = round(x)
    return f"{whole} s" if whole < 60 else minutes(whole)


def minutes(seconds: int) -> str:
    """Format a minute or more: `3 min 05 s`, `2 h 14 min`."""
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def moment(iso: str) -> str:
    """Format an ISO time for reading; other text is returned unchanged."""
    try:
        when = datetime.fromisoformat(iso)
    except ValueError:
        return iso
    return f"{when.day} {when:%B %Y, %H:%M} {when.tzname() or ''}".strip()


def bound(text: str) -> str:
    """Replace `>=`, `<=` and `==` by their mathematical signs."""
    for plain, sign in _BOUNDS.items():
        text = text.replace(plain, sign)
    return text


def words(name: str) -> str:
    """Turn an identifier such as `train-reward-model` or `pairs_train` into words."""
    text = name.replace("-", " ").replace("_", " ").strip()
    text = re.sub(r"\b(sft|ppo|kl|eos)\b", lambda match: match[0].upper(), text)
    return text[:1].upper() + text[1:]


def sentence(value: Any) -> str:
    """Return a remark as a sentence, with a capital and a full stop; empty if there is none."""
    plain = str(value or "").strip()
    return (
        plain[:1].upper()
        + plain[1:]
        + ("" if plain.endswith((".", "!", "?")) else ".") * bool(plain)
    )


def text_of(text: Any) -> str:
    """Return a prompt or reply as text, also one that is a list of messages."""
    if isinstance(text, list | tuple):
        return "\n".join(
            f"{m.get('role')}: {m.get('content')}" if isinstance(m, Mapping) else str(m)
            for m in text
        )
    return str(text)


def short(digest: str | None) -> str:
    """Return the first twelve characters of a digest, without its algorithm."""
    return (digest or "").rpartition(":")[2][:12] or MISSING


def clean(value: Any) -> Any:
    """Escape hidden characters and lone surrogates in untrusted text."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return _HIDDEN.sub(_escape, value)
    return value


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
