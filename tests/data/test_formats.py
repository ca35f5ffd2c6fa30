"""Layouts as people publish them: the format found, and the pairs that come out."""

from __future__ import annotations

import contextlib
import csv
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.config import DataConfig, StoreConfig
from rlhf.data.formats import detect
from rlhf.data.prepare import read_pairs
from rlhf.data.prompt_fields import PromptFields
from rlhf.data.quarantine import Quarantine
from rlhf.data.records import LeftOutError
from rlhf.errors import ConfigError, DataError
from tests.data.helpers import assistant, message, user

Q, GOOD, BAD = "How do I clean a kettle?", "Boil vinegar in it.", "No idea."
HH = "\n\nHuman: {}\n\nAssistant: {}"


def read_rows(folder, rows, form="jsonl", **settings):
    """Format, pairs as (prompt, chosen, rejected), reasons of the rows left out, and notes."""
    path = folder / f"data.{form}"
    if form == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config, quarantine = DataConfig(source=str(path), **settings), Quarantine()
    reading = read_pairs(config, StoreConfig(), quarantine, PromptFields(config))
    for item in reading.pairs:
        reading.ledger.use(item.origins)
    used = reading.ledger.close(quarantine.add)
    assert used + quarantine.total == reading.rows == len(rows)
    pairs = [(p.prompt, p.chosen, p.rejected) for p, _ in reading.pairs]
    return ", ".join(reading.formats), pairs, dict(quarantine.reasons), reading


