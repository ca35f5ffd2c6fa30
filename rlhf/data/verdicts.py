"""Decide which of two replies a row of a comparison log prefers.

A label whose meaning is not certain is refused until `data.labels` sets it: a wrong guess inverts
every pair.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from rlhf.config import DataConfig
from rlhf.data.columns import MISSING, Row, value_of
from rlhf.data.records import LeftOutError
from rlhf.data.special_tokens import is_missing_word
from rlhf.errors import ConfigError

Verdict = Literal["first", "second", "tie"]

#: Label columns, the usual ones first.
LABEL_COLUMNS = (
    "winner", "label", "labels", "preference", "choice", "better_response_id", "chosen_id",
    "preferred_id", "better", "preferred", "judgment", "judgement", "verdict", "vote", "votes",
    "result", "chosen", "selected", "comparison", "human_preference", "annotations",
    "overall_preference", "preference_strength",
)  # fmt: skip
#: Score columns of the two replies; a higher score is better.
SCORE_COLUMNS = ("score", "rating", "reward", "quality")
_REPLY_NAMES = ("response", "model", "assistant", "answer", "output", "completion", "option")
_TIES = (
    "tie", "tied", "both", "both bad", "bothbad", "tie bothbad", "neither", "equal", "draw", "none",
    "same", "no preference", "equally good", "equally bad",
)  # fmt: skip
_WORDS: Mapping[str, Verdict] = {
    **dict.fromkeys(("left", "first", "a", "response a", "model a", "assistant a", "answer a"),
                    "first"),
    **dict.fromkeys(("right", "second", "b", "response b", "model b", "assistant b", "answer b"),
                    "second"),
    **dict.fromkeys(_TIES, "tie"),
}  # fmt: skip
#: HelpSteer's columns: negative where the first reply is better, 0 for a tie.
_SIGNED = ("overall_preference", "preference_strength")
#: Judgements of language models: `[[A>>B]]`, and the sentence "Response 1 is slightly better".
_RELATION = re.compile(r"\[*\s*(\w)\s*(>{1,3}|<{1,3}|={1,3})\s*(\w)\s*\]*")
_IS_BETTER = re.compile(
    r"@?(?:(?:response|answer|model|assistant|output|option) )?(\w) is "
    r"(?:(?:much|slightly|significantly|clearly|far|a bit|a little|somewhat) )?better\b"
)
_CONTRARY = re.compile(r"\b(?:but|however|although|though|only|not)\b")
#: Words in the names of columns that name the worse reply.
_WORSE = frozenset(
    ("loser", "loses", "worse", "worst", "rejected", "dispreferred", "error", "errors", "bad")
)
#: Fields of an object that hold its vote.
_VOTE_KEYS = ("selected", "value", "label", "preference", "winner", "choice")
#: Nested lists and objects around a vote.
_MAX_DEPTH = 8
#: Settings of `data.labels`, each of one value.
_SETTABLE = ("first", "second", "tie")
#: Share of the labels that must be understood; others are left out one by one.
_ENOUGH = 0.5


@dataclass(frozen=True)
class Judge:
    """Reads the verdict of a row: by label, by one-hot columns, or by two scores."""

    description: str
    columns: tuple[str, ...]
    first: str
    second: str
    words: Mapping[str, Verdict]
    by: Literal["label", "sign", "one-hot", "scores"] = "label"
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
                _number(value, name) for value, name in zip(values, self.columns, strict=True)
            )
            return _sign(two - one), abs(one - two)
        votes = _votes(values[0])
        if self.text_cells and not self.are_set:
            votes = [vote for vote in votes if not is_missing_word(str(vote))]
        if not votes:
            raise LeftOutError(f"{self.columns[0]} is missing")
        verdicts = self._count(votes, row, notes)
        if len(votes) == 1:
            is_list = isinstance(values[0], list | tuple)  # where other rows have several votes
            margin = abs(_number(votes[0], self.columns[0])) if self.by == "sign" else None
            return next(iter(verdicts)), 1.0 if is_list and margin is None else margin
        lead = verdicts["first"] - verdicts["second"]
        return _sign(-lead), abs(lead) / sum(verdicts.values())

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
        verdict = self.words.get(_exact(value))
        if verdict is None and not _is_marked(value):
            verdict = self.words.get(_plain(value))
        verdict = verdict or (None if self.are_set else relation(value, self.suffixes))
        text = self._named(value, row)
        if verdict is not None and text not in (None, verdict) and not self.are_set:
            raise LeftOutError(
                f"{self.columns[0]} names one reply and is the text of the other",
                repr(value)[:60], "set data.labels.first and data.labels.second",
            )  # fmt: skip
        if verdict or text:
            return verdict or text or "tie"
        if self.numbers and _exact(value) in ("0", "1", "2"):
            raise ConfigError(
                f"data.label_column: {self.columns[0]!r} holds {_exact(value)}, but in the first "
                f"rows {' and '.join(sorted(self.numbers))} alone, so that 1 may mean either "
                "reply; write all labels in one way, or as the names of the columns"
            )
        raise LeftOutError(
            f"{self.columns[0]} has an unknown value", repr(value)[:60],
            "set data.labels.first, data.labels.second and data.labels.tie",
        )  # fmt: skip

    def _named(self, value: Any, row: Row) -> Verdict | None:
        """Return the reply whose text, or whose model's name, a label repeats."""
        if not isinstance(value, str) or not _plain(value):
            return None
        for columns in ((self.first, self.second), self.models or ()):
            names = [_plain(value_of(row, column)) for column in columns]
            if names.count(_plain(value)) == 1:
                return "first" if names[0] == _plain(value) else "second"
        return None

    def _one_hot(self, values: Sequence[Any]) -> Verdict:
        flags = [_plain(value) in ("1", "1.0", "true") for value in values]
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
    labels = [config.label_column] if config.label_column else [
        names[n] for n in LABEL_COLUMNS if n in names and names[n] not in replies
    ]  # fmt: skip
    sides = {_plain(column) for column in replies}
    labels.sort(key=lambda label: not _name_sides(sample, label, sides))
    fault: ConfigError | None = None
    judges: list[Judge] = []
    for label in labels:  # those whose values can be understood
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
                         {}, "scores")  # fmt: skip
    raise ConfigError(
        f"data.source: {replies[0]} and {replies[1]} are two replies, but no column says which "
        "is better; set data.label_column, and data.labels.first and data.labels.second to its "
        "values"
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
    models = [names.get(f"model_{s}") or names.get(f"name_{s}") for s in suffixes]
    both = (models[0], models[1]) if models[0] and models[1] else None
    words = _words(label, sample, (*replies, *(both or ())), suffixes, config)
    votes = {_plain(vote) for row in sample for vote in _votes(value_of(row, label))}
    numbers = frozenset(vote for vote in votes if vote in ("0", "1", "2") and vote in words)
    return Judge(
        f"decided by {label}", (label,), *replies, words, models=both, suffixes=suffixes,
        numbers=frozenset() if config.labels.first or config.labels.second else numbers,
        are_set=config.labels.first is not None or config.labels.second is not None,
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
        cells = [
            cell for row in sample if (cell := value_of(row, column)) not in (None, "", MISSING)
        ]
        selects = is_table or (bool(cells) and all(_selects(cell) for cell in cells))
        words = {*sides, *_TIES, *(("left", "right") if selects else ())}
        values = {_plain(vote) for cell in cells for vote in _votes(cell)}
        if len(values - {*_TIES}) == 2 and values <= words:
            found.append(column)
    return found[0] if len(found) == 1 else None


def _selects(cell: Any) -> bool:
    """Return whether a cell is a selection of Label Studio's, also as JSON text."""
    if isinstance(cell, str):
        return re.fullmatch(r'\s*\{\s*"selected"\s*:\s*"\w+"\s*\}\s*', cell) is not None
    return isinstance(cell, Mapping) and {*cell} == {"selected"}


def _name_sides(sample: Sequence[Row], column: str, sides: set[str]) -> bool:
    """Return whether a column's values are the names of the reply columns."""
    values = {_plain(v) for row in sample for v in _votes(value_of(row, column))}
    return bool(values) and values <= {*sides, *_TIES}


def _has_negative(sample: Sequence[Row], column: str) -> bool:
    """Return whether a column is a scale around 0, on which a sign tells the sides apart."""
    votes = [vote for row in sample for vote in _votes(value_of(row, column))]
    return any(_is_number(_exact(vote)) and float(_exact(vote)) < 0 for vote in votes)


def prefers_worse(column: str) -> bool:
    """Return whether a label column's name says that it names the worse reply."""
    return bool(set(re.findall(r"[a-z]+", column.lower().replace("_", " "))) & _WORSE)


def relation(value: Any, suffixes: tuple[str, str]) -> Verdict | None:
    """Return the verdict of `A>>B`, `A=B` or "Response 1 is slightly better"; None for others."""
    if not isinstance(value, str) or len(value) > 1000:
        return None
    text = value.strip().casefold()
    if match := _RELATION.fullmatch(text):
        one, sign, other = match.groups()
        if {one, other} != set(suffixes):
            return None
        if sign[0] == "=":
            return "tie"
        return "first" if (one == suffixes[0]) == (sign[0] == ">") else "second"
    match = _IS_BETTER.match(text)
    # "A is better formatted, but B is better overall" says nothing certain
    is_sure = len(set(_IS_BETTER.findall(text))) == 1 and not _CONTRARY.search(text)
    if match and is_sure and match.group(1) in suffixes:
        return "first" if match.group(1) == suffixes[0] else "second"
    return None


def _words(
    label: str, sample: Sequence[Row], replies: tuple[str, ...],
    suffixes: tuple[str, str], config: DataConfig,
) -> dict[str, Verdict]:  # fmt: skip
    """Return the verdict of each label; a label may also be the text of one of the columns.

    Args:
        label: Column of the label.
        sample: First rows.
        replies: Columns of the two replies, and of their models' names if there are such.
        suffixes: The part in which the two replies' columns differ.
        config: Meaning of the labels.
    """
    settings = config.labels
    if settings.first is not None or settings.second is not None:
        meanings: dict[Verdict, str | None] = {
            "first": settings.first, "second": settings.second, "tie": settings.tie,
        }  # fmt: skip
        return _set_words(meanings)
    words: dict[str, Verdict] = {**_WORDS}
    if settings.tie is not None:
        words[_exact(settings.tie)] = "tie"
    sides: tuple[tuple[str, str, Verdict], ...] = (
        (replies[0], suffixes[0], "first"), (replies[1], suffixes[1], "second"),
    )  # fmt: skip
    for column, suffix, verdict in sides:
        words[_plain(column)] = verdict
        words |= {f"{word} {suffix}": verdict for word in _REPLY_NAMES}
    votes = [vote for row in sample for vote in _votes(value_of(row, label))]
    values = Counter(_plain(vote) for vote in votes)
    numbers = {value for value in values if _is_number(value)}
    if _plain(replies[0]) == "human ref a" and label in ("labels", "label"):
        words |= {"1": "first", "0": "second"}  # Stanford Human Preferences
    elif "2" in numbers <= {"1", "1.5", "2"} and suffixes in (("1", "2"), ("a", "b")):
        words |= {"1": "first", "2": "second", "1.5": "tie"}  # AlpacaEval's draws are 1.5
    elif suffixes == ("0", "1") and label.endswith(("_id", "_idx", "_index")):
        words |= {"0": "first", "1": "second"}
    texts = {
        _plain(text)
        for row in sample
        for column in replies
        if isinstance(text := value_of(row, column), str)
    }
    known = sum(count for value, count in values.items() if value in words or value in texts)
    known += sum(
        relation(vote, suffixes) is not None
        for vote in votes
        if _plain(vote) not in words and _plain(vote) not in texts
    )
    if known < _ENOUGH * sum(values.values()) or not values:
        shown = ", ".join(f"{value!r} × {count}" for value, count in values.most_common(5))
        cure = (
            f"set data.labels.first to the value that prefers {replies[0]}, data.labels.second to "
            "the other, and data.labels.tie if there are ties"
        )
        fields = [f"{label}.{key}" for key in _VOTE_KEYS if votes and isinstance(votes[0], Mapping)
                  and key in votes[0]]  # fmt: skip
        if len(fields) > 1:
            cure = f"set data.label_column to one of {', '.join(fields)}"
        if len(numbers) > len(_SETTABLE):
            cure = (
                "they are a scale, of which the settings can't give a meaning to each value; add a "
                f"column that names the better reply, {replies[0]} or {replies[1]}"
            )
        raise ConfigError(
            f"data.label_column = {label!r}: its values ({shown or 'none'}) don't say which of "
            f"{replies[0]} and {replies[1]} is better; {cure}"
        )
    return words


def _set_words(meanings: Mapping[Verdict, str | None]) -> dict[str, Verdict]:
    """Return the verdicts of the labels that are set, which may differ in marks alone: A>B, A=B."""
    words: dict[str, Verdict] = {}
    for name, value in meanings.items():
        if value is None:
            continue
        if other := words.get(_exact(value)):
            raise ConfigError(
                f"data.labels.{name} = {value!r}: data.labels.{other} and data.labels.{name} have "
                "the same value; set each to a value of its own"
            )
        words[_exact(value)] = name
    return words


def names_a_reply(value: Any, columns: Sequence[str]) -> bool:
    """Return whether a value is a label or a column's name rather than a reply."""
    return _plain(value) in _WORDS or _plain(value) in {_plain(column) for column in columns}


def _one_hot_names(suffixes: tuple[str, str]) -> tuple[str, str, str]:
    return (f"model_{suffixes[0]}", f"model_{suffixes[1]}", "tie")


def _with_suffix(names: Mapping[str, str], stem: str, suffix: str) -> str | None:
    forms = (f"{stem}_{suffix}", f"{stem}{suffix}", f"{suffix}_{stem}", f"response_{suffix}_{stem}")
    return next((names[form] for form in forms if form in names), None)


def _votes(value: Any, depth: int = 0) -> list[Any]:
    """Return the votes of one cell: of a list each item, of an object its value."""
    is_nan = isinstance(value, float) and math.isnan(value)  # a missing value in Parquet
    if value is MISSING or value is None or value == "" or is_nan:
        return []
    if depth > _MAX_DEPTH:
        return ["a deeply nested value"]
    if isinstance(value, Mapping):
        found = [key for key in _VOTE_KEYS if key in value]
        # Of {"label": …, "winner": …} nothing says which one is the vote.
        return _votes(value[found[0]], depth + 1) if len(found) == 1 else [value]
    if isinstance(value, list | tuple):
        return [vote for item in value for vote in _votes(item, depth + 1)]
    if isinstance(value, str) and _selects(value):
        return _votes(json.loads(value), depth + 1)
    return [value]


def _plain(value: Any) -> str:
    """Return a label as text: 1.0 and "1" alike, case and marks ignored."""
    text = _exact(value)
    if _is_number(text):
        return text
    return " ".join("".join(c if c.isalnum() else " " for c in text).split())


def _exact(value: Any) -> str:
    """Return a label as text: 1.0 and "1" alike, case and what joins words ignored."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip().casefold()
    if _is_number(text):
        return text.removesuffix(".0")
    return re.sub(r"(?<=[^\W_])[\s_-]+(?=[^\W_])", " ", text)


def _is_marked(value: Any) -> bool:
    """Return whether a mark changes a label's meaning: !B, -B, and the grades A+ and B-."""
    text = str(value).strip()
    return isinstance(value, str) and (text[:1] in "!-~¬^" or text[-1:] in "+-") and text != "-"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _number(value: Any, column: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):  # an integer of 400 digits
        number = float("nan")
    if isinstance(value, bool) or not math.isfinite(number):
        raise LeftOutError(f"{column} is no number", repr(value)[:60])
    return number


def _sign(number: float) -> Verdict:
    return "first" if number < 0 else "second" if number > 0 else "tie"
