"""Marks that most texts of a column begin or end with: the column is a template's output.

The formats of rlhf/data/markup.py are known by name. This rule knows none: a mark is a short piece
at the edge of a text in a form that no sentence has (`Name:`, `<|x|>`, `### Name`, `[Name]`).
"""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rlhf.data.cell_texts import texts_of
from rlhf.data.openers import emoji_speaker, last_sentence, opening_words, page_line
from rlhf.data.role_words import (
    ANSWERING,
    ASKING,
    ASSISTANTS,
    base_word,
    is_label,
    is_speaker,
    is_user,
)
from rlhf.data.special_tokens import END_TOKENS, strip_end_tokens
from rlhf.errors import ConfigError

#: Share of a column's texts with the same mark from which the column is a template's output.
ENOUGH = 0.6
#: Share of a column's texts that begin with the same words for which this is told.
_NEARLY_ALL = 0.9
#: Share in a stretch of rows; below it a sorted mixture of tasks would be taken for a template.
_ENOUGH_IN_STRETCH = 0.95
#: Different texts that the rule needs: of a few, most begin alike by chance.
_FEWEST = 5
_STRETCH, _CHECKED_EVERY = 25, 8  # examined texts
_DENSE_ROWS = 500  # of which all are examined; then one of 32
_EVERY = 32
_LONGEST_TOKEN = 90  # characters, and a role's name behind it
_EDGE = 200  # characters at the beginning and end of a text that are searched for marks
_LONGEST_INNER = 4000  # characters of a text that are searched for turns

#: Kinds of marks, the surest first: a special token's form; a speaker; a heading such as
#: "Answer"; any other name.
TOKEN, SPEAKER, LABEL, NAME = "token", "speaker", "label", "name"
#: Quotation marks, and tags of HTML: formatting, which is told and stays.
FORMAT = "format"


class Mark(NamedTuple):
    """A mark at the edge of a text, or of a turn inside it."""

    kind: str
    text: str
    """As it stands in the text, without numbers behind a name."""


def opening_mark(text: str) -> Mark | None:
    """Return the mark that a text begins with.

    Tokens that a text's own closing tag balances are content: `<think>…</think>`.
    """
    if text[:1] == text.rstrip()[-1:] == '"' and "\n" not in text and text.count('"') == 2:
        return Mark(FORMAT, '"')
    head = _plain(text[:_EDGE]).lstrip("\"' \t\r\n>")
    if match := _TOKEN_AT_START.match(head):
        return Mark(TOKEN, match.group())
    if match := _TAG_AT_START.match(head):
        return _tag(match, text)
    if match := _ATTRIBUTES_AT_START.match(head):
        return Mark(FORMAT, match.group())
    if form := page_line(head) or emoji_speaker(text[:_LONGEST_INNER].lstrip()):
        return Mark(SPEAKER, form)
    return _name_at_start(head)


def closing_mark(text: str) -> Mark | None:
    """Return the mark that a text ends with; an end tag of the text's own is content."""
    tail = _plain(text[-_EDGE:]).rstrip("\"' \t\r\n")
    last = tail[-_LONGEST_TOKEN:]
    if match := _TOKEN_AT_END.search(last):
        return Mark(TOKEN, match.group())
    if (match := _TAG_AT_END.search(last)) and (mark := _tag(match, text)):
        return mark
    if (match := _HASHES_AT_END.search(last)) and _is_role(match.group().strip("# ")):
        return Mark(TOKEN, match.group())
    line = tail[tail.rfind("\n") + 1 :]
    match = _NAME_AT_END.fullmatch(line) if line != text.strip() else None
    if match is not None:
        mark = _named(match["name"], match["mark"])
        return mark if match["right"] or "#" in match["left"] or mark.kind == SPEAKER else None
    match = _SPEAKER_AT_END.search(line)
    is_named = match is not None and _is_role(match["name"])
    return _named(match["name"], match.group()) if match and is_named else None


