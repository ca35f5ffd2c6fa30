"""Exports of annotation tools and of conversation trees, as rows with one column for each text."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.config import DataConfig
from rlhf.data.annotators import ranked_row, ranking_question, ranks_of
from rlhf.data.chat import to_messages, to_text
from rlhf.data.collect import MAX_RANKED_PAIRS
from rlhf.data.columns import Row
from rlhf.data.label_words import names_a_reply
from rlhf.data.records import Comparison, Converted, LeftOutError
from rlhf.data.reply_lists import MAX_REPLIES
from rlhf.data.rows import Message
from rlhf.data.verdicts import LABEL_COLUMNS, prefers_worse
from rlhf.errors import ConfigError


@dataclass(frozen=True)
class Export:
    """Rows of a tool's export, turned into rows with a column for each text."""

    adapt: Callable[[Row], Row]
    read: frozenset[str]
    """Columns and dotted paths that are read, or that the tool adds to every row."""
    holders: tuple[str, ...] = ()
    """Columns whose fields are the columns of the new rows."""
    label: str | None = None
    """Column of the votes in the new rows."""
    is_ranking: bool = False
    """True if the new rows hold a list of replies with ranks, and no votes."""

    def widen(self, row: Row) -> Row:
        """Add the new columns to a row, whose own ones a setting may name: `fields.question`.

        Raises:
            LeftOutError: The row is not like others, or has no answer.
        """
        return {**row, **self.adapt(row)}

    def flatten(self, name: str, sample: Sequence[Row]) -> tuple[list[str], list[Row]]:
        """Return the new columns' names and the first rows with them.

        Raises:
            ConfigError: None of the rows can be used.
        """
        names: dict[str, None] = {}
        rows: list[Row] = []
        reasons: Counter[str] = Counter()
        for row in sample:
            try:
                names |= dict.fromkeys(self.adapt(row))
                rows.append(self.widen(row))
            except LeftOutError as error:
                reasons[f"{error.reason}; {error.cure}" if error.cure else error.reason] += 1
        if not rows and reasons:
            raise ConfigError(
                f"data.source: looks like {name}, but of the first {len(sample)} rows none can be "
                f"used: {reasons.most_common(1)[0][0]}"
            )
        return [*names], rows

    def unused(
        self, columns: Sequence[str], sample: Sequence[Row], read: Sequence[str]
    ) -> tuple[str, ...]:
        """Return the columns, and the fields inside of them, that are not read."""
        known = {*self.read, *read}
        unused = [column for column in columns if column not in known]
        for holder in self.holders:
            values = [row.get(holder) for row in sample]
            fields = dict.fromkeys(key for v in values if isinstance(v, Mapping) for key in v)
            unused += [f"{holder}.{key}" for key in fields if not {key, f"{holder}.{key}"} & known]
        return tuple(unused)


def find_export(
    name: str, columns: Sequence[str], sample: Sequence[Row], config: DataConfig
) -> Export | None:
    """Return the export of a format in `EXPORTS`, if the rows are one."""
    if name == "pairs":
        return _openai(columns, sample)
    if name == "label-studio":
        return _label_studio(columns, sample, config)
    return _argilla(columns, sample, config) or _argilla_table(columns, sample, config)


#: Formats that are exports; OpenAI's preference files are pairs.
EXPORTS = ("pairs", "label-studio", "argilla")


def _openai(columns: Sequence[str], sample: Sequence[Row]) -> Export | None:
    """Return the export for OpenAI's preference files: `input.messages` and two outputs."""
    outputs = ("preferred_output", "non_preferred_output")
    if not {"input", *outputs} <= set(columns):
        return None
    asked = [_object(value) for row in sample if (value := row.get("input")) is not None]
    if not any(isinstance(value, Mapping) and "messages" in value for value in asked):
        return None  # pairs with OpenAI's names, whose input is a text or a list of messages

    def adapt(row: Row) -> Row:
        asked = _object(row.get("input"))
        if not isinstance(asked, Mapping):
            raise LeftOutError("input is no object with messages", str(asked)[:60])
        return {
            "prompt": asked.get("messages"),
            "chosen": row.get("preferred_output"),
            "rejected": row.get("non_preferred_output"),
        }

    return Export(adapt, frozenset(("input", "input.messages", *outputs)), ("input",))


