"""Decide which of two replies a row of a comparison log prefers.

A label whose meaning is not certain is refused until `data.labels` sets it: a wrong guess inverts
every pair.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from rlhf.config import DataConfig
from rlhf.data.columns import Row, filled_cells, plain_name, value_of
from rlhf.data.label_words import (
    TIES,
    Verdict,
    exact_label,
    is_marked,
    is_number,
    label_words,
    plain_label,
    relation,
    selects_side,
    votes_of,
)
from rlhf.data.records import LeftOutError
from rlhf.data.scores import find_unit, mean_score, number_of
from rlhf.data.special_tokens import is_missing_word
from rlhf.errors import ConfigError

#: Label columns, the usual ones first.
LABEL_COLUMNS = (
    "winner", "label", "labels", "preference", "choice", "better_response_id", "chosen_id",
    "preferred_id", "better", "preferred", "judgment", "judgement", "verdict", "vote", "votes",
    "result", "chosen", "selected", "comparison", "human_preference", "annotations",
    "overall_preference", "preference_strength",
)  # fmt: skip
#: Score columns of the two replies; a higher score is better.
SCORE_COLUMNS = ("score", "rating", "reward", "quality")
#: HelpSteer's columns: negative where the first reply is better, 0 for a tie.
_SIGNED = ("overall_preference", "preference_strength")
#: Column of AlpacaEval with 1 plus the probability that the second reply is better.
_SHARE = "preference"
#: Words in the names of columns that name the worse reply.
_WORSE = frozenset(
    ("loser", "loses", "worse", "worst", "rejected", "dispreferred", "error", "errors", "bad")
)


@dataclass(frozen=True)
class Judge:
    """Reads the verdict of a row: by label, by one-hot columns, or by two scores."""

    description: str
    columns: tuple[str, ...]
    first: str
    second: str
    words: Mapping[str, Verdict]
    by: Literal["label", "sign", "share", "one-hot", "scores"] = "label"
    models: tuple[str, str] | None = None
    """Columns with the names of the two replies' models, one of which a label may give."""
    suffixes: tuple[str, str] = ("a", "b")
    """The part in which the names of the two replies differ."""
    are_set: bool = False
    """True if `data.labels` gives the words their meaning."""
    text_cells: bool = False
    """True if all cells are text, so that a missing value is a word."""
    numbers: frozenset[str] = frozenset()
    """Numbers among the labels of the first rows, by which 0 or 1 was found to be the first."""
    unit: str | None = None
    """Unit of two scores, such as `/5`."""
    others: tuple[Judge, ...] = ()
    """Further label columns, which must not say the contrary."""

    def decide(self, row: Row, notes: set[str]) -> tuple[Verdict, float | None]:
        """Return a row's verdict, and by how much where the source says.

        Raises:
            LeftOutError: The label is missing or unknown, or another label says the contrary.
            ConfigError: A number is outside of the convention of the first rows.
        """
        verdict, margin = self._decide(row, notes)
        for other in self.others:
            try:
                contrary, _ = other._decide(row, set())
            except LeftOutError:
                continue
            if {verdict, contrary} == {"first", "second"}:
                raise LeftOutError(
                    f"{self.columns[0]} and {other.columns[0]} say the contrary",
                    f"{verdict} against {contrary}",
                    f"set data.label_column={self.columns[0]} or "
                    f"data.label_column={other.columns[0]}",
                )
        return verdict, margin

    def _decide(self, row: Row, notes: set[str]) -> tuple[Verdict, float | None]:
        values = [value_of(row, column) for column in self.columns]
        if self.by == "one-hot":
            return self._one_hot(values), None
        if self.by == "scores":
            one, two = (
                mean_score(value, name, self.unit)
                for value, name in zip(values, self.columns, strict=True)
            )
            return _sign(two - one), abs(one - two)
        votes = votes_of(values[0])
        if self.text_cells and not self.are_set:
            votes = [vote for vote in votes if not is_missing_word(str(vote))]
        if not votes:
            raise LeftOutError(f"{self.columns[0]} is missing")
        verdicts = self._count(votes, row, notes)
        if len(votes) == 1:
            is_list = isinstance(values[0], list | tuple)  # where other rows have several votes
            margin = self._lead(votes[0])
            return next(iter(verdicts)), 1.0 if is_list and margin is None else margin
        lead = verdicts["first"] - verdicts["second"]
        return _sign(-lead), abs(lead) / sum(verdicts.values())

    def _lead(self, vote: Any) -> float | None:
        """Return by how much a number prefers its reply; None for labels."""
        if self.by == "share":
            return abs(2 * _number(vote, self.columns[0]) - 3)  # of the probabilities p and 1 − p
        return abs(_number(vote, self.columns[0])) if self.by == "sign" else None

    def _count(self, votes: Sequence[Any], row: Row, notes: set[str]) -> Counter[Verdict]:
        """Return the verdicts of a row's votes; among others, those of unknown value do not count.

        Raises:
            LeftOutError: Half of them or more are unknown.
        """
        verdicts: Counter[Verdict] = Counter()
        fault: LeftOutError | None = None
        for vote in votes:
            try:
                verdicts[self._vote(vote, row)] += 1
            except LeftOutError as error:
                fault = error
        known = sum(verdicts.values())
        if fault is not None and known <= len(votes) / 2:
            raise fault
        if known < len(votes):
            notes.add(f"votes of unknown value in {self.columns[0]} are not counted")
        return verdicts

    def _vote(self, value: Any, row: Row) -> Verdict:
        if self.by == "sign":
            return _sign(_number(value, self.columns[0]))
        if self.by == "share":
            number = _number(value, self.columns[0])
            if not 1 <= number <= 2:
                raise ConfigError(
                    f"data.label_column: {self.columns[0]!r} holds {number:g}, but in the first "
                    "rows numbers from 1, the first reply, to 2, the second; write all in one way"
                )
            return _sign(number - 1.5)
        verdict = self.words.get(exact_label(value))
        if verdict is None and not is_marked(value):
            verdict = self.words.get(plain_label(value))
        verdict = verdict or (None if self.are_set else relation(value, self.suffixes))
        text = self._named(value, row)
        if verdict is not None and text not in (None, verdict) and not self.are_set:
            raise LeftOutError(
                f"{self.columns[0]} names one reply and is the text of the other",
                repr(value)[:60], "set data.labels.first and data.labels.second",
            )  # fmt: skip
        if verdict or text:
            return verdict or text or "tie"
        if self.numbers and exact_label(value) in {"0", "1", "2"} - self.numbers:
            raise ConfigError(
                f"data.label_column: {self.columns[0]!r} holds {exact_label(value)}, but in the "
                f"first rows {' and '.join(sorted(self.numbers))} alone, so that 1 may mean either "
                "reply; write all labels in one way, or as the names of the columns"
            )
        raise LeftOutError(
            f"{self.columns[0]} has an unknown value", repr(value)[:60],
            "set data.labels.first, data.labels.second and data.labels.tie",
        )  # fmt: skip

    def _named(self, value: Any, row: Row) -> Verdict | None:
        """Return the reply whose text, or whose model's name, a label repeats."""
        if not isinstance(value, str) or not plain_label(value):
            return None
        for columns in ((self.first, self.second), self.models or ()):
            names = [plain_label(value_of(row, column)) for column in columns]
            if names.count(plain_label(value)) == 1:
                return "first" if names[0] == plain_label(value) else "second"
        return None

    def _one_hot(self, values: Sequence[Any]) -> Verdict:
        flags = [plain_label(value) in ("1", "1.0", "true") for value in values]
        if sum(flags) != 1:
            raise LeftOutError("not exactly one of the winner columns is set", repr(values)[:60])
        verdicts: tuple[Verdict, ...] = ("first", "second", "tie")
        return verdicts[flags.index(True)]


