"""Rows of two replies: of which one is preferred by its column, or by a label."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from rlhf.config import DataConfig
from rlhf.data.cells import Cells, Found
from rlhf.data.chat import loose_text, to_messages, to_text
from rlhf.data.collect import MAX_RANKED_PAIRS
from rlhf.data.columns import Row, cell_of, is_missing, value_of
from rlhf.data.markup import LISTS
from rlhf.data.ratings import CONVERSATIONS
from rlhf.data.records import Comparison, Converted, LeftOutError
from rlhf.data.reply_columns import are_labels, check_replies, hold_text, reply_columns
from rlhf.data.scores import find_unit, mean_score
from rlhf.data.verdicts import LABEL_COLUMNS, Judge, find_judge
from rlhf.errors import ConfigError

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
    ("response_j", "response_k"), ("good_edited_response", "bad_edited_response"),
)  # fmt: skip
PAIR_SCORES = (
    ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"), ("rating_chosen", "rating_rejected"),
    ("chosen_reward", "rejected_reward"),
)  # fmt: skip


@dataclass(frozen=True)
class _Pair:
    """Rows of a preferred reply and another one; either may be a list of texts."""

    scores: tuple[str, str] | None = None
    unit: str | None = None
    """Unit of the scores, which is that of both."""

    @property
    def columns(self) -> tuple[str, ...]:
        return self.scores or ()

    def convert(self, row: Row, cells: Cells, roles: Sequence[str]) -> Converted:
        notes: set[str] = set()
        counted: set[str] = set()
        margin = self._margin(row, counted)
        if not self._may_be_lists(row, cells):
            pair = Comparison(*cells.read(row, roles, notes), margin)
            return Converted([pair], notes=frozenset(notes), counted=frozenset(counted))
        ones = _alternatives(row, cells, cells.first)
        others = _alternatives(row, cells, cells.second)
        # Each reply of one list meets those of the other in turn, so that a limit leaves none out.
        turns = ((i, (i + turn) % len(others)) for turn in range(len(others))
                 for i in range(len(ones)))  # fmt: skip
        comparisons = []
        for i, j in itertools.islice(turns, MAX_RANKED_PAIRS):
            values = cells.read({**row, **ones[i], **others[j]}, roles, notes)
            comparisons.append(Comparison(*values, margin))
        skipped = max(len(ones) * len(others) - MAX_RANKED_PAIRS, 0)
        return Converted(
            comparisons, notes=frozenset(notes), counted=frozenset(counted), skipped=skipped
        )

    @staticmethod
    def _may_be_lists(row: Row, cells: Cells) -> bool:
        texts = all(isinstance(row.get(column), str) for column in (cells.first, cells.second))
        return not texts or cells.text_cells

    def _margin(self, row: Row, counted: set[str]) -> float | None:
        """Return the difference of the scores, None if one is missing or can't be read.

        Raises:
            LeftOutError: They are equal, or contradict the columns of the replies.
        """
        if self.scores is None:
            return None
        values = [value_of(row, column) for column in self.scores]
        if any(map(is_missing, values)):
            return None
        try:
            one, other = (
                mean_score(value, column, self.unit)
                for value, column in zip(values, self.scores, strict=True)
            )
        except LeftOutError:
            counted.add(
                f"{' or '.join(self.scores)} can't be read: write all of both as numbers in one "
                "form; such pairs have no margin from them, and contradictions stay unseen"
            )
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
        verdict, margin = self.judge.decide(row, notes)
        if verdict == "tie":
            raise LeftOutError("tie: neither reply is preferred", is_choice=True)
        prompt, first, second = cells.read(_turns(row, cells), roles, notes)
        if verdict == "second":
            first, second = second, first
        comparison = Comparison(prompt, first, second, margin, verdict)
        return Converted([comparison], notes=frozenset(notes))


def find_pairs(
    names: Mapping[str, str], sample: Sequence[Row], config: DataConfig, prompt: Cells
) -> Found | None:
    """Return the columns of a preferred and another reply, if there are such.

    Raises:
        ConfigError: A column that is set is no reply's, or the prompt's.
    """
    if config.chosen_column and config.rejected_column and config.label_column:
        return None  # a comparison of two columns that are set
    chosen, rejected = _pair_columns(names, sample, config)
    if chosen is None or rejected is None:
        return None
    if config.label_column and config.label_column == _label_naming(
        names, sample, {chosen, rejected}
    ):
        return None  # {"chosen": …, "rejected": …, "preference": "rejected"}
    _check_pair(names, sample, config, prompt, chosen, rejected)
    if are_labels(names, sample, chosen, rejected):
        if config.chosen_column or config.rejected_column:
            raise ConfigError(
                f"data.chosen_column, data.rejected_column: {chosen} and {rejected} hold labels "
                f"({cell_of(sample[0], chosen)!r}), not replies; remove the settings, and set "
                "data.label_column to the column that says which reply is better"
            )
        return None  # the label of a comparison: {"response_a": …, "chosen": "response_a"}
    if config.chosen_column is None and config.rejected_column is None:
        check_replies(names, sample, prompt.prompt, (chosen, rejected))
    scores = next(((names[a], names[b]) for a, b in PAIR_SCORES if a in names and b in names), None)
    cells = replace(prompt, first=chosen, second=rejected)
    if cells.prompt in (chosen, rejected):
        cells = replace(cells, prompt=None)
    source = f"prompt from {cells.prompt}" if cells.prompt else "prompt is what both share"
    if cells.prompt is None and _plain_texts(sample, rejected) and chosen in _chats(names):
        source = f"prompt is what precedes the last reply of {chosen}"
    note = f"pairs: {source}; {chosen} is preferred to {rejected}"
    pair = _Pair(scores, find_unit(sample, *scores)) if scores else _Pair()
    return cells, ("chosen", "rejected"), pair, (note, *_prompt_notes(cells))


def _pair_columns(
    names: Mapping[str, str], sample: Sequence[Row], config: DataConfig
) -> tuple[str | None, str | None]:
    """Return the columns of the preferred and the other reply, as far as they are known."""
    chosen, rejected = config.chosen_column, config.rejected_column
    if chosen is None and rejected is None:
        for one, other in PAIRS:
            if one in names and other in names:
                return names[one], names[other]
        # ms-swift and others: a conversation that ends with the preferred reply, and another one
        alone = next((names[n] for _, n in PAIRS if n in names), None)
        whole = next((c for c in _chats(names) if end_with_reply(sample, c)), None)
        if alone and whole:
            return whole, alone
        for word in ("response", "answer", "output", "completion"):  # ms-swift's older files
            if word in names and f"rejected_{word}" in names:
                return names[word], names[f"rejected_{word}"]
        return None, None
    for one, other in PAIRS:
        if rejected is None:
            rejected = names.get(other)
        elif chosen is None:
            chosen = names.get(one)
    return chosen, rejected


def _check_pair(
    names: Mapping[str, str], sample: Sequence[Row], config: DataConfig, prompt: Cells,
    chosen: str, rejected: str,
) -> None:  # fmt: skip
    """Refuse reply columns that are the prompt's, or of which another column says the better.

    Raises:
        ConfigError: With the setting to change.
    """
    is_set = config.prompt_column or config.chosen_column or config.rejected_column
    if prompt.prompt in (chosen, rejected) and is_set and prompt.prompt not in _chats(names):
        raise ConfigError(
            f"data.prompt_column = {prompt.prompt!r}: is the column of a reply; remove the "
            "setting: the prompt is what both conversations share"
        )
    if chosen == rejected:
        raise ConfigError(
            f"data.chosen_column = {chosen!r}: is data.rejected_column too; set two columns"
        )
    label = _label_naming(names, sample, {chosen, rejected})
    label = label or _label_beside(names, sample, config, prompt, (chosen, rejected))
    if label:
        raise ConfigError(
            f"data.chosen_column = {chosen!r}: {label!r} says for each row which of {chosen} and "
            f"{rejected} is better; set data.label_column={label} too, or remove the column"
        )


def find_comparison(
    names: Mapping[str, str], sample: Sequence[Row], config: DataConfig, prompt: Cells
) -> Found | None:
    """Return two reply columns and what says which is better, if there are such.

    Raises:
        ConfigError: There are two replies, but nothing certain says which is better.
    """
    found = reply_columns(names, sample)
    if config.chosen_column and config.rejected_column:
        found = (config.chosen_column, config.rejected_column), ("", "")
    found = found or _replies_by_label(names, sample)
    if found is None:
        return None
    replies, suffixes = found
    judge = find_judge(names, sample, replies, suffixes, config, prompt.text_cells)
    cells = replace(prompt, first=replies[0], second=replies[1])
    if prompt.prompt in replies:
        cells = replace(cells, prompt=None)
    note = f"comparison: {replies[0]} against {replies[1]}, {judge.description}"
    return cells, replies, _Comparison(judge), (note, *_prompt_notes(cells))


def _label_naming(
    names: Mapping[str, str], sample: Sequence[Row], columns: set[str] | None = None
) -> str | None:
    """Return a label column whose values are the names of two columns, each in some row."""
    known = set(names.values())
    for name in LABEL_COLUMNS:
        values = {v for row in sample if (v := cell_of(row, names.get(name, ""))) is not None
                  and isinstance(v, str)}  # fmt: skip
        if len(values) == 2 and values <= known and columns in (None, values):
            return names[name]
    return None


def _label_beside(
    names: Mapping[str, str], sample: Sequence[Row], config: DataConfig, prompt: Cells,
    pair: tuple[str, str],
) -> str | None:  # fmt: skip
    """Return what decides between columns of two replies that are set to be a pair.

    `response_a` and `response_b` are named alike, so that neither is the better one in all rows.
    """
    found = reply_columns(names, sample)
    if config.chosen_column is None or found is None or {*found[0]} != {*pair}:
        return None
    try:
        judge = find_judge(names, sample, *found, config, prompt.text_cells)
        verdicts = [judge.decide(row, set())[0] for row in sample]
    except (ConfigError, LeftOutError):
        return None  # nothing certain
    is_label = judge.by == "label" and {"first", "second"} <= {*verdicts}
    return judge.columns[0] if is_label else None


def _replies_by_label(
    names: Mapping[str, str], sample: Sequence[Row]
) -> tuple[tuple[str, str], tuple[str, str]] | None:
    """Return two columns that a label column names: {"gpt": …, "llama": …, "winner": "gpt"}."""
    label = _label_naming(names, sample)
    if label is None:
        return None
    values = {v for row in sample if isinstance(v := cell_of(row, label), str)}
    one, other = (column for column in names.values() if column in values)
    return ((one, other), ("", "")) if hold_text(sample, (one, other)) else None


def _chats(names: Mapping[str, str]) -> list[str]:
    return [names[n] for n in CONVERSATIONS if n in names]


def end_with_reply(sample: Sequence[Row], column: str) -> bool:
    """Return whether a column's conversations end with a reply."""
    values = [value for row in sample if (value := cell_of(row, column))]
    ends = 0
    for value in values:
        try:
            ends += to_messages(value, "chosen")[-1]["role"] == "assistant"
        except LeftOutError:
            continue
    return ends > len(values) / 2


