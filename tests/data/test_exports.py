"""Exports of annotation tools and message trees."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.config import DataConfig
from rlhf.data.formats import detect
from rlhf.data.records import LeftOutError
from rlhf.errors import ConfigError
from tests.data.helpers import assistant, message, user
from tests.data.test_formats import BAD, GOOD, JSON, ONE, Q, read_rows
from tests.examples import examples


def task(*selected, **more):
    """A task of Label Studio with these annotations."""
    annotations = [
        {"id": i, "result": [{"type": "pairwise", "value": {"selected": side}}]}
        for i, side in enumerate(selected)
    ]
    data = {"prompt": Q, "answer1": BAD, "answer2": GOOD, **more}
    return {"id": 1, "data": data, "annotations": annotations, "predictions": []}


@pytest.mark.parametrize(
    ("selected", "pairs", "left_out"),
    [
        (["right"], ONE, {}),
        (["left"], [(Q, BAD, GOOD)], {}),
        (["right", "left", "right"], ONE, {}),
        (["right", "left"], [], {"tie: neither reply is preferred": 1}),
        ([], [], {"the task has no annotation": 1}),
    ],
)
def test_label_studio(tmp_path, selected, pairs, left_out):
    rows = [task("right", prompt="Another question?"), task(*selected)]
    found, read, reasons, _ = read_rows(tmp_path, rows)
    assert found == "label-studio"
    assert read[1:] == pairs
    assert reasons == left_out


def test_cancelled_annotations_do_not_count_and_end_nothing(tmp_path):
    row = task("left", "left", "right")
    for annotation in row["annotations"][:2]:
        annotation["was_cancelled"] = True
    assert read_rows(tmp_path, [row])[1] == ONE


@pytest.mark.parametrize(("label", "pairs"), [("better", ONE), ("kinder", [(Q, BAD, GOOD)])])
def test_of_several_controls_the_one_that_is_set_is_read(tmp_path, label, pairs):
    """The other one's votes, of which there are more, are not counted with it."""
    row = task()
    sides = {"better": "right", "kinder": "left"}
    votes = [name for name in sides for _ in range(1 if name == label else 3)]
    row["annotations"] = [
        {"result": [{"from_name": name, "type": "pairwise", "value": {"selected": sides[name]}}]}
        for name in votes
    ]
    assert read_rows(tmp_path, [row], label_column=label)[1] == pairs


def test_a_control_that_is_not_there_is_named(tmp_path):
    text = message(ConfigError, read_rows, tmp_path, [task("right")], label_column="bettr")
    assert text.startswith("data.label_column")
    assert "'bettr'" in text


def test_label_studios_short_form(tmp_path):
    row = {"id": 1, "prompt": Q, "answer1": BAD, "answer2": GOOD, "annotator": 1,
           "comparison": {"type": "pairwise", "selected": "right"}}  # fmt: skip
    assert read_rows(tmp_path, [row])[:3] == ("comparison", ONE, {})


FIELDS = {"prompt": Q, "response_1": BAD, "response_2": GOOD}
ARGILLA = [
    {"preference": [{"value": "response_2", "status": "submitted", "user_id": "u"}]},
    {"preference": [{"value": "response_2"}, {"value": "response_1", "status": "discarded"}]},
    [{"values": {"preference": {"value": "response_2"}}, "status": "submitted"}],
]


@pytest.mark.parametrize("responses", ARGILLA)
def test_argilla(tmp_path, responses):
    row = {"id": "1", "fields": FIELDS, "responses": responses, "metadata": {}}
    assert read_rows(tmp_path, [row])[:3] == ("argilla", ONE, {})


@pytest.mark.parametrize(
    ("ranks", "pairs"),
    [((2, 1), ONE), ((1, 2), [(Q, BAD, GOOD)]), ((1, 1), [])],
)
def test_argillas_ranking_questions(tmp_path, ranks, pairs):
    value = [{"value": f"response_{i}", "rank": rank} for i, rank in enumerate(ranks, start=1)]
    row = {"fields": FIELDS, "responses": {"preference": [{"value": value}]}}
    first = {"fields": {**FIELDS, "prompt": "Else?"}, "responses": ARGILLA[0]}
    assert read_rows(tmp_path, [first, row])[1][1:] == pairs


RECORD = {"prompt": Q, "response-1": BAD, "response-2": GOOD}
PREFERENCE = [{"value": "response-2", "status": "submitted"}]


@pytest.mark.parametrize(
    "columns",
    [
        {"preference": PREFERENCE},
        {"preference": [*PREFERENCE, {"value": "response-1", "status": "discarded"}]},
        {"comment": [{"value": "Nice.", "status": "submitted"}], "preference": PREFERENCE},
        {"preference.responses": ["response-2", "response-1"],
         "preference.responses.status": ["submitted", "draft"],
         "preference.responses.users": ["u", "v"]},
    ],
)  # fmt: skip
def test_argilla_records_as_a_table(tmp_path, columns):
    assert read_rows(tmp_path, [RECORD | columns])[:3] == ("argilla", ONE, {})


@pytest.mark.parametrize(
    "responses",
    [
        {"comment": [{"value": "Nice."}], "better": [{"value": "response_2"}]},
        [{"values": {"comment": {"value": "Nice."}, "better": {"value": "response_2"}}}],
    ],
)
def test_the_question_that_compares_the_replies_decides(tmp_path, responses):
    row = {"fields": FIELDS, "responses": responses}
    found, read, _, reading = read_rows(tmp_path, [row])
    assert (found, read) == ("argilla", ONE)
    assert "decided by responses.better" in " ".join(reading.notes)


