"""Data as people bring them, prepared end to end: the pairs written, and every row counted."""

from __future__ import annotations

import json

import pytest

from rlhf.config import DataConfig
from rlhf.data import rows as files
from rlhf.data.prepare import prepare_data
from rlhf.errors import ConfigError, DataError
from tests.data.helpers import assistant, message, user
from tests.data.test_formats import BAD, CHAT, GOOD, LAYOUTS, ONE, RATED, Q, ab, write_table

TRIPLE = {"prompt": Q, "chosen": GOOD, "rejected": BAD}


def prepare(folder, rows, form="jsonl", **options):
    """The format, pairs that are written, as JSON, and the reasons of the rows left out."""
    write_table(folder / f"data.{form}", rows)
    out = folder / "out"
    out.mkdir(exist_ok=True)
    prepare_data(DataConfig(source=str(folder / f"data.{form}"), **options), out)
    summary = json.loads((out / files.SUMMARY).read_text())
    written = [p for name in (files.PAIRS_TRAIN, files.PAIRS_EVAL)
               for p in files.read_rows(out / name, files.Pair)]  # fmt: skip
    assert summary["rows"] == len(rows)
    assert summary["rows_used"] + sum(summary["left_out"].values()) == len(rows)
    assert summary["pairs_train"] + summary["pairs_eval"] == len(written)
    pairs = in_json([p.prompt, p.chosen, p.rejected] for p in written)
    return summary["format"], pairs, summary["left_out"]


def numbered(items, count=30):
    """The items once for each of several prompts."""
    texts = [json.dumps(item) for item in items]
    for old in (Q, "Correct it.", "Hi"):
        texts = [text.replace(old, f"{old} @") for text in texts]
    return [json.loads(text.replace(" @", f" {i}")) for i in range(count) for text in texts]


def in_json(pairs):
    return sorted(map(json.dumps, pairs))


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_layouts_from_file_to_file(tmp_path, name):
    found, row, pairs = LAYOUTS[name]
    assert prepare(tmp_path, numbered([row]), "json") == (found, in_json(numbered(pairs)), {})


@pytest.mark.parametrize("rows", RATED)
@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_replies_that_are_rated_one_by_one(tmp_path, rows, form):
    found = prepare(tmp_path, numbered(rows), form)
    assert found == ("rated", in_json(numbered(ONE)), {})


CELLS = {
    key: json.dumps([turn])
    for key, turn in (
        ("prompt", user(Q)),
        ("chosen", assistant(f"{GOOD}</s>")),
        ("rejected", assistant(BAD)),
    )
}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
ROLES = [{"role": "Human", "content": Q}], [{"role": "ASSISTANT", "content": GOOD}]
RANKED = {"question": Q, "completions": ["Ask.", GOOD, BAD], "scores": [2, 3, 1]}
SIGN = {"context": [user(Q)], "response1": BAD, "response2": GOOD, "overall_preference": 2}
NEGATIVE = {**SIGN, "response1": GOOD, "response2": BAD, "overall_preference": -1}
NESTED = {"ask": {"text": Q}, "pos": {"answer": GOOD}, "neg": {"answer": BAD}}
REPLIES = {"chosen_column": "pos.answer", "rejected_column": "neg.answer"}
SCORED = {**TRIPLE, "score_chosen": 5, "score_rejected": 4}
#: Form, rows for each prompt, their pairs, further rows, the reason they are left out, settings.
KINDS = {
    "chats in cells": ("csv", [CELLS], CHAT, [], "", {}),
    "missing words": ("csv", [{**TRIPLE, "rejected": "none"}], [(Q, GOOD, "none")],
                      [{**TRIPLE, "rejected": word} for word in ("nan", "NULL", "None ")],
                      "rejected is a missing value written as text", {}),
    "words in JSON": ("json", [{**TRIPLE, "rejected": "nan"}], [(Q, GOOD, "nan")], [], "", {}),
    "capital roles": ("json", [{"prompt": ROLES[0], "chosen": ROLES[1], "rejected": BAD}], CHAT,
                      [{"prompt": [{"role": "critic", "content": Q}], "chosen": ROLES[1],
                        "rejected": BAD}], "prompt has an unknown role", {}),
    "tool calls": ("jsonl", [TRIPLE], ONE, [{**TRIPLE, "chosen": [CALL]}],
                   "chosen holds tool calls", {}),
    "numbers": ("jsonl", [{**TRIPLE, "chosen": 4, "rejected": 5.5}], [(Q, "4", "5.5")], [], "", {}),
    "dotted paths": ("json", [NESTED], ONE, [{**NESTED, "pos": {}}], "chosen is missing",
                     {"prompt_column": "ask.text", **REPLIES}),
    "votes": ("csv", [ab("a"), ab("b"), ab("a")], ONE, [ab("tie")] * 2,
              "tie: neither reply is preferred", {}),
    "kto": ("csv", RATED[0], ONE, [{**RATED[0][0], "prompt": "Why?"}],
            "no other reply to this prompt has a different score", {}),
    "sign": ("jsonl", [SIGN, NEGATIVE], CHAT, [{**SIGN, "overall_preference": 0}],
             "tie: neither reply is preferred", {}),
    "rankings": ("jsonl", [RANKED], [(Q, GOOD, "Ask."), (Q, GOOD, BAD), (Q, "Ask.", BAD)],
                 [{**RANKED, "scores": [1, 1, 1]}], "tie: all replies have the same score", {}),
    "scores": ("csv", [SCORED], ONE, [{**SCORED, "score_rejected": 5}],
               "tie: both replies have the same score", {}),
    "contradiction": ("json", [SCORED], ONE, [{**SCORED, "score_rejected": 6}],
                      "the scores contradict the labels", {}),
}  # fmt: skip


@pytest.mark.parametrize(("form", "rows", "pairs", "more", "reason", "options"), KINDS.values(),
                         ids=KINDS)  # fmt: skip
def test_kinds_of_data(tmp_path, form, rows, pairs, more, reason, options):
    found = prepare(tmp_path, numbered(rows) + more, form, **options)
    left_out = {reason: len(more)} if more else {}
    if rows[0] == ab("a"):
        left_out["outvoted by other rows of the pair"] = 30
    assert found[1:] == (in_json(numbered(pairs)), left_out)
    notes = json.loads((tmp_path / "out" / files.SUMMARY).read_text())["notes"]
    told = {"prompt holds chats written as JSON, which are parsed",
            "end tokens that are spelled out behind replies are cut"}  # fmt: skip
    assert told.issubset(notes) is (rows == [CELLS])


def test_refused_with_a_cure_that_works(tmp_path):
    rows = numbered([ab(1), {**ab(0), "prompt": f"Say: {Q}"}])
    assert "data.labels.first" in message(ConfigError, prepare, tmp_path, rows)
    labels = {"first": 1, "second": 0}
    pairs = [*ONE, (f"Say: {Q}", BAD, GOOD)]
    assert prepare(tmp_path, rows, labels=labels)[1] == in_json(numbered(pairs))
    rows = numbered([{**NESTED, "ask": Q}])
    text = message(DataError, prepare, tmp_path, rows, prompt_column="ask")
    for part in ("chosen is an object", "data.chosen_column", "pos.answer"):
        assert part in text
    assert prepare(tmp_path, rows, prompt_column="ask", **REPLIES)[1] == in_json(numbered(ONE))