def find_judge(
    names: Mapping[str, str],
    sample: Sequence[Row],
    replies: tuple[str, str],
    suffixes: tuple[str, str],
    config: DataConfig,
    text_cells: bool = False,
) -> Judge:
    """Return the way to decide between two reply columns.

    Args:
        names: Columns by their plain names.
        sample: First rows.
        replies: Columns of the two replies.
        suffixes: The part in which their names differ: a and b, 1 and 2.
        config: Label column and the meaning of its values.
        text_cells: True if all cells are text.

    Raises:
        ConfigError: There is no label, or its meaning is not certain.
    """
    one_hot = [names.get(f"winner_{name}") for name in _one_hot_names(suffixes)]
    if config.label_column is None and one_hot[0] and one_hot[1]:
        columns = tuple(name for name in one_hot if name)
        return Judge(f"decided by {', '.join(columns)}", columns, *replies, {}, "one-hot")
    sides = {plain_label(column) for column in replies}
    fault: ConfigError | None = None
    judges: list[Judge] = []
    for label in _label_columns(names, sample, replies, config):
        # Judges are those whose values can be understood.
        if (
            judges
            and (label in _SIGNED or not _name_sides(sample, label, sides))
            and _name_sides(sample, judges[0].columns[0], sides)
        ):
            continue  # names of the columns say more than letters, and strengths have no side
        try:
            judges.append(_by_label(label, names, sample, replies, suffixes, config, text_cells))
        except ConfigError as error:
            fault = fault or error
    if judges:
        return replace(judges[0], others=tuple(j for j in judges[1:] if j.by == judges[0].by))
    if fault is not None:
        raise fault
    if config.label_column is None and (label := _unnamed_label(names, sample, sides)):
        return _by_label(label, names, sample, replies, suffixes, config, text_cells)
    for stem in SCORE_COLUMNS:
        scores = [_with_suffix(names, stem, suffix) for suffix in suffixes]
        if scores[0] and scores[1]:
            columns = (scores[0], scores[1])
            return Judge(f"decided by {' and '.join(columns)}, the higher", columns, *replies,
                         {}, "scores", unit=find_unit(sample, *columns))  # fmt: skip
    raise ConfigError(
        f"data.source: {replies[0]} and {replies[1]} are two replies, but no column says which "
        "is better; set data.label_column, and data.labels.first and data.labels.second to its "
        "values"
    )


