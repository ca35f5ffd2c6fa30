"""Text of strangers as text: characters that would act on a terminal or a page are written out."""

from __future__ import annotations

import re

#: Ends of lines, tabs, and the spaces of French and Chinese typography.
_KEPT = frozenset("\n\t\u00a0\u202f\u3000")
#: Longest word of a message, in characters.
LONGEST = 300
_LONG_WORD = re.compile(r"\S{100,}")
_ENDS = re.compile(r"\r\n|[\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")


def printable(value: object) -> str:
    """Return text in which only ends of lines and tabs are not printable.

    Escape sequences of a terminal, overrides of the writing direction and halves of surrogate pairs
    become what Python writes for them, such as `\\x1b`. A lone `\\r` ends a line.
    """
    text = str(value)
    if text.isprintable():
        return text
    text = _ENDS.sub("\n", text)
    return "".join(c if c.isprintable() or c in _KEPT else ascii(c)[1:-1] for c in text)


def one_line(value: object) -> str:
    """Return `printable` text as one line."""
    return " ".join(printable(value).split())


def shortened(value: object, longest: int = LONGEST) -> str:
    """Return text as one line, without the middles of words that are very long.

    A message keeps its end this way, where the cure stands. Beyond 20 times `longest`, the line is
    cut off too.
    """
    line = _LONG_WORD.sub(lambda match: _middle_left_out(match[0], longest), one_line(value))
    return _middle_left_out(line, 20 * longest)


def counted(number: int, noun: str, several: str = "") -> str:
    """Return `1 reply` or `2 replies`: a number with its noun."""
    return f"{number:,} {noun if number == 1 else several or noun + 's'}"


def _middle_left_out(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    kept = longest // 2
    return f"{text[:kept]}…({len(text) - 2 * kept:,} more characters)…{text[-kept:]}"
