"""Openings and endings that texts share: pages of chats, emoji for speakers, words such as "Sure!".

A line of a chat page or an emoji for each speaker is a template's mark. Words are content, which a
reward model may learn all the same: they are told, and stay.
"""

from __future__ import annotations

import re
import unicodedata

#: Lines above messages as chat pages show them, with the form that a message names.
_PAGES = (
    # Discord: "ann — Today at 10:31", "ann — 01/02/2024 10:31 AM"
    (re.compile(
        r"[^\n—]{1,40} — (?:(?:Today|Yesterday) at |\d{1,4}[/.-]\d{1,2}[/.-]\d{1,4},? )"
        r"\d{1,2}:\d\d(?: ?[AaPp]\.?[Mm]\.?)?[ \t]*(?:\n|\Z)"
    ), "name — Today at 10:31"),
    # Slack: "Ann  10:31 AM"
    (re.compile(r"[^\W\d_][^\n:]{0,39} {1,2}\d{1,2}:\d\d [AaPp][Mm][ \t]*(?:\n|\Z)"),
     "name 10:31 AM"),
    # Telegram: "Ann, [01.02.2024 10:31]"
    (re.compile(r"[^\W\d_][^\n,\[]{0,39}, \[\d[\d/.:, -]{5,24}\]:?[ \t]*(?:\n|\Z)"),
     "name, [01.02.2024 10:31]"),
)  # fmt: skip
#: Emoji for the two speakers, with what follows them: a joined sign, a skin, the form of a picture.
_USER_SIGNS = "🧑👤👨👩🙋🙂🗣💁🧔👱🙎👧👦"
_ASSISTANT_SIGNS = "🤖🦾👾🦙"
_JOINED = "(?:[\ufe0f\U0001f3fb-\U0001f3ff]|\u200d[\u2640\u2642\U0001f300-\U0001faff]\ufe0f?)*"
_EMOJI_TURN = re.compile(
    rf"(?:\A|\n)\s?([{_USER_SIGNS}{_ASSISTANT_SIGNS}]){_JOINED}[ \t]*[:：]?(?=\s|\Z)"
)
_LONGEST = 40  # characters of an opening
_LONGEST_ENDING = 120  # characters
#: Between two sentences; the signs of Chinese and Japanese need no space.
_BREAK = re.compile(r"(?<=[.!?…])[\"'”’)\]*_]*\s+|(?<=[。！？])|\n+")
_WORD = re.compile(r"[^\W\d_]{2}")
#: Words and the sign behind them: "Sure! ", "A. ", "Answer - ", "As an AI model, "; or a line.
_WORDS = re.compile(
    r"([^\W\d_](?:[^\n.!?,:;()–—-]|-(?=\w)){0,38}?(?:\s?[.!?,:;)–—]+|\s[-]+))(?=\s)|"
    r"([^\W\d_]\w{0,20}(?: \w{1,20})?\n)"
)


def page_line(text: str) -> str | None:
    """Return the form of the line above a message that a chat page shows, if a text begins so."""
    head = text.lstrip()[:100]
    return next((form for line, form in _PAGES if line.match(head)), None)


def emoji_speaker(text: str, *, inside: bool = False) -> str | None:
    """Return the user's emoji that begins a turn, if an assistant's begins a later line.

    Args:
        text: The text.
        inside: Whether the turn begins inside of the text, not with it.
    """
    if not inside and (not text or text[0] not in _USER_SIGNS):
        return None
    signs = [m[1] for m in _EMOJI_TURN.finditer(text) if not inside or m.start()]
    user = next((i for i, sign in enumerate(signs) if sign in _USER_SIGNS), len(signs))
    is_answered = any(sign in _ASSISTANT_SIGNS for sign in signs[user + 1 :])
    return signs[user] if is_answered else None


def opening_words(text: str) -> str | None:
    """Return the words, or the symbol, that open a text and a sign ends; None for others."""
    head = text.lstrip()[: _LONGEST + 1]
    first = head.split(maxsplit=1)[0] if head.strip() else ""
    if 0 < len(first) <= 6 and unicodedata.category(first[0]) == "So":
        return first
    match = _WORDS.match(head)
    return match.group().strip() if match else None


def last_sentence(text: str) -> str | None:
    """Return the last sentence or line of a text; None if it is long, or the whole text.

    What has no word, such as an emoji or a bracket, belongs to the sentence before it.
    """
    tail = text.strip()[-_LONGEST_ENDING - 1 :]
    for start in reversed([match.end() for match in _BREAK.finditer(tail)]):
        if _WORD.search(tail, start):
            return tail[start:] if start > 0 else None
    return None
