"""Special tokens of chat templates in replies, and other traces of an export."""

from __future__ import annotations

import re
from collections.abc import Sequence

END_TOKENS: tuple[str, ...] = (
    *("</s>", "<eos>", "[EOS]", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|end|>"),
    *("<|eot_id|>", "<|eom_id|>", "<|eot|>", "<end_of_turn>", "<|END_OF_TURN_TOKEN|>"),
    *("<|return|>", "<｜end▁of▁sentence｜>", "<|end_of_turn|>", "[|endofturn|]"),
)
_BEGIN_TOKENS = ("<s>", "<bos>", "<|begin_of_text|>", "<BOS_TOKEN>", "<｜begin▁of▁sentence｜>")

#: A whole cell that pandas, SQL or a spreadsheet wrote for a missing value. "none" is an answer.
MISSING_WORDS = frozenset({"nan", "NaN", "None", "NULL", "null", "<NA>", "N/A", "#N/A", r"\N"})

_BLANKS = 50  # most blanks in front of a prompt that a reply repeats
_SENTENCE_ENDS = ".!?…。！？"
_TAIL_LENGTH = 100  # characters at the end of a text that are searched for a token
_MIN_PROMPT = 8  # characters; a reply may begin with a shorter prompt by chance: "Hello"


def strip_end_tokens(reply: str, is_habit: bool = True, asked: str = "") -> tuple[str, bool]:
    """Return a reply without end tokens behind it and a begin token before it; whether it had any.

    `<s>` and `</s>` stay where they are HTML: "Price: <s>10</s>".

    Args:
        reply: The reply.
        is_habit: Whether most replies of the column end so. Otherwise a token that a sentence
            names stays: "The token is </s>".
        asked: The prompt, which may ask for the token.
    """
    start = after_begin_tokens(reply)
    struck = reply.rfind("<s>", start)
    closing = reply.find("</s>", struck) if struck >= 0 else -1
    end, found = len(reply), False
    while True:
        last = end
        while last > start and reply[last - 1].isspace():
            last -= 1
        token = next((t for t in END_TOKENS if reply.endswith(t, start, last)), None)
        if token is None or last - len(token) == closing:
            break
        if not (is_habit or found) and (
            token in asked
            or not _is_attached(reply, last - len(token))
            or _opens_turns(reply[start : last - len(token)])
        ):
            break
        end, found = last - len(token), True
    if not reply[:start].strip() or ("<s>" in reply[:start] and "</s>" in reply[start:end]):
        start = 0
    if not found and start == 0:
        return reply, False
    return (reply[start:end].rstrip() if found else reply[start:]), True


def edge_token(text: str) -> str | None:
    """Return the control token that ends a text and does not belong to its last sentence.

    A role may stand behind it: "Why?<|im_end|>\\n<|im_start|>assistant".
    """
    tail = text[-_TAIL_LENGTH:].rstrip()
    found = None
    for match in _CONTROL.finditer(tail):
        found = match
    if found is None or not _ROLE.fullmatch(tail, found.end()):
        return None
    start = len(text) - len(text[-_TAIL_LENGTH:]) + found.start()
    token = found.group()
    if token.startswith("<s") or (token == "</s>" and "<s" in text[:start]):
        return None  # HTML
    return token if _is_attached(text, start) else None


def break_token(text: str, asked: str = "") -> str | None:
    """Return the end token inside a text at which another text begins.

    It follows a sentence without a blank, or a mark of the next turn follows it. Where a token
    that opens a turn comes first, the text shows a template, as where code holds them, unless
    that one follows a sentence without a blank.
    """
    is_struck = False  # <s>…</s> is HTML
    for match in _CONTROL.finditer(text):
        token, start = match.group(), match.start()
        if token.startswith("<s") or (token == "</s>" and is_struck):
            is_struck = token != "</s>"
            continue
        if token in asked or _is_in_code(text, start):
            return None
        rest = _CONTROL.match(text, _blanks_end(text, match.end()))
        is_next = rest is not None and rest.group() not in END_TOKENS and token in END_TOKENS
        ends_sentence = start > 0 and text[start - 1] in _SENTENCE_ENDS
        return token if is_next or (ends_sentence and not ends_at(text, match.end())) else None
    return None


def without_prompt(prompt_text: str, reply: str) -> str | None:
    """Return a reply without the prompt that it repeats at its front; None where it doesn't.

    The two may differ in spacing. Empty lines after the prompt are cut, or one blank.
    """
    words = prompt_text.split(None, 1)
    if not words or not reply[: len(words[0]) + _BLANKS].lstrip().startswith(words[0]):
        return None  # as for nearly all replies
    if len(prompt_text.strip()) < _MIN_PROMPT:
        return None
    end, last = len(prompt_text), prompt_text[-1]
    if not reply.startswith(prompt_text):
        end, last = _end_of_words(prompt_text.split(), reply), prompt_text.rstrip()[-1]
    rest = "" if end is None else reply[end:]
    if not rest.strip() or (last.isalnum() and rest[0].isalnum()):
        return None  # "2 + 23" begins like the prompt "2 + 2" and doesn't repeat it
    lines = _EMPTY_LINES.match(rest)
    return rest[lines.end() :] if lines else rest.removeprefix("" if last.isspace() else " ")


def is_missing_word(text: str) -> bool:
    """Return True for a cell that is nothing but a word for a missing value."""
    return text.strip() in MISSING_WORDS


def after_begin_tokens(text: str) -> int:
    """Return where a text goes on after blanks and begin tokens."""
    match = _HEAD.match(text)
    return match.end() if match else 0


def ends_at(text: str, start: int) -> bool:
    """Return whether a text holds nothing but blanks and tokens from a position on."""
    return _TAIL.fullmatch(text, start) is not None


def _any_of(tokens: Sequence[str]) -> str:
    return "|".join(re.escape(token) for token in tokens)


_HEAD = re.compile(rf"(?:\s|{_any_of(_BEGIN_TOKENS)})*")
_TAIL = re.compile(rf"(?:\s|{_any_of((*END_TOKENS, *_BEGIN_TOKENS))})*")
_ROLE = re.compile(r"\s*\w{0,12}:?\s*")
_EMPTY_LINES = re.compile(r"(?:[ \t\r]*\n)+")
_CONTROL = re.compile(
    r"<s(?: [^<>]{0,200})?>|"
    + _any_of(
        (
            *(*END_TOKENS, *(token for token in _BEGIN_TOKENS if token != "<s>")),
            *("<|im_start|>", "<|im_sep|>", "<start_of_turn>", "<|START_OF_TURN_TOKEN|>"),
            *("<|start_header_id|>", "<|end_header_id|>", "<|header_start|>", "<|header_end|>"),
            *("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<｜User｜>", "<｜Assistant｜>"),
            *("<|system|>", "<|user|>", "<|assistant|>", "<|start|>", "<|message|>"),
            *("<extra_id_1>", "<extra_id_0>"),
            *("<|prompter|>", "<|start_of_role|>", "<|end_of_role|>", "[|user|]", "[|assistant|]"),
        )
    )
)


def _opens_turns(text: str) -> bool:
    """Return whether a text holds tokens that open a turn, as one that shows a template does."""
    tokens = (match.group() for match in _CONTROL.finditer(text))
    return any(token not in END_TOKENS and not token.startswith("<s") for token in tokens)


def _is_attached(text: str, start: int) -> bool:
    """Return whether a token at a position stands apart from the sentence before it."""
    before = text[:start].rstrip(" \t")
    if not before or before[-1] in "\n" + _SENTENCE_ENDS:
        return True
    return len(before) == start and before[-1] not in "`'\"(“‘*"


def _is_in_code(text: str, start: int) -> bool:
    """Return whether a position is inside backticks."""
    line = text.rfind("\n", 0, start) + 1
    return text.count("```", 0, start) % 2 == 1 or text.count("`", line, start) % 2 == 1


def _blanks_end(text: str, start: int) -> int:
    while start < len(text) and text[start].isspace():
        start += 1
    return start


def _end_of_words(words: list[str], text: str) -> int | None:
    """Return where the words end with which a text begins, whatever the spacing."""
    position = 0
    for index, word in enumerate(words):
        start = position
        while position < len(text) and text[position].isspace():
            position += 1
        if (index and position == start) or not text.startswith(word, position):
            return None
        position += len(word)
    return position