def inner_turn(text: str) -> Mark | None:
    """Return the mark of a user's turn that begins inside a text, behind something else.

    Words such as "Question" count only before a mark of a reply, a user's also alone.
    """
    text = _plain(text[:_LONGEST_INNER])
    for match in _INNER.finditer(text):
        name = base_word(match["name"])
        before = text[: match.start()].rstrip()
        if not before or before.endswith((":", "：", "```")):
            continue
        if is_user(name):
            return _named(match["name"], match["mark"].strip())
        if name in ASKING and any(
            base_word(later["name"]) in ANSWERING | ASSISTANTS
            for later in _INNER.finditer(text, match.end())
        ):
            return _named(match["name"], match["mark"].strip())
    for line in text.split("\n")[1:]:
        if "—" in line and (form := page_line(line)):
            return Mark(SPEAKER, form)
    if sign := emoji_speaker(text, inside=True):
        return Mark(SPEAKER, sign)
    return None


@dataclass
class Edge:
    """Beginning or end that several texts share, and the number of those texts."""

    shared: str
    count: int = 0

    def add(self, text: str, weight: int) -> None:
        """Count a text that shares at least the characters by which it was found."""
        self.shared = _common(self.shared, text)
        self.count += weight


@dataclass
class Marks:
    """Counts of the marks of a column's texts.

    Args:
        column: Its name.
        is_reply: True if the texts are replies, which end tokens end and the assistant's name
            begins: those are cut elsewhere.
    """

    column: str
    is_reply: bool
    begins: Counter[Mark] = field(default_factory=Counter)
    ends: Counter[Mark] = field(default_factory=Counter)
    inside: Counter[Mark] = field(default_factory=Counter)
    openers: Counter[str] = field(default_factory=Counter)
    """Words or a symbol in front of texts."""
    endings: Counter[str] = field(default_factory=Counter)
    """Last sentences of replies."""
    heads: dict[str, Edge] = field(default_factory=dict)
    tails: dict[str, Edge] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)
    """Hashes of the counted texts."""
    texts: int = 0
    """Sum of their weights."""

    def add(self, text: str, weight: int = 1) -> None:
        """Count the marks of a text, unless an equal one is counted.

        Args:
            text: The text.
            weight: Number of rows that it stands for.
        """
        if not text.strip() or (key := hash(text)) in self.seen:
            return
        self.seen.add(key)
        self.texts += weight
        plain = text.strip()
        for edges, edge in ((self.heads, plain[:_EDGE]), (self.tails, plain[: -_EDGE - 1 : -1])):
            edges.setdefault(edge[:_LEAST_SHARED], Edge(edge)).add(edge, weight)
        if opener := opening_words(text):
            self.openers[opener] += weight
        if self.is_reply and (ending := last_sentence(strip_end_tokens(text)[0])):
            self.endings[ending] += weight
        begin, end = opening_mark(text), closing_mark(text)
        if begin is not None and not (self.is_reply and CUT_SPEAKER.match(text)):
            self.begins[begin] += weight
        is_cut = end is not None and end.text in END_TOKENS and text.rstrip().endswith(end.text)
        if end is not None and not (self.is_reply and is_cut):
            self.ends[end] += weight
        turn = inner_turn(text) if "\n" in text or "\\n" in text or "USER" in text else None
        # A prompt that a user's turn ends is a chat; another may be a task on a transcript.
        is_last = turn and text.rstrip().rpartition("\n")[2].startswith(turn.text)
        if turn is not None and (self.is_reply or is_last):
            self.inside[turn] += weight

    def check(self, enough: float = ENOUGH) -> str | None:
        """Return a sentence on a mark of most texts that a template need not have written.

        Raises:
            ConfigError: Most texts have marks that a template wrote.
        """
        (begin, begins), (end, ends), (turn, turns) = map(
            _most, (self.begins, self.ends, self.inside)
        )
        least = max(_FEWEST, enough * self.texts)
        opens, closes = begins >= least, ends >= least
        told = (NAME, FORMAT)
        if begin and opens and (begin.kind not in told or (closes and begin.kind == NAME)):
            raise self._refusal("begins with", begin, begins)
        if end and closes and (end.kind != NAME or opens):
            raise self._refusal("ends with", end, ends)
        if turn and turns >= least:
            raise self._refusal("has a further turn", turn, turns)
        for verb, mark, is_shared in (("begin", begin, opens), ("end", end, closes)):
            if mark and is_shared:
                return f"most texts of {self.column} {verb} with {mark.text!r}, which stays in them"
        return self._check_edges(least) or self._tell_opener()

    def common_opener(self) -> str | None:
        """Return the words or symbol that nearly all texts begin with."""
        opener, count = next(iter(self.openers.most_common(1)), (None, 0))
        return opener if count >= max(_FEWEST, _NEARLY_ALL * self.texts) else None

    def common_ending(self) -> str | None:
        """Return the sentence that most replies end with."""
        ending, count = next(iter(self.endings.most_common(1)), (None, 0))
        return ending if count >= max(_FEWEST, ENOUGH * self.texts) else None

    def share_of(self, opener: str) -> float:
        """Return the share of the texts that begin with some words, or end with a sentence."""
        count = max(self.openers[opener], self.endings[opener])
        return count / self.texts if self.texts else 0.0

    def _tell_opener(self) -> str | None:
        opener = self.common_opener()
        if opener is None or (self.is_reply and CUT_SPEAKER.match(f"{opener} ")):
            return None
        return f"nearly all texts of {self.column} begin with {opener!r}, which stays in them"

    def _check_edges(self, least: float) -> str | None:
        """Check what most texts share at an edge in any form: a speaker between signs, a token."""
        for verb, edges in (("begins with", self.heads), ("ends with", self.tails)):
            edge = max(edges.values(), key=lambda edge: edge.count, default=Edge(""))
            shared = edge.shared if verb == "begins with" else edge.shared[::-1]
            if edge.count < least or len(shared) > _LONGEST_SHARED:
                continue
            if self.is_reply and (CUT_SPEAKER.match(shared) or shared.endswith(END_TOKENS)):
                continue
            if _speaker_in(shared) or _TOKEN_AT_START.search(shared):
                raise self._refusal(verb, Mark(TOKEN, shared.strip()), edge.count)
            is_structure = shared.startswith(_STRUCTURES) or shared.endswith(("}", "]"))
            shared = _WORD_CUT_OFF.sub("", shared)
            if _SIGN.search(shared) and not is_structure:
                return (
                    f"most texts of {self.column} {_PLURAL[verb]} {shared!r}, which stays in them"
                )
        return None

    def _refusal(self, verb: str, mark: Mark, count: int) -> ConfigError:
        return ConfigError(
            f"data.text_columns: most texts of {self.column} are written by a template: "
            f"{count:,} of {self.texts:,} {_PLURAL[verb]} {mark.text!r}; remove its marks, or "
            "give chats as lists of {role, content}, or, if they belong to the text, set "
            f"data.text_columns={self.column}"
        )