ONE = [(Q, GOOD, BAD)]
CHAT = [([user(Q)], GOOD, BAD)]
LAYOUTS = {
    "trl explicit": ("pairs", {"prompt": Q, "chosen": GOOD, "rejected": BAD}, ONE),
    "trl messages": (
        "pairs",
        {"prompt": [user(Q)], "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]},
        CHAT,
    ),
    "trl implicit": (
        "pairs",
        {"chosen": [user(Q), assistant(GOOD)], "rejected": [user(Q), assistant(BAD)]},
        CHAT,
    ),
    "ultrafeedback binarized": (
        "pairs",
        {"prompt": Q, "prompt_id": "1", "chosen": [user(Q), assistant(GOOD)],
         "rejected": [user(Q), assistant(BAD)], "score_chosen": 8.0, "score_rejected": 2.0,
         "messages": [user(Q), assistant(GOOD)]},
        ONE,
    ),
    "hh": ("pairs", {"chosen": HH.format(Q, GOOD), "rejected": HH.format(Q, BAD)}, CHAT),
    "orca": (
        "pairs",
        {"system": "Be brief.", "question": Q, "chosen": GOOD, "rejected": BAD},
        [([{"role": "system", "content": "Be brief."}, user(Q)], GOOD, BAD)],
    ),
    "alpaca with input and history": (
        "pairs",
        {"instruction": "Correct it.", "input": "He go.", "chosen": "He goes.",
         "rejected": "He gone.", "history": [["Hi", "Hello"]]},
        [([user("Hi"), assistant("Hello"), user("Correct it.\n\nHe go.")], "He goes.", "He gone.")],
    ),
    "sharegpt": (
        "pairs",
        {"conversations": [{"from": "human", "value": Q}],
         "chosen": {"from": "gpt", "value": GOOD}, "rejected": {"from": "gpt", "value": BAD}},
        CHAT,
    ),
    "openai": (
        "pairs",
        {"input": {"messages": [user(Q)], "tools": []}, "preferred_output": [assistant(GOOD)],
         "non_preferred_output": [assistant(BAD)]},
        CHAT,
    ),
    "several rejected": (
        "pairs",
        {"prompt": Q, "chosen": [GOOD], "rejected": [BAD, "Ask."]},
        [(Q, GOOD, BAD), (Q, GOOD, "Ask.")],
    ),
    "chat written as text": (
        "pairs",
        {"prompt": f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n",
         "chosen": f"{GOOD}<|im_end|>", "rejected": f"{BAD}<|im_end|>"},
        CHAT,
    ),
    "prompt repeated": (
        "pairs", {"prompt": Q, "chosen": f"{Q}\n{GOOD}", "rejected": f"{Q}\n{BAD}"}, ONE,
    ),
    "winner by letter": (
        "comparison",
        {"prompt": Q, "response_a": BAD, "response_b": GOOD, "winner": "B"}, ONE,
    ),
    "arena": (
        "comparison",
        {"model_a": "x", "model_b": "y", "winner": "model_a",
         "conversation_a": [user(Q), assistant(GOOD)], "conversation_b": [user(Q), assistant(BAD)]},
        CHAT,
    ),
    "winner's name": (
        "comparison",
        {"prompt": Q, "model_a": "x-1", "model_b": "y", "response_a": BAD, "response_b": GOOD,
         "winner": "y"},
        ONE,
    ),
    "speaker in front of replies": (
        "pairs",
        {"prompt": Q, "chosen": f"Assistant: {GOOD}", "rejected": f"Assistant: {BAD}"},
        ONE,
    ),
    "empty system turn": (
        "pairs",
        {"prompt": f"<|system|>\n</s>\n<|user|>\n{Q}</s>\n<|assistant|>\n",
         "chosen": f"{GOOD}</s>", "rejected": f"{BAD}</s>"},
        CHAT,
    ),
    "chosen names the column": (
        "comparison",
        {"prompt": Q, "response_1": BAD, "response_2": GOOD, "chosen": "response_2",
         "rejected": "response_1"},
        ONE,
    ),
    "letters as answers": ("pairs", {"prompt": Q, "chosen": "A", "rejected": "B"}, [(Q, "A", "B")]),
    "chosen is a letter": (
        "comparison", {"prompt": Q, "response_a": BAD, "response_b": GOOD, "chosen": "B"}, ONE,
    ),
    "kaggle arena": (
        "comparison",
        {"id": 1, "prompt": json.dumps([Q]), "response_a": json.dumps([BAD]),
         "response_b": json.dumps([GOOD]), "winner_model_a": 0, "winner_model_b": 1,
         "winner_tie": 0},
        ONE,
    ),
    "helpsteer 3": (
        "comparison",
        {"context": [user(Q)], "response1": GOOD, "response2": BAD, "overall_preference": -2},
        CHAT,
    ),
    "shp": (
        "comparison",
        {"post_id": "a", "history": Q, "human_ref_A": BAD, "human_ref_B": GOOD, "labels": 0,
         "score_A": 3, "score_B": 9},
        ONE,
    ),
    "safe rlhf": (
        "comparison",
        {"prompt": Q, "response_0": BAD, "response_1": GOOD, "better_response_id": 1,
         "safer_response_id": 0, "is_response_0_safe": True},
        ONE,
    ),
    "alpaca farm": (
        "comparison",
        {"instruction": Q, "input": "", "output_1": BAD, "output_2": GOOD, "preference": 2}, ONE,
    ),
    "webgpt": (
        "comparison",
        {"question": Q, "answer_0": GOOD, "answer_1": BAD, "score_0": 0.5, "score_1": -0.5}, ONE,
    ),
    "winner's text": (
        "comparison",
        {"prompt": Q, "response_1": BAD, "response_2": GOOD, "preferred": GOOD}, ONE,
    ),
    "several annotators in a row": (
        "comparison",
        {"prompt": Q, "response_a": GOOD, "response_b": BAD, "label": ["a", "b", "a"]}, ONE,
    ),
    "ultrafeedback": (
        "ranking",
        {"source": "x", "instruction": Q, "completions": [
            {"model": "m", "response": BAD, "overall_score": 2},
            {"model": "n", "response": GOOD, "overall_score": 8}]},
        ONE,
    ),
    "nectar": (
        "ranking",
        {"prompt": HH.format(Q, ""), "answers": [
            {"answer": BAD, "rank": 2.0}, {"answer": GOOD, "rank": 1.0}]},
        CHAT,
    ),
    "distilabel": (
        "ranking", {"instruction": Q, "generations": [BAD, GOOD], "ratings": [1, 5]}, ONE,
    ),
    "best first": ("ranking", {"instruction": Q, "input": "", "output": [GOOD, BAD]}, ONE),
}  # fmt: skip


@pytest.mark.parametrize(("name", "row", "pairs"), LAYOUTS.values(), ids=LAYOUTS)
def test_layout(tmp_path, name, row, pairs):
    found, read, left_out, _ = read_rows(tmp_path, [row])
    assert (found, read, left_out) == (name, pairs, {})


RATED = [
    [{"prompt": Q, "completion": GOOD, "label": True},
     {"prompt": Q, "completion": BAD, "label": False}],
    [{"prompt": Q, "response": GOOD, "score": 4.5}, {"prompt": Q, "response": BAD, "score": 1}],
    [{"question": Q, "answer": BAD, "thumbs": "down"},
     {"question": Q, "answer": GOOD, "thumbs": "up"}],
    [
        {"prompt": Q, "response": GOOD, "helpfulness": 4, "correctness": 4, "coherence": 4,
         "complexity": 1, "verbosity": 1},
        {"prompt": Q, "response": BAD, "helpfulness": 1, "correctness": 0, "coherence": 4,
         "complexity": 1, "verbosity": 1},
    ],
]  # fmt: skip


@pytest.mark.parametrize("rows", RATED)
@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_replies_that_are_rated_one_by_one(tmp_path, rows, form):
    found, read, left_out, _ = read_rows(tmp_path, rows, form)
    assert (found, read, left_out) == ("rated", ONE, {})


def ab(label, **columns):
    return {"prompt": Q, "answer_a": GOOD, "answer_b": BAD, "label": label, **columns}


@pytest.mark.parametrize("labels", [[0, 1], [1, 1], ["0", "1"], [0.2, 0.8], ["x", "y"], [-1, 2]])
def test_labels_that_can_mean_either_are_refused_until_they_are_set(tmp_path, labels):
    rows = [{**ab(label), "prompt": f"{Q} {i}"} for i, label in enumerate(labels)]
    text = message(ConfigError, read_rows, tmp_path, rows)
    for part in ("data.label_column = 'label'", f"× {labels.count(labels[0])}",
                 "set data.labels.first to the value that prefers answer_a"):  # fmt: skip
        assert part in text
    first, second = str(labels[0]), str(labels[1])
    if first != second:
        _, read, _, _ = read_rows(tmp_path, rows, labels={"first": first, "second": second})
        assert [chosen for _, chosen, _ in read] == [GOOD, BAD]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (ab("tie"), "tie: neither reply is preferred"),
        (ab("both bad"), "tie: neither reply is preferred"),
        (ab(["a", "b"]), "tie: neither reply is preferred"),
        (ab(None), "label is missing"),
        (ab("c"), "label has an unknown value"),
        (ab("a", answer_b=GOOD), "both replies are the same"),
        (ab("a", answer_b=""), "answer_b is empty"),
        (ab("a", answer_a={"text": GOOD}), "answer_a is an object"),
        (ab("a", prompt=[user(Q), assistant("x")]), "prompt ends with a reply"),
        (ab("a", prompt=[{"role": "critic", "content": Q}]), "prompt has an unknown role"),
        (ab("a", answer_a=f"{GOOD}<|im_start|>user\nMore"),
         "answer_a holds a control token of a chat template"),
    ],
)  # fmt: skip
def test_rows_that_are_left_out(tmp_path, row, reason):
    rows = [ab("a", prompt="p"), ab("b", prompt="q"), ab("a", prompt="r"), row]
    _, read, left_out, _ = read_rows(tmp_path, rows)
    assert left_out == {reason: 1}
    assert [chosen for _, chosen, _ in read] == [GOOD, BAD, GOOD]