def _plain_texts(sample: Sequence[Row], column: str) -> bool:
    return any(isinstance(cell_of(row, column), str) for row in sample)


def _prompt_notes(cells: Cells) -> Iterator[str]:
    if cells.system:
        yield f"{cells.system} goes before the prompt as a system turn"


def _alternatives(row: Row, cells: Cells, column: str) -> list[Row]:
    """Return a row's values of a column that may be a list of several replies.

    Raises:
        LeftOutError: A list begins with the prompt, so that its texts are turns.
    """
    value = cell_of(row, column)
    markup = (cells.markups or {}).get(column)
    if isinstance(value, str) and cells.text_cells and markup in LISTS:
        assert markup.parse is not None
        listed = markup.parse(value)
        value = listed[0] if listed and len(listed) == 1 else value  # several may be an answer
    if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
        return [{column: value}]
    asked = cell_of(row, cells.prompt) if cells.prompt else None
    if isinstance(asked, str) and value and loose_text(value[0]) == loose_text(asked):
        if len(value) != 2:
            raise LeftOutError(
                f"{column} is a list of turns", f"{len(value)} texts, the first is the prompt",
                "give the reply alone, or a list of {role, content}",
            )  # fmt: skip
        value = value[1:]
    return [{column: text} for text in value] or [{column: value}]


def _turns(row: Row, cells: Cells) -> Row:
    """Unwrap cells that are JSON lists of turns, one for each, as in arena data."""
    listed = [c for c in cells.columns if (m := (cells.markups or {}).get(c)) and m in LISTS]
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
                "compare replies to one prompt", is_choice=True,
            )  # fmt: skip
        unwrapped[column] = turns[0]
    return unwrapped