def _is_constant(sample: Sequence[Row], label: str) -> bool:
    """Return whether several rows have a value in this column, and all of them the same."""
    values = [repr(value) for value in filled_cells(sample, label)]
    return len(values) > 1 and len({*values}) == 1


def _label_columns(
    names: Mapping[str, str], sample: Sequence[Row], replies: tuple[str, str], config: DataConfig
) -> list[str]:
    """Return the columns that may hold labels, those that say most of a reply first."""
    if config.label_column:
        return [config.label_column]
    labels = [names[n] for n in LABEL_COLUMNS if n in names and names[n] not in replies]
    sides = {plain_label(column) for column in replies}
    # A column with one value for all rows is a class of the rows rather than a decision.
    return sorted(
        labels,
        key=lambda label: (_is_constant(sample, label), not _name_sides(sample, label, sides)),
    )


def _by_label(
    label: str, names: Mapping[str, str], sample: Sequence[Row], replies: tuple[str, str],
    suffixes: tuple[str, str], config: DataConfig, text_cells: bool,
) -> Judge:  # fmt: skip
    """Return the way to decide by the values of one column."""
    is_set = any(v is not None for v in config.labels.model_dump().values())
    if not is_set and prefers_worse(label):
        raise ConfigError(
            f"data.label_column = {label!r}: seems to name the worse reply; set data.labels.first "
            f"to the value of rows whose {replies[0]} is better, and data.labels.second"
        )
    if (
        not is_set
        and re.fullmatch(rf".*_?(?:{'|'.join(map(re.escape, suffixes))})", label)
        and (re.search(r"rank|score|rating|reward", label.lower()))
    ):
        raise ConfigError(
            f"data.label_column = {label!r}: belongs to one of {replies[0]} and {replies[1]}; set "
            "the column that compares them, or remove the setting to compare score_a with score_b"
        )
    if label in _SIGNED and suffixes == ("1", "2") and not is_set and _has_negative(sample, label):
        return Judge(f"decided by the sign of {label}", (label,), *replies, {}, "sign")
    if plain_name(label) == _SHARE and suffixes == ("1", "2") and not is_set and _are_shares(
        sample, label
    ):  # fmt: skip
        way = f"decided by {label}: 1 is {replies[0]}, 2 is {replies[1]}, 1.5 is a tie"
        return Judge(way, (label,), *replies, {}, "share")
    models = [names.get(f"model_{s}") or names.get(f"name_{s}") for s in suffixes]
    both = (models[0], models[1]) if models[0] and models[1] else None
    words = label_words(label, sample, (*replies, *(both or ())), suffixes, config)
    votes = {plain_label(vote) for row in sample for vote in votes_of(value_of(row, label))}
    are_set = config.labels.first is not None or config.labels.second is not None
    # Of set labels one that is not set may stand in the first rows, and is left out there.
    numbers = frozenset(v for v in votes if v in ("0", "1", "2") and (are_set or v in words))
    return Judge(
        f"decided by {label}", (label,), *replies, words, models=both, suffixes=suffixes,
        numbers=numbers, are_set=are_set,
        text_cells=text_cells,
    )  # fmt: skip


