"""Layouts of preference data: found by their columns, and converted row by row."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf.config import DataConfig
from rlhf.data.cells import TEXT_LISTS, Cells, find_markups, find_named
from rlhf.data.chat import to_text
from rlhf.data.columns import Row, cell_of, check_settings, value_of
from rlhf.data.exports import EXPORTS, Export, find_export, trees
from rlhf.data.markup import Markup
from rlhf.data.records import Comparison, Converted, LeftOutError
from rlhf.data.replies import (
    CONVERSATIONS,
    REPLIES,
    Found,
    find_ranking,
    find_rated,
    find_unranked,
)
from rlhf.data.verdicts import Judge, find_judge, names_a_reply
from rlhf.errors import ConfigError

PROMPTS = (
    "prompt", "question", "instruction", "query", "context", "user_input", "user_prompt", "input",
    "conversations", "conversation", "messages", "history", "problem", "post", "dialogue", "x",
)  # fmt: skip
#: Columns that identify a row.
_KEYS = ("id", "prompt_id", "conversation_id", "index", "source", "dataset")
SYSTEMS = ("system", "system_prompt", "system_message")
#: Columns of the preferred and the other reply.
PAIRS = (
    ("chosen", "rejected"), ("chosen_response", "rejected_response"),
    ("response_chosen", "response_rejected"), ("answer_chosen", "answer_rejected"),
    ("output_chosen", "output_rejected"), ("chosen_answer", "rejected_answer"),
    ("preferred", "dispreferred"), ("preferred_output", "non_preferred_output"),
    ("preferred_response", "dispreferred_response"), ("preferred", "rejected"),
    ("accepted", "rejected"), ("accepted_response", "rejected_response"),
    ("better", "worse"), ("better_response", "worse_response"),
    ("best", "worst"), ("pos_answer", "neg_answer"), ("positive", "negative"), ("pos", "neg"),
    ("good", "bad"), ("good_response", "bad_response"), ("winner", "loser"),
    ("winning_response", "losing_response"), ("winner_response", "loser_response"),
    ("win", "lose"), ("y_w", "y_l"), ("chosen_messages", "rejected_messages"),
)  # fmt: skip
#: Words for a reply in the names of two columns that differ in a suffix alone.
_REPLY_WORDS = (
    "response", "answer", "output", "completion", "reply", "text", "conversation", "generation",
    "candidate", "option", "human_ref", "assistant", "summary", "message", "model_response",
    "continuation", "chat", "responses",
)  # fmt: skip
_SUFFIXES = (("a", "b"), ("1", "2"), ("0", "1"), ("left", "right"), ("first", "second"))
_SCORES = (
    ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"), ("rating_chosen", "rating_rejected"),
    ("chosen_reward", "rejected_reward"),
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """A format and its columns, and the conversion of its rows."""

    name: str
    """One of `DataFormat`."""
    columns: tuple[str, ...]
    """Columns that are read."""
    notes: tuple[str, ...]
    """Sentences for the user: which columns are taken for what."""
    converter: Callable[[Row], Converted]
    unused: tuple[str, ...] = ()
    """Columns that are not read."""

    def convert(self, fields: Row) -> Converted:
        """Return everything that a row says.

        Raises:
            LeftOutError: It can't be used.
        """
        return self.converter(fields)


def detect(
    columns: Sequence[str], sample: Sequence[Row], config: DataConfig, *, text_cells: bool = False
) -> Layout:
    """Return the layout of a source by its columns, its first rows, and the settings.

    Args:
        columns: Names of all columns.
        sample: First rows.
        config: Format and columns that the user set.
        text_cells: True if all values are text, as in CSV.

    Raises:
        ConfigError: A column that is set does not exist or is not read, or no format fits.
    """
    check_settings(columns, sample, config)
    layout = _detect(columns, sample, config, text_cells)
    labels = [("label_column", config.label_column)]
    for name, column in (*labels, *(("score_weights", column) for column in config.score_weights)):
        if column is not None and column not in layout.columns:
            raise ConfigError(
                f"data.{name}: names {column!r}, but the rows are taken for {layout.name} "
                f"({layout.notes[0]}), where it has no meaning; remove the setting, or set "
                "data.format"
            )
    return layout


def _detect(
    columns: Sequence[str], sample: Sequence[Row], config: DataConfig, text_cells: bool
) -> Layout:
    for name in EXPORTS:
        if config.format not in ("auto", name):
            continue
        if export := find_export(name, columns, sample, config):
            return _exported(name, export, columns, sample, config, text_cells)
    if config.format in ("auto", "open-assistant") and (convert := trees(columns, sample)):
        unused = tuple(name for name in columns if name != "prompt")
        note = "replies to the same message are compared by their rank"
        return Layout("open-assistant", ("prompt",), (note,), convert, unused)
    layout = _flat(columns, sample, config, text_cells)
    read = {column.partition(".")[0] for column in layout.columns} | set(layout.columns)
    return replace(layout, unused=tuple(name for name in columns if name not in read))


def _exported(
    name: str, export: Export, columns: Sequence[str], sample: Sequence[Row], config: DataConfig,
    text_cells: bool,
) -> Layout:  # fmt: skip
    """Return the layout of an export, from the rows that it is turned into."""
    names, flat = export.flatten(name, sample)
    settings = {"format": "auto", "label_column": config.label_column or export.label}
    layout = _flat(names, flat, config.model_copy(update=settings), text_cells)
    unused = export.unused(columns, sample, layout.columns)
    return replace(
        layout, name=name, unused=unused, converter=lambda row: layout.converter(export.widen(row))
    )


def _flat(
    columns: Sequence[str], sample: Sequence[Row], config: DataConfig, text_cells: bool
) -> Layout:
    """Return the layout of rows whose prompt and replies are columns."""
    names = {plain_name(column): column for column in reversed(columns)}
    finders = {
        "pairs": _find_pairs,
        "comparison": _find_comparison,
        "ranking": find_ranking,
        "rated": find_rated,
    }
    prompt = _find_prompt(names, config)
    for name, find in finders.items():
        if config.format in ("auto", name) and (found := find(names, sample, config, prompt)):
            return _layout(name, found, sample, text_cells)
    raise _unknown(columns, sample, config)


def _layout(name: str, found: Found, sample: Sequence[Row], text_cells: bool) -> Layout:
    cells, roles, decide, notes = found
    markups, more = find_markups(cells.columns, sample)
    if cells.prompt is None:
        _check_conversations(cells, markups, sample)
    named = find_named([c for c in (cells.first, cells.second) if c not in markups], sample)
    cells = replace(cells, markups=markups, text_cells=text_cells, named=named)
    columns = tuple(dict.fromkeys((*cells.columns, *decide.columns)))
    return Layout(name, columns, (*notes, *more), lambda row: decide.convert(row, cells, roles))


def _check_conversations(
    cells: Cells, markups: Mapping[str, Markup], sample: Sequence[Row]
) -> None:
    """Refuse replies that are plain texts, where no column holds the prompt."""
    values = [value_of(row, cells.first) for row in sample]
    texts = [value for value in values if isinstance(value, str)]
    if cells.first not in markups and len(texts) > len(values) / 2:
        raise ConfigError(
            f"data.prompt_column: no column holds the prompt, and {cells.first} "
            f"({_shown(texts[0])}) is no conversation that begins with it; set data.prompt_column"
        )


def _find_prompt(names: Mapping[str, str], config: DataConfig) -> Cells:
    """Return the columns of the prompt, the system turn, the history and Alpaca's input.

    The columns of the replies are empty.
    """
    prompt = config.prompt_column or next((names[n] for n in PROMPTS if n in names), None)
    more = names.get("input") if prompt and plain_name(prompt) == "instruction" else None
    system = config.system_column or next((names[n] for n in SYSTEMS if n in names), None)
    history = names.get("history")
    return Cells(
        prompt, "", "", system=system, more=more, history=history if history != prompt else None
    )


@dataclass(frozen=True)
class _Pair:
    """Rows of a preferred reply and another one; either may be a list of texts."""

    scores: tuple[str, str] | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return self.scores or ()

    def convert(self, row: Row, cells: Cells, roles: Sequence[str]) -> Converted:
        notes: set[str] = set()
        margin = self._margin(row)
        comparisons = []
        for one in _alternatives(row, cells.first):
            for other in _alternatives(row, cells.second):
                comparisons.append(Comparison(*cells.read({**row, **one, **other}, roles, notes),
                                              margin))  # fmt: skip
        return Converted(comparisons=comparisons, notes=frozenset(notes))

    def _margin(self, row: Row) -> float | None:
        if self.scores is None:
            return None
        values = [value_of(row, column) for column in self.scores]
        try:
            one, other = (float(value) for value in values)
        except (TypeError, ValueError, OverflowError):  # an integer of 400 digits
            return None
        if not (math.isfinite(one) and math.isfinite(other)):
            return None
        if one == other:
            raise LeftOutError("tie: both replies have the same score", f"{one:g}", is_choice=True)
        if one < other:
            raise LeftOutError(
                "the scores contradict the labels", f"{one:g} for chosen, {other:g} for rejected",
                "check which column holds the preferred reply",
            )  # fmt: skip
        return one - other


@dataclass(frozen=True)
class _Comparison:
    """Rows of two replies and a label that says which is better."""

    judge: Judge

    @property
    def columns(self) -> tuple[str, ...]:
        return self.judge.columns

    def convert(self, row: Row, cells: Cells, roles: Sequence[str]) -> Converted:
        notes: set[str] = set()
        verdict, margin = self.judge.decide(row)
        if verdict == "tie":
            raise LeftOutError("tie: neither reply is preferred", is_choice=True)
        prompt, first, second = cells.read(_turns(row, cells), roles, notes)
        if verdict == "second":
            first, second = second, first
        return Converted([Comparison(prompt, first, second, margin)], notes=frozenset(notes))


def _find_pairs(
    names: Mapping[str, str], sample: Sequence[Row], config: DataConfig,
    prompt: Cells,
) -> Found | None:  # fmt: skip
    chosen, rejected = config.chosen_column, config.rejected_column
    for one, other in PAIRS:
        if config.chosen_column is None and config.rejected_column is None:
            if chosen is None and one in names and other in names:
                chosen, rejected = names[one], names[other]
        elif rejected is None:
            rejected = names.get(other)
        elif chosen is None:
            chosen = names.get(one)
    if chosen is None or rejected is None:
        return None
    values = [v for row in sample if (v := cell_of(row, chosen)) not in (None, "")]
    are_labels = values and all(names_a_reply(value, list(names.values())) for value in values)
    if are_labels and _reply_columns(names, sample):
        return None  # the label of a comparison: {"response_a": …, "chosen": "response_a"}
    if prompt.prompt in (chosen, rejected):
        raise ConfigError(
            f"data.prompt_column = {prompt.prompt!r}: is the column of a reply; remove the "
            "setting: the prompt is what both conversations share"
        )
    if chosen == rejected:
        raise ConfigError(
            f"data.chosen_column = {chosen!r}: is data.rejected_column too; set two columns"
        )
    scores = next(((names[a], names[b]) for a, b in _SCORES if a in names and b in names), None)
    cells = replace(prompt, first=chosen, second=rejected)
    source = f"prompt from {cells.prompt}" if cells.prompt else "prompt is what both share"
    note = f"pairs: {source}; {chosen} is preferred to {rejected}"
    return cells, ("chosen", "rejected"), _Pair(scores), (note, *_prompt_notes(cells))


def _find_comparison(
    names: Mapping[str, str], sample: Sequence[Row], config: DataConfig,
    prompt: Cells,
) -> Found | None:  # fmt: skip
    found = _reply_columns(names, sample)
    if found is None:
        return None
    replies, suffixes = found
    judge = find_judge(names, sample, replies, suffixes, config)
    cells = replace(prompt, first=replies[0], second=replies[1])
    if prompt.prompt in replies:
        cells = replace(cells, prompt=None)
    note = f"comparison: {replies[0]} against {replies[1]}, {judge.description}"
    return cells, replies, _Comparison(judge), (note, *_prompt_notes(cells))


def _reply_columns(
    names: Mapping[str, str], sample: Sequence[Row]
) -> tuple[tuple[str, str], tuple[str, str]] | None:
    """Return two columns of replies whose names differ in a suffix, and the suffixes."""
    for suffixes in _SUFFIXES:
        for word in _REPLY_WORDS:
            replies = _with_suffixes(names, word, suffixes)
            if replies is not None and _hold_text(sample, replies):
                return replies, suffixes
    return None


def _prompt_notes(cells: Cells) -> Iterator[str]:
    if cells.system:
        yield f"{cells.system} goes before the prompt as a system turn"


def _with_suffixes(
    names: Mapping[str, str], word: str, suffixes: tuple[str, str]
) -> tuple[str, str] | None:
    stem, _, tail = word.partition("_") if word.startswith("model_") else (word, "", "")
    for form in ("{0}_{1}", "{0}{1}", "{1}_{0}", "{0}_{1}_{2}", "{0}{1}_{2}"):
        if ("{2}" in form) != bool(tail):
            continue
        one, other = (form.format(stem, suffix, tail) for suffix in suffixes)
        if one in names and other in names:
            return names[one], names[other]
    return None


def _hold_text(sample: Sequence[Row], columns: Sequence[str]) -> bool:
    """Return whether columns hold replies, not scores or names of models."""
    values = [row.get(column) for row in sample for column in columns]
    return any(isinstance(value, str | list | dict) and value for value in values)


def _alternatives(row: Row, column: str) -> list[Row]:
    """Return a row's values of a column that may be a list of several replies."""
    value = cell_of(row, column)
    if isinstance(value, list | tuple) and value and all(isinstance(v, str) for v in value):
        return [{column: text} for text in value]
    return [{column: value}]