def test_scores_that_tie_or_contradict_the_labels(tmp_path):
    rows = [
        {"prompt": str(i), "chosen": GOOD, "rejected": BAD, "score_chosen": 5, "score_rejected": s}
        for i, s in enumerate((4, 5, 6))
    ]
    _, read, left_out, _ = read_rows(tmp_path, rows)
    assert len(read) == 1
    assert left_out == {
        "tie: both replies have the same score": 1,
        "the scores contradict the labels": 1,
    }


def test_missing_values_written_as_text_in_csv_and_answers_that_are_none(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": GOOD, "rejected": r} for i, r in
            enumerate(("nan", "None", "NULL", "none", "n/a is fine"))]  # fmt: skip
    _, read, left_out, _ = read_rows(tmp_path, rows, "csv")
    assert [rejected for _, _, rejected in read] == ["none", "n/a is fine"]
    assert left_out == {"rejected is a missing value written as text": 3}
    assert len(read_rows(tmp_path, rows)[1]) == 5


def test_chats_as_json_in_csv_cells_and_end_tokens(tmp_path):
    rows = [
        {"prompt": json.dumps([user(f"{Q} {i}")]), "chosen": json.dumps([assistant(GOOD + "</s>")]),
         "rejected": json.dumps([assistant(BAD)])}
        for i in range(3)
    ]  # fmt: skip
    _, read, _, reading = read_rows(tmp_path, rows, "csv")
    assert read[0] == ([user(f"{Q} 0")], GOOD, BAD)
    assert "prompt holds chats written as JSON, which are parsed" in reading.notes
    assert "end tokens that are spelled out behind replies are cut" in reading.notes


@pytest.mark.parametrize(
    "prompt", [HH.format(Q, ""), f"<|im_start|>user\n{Q}<|im_end|>", f"[INST] {Q} [/INST]"]
)
def test_a_single_prompt_that_is_a_chat_written_as_text_is_left_out(tmp_path, prompt):
    rows = [{"prompt": f"{Q} {i}", "chosen": GOOD, "rejected": BAD} for i in range(3)]
    _, read, left_out, _ = read_rows(tmp_path, [*rows, {**rows[0], "prompt": prompt}])
    assert len(read) == 3
    assert left_out == {"prompt is a chat written as text, unlike other rows": 1}


def test_what_looks_like_markup_but_is_an_answer_stays(tmp_path):
    replies = ['{"city": "Oslo"}', "[1, 2]", '["a", "b"]', "Human: is a noun.", "x = {'a': 1}"]
    rows = [{"prompt": f"{Q} {i}", "chosen": r, "rejected": BAD} for i, r in enumerate(replies)]
    _, read, left_out, _ = read_rows(tmp_path, rows)
    assert [chosen for _, chosen, _ in read] == replies
    assert left_out == {}


