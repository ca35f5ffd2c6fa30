"""Rows with several candidate replies inside are read by what they say, and never inverted."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from rlhf.config import DataConfig
from rlhf.data import rows as files
from rlhf.data.formats import detect
from rlhf.errors import ConfigError, NoPreferences
from tests.data.helpers import assistant, user
from tests.data.test_meaning import asked, bad, good, prepare, right, side, two
from tests.examples import examples


def parts(role, *texts):
    """A message as Gemini writes it."""
    return {"role": role, "parts": [{"text": text} for text in texts]}


def converse(role, *texts):
    """A message as Bedrock writes it."""
    return {"role": role, "content": [{"text": text} for text in texts]}


def mixed(i, items):
    """The items in an order that the row's number decides."""
    return random.Random(i).sample(items, len(items))


def candidates(i, *labels):
    texts = {"preferred": good(i), "non-preferred": bad(i)}
    items = [{"content": [{"text": texts[n]}], "preferenceLabel": n} for n in labels]
    return {"role": "assistant", "candidates": mixed(i, items)}


def nova(i, *labels):
    return {
        "schemaVersion": "bedrock-conversation-2024", "system": [{"text": "Be kind."}],
        "messages": [converse("user", asked(i)), candidates(i, *labels or SIDES)],
    }  # fmt: skip


SIDES = ("preferred", "non-preferred")


def options(i, *texts):
    return mixed(i, [{"id": f"{i}-{k}", "text": text} for k, text in enumerate(texts)])


def choice(i, *texts, accept=1, **more):
    """A task of Prodigy whose first `accept` texts are accepted."""
    listed = options(i, *texts)
    ids = [item["id"] for item in listed if item["text"] in texts[:accept]]
    return {"text": asked(i), "options": listed, "accept": ids, "answer": "accept",
            "_view_id": "choice", "_annotator_id": f"u{i % 2}", **more}  # fmt: skip


def model(turn, text, score, chosen):
    return {"turn": turn, "role": "model", "content": text, "model_name": "m", "score": score,
            "if_chosen": chosen}  # fmt: skip


def prism(i, low=10, **more):
    """A conversation of two turns, each with two replies."""
    turns = []
    for turn, text in enumerate((asked(i), f"Go on with question {i}.")):
        replies = [model(turn, f"{good(i)} {turn}", 90, True),
                   model(turn, f"{bad(i)} {turn}", low, False)]  # fmt: skip
        turns += [{"turn": turn, "role": "user", "content": text}, *mixed(i + turn, replies)]
    return {"user_id": f"u{i % 2}", "opening_prompt": asked(i), "conversation_history": turns,
            **more}  # fmt: skip


def mix_instruct(i):
    scored = [(good(i), 0.9), (bad(i), 0.2), ("So so.", 0.5)]
    items = [{"model": "m", "text": text, "scores": {"bleu": s, "bartscore": s - 4, "loss": 1 - s}}
             for text, s in scored]  # fmt: skip
    return {"instruction": asked(i), "input": "", "output": "A reference.",
            "candidates": mixed(i, items)}  # fmt: skip


#: Rows by their number; each prefers the right reply.
READ = {
    "Bedrock": nova,
    "Bedrock without a schema": lambda i: {"messages": nova(i)["messages"]},
    "Gemini": lambda i: {
        "systemInstruction": parts("system", "Be kind."), "contents": [parts("user", asked(i))],
        "completions": mixed(i, [{"score": 1.0, "completion": parts("model", good(i))},
                                 {"score": 0.0, "completion": parts("model", bad(i))}])},
    "contents beside a pair": lambda i: {
        "contents": [parts("user", asked(i))], "chosen": parts("model", good(i)),
        "rejected": parts("model", bad(i))},
    "contents that begin alike": lambda i: {
        "chosen": [parts("user", asked(i)), parts("model", good(i))],
        "rejected": [parts("user", asked(i)), parts("model", bad(i))]},
    "Prodigy": lambda i: choice(i, good(i), bad(i)),
    "Prodigy of three": lambda i: choice(i, good(i), bad(i), f"BAD too {i}."),
    "Prodigy with several": lambda i: choice(i, good(i), f"GOOD too {i}.", bad(i), accept=2),
    "Prodigy with a prompt": lambda i: {
        "question": asked(i), "options": options(i, good(i), bad(i)), "accept": [f"{i}-0"]},
    "Prodigy with labels": lambda i: {
        "text": asked(i), **{k: v for k, v in two(i).items() if k != "prompt"}, "answer": "accept",
        "options": [{"id": "a", "text": "A"}, {"id": "b", "text": "B"}],
        "accept": [side(i, "a", "b")]},
    "PRISM": prism,
    "PRISM without scores": lambda i: prism(i, conversation_history=[
        {k: v for k, v in m.items() if k != "score"} for m in prism(i)["conversation_history"]]),
    "AlpacaEval": lambda i: {
        "instruction": asked(i), **{k: v for k, v in two(i, "output_1", "output_2").items()
                                    if k != "prompt"},
        "preference": side(i, 1.0002, 1.99987)},
    "mix-instruct": mix_instruct,
    "mix-instruct by loss": mix_instruct,
}  # fmt: skip
SETTINGS = {
    "mix-instruct": {"label_column": "candidates.scores.bartscore"},
    "mix-instruct by loss": {"label_column": "candidates.scores.loss"},
}