def _object(value: Any) -> Any:
    """Return an object that a cell of CSV holds as JSON parsed; other values as they are."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _label_studio(
    columns: Sequence[str], sample: Sequence[Row], config: DataConfig
) -> Export | None:
    """Return the export for Label Studio's JSON of pairwise tasks."""
    if not {"data", "annotations"} <= set(columns):
        return None
    data = [data for row in sample if isinstance(data := row.get("data"), Mapping)]
    if not data:
        return None
    answers: dict[str, list[Any]] = {}
    for row in sample:
        for control, value in _selections(row.get("annotations")):
            answers.setdefault(control, []).append(value)
    has_choice = bool(answers)
    if not has_choice:  # replies that are rated one by one
        for row in sample:
            for control, value in _selections(row.get("annotations"), _RATED):
                answers.setdefault(control, []).append(value)
    keys = _CHOSEN if has_choice else _RATED
    label = _question(answers, list(data[0]), config)

    def adapt(row: Row) -> Row:
        data = row.get("data")
        if not isinstance(data, Mapping):
            raise LeftOutError("data is no object", str(data)[:60])
        given = _selections(row.get("annotations"), keys)
        votes = [value for control, value in given if control == label]
        if not votes:
            raise _unanswered(row.get("annotations"), label)
        return {**data, label or "annotations": votes}

    return Export(adapt, frozenset((*columns, label or "")), ("data",), label or "annotations")


#: Fields of results that select a reply, and that rate one.
_CHOSEN = ("selected", "choices")
_RATED = ("rating", "number")


def _selections(
    annotations: Any, keys: tuple[str, ...] = _CHOSEN
) -> Iterator[tuple[str, Any]]:  # fmt: skip
    """Return control and value of all annotations that count: a selected side, or a rating."""
    for result in _results(annotations):
        value = result.get("value")
        if not isinstance(value, Mapping):
            continue
        for key in [k for k in keys if k in value][:1]:
            selected = value[key]
            control = str(result.get("from_name", "annotations"))
            for side in selected if isinstance(selected, list) else [selected]:
                yield control, side


def _results(annotations: Any) -> Iterator[Mapping[str, Any]]:
    """Return the results of all annotations that were not cancelled."""
    for annotation in annotations if isinstance(annotations, list) else ():
        if not isinstance(annotation, Mapping) or annotation.get("was_cancelled"):
            continue
        results = annotation.get("result")
        yield from (r for r in (results if isinstance(results, list) else ()) if
                    isinstance(r, Mapping))  # fmt: skip


def _unanswered(annotations: Any, label: str | None) -> LeftOutError:
    """Return the reason for a task without an answer that is read: none, or of another control."""
    controls = dict.fromkeys(
        f"{result.get('type', 'unknown')} ({result.get('from_name', 'no name')})"
        for result in _results(annotations)
    )
    if not controls:
        return LeftOutError(
            "the task has no annotation", cure="export labelled tasks only", is_choice=True
        )
    wanted = f"control {label}" if label else "control that compares or rates replies"
    return LeftOutError(
        f"the task has no answer of a {wanted}: it has {', '.join(controls)}",
        cure="annotate with Pairwise or Choices for two replies, or with Rating or Number for one",
    )


def _argilla(columns: Sequence[str], sample: Sequence[Row], config: DataConfig) -> Export | None:
    """Return the export for Argilla's records: `fields`, and `responses` by question."""
    if not {"fields", "responses"} <= set(columns):
        return None
    texts = [fields for row in sample if isinstance(fields := row.get("fields"), Mapping)]
    if not texts:
        return None
    answers: dict[str, list[Any]] = {}
    for row in sample:
        for question, values in _answers(row.get("responses")).items():
            answers.setdefault(f"responses.{question}", []).extend(values)
    ranking = ranking_question(answers, list(texts[0]))
    label = ranking or _question(answers, list(texts[0]), config)

    def adapt(row: Row) -> Row:
        fields = row.get("fields")
        if not isinstance(fields, Mapping):
            raise LeftOutError("fields is no object", str(fields)[:60])
        question = (label or "").removeprefix("responses.")
        votes = _answers(row.get("responses")).get(question)
        if not votes:
            raise _NoResponseError()
        return ranked_row(fields, votes) if ranking else {**fields, label or "": votes}

    ranked = (
        (name for v in answers[ranking] for name in ranks_of(v, [*texts[0]])) if ranking else ()
    )
    read = frozenset(name for name in (*columns, label, *ranked) if name)
    return Export(adapt, read, ("fields", "responses"), label, ranking is not None)