def test_a_label_column_that_is_set_chooses_the_question(tmp_path):
    responses = {"preference": [{"value": "response_1"}], "overall": [{"value": "response_2"}]}
    row = {"fields": FIELDS, "responses": responses}
    assert read_rows(tmp_path, [row], label_column="responses.overall")[1] == ONE
    assert read_rows(tmp_path, [row])[1] == [(Q, BAD, GOOD)]


def test_a_prompt_inside_of_an_export_is_set_by_its_path(tmp_path):
    row = {"fields": {**FIELDS, "task": "Which?"}, "responses": ARGILLA[0]}
    _, read, _, _ = read_rows(tmp_path, [row], prompt_column="fields.task")
    assert read == [("Which?", GOOD, BAD)]


@pytest.mark.parametrize(
    ("row", "unused"),
    [
        ({"input": {"messages": [user(Q)], "tools": [{"type": "function"}]}, "split": "train",
          "preferred_output": [assistant(GOOD)], "non_preferred_output": [assistant(BAD)]},
         ["split", "input.tools"]),
        (task("right", customer="c1"), ["data.customer"]),
        ({"fields": {**FIELDS, "hint": "h"}, "responses": ARGILLA[0]}, ["fields.hint"]),
    ],
)  # fmt: skip
def test_parts_of_an_export_that_are_not_read_are_named(tmp_path, row, unused):
    assert read_rows(tmp_path, [row])[3].unused_columns == unused


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (task(), "looks like label-studio, but of the first 1 rows none can be used: the task has "
                 "no annotation; export labelled tasks only"),
        ({"fields": FIELDS, "responses": {}},
         "looks like argilla, but of the first 1 rows none can be used: the record has no "
         "submitted response; export submitted records only"),
    ],
)  # fmt: skip
def test_an_export_without_any_answer_is_refused_by_its_name(tmp_path, row, reason):
    assert reason in message(ConfigError, read_rows, tmp_path, [row])


def test_an_argilla_record_without_responses_is_left_out(tmp_path):
    rows = [{"fields": FIELDS, "responses": responses} for responses in (ARGILLA[0], {})]
    _, read, reasons, _ = read_rows(tmp_path, rows)
    assert read == ONE
    assert reasons == {"the record has no submitted response": 1}


def reply(text, rank, *replies, role="assistant"):
    return {"text": text, "role": role, "rank": rank, "replies": list(replies)}


def test_message_trees_several_turns_deep(tmp_path):
    deeper = reply("Why?", None, reply("Acid.", 0), reply("Magic.", 2), reply("Who knows.", 1),
                   role="prompter")  # fmt: skip
    root = {"text": Q, "role": "prompter", "replies": [reply(BAD, 1), reply(GOOD, 0, deeper)]}
    found, read, reasons, _ = read_rows(tmp_path, [{"message_tree_id": "1", "prompt": root}])
    asked = [user(Q), assistant(GOOD), user("Why?")]
    assert (found, reasons) == ("open-assistant", {})
    assert read == [
        ([user(Q)], GOOD, BAD),
        (asked, "Acid.", "Who knows."),
        (asked, "Acid.", "Magic."),
        (asked, "Who knows.", "Magic."),
    ]


def test_a_rank_of_400_digits_is_one():
    root = {"text": Q, "role": "prompter", "replies": [reply(BAD, 10**400), reply(GOOD, 0)]}
    row = {"prompt": root}
    (comparison,) = detect(["prompt"], [row], DataConfig(source="x.jsonl")).convert(row).comparisons
    assert comparison.chosen == GOOD


def test_a_tree_without_ranks_is_left_out(tmp_path):
    trees = [
        {"prompt": {"text": Q, "role": "prompter", "replies": [reply(GOOD, r), reply(BAD, s)]}}
        for r, s in ((0, 1), (None, None), (0, 0), (0, math.nan), (0, -math.inf), (math.inf, 0))
    ]
    _, read, reasons, _ = read_rows(tmp_path, trees)
    assert read == [([user(Q)], GOOD, BAD)]
    assert reasons == {"no message of the tree has two ranked replies": 5}


EXPORTED = {
    "openai": {"input": {"messages": [user(Q)]}, "preferred_output": [assistant(GOOD)],
               "non_preferred_output": [assistant(BAD)]},
    "label studio": task("right", "left", "right"),
    "argilla by question": {"fields": FIELDS, "responses": ARGILLA[0]},
    "argilla by annotator": {"fields": FIELDS, "responses": ARGILLA[2]},
    "argilla table": RECORD | {"preference": PREFERENCE},
    "argilla flat table": RECORD | {"preference.responses": ["response-2"],
                                    "preference.responses.status": ["submitted"]},
    "tree": {"prompt": {"text": Q, "role": "prompter", "replies": [reply(GOOD, 0), reply(BAD, 1)]}},
}  # fmt: skip


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to all values inside of a value."""
    keys = value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0)
    for key in keys:
        yield (*prefix, key)
        yield from paths(value[key], (*prefix, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """The value with another one at a path."""
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = changed(value[path[0]], path[1:], new)
    return copy


@pytest.mark.parametrize("row", EXPORTED.values(), ids=EXPORTED)
@given(data=st.data())
@settings(max_examples=examples(40), deadline=None)
def test_any_value_anywhere_in_an_export_is_converted_or_left_out(row, data):
    layout = detect(list(row), [row], DataConfig(source="x.jsonl"))
    path = data.draw(st.sampled_from([*paths(row)]))
    other = changed(row, path, data.draw(JSON))
    with contextlib.suppress(LeftOutError):
        assert layout.convert(other).comparisons
    with contextlib.suppress(LeftOutError, ConfigError):
        detect(list(row), [other], DataConfig(source="x.jsonl")).convert(row)