@dataclass
class MarkWatch:
    """The marks of each column's texts, over the first rows and those that follow."""

    columns: Mapping[str, Marks]
    stretches: dict[str, Marks] = field(default_factory=dict)
    rows: Counter[str] = field(default_factory=Counter)

    def see(self, column: str, value: Any) -> None:
        """Count the marks of a value, of one row of 32 in a long file.

        Raises:
            ConfigError: Most texts so far, or nearly all in a stretch, have marks of a template.
        """
        total = self.columns.get(column)
        if total is None:
            return
        self.rows[column] += 1
        weight = 1 if self.rows[column] <= _DENSE_ROWS else _EVERY
        if self.rows[column] % weight:
            return
        stretch = self.stretches.setdefault(column, Marks(column, total.is_reply))
        for text in texts_of(value, total.is_reply):
            total.add(text, weight)
            stretch.add(text)
        if len(total.seen) % _CHECKED_EVERY == 0:
            total.check()
        if len(stretch.seen) >= _STRETCH:
            stretch.check(_ENOUGH_IN_STRETCH)
            del self.stretches[column]


# --- one text ---------------------------------------------------------------------------------

#: The assistant's name in front of a reply, which is cut where most replies have it.
CUT_SPEAKER = re.compile(r"\s*(?:(?:### ?)?(?:Assistant|ASSISTANT):|### ?Response:)[ \n]*")