@pytest.mark.parametrize("name", READ)
def test_rows_with_candidates_prefer_the_right_reply(tmp_path, name):
    more: dict[str, Any] = {
        "max_reply_share": None,
        "near_duplicates": None,
        **SETTINGS.get(name, {}),
    }
    pairs, summary = prepare(tmp_path, [READ[name](i) for i in range(24)], **more)
    if name.startswith("mix"):
        pairs = [p for p in pairs if "So so." not in (p.chosen, p.rejected)]
    assert len(pairs) >= 24
    assert right(pairs)
    assert all("question" in str(p.prompt) for p in pairs)
    assert summary["left_out"] == {}


def test_what_is_not_read_of_them_is_listed(tmp_path):
    _, summary = prepare(tmp_path, [choice(i, good(i), bad(i), meta=i) for i in range(24)])
    assert summary["unused_columns"] == "meta"
    assert summary["format"] == "comparison"
    card = json.loads((tmp_path / "out" / files.CARD).read_text())
    assert {row["name"] for row in card["annotators"]["rows"]} == {"u0", "u1"}


def test_a_turn_follows_the_chosen_replies_before_it(tmp_path):
    pairs, _ = prepare(tmp_path, [prism(i) for i in range(24)], near_duplicates=None)
    long = [p for p in pairs if len(p.prompt) == 3]
    assert len(pairs) == 48
    assert len(long) == 24
    for p in long:
        number = int(p.prompt[2]["content"].split()[-1].rstrip("."))
        assert p.prompt[1] == assistant(f"{good(number)} 0")
        assert p.chosen == f"{good(number)} 1"
        assert p.margin == 80


def test_system_turns_in_parts_go_before_the_prompt(tmp_path):
    for row in (READ["Gemini"], nova):
        pairs, _ = prepare(tmp_path, [row(i) for i in range(24)])
        assert all(p.prompt[0] == {"role": "system", "content": "Be kind."} for p in pairs)


def test_weighted_preferences_have_their_lead_as_margin_and_ties(tmp_path):
    values = {0: 1.0, 1: 1.93, 2: 1.5, 3: 2}
    rows = [{**READ["AlpacaEval"](i), "preference": values[i % 4]} for i in range(24)]
    pairs, summary = prepare(tmp_path, rows)
    assert right(pairs)
    assert {round(p.margin or 0, 6) for p in pairs} == {1.0, 0.86}
    assert summary["left_out"] == {"tie: neither reply is preferred": 6}


def test_weighted_preferences_are_on_one_scale(tmp_path):
    rows = [{**READ["AlpacaEval"](i), "preference": 3.5 if i == 230 else 1.2} for i in range(260)]
    with pytest.raises(ConfigError, match=r"holds 3.5, but in the first rows numbers from 1"):
        prepare(tmp_path, rows)
    rows = [{**row, "preference": side(i, 1.2, 3.4)} for i, row in enumerate(rows)]
    with pytest.raises(ConfigError, match="don't say which of output_1 and output_2"):
        prepare(tmp_path, rows)


