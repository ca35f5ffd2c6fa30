"""Forms of most texts of each column: chats of a known format, shared marks, end tokens.

What most rows have is the file's format, and is parsed or cut for all of them, or refused.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from rlhf.data.cell_texts import texts_of
from rlhf.data.cells import Cells
from rlhf.data.columns import Row, cell_of
from rlhf.data.markup import LISTS, WEAK, Markup, markup_of, recognise
from rlhf.data.records import LeftOutError
from rlhf.data.shared_marks import CUT_SPEAKER, ENOUGH, Marks, MarkWatch
from rlhf.data.special_tokens import strip_end_tokens, without_prompt
from rlhf.errors import ConfigError

#: Share of the other replies below which an opening tells the two apart.
_FEW = 0.1


def with_forms(cells: Cells, sample: Sequence[Row]) -> tuple[Cells, list[str]]:
    """Return the cells with the forms of their columns, and sentences about them.

    Args:
        cells: Columns.
        sample: First rows.

    Raises:
        ConfigError: A column is written in a form that can't be parsed, or by a template that is
            not known, or is declared to be text and not read.
    """
    for column in sorted(cells.plain):
        if column not in cells.columns:
            raise ConfigError(
                f"data.text_columns: {column!r} is not read; name columns of "
                f"{', '.join(cells.columns)}"
            )
    _check_line_breaks(cells, sample)
    markups, notes = find_markups(cells, sample)
    _check_replies(replace(cells, markups=markups), sample)
    replies = [c for c in (cells.first, cells.second) if c not in markups and c not in cells.plain]
    texts = {column: _texts(sample, column) for column in replies}
    named = [c for c in replies if _most(bool(CUT_SPEAKER.match(t)) for t in texts[c])]
    ended = [c for c in replies if _most(strip_end_tokens(t)[1] for t in texts[c])]
    watch = MarkWatch(_marks(cells, markups, sample))
    if cells.prompt is None:  # a conversation's question is a prompt
        asked = replace(cells, prompt=cells.first, first="", second="", system=None)
        notes += _notes(_marks(asked, markups, sample))
    notes += [*_notes(watch.columns), *_one_sided(watch.columns, cells)]
    cells = replace(
        cells, markups=markups, named=frozenset(named), ended=frozenset(ended), watch=watch,
        repeats=_repeat_prompts(cells, sample) if replies else False,
    )  # fmt: skip
    return cells, notes


#: A line break written as two characters, unlike commands of TeX and names in paths.
_ESCAPED_BREAK = re.compile(r"(?<!\\)\\n(?![a-z])|(?<=[.!?])\\n")


def _check_line_breaks(cells: Cells, sample: Sequence[Row]) -> None:
    """Refuse a column with escaped line breaks in over half of its texts and no real one.

    Raises:
        ConfigError: Models would learn to write a backslash and an n.
    """
    for column, is_reply in itertools.product(cells.columns, (True, False)):
        texts = [text for row in sample for text in texts_of(cell_of(row, column), is_reply)]
        if column in cells.plain or any("\n" in text for text in texts):
            continue
        escaped = [text for text in texts if _ESCAPED_BREAK.search(text)]
        if len(escaped) > len(texts) / 2:
            raise ConfigError(
                f"data.source: {column} has line breaks written as a backslash and an n in "
                f"{len(escaped)} of the first {len(texts)} texts ({ascii(escaped[0])[:60]}), and "
                "no real one; export the data with real line breaks, or, if the texts are meant "
                f"so, set data.text_columns={column}"
            )


def find_markups(cells: Cells, sample: Sequence[Row]) -> tuple[dict[str, Markup], list[str]]:
    """Return the markup of each column whose texts are written in one, and sentences about them.

    Replies of their own are not taken for chats by marks that other texts have too.

    Raises:
        ConfigError: A column is written in a markup that can't be parsed.
    """
    markups: dict[str, Markup] = {}
    notes = []
    replies = {cells.first, cells.second} if cells.prompt is not None else set()
    for column in cells.columns:
        markup = recognise(_texts(sample, column))
        if markup is None or column in (cells.system, cells.more) or column in cells.plain:
            continue
        if column in replies and markup in WEAK:
            continue
        if column in replies and markup in LISTS and not _hold_one_text(cells, sample):
            continue
        if markup.parse is None:
            raise ConfigError(
                f"data.source: column {column!r} holds chats written as {markup.name}, which "
                "can't be read back; export the data as JSON lines or Parquet, or, if they are "
                f"to be learned as text, set data.text_columns={column}"
            )
        markups[column] = markup
        if markup not in LISTS:
            notes.append(f"{column} holds chats written as {markup.name}, which are parsed")
    return markups, notes


def _hold_one_text(cells: Cells, sample: Sequence[Row]) -> bool:
    """Return whether all lists in the columns of replies hold one text, or prompts are lists too.

    Other lists are answers, and taking the text of some would tell them from the rest.
    """
    assert cells.prompt is not None
    if recognise(_texts(sample, cells.prompt)) in LISTS:
        return True
    texts = [*_texts(sample, cells.first), *_texts(sample, cells.second)]
    lists = [markup_of(text) for text in texts]
    return all(
        markup in LISTS and markup.parse is not None and len(markup.parse(text)) == 1
        for text, markup in zip(texts, lists, strict=True)
        if markup is not None
    )


def _check_replies(cells: Cells, sample: Sequence[Row]) -> None:
    """Refuse replies that are chats of other prompts: they may be answers about chats.

    Raises:
        ConfigError: With the setting that takes them as text.
    """
    for column in dict.fromkeys((cells.first, cells.second)):
        markup = (cells.markups or {}).get(column)
        if cells.prompt is None or markup is None or markup in LISTS:
            continue
        fits = [_fits(cells, row, column) for row in sample if cell_of(row, column)]
        if not any(fits):
            raise ConfigError(
                f"data.source: {column} holds chats written as {markup.name}, none of which "
                "continues the prompt of its row; give the reply alone, or, if the chats are the "
                f"answers, set data.text_columns={column}"
            )


def _fits(cells: Cells, row: Row, column: str) -> bool:
    try:
        prompt = cells.read_prompt(row, set())
    except LeftOutError:
        return True  # which says nothing of the reply
    try:
        cells.read_reply(cell_of(row, column), column, prompt, "reply", set())
    except LeftOutError:
        return False
    return True


def _notes(columns: Mapping[str, Marks]) -> list[str]:
    """Return sentences on what the texts of each column share at an edge, and keep."""
    notes: dict[str, None] = {}
    for marks in columns.values():
        if note := marks.check():
            notes[note] = None
        if ending := marks.common_ending():
            notes[f"most texts of {marks.column} end with {ending!r}, which stays in them"] = None
    return [*notes]


def _one_sided(columns: Mapping[str, Marks], cells: Cells) -> list[str]:
    """Return sentences on openings and endings that the replies of one column have, and few others.

    These are told where a column's texts share them at all.
    """
    found = []
    for one, other in itertools.permutations((cells.first, cells.second)):
        if one == other or one not in columns or other not in columns:
            continue
        opener, ending = columns[one].common_opener(), columns[one].common_ending()
        for words, where in ((opener, "in front of both"), (ending, "at the end of both")):
            if words and columns[other].share_of(words) < _FEW:
                found.append(
                    f"{words!r} tells {one} from {other} without a look at the rest: a reward "
                    f"model may learn that alone; cut it, or write it {where}"
                )
    return found


def _marks(cells: Cells, markups: Mapping[str, Markup], sample: Sequence[Row]) -> dict[str, Marks]:
    """Return the counts of marks of the columns; of those that are parsed, of the last turns."""
    columns: dict[str, Marks] = {}
    for column in (cells.prompt, cells.first, cells.second, cells.system):
        if not column or column in cells.plain or column in columns:
            continue
        is_reply = column not in (cells.prompt, cells.system)
        columns[column] = Marks(column, is_reply)
        parse = markups[column].parse if column in markups else None
        for row in sample:
            value = cell_of(row, column)
            value = parse(value) if parse is not None and isinstance(value, str) else value
            for text in texts_of(value, is_reply):
                columns[column].add(text)
    return columns


def _repeat_prompts(cells: Cells, sample: Sequence[Row]) -> bool:
    """Return whether the replies of most rows begin with the prompt.

    Raises:
        ConfigError: What follows the prompt has marks of a template.
    """
    if cells.prompt is None or {cells.first, cells.second} & cells.plain:
        return False
    repeats = []
    marks = Marks(cells.first, is_reply=True)
    for row in sample:
        asked = [*texts_of(cell_of(row, cells.prompt), False)][-1:]
        replies = [t for c in (cells.first, cells.second) for t in texts_of(cell_of(row, c), True)]
        if asked and asked[0].strip() and replies:
            rests = [without_prompt(asked[0], reply) for reply in replies]
            repeats.append(None not in rests)
            for rest in rests:
                marks.add(rest or "")
    if _most(repeats):
        marks.check()
        return True
    return False


def _texts(sample: Sequence[Row], column: str) -> list[str]:
    return [value for row in sample if isinstance(value := cell_of(row, column), str) and value]


def _most(found: Iterable[bool]) -> bool:
    """Return whether enough of some answers are yes."""
    answers = [*found]
    return bool(answers) and sum(answers) >= ENOUGH * len(answers)
