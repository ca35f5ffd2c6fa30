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
from tests.data.helpers import assistant, message, pair, user
from tests.examples import examples

Q, GOOD, BAD = "How do I clean a kettle?", "Boil vinegar in it.", "No idea."
HH = "\n\nHuman: {}\n\nAssistant: {}"


def write_table(path, rows):
    with path.open("w", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        else:
            ends = ("[", ",", "]") if path.suffix == ".json" else ("", "\n", "\n")
            file.write(ends[0] + ends[1].join(map(json.dumps, rows)) + ends[2])


def read_rows(folder, rows, form="jsonl", **settings):
    """Format, pairs as (prompt, chosen, rejected), reasons of the rows left out, and notes."""
    path = folder / f"data.{form}"
    write_table(path, rows)
    config, quarantine = DataConfig(source=str(path), **settings), Quarantine()
    reading = read_pairs(config, StoreConfig(), quarantine, PromptFields(config))
    reading.pairs.use()
    used = reading.ledger.close(quarantine.add)
    assert used + quarantine.total == reading.rows == len(rows)
    pairs = [(p.prompt, p.chosen, p.rejected) for p, _ in reading.pairs]
    return ", ".join(reading.formats), pairs, dict(quarantine.reasons), reading


ONE = [(Q, GOOD, BAD)]
CHAT = [([user(Q)], GOOD, BAD)]
LAYOUTS = {
    "trl explicit": ("pairs", {"prompt": Q, "chosen": GOOD, "rejected": BAD}, ONE),
    "trl messages": (
        "pairs", {"prompt": [user(Q)], "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]},
        CHAT),
    "trl implicit": (
        "pairs", {"chosen": [user(Q), assistant(GOOD)], "rejected": [user(Q), assistant(BAD)]},
        CHAT),
    "ultrafeedback binarized": (
        "pairs", {"prompt": Q, "prompt_id": "1", "chosen": [user(Q), assistant(GOOD)],
         "rejected": [user(Q), assistant(BAD)], "score_chosen": 8.0, "score_rejected": 2.0,
         "messages": [user(Q), assistant(GOOD)]}, ONE),
    "hh": ("pairs", {"chosen": HH.format(Q, GOOD), "rejected": HH.format(Q, BAD)}, CHAT),
    "orca": ("pairs", {"system": "Be brief.", "question": Q, "chosen": GOOD, "rejected": BAD},
        [([{"role": "system", "content": "Be brief."}, user(Q)], GOOD, BAD)]),
    "alpaca with input and history": (
        "pairs", {"instruction": "Correct it.", "input": "He go.", "chosen": "He goes.",
         "rejected": "He gone.", "history": [["Hi", "Hello"]]},
        [([user("Hi"), assistant("Hello"), user("Correct it.\n\nHe go.")], "He goes.", "He gone.")],
    ),
    "sharegpt": ("pairs", {"conversations": [{"from": "human", "value": Q}],
         "chosen": {"from": "gpt", "value": GOOD}, "rejected": {"from": "gpt", "value": BAD}}, CHAT,
    ),
    "openai": ("pairs",
        {"input": {"messages": [user(Q)], "tools": []}, "preferred_output": [assistant(GOOD)],
         "non_preferred_output": [assistant(BAD)]}, CHAT),
    "several rejected": ("pairs", {"prompt": Q, "chosen": [GOOD], "rejected": [BAD, "Ask."]},
        [(Q, GOOD, BAD), (Q, GOOD, "Ask.")]),
    "chat written as text": (
        "pairs", {"prompt": f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n",
         "chosen": f"{GOOD}<|im_end|>", "rejected": f"{BAD}<|im_end|>"}, CHAT),
    "prompt repeated": (
        "pairs", {"prompt": Q, "chosen": f"{Q}\n{GOOD}", "rejected": f"{Q}\n{BAD}"}, ONE),
    "winner by letter": (
        "comparison", {"prompt": Q, "response_a": BAD, "response_b": GOOD, "winner": "B"}, ONE),
    "arena": ("comparison", {"model_a": "x", "model_b": "y", "winner": "model_a",
         "conversation_a": [user(Q), assistant(GOOD)], "conversation_b": [user(Q), assistant(BAD)]},
        CHAT),
    "winner's name": ("comparison",
        {"prompt": Q, "model_a": "x-1", "model_b": "y", "response_a": BAD, "response_b": GOOD,
         "winner": "y"}, ONE),
    "speaker in front of replies": (
        "pairs", {"prompt": Q, "chosen": f"Assistant: {GOOD}", "rejected": f"Assistant: {BAD}"},
        ONE),
    "empty system turn": (
        "pairs", {"prompt": f"<|system|>\n</s>\n<|user|>\n{Q}</s>\n<|assistant|>\n",
         "chosen": f"{GOOD}</s>", "rejected": f"{BAD}</s>"}, CHAT),
    "chosen names the column": (
        "comparison", {"prompt": Q, "response_1": BAD, "response_2": GOOD, "chosen": "response_2",
         "rejected": "response_1"}, ONE),
    "letters as answers": ("pairs", {"prompt": Q, "chosen": "A", "rejected": "B"}, [(Q, "A", "B")]),
    "chosen is a letter": (
        "comparison", {"prompt": Q, "response_a": BAD, "response_b": GOOD, "chosen": "B"}, ONE),
    "kaggle arena": (
        "comparison", {"id": 1, "prompt": json.dumps([Q]), "response_a": json.dumps([BAD]),
         "response_b": json.dumps([GOOD]), "winner_model_a": 0, "winner_model_b": 1,
         "winner_tie": 0}, ONE),
    "helpsteer 3": ("comparison",
        {"context": [user(Q)], "response1": GOOD, "response2": BAD, "overall_preference": -2}, CHAT,
    ),
    "shp": ("comparison",
        {"post_id": "a", "history": Q, "human_ref_A": BAD, "human_ref_B": GOOD, "labels": 0,
         "score_A": 3, "score_B": 9}, ONE),
    "safe rlhf": (
        "comparison", {"prompt": Q, "response_0": BAD, "response_1": GOOD, "better_response_id": 1,
         "safer_response_id": 0, "is_response_0_safe": True}, ONE),
    "alpaca farm": ("comparison",
        {"instruction": Q, "input": "", "output_1": BAD, "output_2": GOOD, "preference": 2}, ONE),
    "webgpt": ("comparison",
        {"question": Q, "answer_0": GOOD, "answer_1": BAD, "score_0": 0.5, "score_1": -0.5}, ONE),
    "winner's text": (
        "comparison", {"prompt": Q, "response_1": BAD, "response_2": GOOD, "preferred": GOOD}, ONE),
    "several annotators in a row": ("comparison",
        {"prompt": Q, "response_a": GOOD, "response_b": BAD, "label": ["a", "b", "a"]}, ONE),
    "ultrafeedback": ("ranking", {"source": "x", "instruction": Q, "completions": [
            {"model": "m", "response": BAD, "overall_score": 2},
            {"model": "n", "response": GOOD, "overall_score": 8}]}, ONE),
    "nectar": ("ranking", {"prompt": HH.format(Q, ""), "answers": [
            {"answer": BAD, "rank": 2.0}, {"answer": GOOD, "rank": 1.0}]}, CHAT),
    "distilabel": (
        "ranking", {"instruction": Q, "generations": [BAD, GOOD], "ratings": [1, 5]}, ONE),
    "best first": ("ranking", {"instruction": Q, "input": "", "output": [GOOD, BAD]}, ONE),
}  # fmt: skip


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


def ab(label, **columns):
    return {"prompt": Q, "answer_a": GOOD, "answer_b": BAD, "label": label, **columns}


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
        (ab("a", answer_a={"score": 1}), "answer_a is an object"),
        (ab("a", prompt=[user(Q), assistant("x")]), "prompt ends with a reply"),
        (ab("a", prompt=[{"role": "critic", "content": Q}]), "prompt has an unknown role"),
        (ab("a", answer_a=f"{GOOD}<|im_start|>user\nMore"),
         "answer_a goes on behind a control token of a chat template"),
    ],
)  # fmt: skip
def test_rows_that_are_left_out(tmp_path, row, reason):
    rows = [ab("a", prompt="p"), ab("b", prompt="q"), ab("a", prompt="r"), row]
    _, read, left_out, _ = read_rows(tmp_path, rows)
    assert left_out == {reason: 1}
    assert [chosen for _, chosen, _ in read] == [GOOD, BAD, GOOD]


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
        ({"prompt": Q, "outputs": [GOOD, BAD]}, {},
         ["the replies in outputs have neither scores nor ranks", "set data.format=ranking"]),
        ({"instruction": Q, "input": "", "output": GOOD}, {},
         ["supervised fine-tuning: there is nothing to compare", "give two replies"]),
        ({"messages": [user(Q), assistant(GOOD)]}, {},
         ["supervised fine-tuning: there is nothing to compare", "give two replies"]),
        ({"id": 1, "prompt": Q}, {}, ["there is nothing to compare in these columns"]),
        ({"prompt": Q, "response": GOOD, "stars": 5}, {},
         ["supervised fine-tuning: no column says", "data.label_column"]),
        ({"prompt": Q, "chosen": GOOD, "rejected": BAD, "flag": 1}, {"label_column": "flag"},
         ["data.label_column: names 'flag'", "taken for pairs", "remove the setting"]),
        ({"prompt": Q, "chosen": GOOD, "rejected": BAD, "flag": 1}, {"score_weights": {"flag": 1}},
         ["data.score_weights: names 'flag'", "taken for pairs"]),
        ({"prompt": Q, "response": GOOD, "tone": 1}, {"score_weights": {"tune": 1.0}},
         ["data.score_weights = 'tune': not a column", "did you mean 'tone'?"]),
    ],
)  # fmt: skip
def test_what_can_not_be_right_is_refused_with_a_cure(tmp_path, row, settings, parts):
    text = message(ConfigError, read_rows, tmp_path, [row], **settings)
    for part in parts:
        assert part in text
    assert "to one of these" not in text
    if "nothing to compare" in text or "single messages" in text:
        assert "data.chosen_column" not in text  # there is no column to set


def test_a_scale_of_unknown_sign_is_refused_with_a_cure_that_works(tmp_path):
    rows = [ab(score, prompt=f"{Q} {score}") for score in (-2, -1, 1, 1.5)]
    text = message(ConfigError, read_rows, tmp_path, rows)
    assert "add a column that names the better reply, answer_a or answer_b" in text
    assert "data.labels.first" not in text


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
@settings(max_examples=examples(15))
def test_any_value_is_converted_or_left_out(row, data):
    layout = detect(list(row), [row], DataConfig(source="x.jsonl"))
    changed = data.draw(st.dictionaries(st.sampled_from(list(row)), JSON, min_size=1))
    converted = None
    # A label outside of the first rows' convention stops the stage.
    with contextlib.suppress(LeftOutError, ConfigError):
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


@pytest.mark.parametrize("repeats", ["chosen", "rejected"])
def test_a_prompt_in_front_of_one_reply_alone_is_a_part_of_it(tmp_path, repeats):
    row = pair(Q, GOOD, BAD)
    row[repeats] = f"{Q} {row[repeats]}"
    assert read_rows(tmp_path, [row])[1] == [(Q, row["chosen"], row["rejected"])]
