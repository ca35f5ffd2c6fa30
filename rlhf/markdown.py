"""Markdown for Prefect's UI and data cards: strings are escaped, unless this module made them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rlhf.plain_text import one_line, printable


class Markdown(str):
    """Markdown that holds no text of a stranger unescaped; only this module makes it."""

    __slots__ = ()


#: Markup anywhere in a line; an underscore inside of a word is none.
_MARKUP = re.compile(r"[`*\[\]~]|(?<![^\W_])_|_(?![^\W_])")
#: Markup at the beginning of a line: lists, headings, quotations, underlines.
_BLOCK = re.compile(r"^(\d{1,9}(?=[.)](?:\s|$)))?([-+#=.)])")
#: Not all renderers let a backslash escape these.
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "\\": "&#92;", "|": "&#124;"}


def escape(text: object, limit: int | None = None) -> Markdown:
    """Return text of a stranger for Markdown: no markup, no HTML, no links, no line breaks.

    Args:
        text: Anything; it is shown as text. Markdown of this module is returned unchanged.
        limit: Longest text, in characters.
    """
    if isinstance(text, Markdown):
        return text
    line = one_line(text)
    if limit is not None and len(line) > limit:
        line = line[:limit] + "…"
    line = "".join(_ENTITIES.get(c, c) for c in line)
    line = _MARKUP.sub(lambda match: f"\\{match[0]}", line)
    # GitHub and Prefect make links of bare addresses.
    line = line.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")
    return Markdown(_BLOCK.sub(lambda match: f"{match[1] or ''}&#{ord(match[2])};", line))


def bold(text: object) -> Markdown:
    """Return text in bold."""
    return Markdown(f"**{escape(text)}**")


def code(text: object) -> Markdown:
    """Return text as code, for paths and commands; its backticks can't end it."""
    line = one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return Markdown(f"{fence}{pad}{line or ' '}{pad}{fence}")


def words(*parts: object) -> Markdown:
    """Return parts with spaces between them; strings are escaped."""
    return Markdown(" ".join(map(escape, parts)))


def paragraphs(*parts: Markdown) -> Markdown:
    """Return blocks with empty lines between them; empty ones are left out."""
    return Markdown("\n\n".join(part for part in parts if part))


def bullets(items: Iterable[object]) -> Markdown:
    """Return a list; nothing if it has no items."""
    return Markdown("\n".join(f"- {escape(item)}" for item in items))


def quotation(text: object) -> Markdown:
    """Return text as a quotation: each of its lines is escaped, indented and broken as it is."""
    return Markdown("\n".join(map(_quoted, printable(text).split("\n"))))


def command(text: object) -> Markdown:
    """Return a command on a line of its own, to copy."""
    return Markdown(f"    {one_line(text)}")


def code_block(text: object, language: str = "") -> Markdown:
    """Return lines of code, to copy; no line of backticks in them can end the block."""
    lines = printable(text).strip("\n")
    fence = "`" * (1 + max(map(len, re.findall("`{2,}", lines)), default=2))
    return Markdown(f"{fence}{language}\n{lines}\n{fence}")


def rule() -> Markdown:
    """Return a line between two parts."""
    return Markdown("---")


def heading(text: object, level: int = 1, limit: int | None = None) -> Markdown:
    """Return a heading."""
    # Signs at its end would close it, and not be shown.
    shown = re.sub("#+$", lambda match: "&#35;" * len(match[0]), escape(text, limit))
    return Markdown(f"{'#' * level} {shown}")


def table(
    head: Sequence[object], rows: Iterable[Sequence[object]], limit: int | None = None
) -> Markdown:
    """Return a table; nothing if it has no rows."""
    lines = [_row(row, limit) for row in rows]
    return Markdown(
        "\n".join([_row(head, limit), "|" + "---|" * len(head), *lines] if lines else [])
    )


def _row(cells: Sequence[object], limit: int | None) -> str:
    return "| " + " | ".join(escape(cell, limit) for cell in cells) + " |"


def _quoted(line: str) -> str:
    content = line.lstrip()
    indent = "&nbsp;" * len(line[: len(line) - len(content)].expandtabs(4)) if content else ""
    return f"> {indent}{escape(content)}  "