_TOKEN = (
    r"(?:<[|｜][^<>\n]{1,60}?[|｜]>|\[\|[^\[\]\n]{1,40}\|\]|<</?[A-Z]{2,20}>>|"
    r"</?(?:extra_id|reserved|unused)_?\d+>|</?s>|<\\/s>|</S>|<(?:[Ee][Oo][Ss]|[Bb][Oo][Ss]|BOS_TOKEN|"
    r"pad|PAD|unk|UNK|eo[hm]|sop|start_of_turn|end_of_turn)>|"
    r"\[(?:UNUSED_TOKEN_\d+|gMASK|/?INST|/?SYSTEM_PROMPT|/?AVAILABLE_TOOLS|(?i:PAD|SEP|CLS|EOS|BOS|UNK|EOT|END|STOP)|"
    r"/[A-Za-z]\w{0,30})\])"
)
_TAG = (
    r"<(?P<slash>/?)(?P<tag>[A-Za-z_][\w.:▁-]{0,40})(?P<role> (?:role|name|from)=[^<>\n]{1,40})?>"
)
_TOKEN_AT_START, _TAG_AT_START = re.compile(_TOKEN), re.compile(_TAG)
_TOKEN_AT_END = re.compile(rf"{_TOKEN}(?=\s*(?:[:：]|\w{{1,12}})?\Z)")
_ATTRIBUTES_AT_START = re.compile(r"<[a-z]{1,12} [^<>]{1,100}>")
_TAG_AT_END = re.compile(rf"{_TAG}(?=\s*[:：]?\Z)")
_HASHES_AT_END = re.compile(r"(?<!#)#{2,6}(?: ?[^\W\d_]\w{0,14})?\Z")
_HTML = frozenset(
    ("a", "b", "br", "hr", "i", "img", "input", "li", "link", "meta", "p", "q", "s", "td", "th",
     "tr", "u", "wbr")
)  # fmt: skip

_STAMP = r"(?:\[?\d[\d/.:, -]{2,24}(?:[AaPp]\.?[Mm]\.?)?\]?\s*(?:-\s*)?|\d{1,3}[.)]\s+)?"
_LEFT = r"(?P<left>[#>*_\[\-\t ]{0,8})"
_WORDS = r"(?P<name>[^\W\d_][^\n:：|<>\[\]*#.!?,\"`(){}=]{0,29}?)"
_NAME_AT_START = re.compile(
    rf"{_STAMP}(?P<mark>{_LEFT}{_WORDS}\s?(?P<right>[\]*_]{{0,4}}[:：][*_]{{0,3}}|\]|[*_]{{2,3}}(?=\s)|"
    r"\|| [-–—] |\n))(?!//)"
)
_NAME_AT_END = re.compile(
    rf"{_STAMP}(?P<mark>{_LEFT}{_WORDS}\s?(?P<right>[\]*_]{{0,4}}[:：][*_]{{0,3}}|\]|[*_]{{2,3}}|))"
)
_SPEAKER_AT_END = re.compile(
    r"(?:(?<=[\s>.!?。\]])|^)(?:#{1,6} ?|\[|\*\*)?(?P<name>[^\W\d_][^\s:：<>\[\]*#.]{0,20})"
    r"(?:(?:\]|\*\*)? ?[:：](?:\*\*)?|\])\Z"
)
#: A turn on a line of its own; on one line only in the spelling of transcripts.
_INNER = re.compile(
    r"(?P<mark>(?:\n[ \t]{0,8}(?:im_start )?|(?<=[.!?。] )(?=USER:|Human:)|(?<=[.!?。])(?=user\n))"
    r"(?:#{1,6} ?|\*\*|\[|<)?(?P<name>[^\W\d_][^\n:：|<>\[\]*#.!?,;\"`(){}=]{0,24})"
    r"(?:(?:\]|>|\*\*)? ?[:：](?:\*\*)?|\]|>|\*\*|(?=\r?\n)))"
)
_TAG_OF_STYLE = re.compile(r"</?(?:b|br|p|i|em|strong|div|span)/?>")
_WORD = re.compile(r"[^\W\d_]")
_BETWEEN_SIGNS = re.compile(
    r"(?:(?<=[^\w\s])|(?<=[^\w\s] )|^)[^\W\d_]+(?=\s?[^\w\s,.!?'’-]|\n|\Z)", re.M
)
_LEAST_SHARED = 3  # characters that texts of one group share
_LONGEST_SHARED = 60  # characters; a longer beginning is an instruction
#: Signs that prose has not.
_SIGN = re.compile(r"[^\w\s.,!?;:'\"()\-–—…“”‘’/。，、？！：；（）「」*#&%$+=]")
_WORD_CUT_OFF = re.compile(r"(?<=[^\w\s]\s)\w{1,3}\Z")
_STRUCTURES = ("{", "[", "<", "|", "`", "$", "\\")
_PLURAL = {"begins with": "begin with", "ends with": "end with", "has a further turn": "go on with"}