def _turns(row: Row, cells: Cells) -> Row:
    """Unwrap cells that are JSON lists of turns, one for each, as in arena data."""
    listed = [
        c for c in cells.columns if (m := (cells.markups or {}).get(c)) and m.name in TEXT_LISTS
    ]
    if not {cells.prompt, cells.first, cells.second} <= {*listed}:
        return row
    unwrapped = dict(row)
    for column in listed:
        markup = (cells.markups or {})[column]
        assert markup.parse is not None
        turns = markup.parse(to_text(row.get(column), column))
        if not isinstance(turns, list) or len(turns) != 1:
            raise LeftOutError(
                "several turns are compared at once", f"{column}: {str(turns)[:60]}",
                "compare replies to one prompt",
            )  # fmt: skip
        unwrapped[column] = turns[0]
    return unwrapped


def _unknown(columns: Sequence[str], sample: Sequence[Row], config: DataConfig) -> ConfigError:
    """Return the error for rows of which nothing says what was preferred.

    Its cure is one that can work: rows without anything to compare have no column to set.
    """
    first = sample[0] if sample else {}
    shown = "; ".join(f"{name} ({_shown(first.get(name))})" for name in [*columns][:8]) or "none"
    names = {plain_name(name): name for name in columns}
    cure = (
        "set data.chosen_column and data.rejected_column to the columns of two replies, or "
        "data.label_column to the one that rates a reply, if there are such; docs/data.md shows "
        "the formats"
    )
    if {"parent_id", "message_id"} <= {*names}:
        reason = "rows are single messages of trees"
        cure = "give the file with whole message trees, one on each line"
    elif config.format != "auto":
        reason = f"data.format = {config.format!r} does not fit these columns"
    elif column := find_unranked(names, sample):
        reason = f"the replies in {column} have neither scores nor ranks"
        cure = (
            "set data.format=ranking if the best comes first, or data.label_column to a column "
            "with a score for each"
        )
    elif names.keys() <= {*PROMPTS, *SYSTEMS, *REPLIES, *_KEYS} and sample:
        reason = "there is nothing to compare in these columns"
        if names.keys() & {*CONVERSATIONS, *REPLIES}:
            reason = f"looks like data for supervised fine-tuning: {reason}"
        cure = (
            "give two replies to each prompt and which is better, or replies with ratings; "
            "docs/data.md shows the formats"
        )
    elif names.keys() & {*CONVERSATIONS, *REPLIES}:
        reason = (
            "looks like data for supervised fine-tuning: no column says which of two replies is "
            "better, or rates one"
        )
    else:
        reason = "no format fits these columns"
    return ConfigError(f"data.source: {reason}: {shown}; {cure}")


def _shown(value: Any) -> str:
    text = " ".join(str(value).split())
    return f"{type(value).__name__} {text[:30]}{'…' if len(text) > 30 else ''}"


def plain_name(column: str) -> str:
    """Return a column's name in lower case, its words joined by underscores."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", column.strip())
    return re.sub(r"[\s\-.]+", "_", spaced).lower()