def _answers(responses: Any) -> dict[str, list[Any]]:
    """Return the submitted values by question, in both forms of Argilla's records."""
    answers: dict[str, list[Any]] = {}
    if isinstance(responses, Mapping):  # {question: [{value, user_id, status}]}
        for question, values in responses.items():
            answers[str(question)] = _submitted(values)
    elif isinstance(responses, list):  # [{values: {question: {value}}, status}]
        for answer in responses:
            values = answer.get("values") if isinstance(answer, Mapping) else None
            if isinstance(values, Mapping) and _counts(answer.get("status")):
                for question, given in values.items():
                    value = _best_of(given.get("value") if isinstance(given, Mapping) else given)
                    answers.setdefault(str(question), []).append(value)
    return answers


def _argilla_table(
    columns: Sequence[str], sample: Sequence[Row], config: DataConfig
) -> Export | None:
    """Return the export for Argilla's records as a table, with columns for each question.

    A question is `preference` with {value, status} for each annotator, or `preference.responses`
    beside `preference.responses.status`.
    """
    answers: dict[str, list[Any]] = {}
    for column in columns:
        cells = [cell for row in sample if (cell := row.get(column)) is not None]
        is_table = f"{column}.status" in columns and column.endswith(".responses")
        # A column of empty lists, such as tags or images, is no question.
        if any(cells) and (is_table or all(_are_responses(cell) for cell in cells)):
            answers[column] = [v for row in sample for v in _cell_votes(row, column)]
    ranking = ranking_question(answers, columns)
    label = ranking or _question(answers, columns, config)
    if label is None:
        return None

    def adapt(row: Row) -> Row:
        votes = _cell_votes(row, label)
        if not votes:
            raise _NoResponseError()
        return ranked_row(row, votes) if ranking else {**row, label: votes}

    ranked = [name for v in answers.get(ranking or "", ()) for name in ranks_of(v, columns)]
    read = frozenset((label, f"{label}.status", f"{label}.users", *ranked))
    return Export(adapt, read, label=label, is_ranking=ranking is not None)


def _are_responses(cell: Any) -> bool:
    return isinstance(cell, list) and all(
        isinstance(item, Mapping) and {"value", "status"} <= set(item) for item in cell
    )


def _cell_votes(row: Row, column: str) -> list[Any]:
    values, statuses = row.get(column), row.get(f"{column}.status")
    if _are_responses(values):
        return _submitted(values)
    if not isinstance(values, list):
        return []
    if not isinstance(statuses, list) or len(statuses) != len(values):
        return values
    return [value for value, status in zip(values, statuses, strict=True) if _counts(status)]


def _submitted(answers: Any) -> list[Any]:
    return [
        _best_of(answer.get("value"))
        for answer in (answers if isinstance(answers, list) else ())
        if isinstance(answer, Mapping) and _counts(answer.get("status"))
    ]


def _best_of(value: Any) -> Any:
    """Return the field that a ranking question puts first, a tie if it is not one alone."""
    if not isinstance(value, list) or not value:
        return value
    ranks = [item.get("rank") if isinstance(item, Mapping) else None for item in value]
    known = [rank for rank in ranks if isinstance(rank, int | float)]
    if len(value) != 2 or len(known) != 2:
        return value
    if known[0] == known[1]:
        return "tie"
    return value[known.index(min(known))].get("value")


def _counts(status: Any) -> bool:
    """Return whether an answer counts: drafts and discarded ones do not."""
    return status in (None, "submitted")