def _unnamed_label(names: Mapping[str, str], sample: Sequence[Row], sides: set[str]) -> str | None:
    """Return the one column of any name that names the replies' columns, or selects a side.

    Label Studio writes the latter: `{"selected": "left"}` in JSON, `left` in CSV.
    """
    is_table = {"annotation_id", "lead_time"} <= names.keys()
    found = []
    for column in names.values():
        if prefers_worse(column):
            continue
        cells = filled_cells(sample, column)
        selects = is_table or (bool(cells) and all(selects_side(cell) for cell in cells))
        words = {*sides, *TIES, *(("left", "right") if selects else ())}
        values = {plain_label(vote) for cell in cells for vote in votes_of(cell)}
        if len(values - {*TIES}) == 2 and values <= words:
            found.append(column)
    return found[0] if len(found) == 1 else None


def _name_sides(sample: Sequence[Row], column: str, sides: set[str]) -> bool:
    """Return whether a column's values are the names of the reply columns."""
    values = {plain_label(v) for row in sample for v in votes_of(value_of(row, column))}
    return bool(values) and values <= {*sides, *TIES}


def _has_negative(sample: Sequence[Row], column: str) -> bool:
    """Return whether a column is a scale around 0, on which a sign tells the sides apart."""
    votes = [vote for row in sample for vote in votes_of(value_of(row, column))]
    return any(is_number(exact_label(vote)) and float(exact_label(vote)) < 0 for vote in votes)


def _are_shares(sample: Sequence[Row], column: str) -> bool:
    """Return whether a column holds numbers from 1 to 2, not all of them 1, 1.5 and 2."""
    votes = [exact_label(vote) for row in sample for vote in votes_of(value_of(row, column))]
    are_numbers = bool(votes) and all(is_number(vote) for vote in votes)
    return are_numbers and all(1 <= float(vote) <= 2 for vote in votes) and any(
        float(vote) not in (1, 1.5, 2) for vote in votes
    )  # fmt: skip


def prefers_worse(column: str) -> bool:
    """Return whether a label column's name says that it names the worse reply."""
    return bool(set(re.findall(r"[a-z]+", column.lower().replace("_", " "))) & _WORSE)


def _one_hot_names(suffixes: tuple[str, str]) -> tuple[str, str, str]:
    return (f"model_{suffixes[0]}", f"model_{suffixes[1]}", "tie")


def _with_suffix(names: Mapping[str, str], stem: str, suffix: str) -> str | None:
    forms = (f"{stem}_{suffix}", f"{stem}{suffix}", f"{suffix}_{stem}", f"response_{suffix}_{stem}")
    return next((names[form] for form in forms if form in names), None)


def _number(value: Any, column: str) -> float:
    number = number_of(value)
    if number is None:
        raise LeftOutError(f"{column} is no number", repr(value)[:60])
    return number


def _sign(number: float) -> Verdict:
    return "first" if number < 0 else "second" if number > 0 else "tie"
