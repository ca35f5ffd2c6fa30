"""Answers of single annotators in exports of annotation tools, and their rankings of fields.

A row of an export holds the answers of all annotators of one task. Split by annotator, each part is
a row of its own that reads like the whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf.data.columns import Row

#: Columns with one answer for each annotator.
_LISTS = ("annotations", "responses")


def by_annotator(row: Row, label: str | None) -> Iterator[tuple[str, Row]]:
    """Yield the annotators of a task, each with a row that holds their answers alone.

    Args:
        row: A row of Label Studio's or Argilla's export.
        label: Column of the question, where a table has one for each question.
    """
    for column in (*_LISTS, *([label] if label else [])):
        answers = row.get(column)
        if isinstance(answers, Mapping):  # {question: [{value, user_id, status}]}
            lists = {q: v for q, v in answers.items() if isinstance(v, list)}
            users = dict.fromkeys(_user(item) for items in lists.values() for item in items)
            for user in filter(None, users):
                own = {q: [i for i in v if _user(i) == user] for q, v in lists.items()}
                yield user, {**row, column: own}
        for index, item in enumerate(answers if isinstance(answers, list) else ()):
            users = row.get(f"{column}.users")
            listed = users[index : index + 1] if isinstance(users, list) else []
            user = _name(listed[0]) if listed else _user(item)
            if user:
                status = row.get(f"{column}.status")
                own = {f"{column}.status": status[index : index + 1]} if isinstance(
                    status, list) else {}  # fmt: skip
                yield user, {**row, column: [item], **own}


def _user(answer: Any) -> str:
    if not isinstance(answer, Mapping):
        return ""
    return _name(answer.get("completed_by", answer.get("user_id")))


def _name(user: Any) -> str:
    """Return the name of a user; of an object with an email address, the id."""
    user = user.get("id") if isinstance(user, Mapping) else user
    return "" if isinstance(user, bool) or not isinstance(user, str | int) else str(user)


def ranks_of(answer: Any, fields: Sequence[str]) -> dict[str, float]:
    """Return the ranks of fields in an answer to a ranking question, 1 for the best.

    Empty for other answers, and for two fields with ranks, which are a comparison. Answers are
    `[{value, rank}]`, `{value: […], rank: […]}`, or names of fields, the best first.
    """
    pairs: list[tuple[Any, Any]] = []
    if isinstance(answer, Mapping):
        names, ranks = answer.get("value"), answer.get("rank")
        if isinstance(names, list) and isinstance(ranks, list) and len(names) == len(ranks):
            pairs = [*zip(names, ranks, strict=True)]
    elif isinstance(answer, list) and all(isinstance(item, str) for item in answer):
        pairs = [(name, rank) for rank, name in enumerate(answer, 1)]
    elif isinstance(answer, list) and len(answer) > 2:
        pairs = [(i.get("value"), i.get("rank")) for i in answer if isinstance(i, Mapping)]
    found = {
        name: float(rank)
        for name, rank in pairs
        if isinstance(name, str) and name in fields
        if isinstance(rank, int | float) and not isinstance(rank, bool)
    }
    return found if 1 < len(found) == len(pairs) else {}


def ranking_question(answers: Mapping[str, Sequence[Any]], fields: Sequence[str]) -> str | None:
    """Return the one question whose answers rank fields; None if there is none, or several."""
    found = [
        question
        for question, values in answers.items()
        if values and all(ranks_of(value, fields) for value in values)
    ]
    return found[0] if len(found) == 1 else None


def ranked_row(texts: Row, answers: Sequence[Any]) -> Row:
    """Return a row with the ranked fields as a list of replies, each with its mean rank (Borda)."""
    ranks = [ranks_of(answer, [*texts]) for answer in answers]
    names = dict.fromkeys(itertools.chain(*ranks))
    known = {name: [r[name] for r in ranks if name in r] for name in names}
    replies = [
        {"text": texts[name], "rank": sum(values) / len(values)} for name, values in known.items()
    ]
    return {**{n: text for n, text in texts.items() if n not in names}, "responses": replies}