LEFT_OUT = {
    "rejected": (lambda i: choice(i, good(i), bad(i), answer="reject"),
                 "the task was rejected or ignored"),
    "ignored": (lambda i: choice(i, good(i), bad(i), answer="ignore"),
                "the task was rejected or ignored"),
    "all accepted": (lambda i: choice(i, good(i), bad(i), accept=2),
                     "tie: all options are accepted, or none"),
    "unknown option": (lambda i: choice(i, good(i), bad(i)) | {"accept": ["x"]},
                       "accept names no single option"),
    "option of an image": (lambda i: choice(i, good(i), bad(i)) | {
        "options": [{"id": 0, "image": "x"}, {"id": 1, "image": "y"}], "accept": [0]},
        "an option has no text"),
    "unknown label": (lambda i: {"messages": [converse("user", asked(i)), {"candidates": [
        {"preferenceLabel": "good"}, {"preferenceLabel": "bad"}]}]},
        "a candidate has an unknown preferenceLabel"),
    "one candidate": (lambda i: nova(i, "preferred"), "the last message has no two candidates"),
    "equal labels": (lambda i: nova(i, "preferred", "preferred"),
                     "tie: all candidates have the same preferenceLabel"),
    "an image": (lambda i: {"messages": [{"role": "user", "content": [
        {"text": asked(i)}, {"image": {"format": "png"}}]}, candidates(i, *SIDES)]},
        "prompt holds an image"),
    "if_chosen against the score": (lambda i: prism(i, 95), "if_chosen and score say the contrary"),
    "no reply is chosen": (lambda i: prism(i, conversation_history=[
        {**m, "if_chosen": False} if "if_chosen" in m else m
        for m in prism(i)["conversation_history"]]),
        "a turn follows replies of which not exactly one has if_chosen"),
    "single replies": (lambda i: prism(i, conversation_history=[
        user(asked(i)), model(0, good(i), 9, True)]), "no turn has two replies"),
    "a call": (lambda i: READ["Gemini"](i) | {"contents": [
        {"role": "user", "parts": [{"functionCall": {"name": "f"}}]}]}, "prompt holds tool calls"),
    "a file": (lambda i: READ["Gemini"](i) | {"contents": [
        {"role": "user", "parts": [{"inlineData": {"data": "x"}}, {"text": "y"}]}]},
        "prompt holds a file"),
    "a thought": (lambda i: READ["Gemini"](i) | {"contents": [
        {"role": "user", "parts": [{"text": "Hm.", "thought": True}]}]}, "prompt holds a thought"),
}  # fmt: skip
OTHERS = {"unknown label": nova, "one candidate": nova, "equal labels": nova, "an image": nova,
          "a call": READ["Gemini"], "a file": READ["Gemini"], "a thought": READ["Gemini"],
          "if_chosen against the score": prism, "no reply is chosen": prism,
          "single replies": prism}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_OUT)
def test_rows_that_say_nothing_certain_are_left_out_with_the_reason(tmp_path, name):
    row, reason = LEFT_OUT[name]
    usual = OTHERS.get(name, lambda i: choice(i, good(i), bad(i)))
    rows = [usual(i) for i in range(24)] + [row(24), row(25)]
    pairs, summary = prepare(tmp_path, rows, max_bad_fraction=0.2, near_duplicates=None)
    assert summary["left_out"] == {reason: 2}
    assert right(pairs)


def test_tasks_of_more_options_late_in_the_file_are_left_out(tmp_path):
    rows = [choice(i, good(i), bad(i)) for i in range(210)]
    rows[205:] = [choice(i, good(i), bad(i), "BAD too.") for i in range(205, 210)]
    pairs, summary = prepare(tmp_path, rows, max_reply_share=None, near_duplicates=None)
    assert summary["left_out"] == {"the task has more options than the first rows": 5}
    assert len(pairs) == 205
    assert right(pairs)
    pairs, _ = prepare(tmp_path, rows[20:], max_reply_share=None, near_duplicates=None)
    assert len(pairs) == 185 + 2 * 5


