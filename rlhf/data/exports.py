"""Exports of annotation tools and of conversation trees, as rows with one column for each text."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rlhf.data.chat import to_messages, to_text
from rlhf.data.columns import Row
from rlhf.data.records import Comparison, Converted, LeftOutError
from rlhf.data.rows import Message

#: Turns an export's row into one with a column for each text.
Adapter = Callable[[Row], Row]


def _openai(columns: Sequence[str], sample: Sequence[Row]) -> Adapter | None:
    """Adapter of OpenAI's preference files: `input.messages` and two outputs."""
    if not {"input", "preferred_output", "non_preferred_output"} <= set(columns):
        return None

    def adapt(row: Row) -> Row:
        asked = row.get("input")
        if not isinstance(asked, Mapping):
            raise LeftOutError("input is no object with messages", str(asked)[:60])
        return {
            "prompt": asked.get("messages"),
            "chosen": row.get("preferred_output"),
            "rejected": row.get("non_preferred_output"),
        }

    return adapt


def _label_studio(columns: Sequence[str], sample: Sequence[Row]) -> Adapter | None:
    """Adapter of Label Studio's JSON export of pairwise tasks."""
    if not {"data", "annotations"} <= set(columns):
        return None
    if not any(isinstance(row.get("data"), Mapping) for row in sample):
        return None

    def adapt(row: Row) -> Row:
        data = row.get("data")
        if not isinstance(data, Mapping):
            raise LeftOutError("data is no object", str(data)[:60])
        votes = [*_selections(row.get("annotations"))]
        if not votes:
            raise LeftOutError(
                "the task has no annotation", cure="export labelled tasks only", is_choice=True
            )
        return {**{k: v for k, v in data.items() if k != "winner"}, "winner": votes}

    return adapt


def _selections(annotations: Any) -> Iterator[Any]:
    """Return the selected sides of all annotations that count."""
    for annotation in annotations if isinstance(annotations, list) else ():
        if not isinstance(annotation, Mapping) or annotation.get("was_cancelled"):
            continue
        results = annotation.get("result")
        for result in results if isinstance(results, list) else ():
            value = result.get("value") if isinstance(result, Mapping) else None
            if isinstance(value, Mapping):
                selected = value.get("selected", value.get("choices"))
                yield from selected if isinstance(selected, list) else [selected]


def _argilla(columns: Sequence[str], sample: Sequence[Row]) -> Adapter | None:
    """Adapter of Argilla's records: `fields`, and `responses` by question."""
    if not {"fields", "responses"} <= set(columns):
        return None
    if not any(isinstance(row.get("fields"), Mapping) for row in sample):
        return None

    def adapt(row: Row) -> Row:
        fields, responses = row.get("fields"), row.get("responses")
        if not isinstance(fields, Mapping):
            raise LeftOutError("fields is no object", str(fields)[:60])
        votes = [*_answers(responses)]
        if not votes:
            raise LeftOutError(
                "the record has no submitted response", cure="export submitted records only",
                is_choice=True,
            )  # fmt: skip
        return {**fields, "winner": votes}

    return adapt


def _answers(responses: Any) -> Iterator[Any]:
    """Return the submitted values of the first question, in both of Argilla's export forms."""
    if isinstance(responses, Mapping):  # {question: [{value, user_id, status}]}
        for answers in itertools.islice(responses.values(), 1):
            for answer in answers if isinstance(answers, list) else ():
                if isinstance(answer, Mapping) and answer.get("status") in (None, "submitted"):
                    yield answer.get("value")
    elif isinstance(responses, list):  # [{values: {question: {value}}, status}]
        for answer in responses:
            values = answer.get("values") if isinstance(answer, Mapping) else None
            if isinstance(values, Mapping) and answer.get("status") in (None, "submitted"):
                for value in itertools.islice(values.values(), 1):
                    yield value.get("value") if isinstance(value, Mapping) else value


#: Finders of adapters by the format's name in `DataFormat`; OpenAI's files are pairs.
ADAPTERS: Mapping[str, Callable[[Sequence[str], Sequence[Row]], Adapter | None]] = {
    "pairs": _openai,
    "label-studio": _label_studio,
    "argilla": _argilla,
}


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
    comparisons = [*_ranked_siblings(root, [])]
    if not comparisons:
        raise LeftOutError("no message of the tree has two ranked replies", is_choice=True)
    return Converted(comparisons)


def _ranked_siblings(node: Mapping[str, Any], before: list[Message]) -> Iterator[Comparison]:
    """Compare the assistant's replies to each user's message by rank, 0 being the best."""
    message = to_messages({"role": node.get("role"), "content": node.get("text")}, "prompt")
    conversation = [*before, *message]
    replies = node.get("replies")
    children = [c for c in replies if isinstance(c, Mapping)] if isinstance(replies, list) else []
    ranked = [
        (child["rank"], to_text(child.get("text"), "a reply"))
        for child in children
        if isinstance(child.get("rank"), int) and not child.get("deleted")
    ]
    if message[0]["role"] == "user":
        ranked.sort(key=lambda item: item[0])
        for (rank, better), (other, worse) in itertools.combinations(ranked, 2):
            if rank < other:
                yield Comparison(conversation, better, worse)
    for child in children:
        yield from _ranked_siblings(child, conversation)