def _question(
    answers: Mapping[str, Sequence[Any]], columns: Sequence[str], config: DataConfig
) -> str | None:
    """Return the question that compares the replies: records also hold comments and ratings.

    Raises:
        ConfigError: There are several such questions, none of them of a usual name.
    """
    if config.label_column in answers:
        return config.label_column
    naming = [
        question
        for question, values in answers.items()
        if not prefers_worse(question)
        and sum(names_a_reply(value, columns) for value in values) > len(values) / 2
    ]
    known = [
        question
        for question in naming or answers
        if question.removeprefix("responses.").removesuffix(".responses") in LABEL_COLUMNS
    ]
    if len(naming) > 1 and not known:
        raise ConfigError(
            f"data.label_column: {' and '.join(naming)} each say which reply is better; set "
            "data.label_column to one of them"
        )
    question = next(iter((*known, *naming, *answers)), None)
    if question is not None and prefers_worse(question):
        raise ConfigError(
            f"data.label_column: {question!r} seems to name the worse reply; rename the question, "
            "and swap its answers"
        )
    return question


class _NoResponseError(LeftOutError):
    """A record was not answered, or its answers were discarded."""

    def __init__(self) -> None:
        super().__init__(
            "the record has no submitted response", cure="export submitted records only",
            is_choice=True,
        )  # fmt: skip


def trees(
    columns: Sequence[str], sample: Sequence[Row]
) -> Callable[[Row], Converted] | None:  # fmt: skip
    """Return the conversion of message trees with ranked replies (Open Assistant), if they are."""
    is_tree = any(
        isinstance(root := row.get("prompt"), Mapping) and isinstance(root.get("replies"), list)
        for row in sample
    )
    return _tree if is_tree else None


def _tree(row: Row) -> Converted:
    root = row.get("prompt")
    if not isinstance(root, Mapping):
        raise LeftOutError("prompt is no tree of messages", str(root)[:60])
    skipped: list[int] = []
    comparisons = [*_ranked_siblings(root, [], skipped)]
    if not comparisons:
        raise LeftOutError("no message of the tree has two ranked replies", is_choice=True)
    return Converted(comparisons, skipped=sum(skipped))


def _ranked_siblings(
    node: Mapping[str, Any], before: list[Message], skipped: list[int]
) -> Iterator[Comparison]:
    """Compare the assistant's replies to each user's message by rank, 0 being the best.

    `skipped` receives the number of pairs that are not made.
    """
    message = to_messages({"role": node.get("role"), "content": node.get("text")}, "prompt")
    conversation = [*before, *message]
    replies = node.get("replies")
    children = [c for c in replies if isinstance(c, Mapping)] if isinstance(replies, list) else []
    ranked = [
        (rank, to_text(child.get("text"), "a reply"))
        for child in children
        if (rank := _rank(child.get("rank"))) is not None
        and -math.inf < rank < math.inf  # pandas writes NaN; isfinite fails for 400 digits
        and not child.get("deleted")
    ]
    if message[0]["role"] == "user":
        ranked.sort(key=lambda item: item[0])
        ties = Counter(rank for rank, _ in ranked).values()
        total = (len(ranked) ** 2 - sum(count**2 for count in ties)) // 2
        if len(ranked) > MAX_REPLIES:  # their pairs grow with the square
            ranked = [*ranked[: MAX_REPLIES // 2], *ranked[-MAX_REPLIES // 2 :]]
        pairs = [(b - a, x, y) for (a, x), (b, y) in itertools.combinations(ranked, 2) if a < b]
        if len(pairs) > MAX_RANKED_PAIRS:
            pairs.sort(key=lambda pair: -pair[0])
        skipped.append(total - min(len(pairs), MAX_RANKED_PAIRS))
        for _, better, worse in pairs[:MAX_RANKED_PAIRS]:
            yield Comparison(conversation, better, worse)
    for child in children:
        yield from _ranked_siblings(child, conversation, skipped)


def _rank(value: Any) -> float | None:
    """Return a rank, also one written as text."""
    if isinstance(value, str):
        value = int(value) if value.strip().isdecimal() and len(value) < 10 else None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