STEPS = {
    "PRM800K": (
        lambda i: {"question": {"problem": asked(i)}, "label": {"steps": [{"completions": [
            {"text": "Step 1", "rating": 1}, {"text": "Step 2", "rating": -1}]}]}},
        r"label\.steps holds solutions whose steps are rated \(PRM800K\).*two whole solutions"),
    "TRL": (
        lambda i: {"prompt": asked(i), "completions": [good(i), bad(i)], "labels": [True, False]},
        r"completions and labels .*stepwise supervision.*set data\.label_column=labels"),
    "steps": (
        lambda i: {"problem": asked(i), "steps": [good(i), bad(i)], "labels": [1, -1]},
        r"steps and labels .*stepwise supervision.*a right and a wrong one"),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_ratings_of_steps_are_no_pairs(tmp_path, name):
    row, part = STEPS[name]
    with pytest.raises(NoPreferences, match=part):
        prepare(tmp_path, [row(i) for i in range(24)])


def test_flags_of_whole_replies_are_read_by_the_setting(tmp_path):
    rows = [STEPS["TRL"][0](i) for i in range(24)]
    assert right(prepare(tmp_path, rows, label_column="labels")[0])
    rows = [{**row, "chosen": good(i), "rejected": bad(i)} for i, row in enumerate(rows)]
    assert right(prepare(tmp_path, rows)[0])


def test_scores_of_several_metrics_need_the_setting(tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"llm-blender's mix-instruct.*set data\.label_column=candidates\.scores\.bleu or ",
    ):
        prepare(tmp_path, [mix_instruct(i) for i in range(24)])
    with pytest.raises(ConfigError, match=r"'candidates\.scores\.blue': not a column"):
        prepare(tmp_path, [mix_instruct(i) for i in range(24)],
                label_column="candidates.scores.blue")  # fmt: skip


def test_options_that_are_labels_of_one_text_are_no_replies(tmp_path):
    rows = [{"text": asked(i), "options": [{"id": 0, "text": "fine"}, {"id": 1, "text": "poor"}],
             "accept": [i % 2], "answer": "accept"} for i in range(24)]  # fmt: skip
    with pytest.raises(NoPreferences):
        prepare(tmp_path, rows)


def test_numbers_of_options_beside_replies_need_their_meaning(tmp_path):
    rows = [READ["Prodigy with labels"](i) for i in range(24)]
    rows = [{**row, "options": [{"id": 0, "text": "x"}, {"id": 1, "text": "y"}],
             "accept": [i % 2]} for i, row in enumerate(rows)]  # fmt: skip
    with pytest.raises(ConfigError, match=r"'accept'.*set data\.labels\.first"):
        prepare(tmp_path, rows)
    pairs, _ = prepare(tmp_path, rows, labels={"first": "0", "second": "1"})
    assert right(pairs)


def test_marks_of_templates_in_parts_are_found(tmp_path):
    rows = [nova(i) for i in range(24)]
    for i, row in enumerate(rows):
        row["messages"][0] = converse("user", f"Student: {asked(i)}\nTeacher:")
    with pytest.raises(ConfigError, match=r"begin with 'Student:'"):
        prepare(tmp_path, rows)


@given(st.data())
@settings(max_examples=examples(60), deadline=None, phases=[Phase.explicit, Phase.generate])
def test_candidates_are_never_the_wrong_way_round(data):
    """Orders, scores, ids and further columns are drawn."""
    kind = data.draw(st.sampled_from(["nova", "prodigy", "prism", "gemini", "mix", "share"]))
    low, high = sorted(
        data.draw(st.lists(st.integers(1, 100), min_size=2, max_size=2, unique=True))
    )
    more = data.draw(st.dictionaries(
        st.sampled_from(["label", "winner", "score", "rank", "rejected_by", "chosen_id", "answer"]),
        st.sampled_from([0, 1, 2, "a", "x"]), max_size=2))  # fmt: skip
    seed = data.draw(st.integers(0, 1000))
    ids = data.draw(st.sampled_from([(0, 1), (1, 0), ("b", "a"), ("x", "y"), ("2", "1")]))

    def row(i):
        k = seed + i
        first = mixed(k, [True, False])[0]
        if kind == "nova":
            return {**more, "messages": [converse("user", asked(i)), candidates(k, *SIDES)]}
        if kind == "prodigy":
            texts = mixed(k, [good(i), bad(i)])
            listed = [{"id": x, "text": t} for x, t in zip(ids, texts, strict=True)]
            return {
                **more,
                "text": asked(i),
                "options": listed,
                "accept": [o["id"] for o in listed if "GOOD" in o["text"]],
                "answer": "accept",
            }
        if kind == "prism":
            replies = mixed(k, [model(0, good(i), high, True), model(0, bad(i), low, False)])
            return {**more, "conversation_history": [user(asked(i)), *replies]}
        if kind == "gemini":
            return {
                **more,
                "contents": [parts("user", asked(i))],
                "completions": mixed(
                    k,
                    [
                        {"score": high, "completion": parts("model", good(i))},
                        {"score": low, "completion": parts("model", bad(i))},
                    ],
                ),
            }
        if kind == "mix":
            return {
                **more,
                "instruction": asked(i),
                "candidates": mixed(
                    k,
                    [
                        {"text": good(i), "scores": {"m": high, "n": 1}},
                        {"text": bad(i), "scores": {"m": low, "n": 2}},
                    ],
                ),
            }
        one, other = (good(i), bad(i)) if first else (bad(i), good(i))
        lead = (high - low) / 200
        return {
            **more,
            "instruction": asked(i),
            "output_1": one,
            "output_2": other,
            "preference": 1.5 - lead if first else 1.5 + lead,
        }

    named: dict[str, Any] = {"label_column": "candidates.scores.m"} if kind == "mix" else {}
    rows = [row(i) for i in range(12)]
    layout = detect([*rows[0]], rows, DataConfig(source="x", **named))
    for found in rows:
        (pair,) = layout.convert(found).comparisons
        assert right([pair]), json.dumps(found)