@pytest.mark.parametrize(
    ("row", "settings", "parts"),
    [
        ({"chosen": GOOD, "rejected": BAD}, {}, ["data.prompt_column: no column holds the prompt"]),
        ({"prompt": Q, "a1": GOOD, "a2": BAD}, {},
         ["no format fits", "a1 (str Boil vinegar in it."]),
        ({"text": Q}, {}, ["supervised fine-tuning", "text (str"]),
        ({"prompt": Q, "answer_a": GOOD, "answer_b": BAD}, {},
         ["no column says which is better", "data.label_column"]),
        ({"message_id": "1", "parent_id": "0", "text": Q, "role": "prompter"}, {},
         ["single messages of trees"]),
        ({"prompt": Q, "chosen": GOOD, "rejected": BAD}, {"chosen_column": "chose"},
         ["data.chosen_column = 'chose'", "did you mean 'chosen'?"]),
        ({"prompt": Q, "chosen": GOOD, "rejected": BAD}, {"prompt_column": "chosen"},
         ["data.prompt_column = 'chosen': is the column of a reply"]),
        ({"prompt": Q, "chosen": GOOD, "rejected": BAD}, {"chosen_column": "prompt"},
         ["data.prompt_column = 'prompt': is the column of a reply"]),
        ({"prompt": Q, "chosen": GOOD, "rejected": BAD},
         {"chosen_column": "chosen", "reference_column": "chosen"},
         ["data.reference_column = 'chosen': is data.chosen_column too"]),
        ({"prompt": Q, "chosen": GOOD, "rejected": BAD}, {"format": "comparison"},
         ["data.format = 'comparison' does not fit"]),
        ({"prompt": Q, "outputs": [GOOD, BAD]}, {}, ["no format fits"]),
    ],
)  # fmt: skip
def test_what_can_not_be_right_is_refused_with_a_cure(tmp_path, row, settings, parts):
    text = message(ConfigError, read_rows, tmp_path, [row], **settings)
    for part in parts:
        assert part in text
    assert "to one of these" not in text


def test_an_object_is_named_with_a_cure_that_works(tmp_path):
    rows = [{"question": Q, "pos": {"answer": GOOD, "n": 1}, "neg": {"answer": BAD, "n": 2}}]
    _, _, left_out, _ = read_rows(tmp_path, rows)
    assert left_out == {"chosen is an object": 1}
    settings = {"chosen_column": "pos.answer", "rejected_column": "neg.answer"}
    assert read_rows(tmp_path, rows, **settings)[1] == ONE


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "text", "rank", "score", "a"]), inner,
        max_size=3,
    ),
    max_leaves=8,
)  # fmt: skip


@pytest.mark.parametrize("row", [row for _, row, _ in LAYOUTS.values()], ids=LAYOUTS)
@given(data=st.data())
@settings(max_examples=15)
def test_any_value_is_converted_or_left_out(row, data):
    layout = detect(list(row), [row], DataConfig(source="x.jsonl"))
    changed = data.draw(st.dictionaries(st.sampled_from(list(row)), JSON, min_size=1))
    converted = None
    with contextlib.suppress(LeftOutError):
        converted = layout.convert({**row, **changed})
    for comparison in converted.comparisons if converted else ():
        assert comparison.chosen.strip()
        assert comparison.rejected.strip()


@given(st.dictionaries(st.sampled_from(
    ["prompt", "chosen", "rejected", "response_a", "response_b", "label", "winner", "completion",
     "completions", "data", "annotations", "fields", "responses", "input", "history", "messages"]),
    JSON))  # fmt: skip
def test_any_columns_are_a_layout_or_refused(row):
    with contextlib.suppress(ConfigError, DataError, LeftOutError):
        detect(list(row), [row], DataConfig(source="x.jsonl")).convert(row)


@given(
    st.sampled_from(["response_a", "answer_1", "output_left"]),
    st.booleans(),
)
def test_swapping_replies_and_label_changes_nothing(column, second_wins):
    stem, _, suffix = column.rpartition("_")
    other = {"a": "b", "1": "2", "left": "right"}[suffix]
    replies = (BAD, GOOD) if second_wins else (GOOD, BAD)
    winner = other if second_wins else suffix
    row = {"prompt": Q, column: replies[0], f"{stem}_{other}": replies[1], "winner": winner}
    more = {**row, "winner": suffix if second_wins else other}
    layout = detect(list(row), [row, more], DataConfig(source="x.jsonl"))
    (comparison,) = layout.convert(row).comparisons
    assert (comparison.chosen, comparison.rejected) == (GOOD, BAD)