def _plain(piece: str) -> str:
    """Return a piece of text with escaped line breaks and HTML characters written out."""
    if "&lt;" in piece:
        piece = html.unescape(piece)
    if "\\n" in piece and "\n" not in piece:
        piece = piece.replace("\\n", "\n")
    return piece


def _tag(match: re.Match[str], text: str) -> Mark | None:
    """Return the mark of a tag, unless it is the text's own: HTML, or closed in the text."""
    name = match["tag"]
    if match["role"] or (is_speaker(name) and name.lower() not in _HTML):
        return Mark(SPEAKER, f"<{match['slash']}{name}>")
    if name.lower() in _HTML:
        return None
    other = f"<{name}" if match["slash"] else f"</{name}>"
    return None if other in text else Mark(TOKEN, match.group())


def _common(one: str, other: str) -> str:
    if other.startswith(one):
        return one
    end = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))
    return one[:end]


def _speaker_in(shared: str) -> bool:
    """Return whether a shared piece ends in a speaker between signs: `=== USER ===`, `user> `."""
    shared = _TAG_OF_STYLE.sub("", shared)
    words = [*_BETWEEN_SIGNS.finditer(shared)]
    return (
        bool(words) and is_speaker(words[-1].group()) and not _WORD.search(shared, words[-1].end())
    )


def _name_at_start(head: str) -> Mark | None:
    """Return the mark of a name in front of a text: `Name:`, `### Name`, `Answer - `."""
    match = _NAME_AT_START.match(head)
    if match is None or not _is_whole(match):
        return None
    mark = _named(match["name"], match["mark"])
    is_heading = any(sign in match["left"] for sign in ("#", "[", "**"))
    right = match["right"].strip()[:1]
    has_colon = right not in ("", "|", "-", "–", "—")
    # A single letter in front of a dash may be an option, "Answer" is a heading.
    is_word = mark.kind == LABEL and right in ("-", "–", "—") and len(match["name"].strip()) > 2
    return mark if has_colon or is_heading or is_word or mark.kind == SPEAKER else None


def _is_whole(match: re.Match[str]) -> bool:
    """Return whether the brackets or asterisks around a name are closed, or there are none."""
    left, right = match["left"], match["right"]
    if "[" in left and "]" not in right:
        return False
    return ":" in right or "：" in right or right[0] not in "]*_" or right[0] in left + "]"


def _is_role(name: str) -> bool:
    return not name or is_speaker(name) or is_label(name)


def _named(name: str, mark: str) -> Mark:
    kind = SPEAKER if is_speaker(name) else LABEL if is_label(name) else NAME
    return Mark(kind, re.sub(r"\s?\d+(?=\W*$)", "", mark.strip()))


def _most(counts: Counter[Mark]) -> tuple[Mark | None, int]:
    return counts.most_common(1)[0] if counts else (None, 0)
