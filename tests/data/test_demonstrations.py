"""Demonstrations of their own for SFT: formats, turns, refusals, and what never is one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf.config import DataConfig
from rlhf.data import rows as files
from rlhf.data.prepare import prepare_data
from rlhf.data.records import Record
from rlhf.data.rows import Demonstration, Pair, PromptRow, messages_of, read_rows
from rlhf.errors import ConfigError, DataError
from tests.data.helpers import assistant, message, pair, user
from tests.examples import examples


def write(path, data) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    return str(path)


#: Rows of pairs; "best" won every comparison.
PAIRS = [pair(f"pairs ask the question {i}", "best", "worst") for i in range(20)]


def prepare(tmp_path, data, pairs=PAIRS, source: dict[str, Any] | None = None, **options: Any):
    """Demonstrations of these rows, the summary, and the quarantine's lines."""
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    path = data if isinstance(data, str) else write(tmp_path / "sft.jsonl", data)
    config = DataConfig(
        source=write(tmp_path / "pairs.jsonl", pairs),
        sft_source=path if source is None else {"source": path, **source},
        **options,
    )
    prepare_data(config, out)
    lines = [json.loads(line) for line in (out / files.QUARANTINE).read_text().splitlines()]
    summary = json.loads((out / files.SUMMARY).read_text())
    return read_rows(out / files.DEMONSTRATIONS, Demonstration), summary, lines


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def both(prompt: Any = "How?", reply: str = "So.") -> list[Demonstration]:
    return [Demonstration(prompt, reply)]


def chat(*texts: str) -> list[dict[str, Any]]:
    return [user(text) if i % 2 == 0 else assistant(text) for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": chat("How?", "So.")}, both([user("How?")])),
        ({"conversations": [{"from": "system", "value": "Be"}, {"from": "human", "value": "How?"},
                            {"from": "gpt", "value": "So."}]},
         both([system("Be"), user("How?")])),
        ({"conversation": json.dumps(chat("How?", "So."))}, both([user("How?")])),
        ({"messages": chat("How?", "So."), "system": "Be", "id": 1},
         both([system("Be"), user("How?")])),
        ({"prompt": "How?", "prompt_id": "x", "messages": chat("How?", "So.")},
         both([user("How?")])),
        ({"messages": chat("How?"), "response": "So."}, both([user("How?")])),
        ({"instruction": "How?", "input": "", "output": "So.", "text": "### ..."}, both()),
        ({"instruction": "Add", "input": "2 and 3", "output": "5"}, both("Add\n\n2 and 3", "5")),
        ({"instruction": "Who?", "context": "Ann came.", "response": "Ann", "category": "qa"},
         both("Who?\n\nAnn came.", "Ann")),
        ({"instruction": "How?", "output": "So.", "system": "Be", "history": []},
         both([system("Be"), user("How?")])),
        ({"question": "How?", "answer": "So."}, both()),
        ({"prompt": "How?", "completion": "So."}, both()),
        ({"prompt": "How?", "response": "So.</s>"}, both()),
        ({"query": "How?", "response": "So."}, both()),
        ({"input": "How?", "output": "So."}, both()),
        ({"Question": "How?", "Answer": 5}, both("How?", "5")),
        ({"prompt": [user("How?")], "completion": [assistant("So.")]}, both([user("How?")])),
        ({"text": "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n"},
         both([user("How?")])),
        ({"text": "\n\nHuman: How?\n\nAssistant: So."}, both([user("How?")])),
        ({"text": "### Instruction:\nHow?\n\n### Response:\nSo."}, both([user("How?")])),
        ({"prompt": "Tell me why it is?", "completion": "Tell me why it is? Since."},
         both("Tell me why it is?", "Since.")),
        ({"prompt": "How?", "completion": "So.", "label": True}, both()),
    ],
)  # fmt: skip
def test_formats(tmp_path, row, expected):
    found, summary, lines = prepare(tmp_path, [row])
    assert found == expected
    assert lines == []
    assert any(note.startswith("data.sft_source: ") for note in summary["notes"])


def test_every_reply_of_a_conversation_or_the_last(tmp_path):
    turns = [system("Be"), *chat("a", "b", "c", "d")]
    first = Demonstration(turns[:2], "b")
    last = Demonstration(turns[:4], "d")
    assert prepare(tmp_path, [{"messages": turns}])[0] == [first, last]
    assert prepare(tmp_path, [{"messages": turns}], sft_turns="last")[0] == [last]
    history = {"instruction": "c", "output": "d", "system": "Be", "history": [["a", "b"]]}
    assert prepare(tmp_path, [history])[0] == [first, last]
    assert prepare(tmp_path, [history], sft_turns="last")[0] == [last]
    # The turns of a prompt are context: the completion alone is learned, as in TRL.
    prompt = {"prompt": chat("a", "b", "c"), "completion": "d"}
    assert prepare(tmp_path, [prompt])[0] == [Demonstration(chat("a", "b", "c"), "d")]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
@pytest.mark.parametrize("form", [list, json.dumps])
def test_replies_marked_as_context_are_not_learned(tmp_path, mark, form):
    turns = chat("a", "b", "c", "d")
    turns[1] |= mark
    rows = [{"messages": form(turns)}, {"messages": form(chat("e", "f"))}]
    found, summary, _ = prepare(tmp_path, rows)
    assert [d.response for d in found] == ["d", "f"]
    assert any("only context" in note for note in summary["notes"])


def test_greetings_and_turns_without_a_reply_are_cut_and_said(tmp_path):
    turns = [system("Be"), assistant("Hello!"), *chat("a", "b", "c")]
    found, summary, _ = prepare(tmp_path, [{"messages": turns}])
    assert found == [Demonstration([system("Be"), user("a")], "b")]
    assert any("replies before a user's first turn are cut" in n for n in summary["notes"])
    assert any("turns after the last reply are not used" in n for n in summary["notes"])


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        (chat("a"), "the conversation has no reply to learn"),
        ([assistant("a")], "the conversation has no user's turn"),
        ([*chat("a", "b"), assistant("c")], "two messages of the assistant follow each other"),
        ([*chat("a", "b"), system("c"), *chat("d", "e")], "a system turn inside the conversation"),
        ([user("a"), {"role": "critic", "content": "b"}], "conversation has an unknown role"),
        ([user("a"), {"role": "assistant", "tool_calls": [{"id": 1}]}],
         "conversation holds tool calls"),
        ([user("a"), assistant([{"type": "image"}])], "conversation holds an image"),
        ([user("a"), assistant("So.<|im_end|>x")],
         "reply goes on behind a control token of a chat template"),
        ([user("a"), assistant("x" * 101)], "reply too long"),
        ([user("a" * 101), assistant("x")], "prompt too long"),
    ],
)  # fmt: skip
def test_reasons(tmp_path, turns, reason):
    good = [{"messages": chat(f"q{i}", "a")} for i in range(12)]
    limits = {"max_prompt_chars": 100, "max_reply_chars": 100}
    found, summary, lines = prepare(tmp_path, [*good, {"messages": turns}], **limits)
    assert [(n["source"], n["line"], n["reason"]) for n in lines] == [
        ("sft_source/sft.jsonl", 13, reason)
    ]
    assert len(found) == 12
    assert summary["rows"] == 20 + 13
    assert summary["rows_left_out"] == f"1 of 33 rows left out (1 × {reason})"


def test_a_turn_that_is_too_long_is_counted_and_the_others_used(tmp_path):
    rows = [{"messages": chat("a", "x" * 101, "c", "d")}, {"messages": chat("e", "f")}]
    found, summary, lines = prepare(tmp_path, rows, max_reply_chars=100)
    assert [d.response for d in found] == ["d", "f"]
    assert lines == []
    note = "data.sft_source: 1 turns of conversations are left out: reply too long"
    assert note in summary["notes"]


def test_too_many_bad_rows_stop_the_stage_whatever_the_pairs_are(tmp_path):
    rows = [{"messages": chat("a", "b")}, {"messages": chat("a")}]
    pairs = [pair(f"p{i}") for i in range(100)]
    text = message(DataError, prepare, tmp_path, rows, pairs)
    assert text.startswith("data.sft_source = ")
    assert "1 of 2 rows can't be used" in text
    assert "give conversations with a turn of the assistant" in text


@pytest.mark.parametrize(
    ("row", "source", "text"),
    [
        ({"text": "Once upon a time."}, None, "text holds plain text without a prompt"),
        (pair(), None, "the rows are preference pairs (chosen, rejected); without data.sft_source"),
        ({"prompt": "x"}, None, "no column holds the reply to prompt"),
        ({"ask": "x", "tell": "y"}, None, "{source: …, prompt_column: …, chosen_column: …}"),
        ({"ask": "x", "tell": "y"}, {"prompt_column": "asks"}, "did you mean 'ask'?"),
        ({"prompt": "x", "answer": "y"}, {"label_column": "answer"}, "label_column has no meaning"),
        ({"prompt": "x", "answer": "y"}, {"format": "rated"}, "format = 'rated' is one of pairs"),
    ],
)
def test_refused_with_a_cure(tmp_path, row, source, text):
    found = message(ConfigError, prepare, tmp_path, [row], source=source)
    assert found.startswith("data.sft_source")
    assert text in found
    assert "(in sft.jsonl; rlhf data inspect " in found


def test_columns_that_are_set(tmp_path):
    rows = [{"ask": "How?", "meta": {"tell": "So."}, "sys": "Be"}]
    source = {"prompt_column": "ask", "chosen_column": "meta.tell", "system_column": "sys"}
    found, summary, _ = prepare(tmp_path, [{**rows[0], "rest": 1}], source=source)
    assert found == both([system("Be"), user("How?")])
    assert summary["unused_columns"] == "rest"
    talk = [{"talk": chat("How?", "So."), "other": 1}]
    for name in ("prompt_column", "chosen_column"):
        found, summary, _ = prepare(tmp_path, talk, source={name: "talk"})
        assert found == both([user("How?")])
        assert summary["unused_columns"] == "other"


def test_settings_of_the_pairs_are_not_those_of_demonstrations(tmp_path):
    pairs = [{"q": f"p{i}", "good": "x", "bad": "y"} for i in range(20)]
    options = {"prompt_column": "q", "chosen_column": "good", "rejected_column": "bad"}
    rows = [{"prompt": "How?", "completion": "So."}]
    assert prepare(tmp_path, rows, pairs, **options)[0] == both()


@pytest.mark.parametrize(
    ("column", "up", "down"),
    [
        ("label", True, False),
        ("label", 1, 0),
        ("label", "1", "0"),
        ("label", 1, -1),
        ("reward", 1.0, 0.0),
        ("thumbs", "👍", "👎"),
        ("thumbs_up", True, False),
        ("feedback", "positive", "negative"),
    ],
)
@pytest.mark.parametrize("form", ["reply", "conversation"])
def test_replies_that_were_rated_down_are_no_demonstrations(tmp_path, column, up, down, form):
    rows = [
        {**({"prompt": f"q{i}", "completion": "a"} if form == "reply"
            else {"messages": chat(f"q{i}", "a")}),
         column: down if i % 2 else up}
        for i in range(10)
    ]  # fmt: skip
    found, summary, lines = prepare(tmp_path, rows)
    assert [messages_of(d.prompt)[0]["content"] for d in found] == ["q0", "q2", "q4", "q6", "q8"]
    assert {line["reason"] for line in lines} == {"the reply was rated down"}
    assert any(f"{column} rates down" in note for note in summary["notes"])


def test_classes_that_begin_like_thumbs_stop(tmp_path):
    rows = [{"prompt": f"p {i}", "response": f"r {i}", "label": i % (2 if i < 210 else 5)}
            for i in range(260)]  # fmt: skip
    with pytest.raises(ConfigError, match=r"'label' holds [234], but in the first rows thumbs"):
        prepare(tmp_path, rows)


def test_grades_are_no_thumbs(tmp_path):
    rows = [{"prompt": f"q{i}", "completion": "a", "score": i % 3} for i in range(9)]
    found, summary, lines = prepare(tmp_path, rows)
    assert (len(found), lines, summary["unused_columns"]) == (9, [], "score")


THUMBS = st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=20)


@settings(
    max_examples=examples(25),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(THUMBS)
def test_thumbs_end_as_pairs_as_demonstrations_or_left_out(tmp_path, thumbs):
    """One file of thumbs as pairs and as demonstrations, most prompts with one reply alone."""
    always = [
        (f"always {i}", f"{kind} {i}", kind == "up") for i in range(8) for kind in ("up", "no")
    ]
    drawn = [(f"prompt {n}", f"reply {i}", up) for i, (n, up) in enumerate(thumbs)]
    rows = [{"prompt": p, "completion": c, "label": up} for p, c, up in (*always, *drawn)]
    path = write(tmp_path / "kto.jsonl", rows)
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    prepare_data(DataConfig(source=path, sft_source=path, near_duplicates=None), out)
    lines = [json.loads(line) for line in (out / files.QUARANTINE).read_text().splitlines()]
    summary = json.loads((out / files.SUMMARY).read_text())
    assert summary["rows"] == 2 * len(rows) == summary["rows_used"] + len(lines)
    sides = {p: {up for q, _, up in (*always, *drawn) if p == q} for p, _, _ in drawn}
    alone = {p for p, ups in sides.items() if len(ups) == 1}
    unpaired = [n["line"] for n in lines if n["source"] == "kto.jsonl"]
    assert unpaired == [i + 1 for i, row in enumerate(rows) if row["prompt"] in alone]
    held_out = {p.prompt for p in read_rows(out / files.PAIRS_EVAL, Pair)}
    ups = {(r["prompt"], r["completion"]) for r in rows if r["label"]}
    found = {(d.prompt, d.response) for d in read_rows(out / files.DEMONSTRATIONS, Demonstration)}
    assert found == {(p, c) for p, c in ups if p not in held_out}


def test_in_place_of_the_pairs_or_beside_them(tmp_path):
    rows = [{"prompt": "How?", "completion": "So."}]
    found, summary, _ = prepare(tmp_path, rows)
    assert found == both()
    assert summary["demonstrations"] == 1
    found, _, _ = prepare(tmp_path, rows, sft_mode="add")
    assert found[-1:] == both()
    assert {d.response for d in found[:-1]} == {"best"}
    assert len(found) == 1 + summary["prompts_train"]
    again = [*rows, {"prompt": found[0].prompt, "completion": "best"}]
    assert len(prepare(tmp_path, again, sft_mode="add")[0]) == len(found)


def test_weights_and_repeats(tmp_path):
    one = write(tmp_path / "one.jsonl", [{"prompt": "a", "completion": "b"}] * 3)
    two = write(tmp_path / "two.jsonl", [{"messages": chat("c", "d", "e", "f")}])
    out = tmp_path / "out"
    out.mkdir()
    config = DataConfig(
        source=write(tmp_path / "pairs.jsonl", PAIRS),
        sft_source=[one, {"source": two, "weight": 2}],
    )
    prepare_data(config, out)
    found = read_rows(out / files.DEMONSTRATIONS, Demonstration)
    assert [d.response for d in found] == [*"bddff"]
    summary = json.loads((out / files.SUMMARY).read_text())
    counts = [(c["source"], c["rows"], c["written"]) for c in summary["sources"]]
    assert counts == [("pairs.jsonl", 20, 20), ("one.jsonl", 3, 1), ("two.jsonl", 1, 4)]


@pytest.mark.parametrize("setting", ["sft_source", "prompts_source"])
def test_a_share_of_a_source_and_formats_of_its_files(tmp_path, setting):
    """Rows that the weight leaves out are in quarantine; each format is named once."""
    folder = tmp_path / "own"
    folder.mkdir()
    for name in "xy":
        rows = [{"prompt": f"{name} asks {i}", "completion": "so"} for i in range(40)]
        write(folder / f"{name}.jsonl", rows)
    out = tmp_path / "out"
    out.mkdir()
    own = {setting: [{"source": str(folder), "weight": 0.3}]}
    prepare_data(DataConfig(source=write(tmp_path / "pairs.jsonl", PAIRS), **own), out)
    lines = [json.loads(line) for line in (out / files.QUARANTINE).read_text().splitlines()]
    assert {n["reason"] for n in lines} == {"not in the share of its source's weight"}
    assert {n["source"] for n in lines} == {f"{setting}/own/x.jsonl", f"{setting}/own/y.jsonl"}
    summary = json.loads((out / files.SUMMARY).read_text())
    _, counts = summary["sources"]
    assert counts["format"] == {"sft_source": "prompt-reply", "prompts_source": "prompts"}[setting]
    assert counts["rows"] == 80 == counts["left_out"] + counts["written"]
    assert 10 < counts["written"] < 40
    name, row_type = {
        "sft_source": (files.DEMONSTRATIONS, Demonstration),
        "prompts_source": (files.PROMPTS_TRAIN, PromptRow),
    }[setting]
    assert len(read_rows(out / name, row_type)) == counts["written"]
    sentence = f"data.{setting}: own with weight 0.3: 80 rows, {counts['left_out']} left out"
    assert any(note.startswith(sentence) for note in summary["notes"])


def test_a_forgotten_row_is_left_out_alone(tmp_path):
    rows = [{"prompt": f"asks {i}", "completion": "so"} for i in range(6)]
    path = write(tmp_path / "own.jsonl", rows)
    out = tmp_path / "out"
    out.mkdir()
    config = DataConfig(
        source=write(tmp_path / "pairs.jsonl", PAIRS), sft_source=path, prompts_source=path
    )
    prepare_data(config, out, forgotten=frozenset([Record("own.jsonl", 3, rows[2]).id]))
    lines = [json.loads(line) for line in (out / files.QUARANTINE).read_text().splitlines()]
    assert [(n["source"], n["line"], n["reason"], n["row"]) for n in lines] == [
        (f"{name}_source/own.jsonl", 3, "forgotten", None) for name in ("sft", "prompts")
    ]  # fmt: skip
    expected = ["asks 0", "asks 1", "asks 3", "asks 4", "asks 5"]
    for name, row_type in (
        (files.DEMONSTRATIONS, Demonstration), (files.PROMPTS_TRAIN, PromptRow),
    ):  # fmt: skip
        assert [row.prompt for row in read_rows(out / name, row_type)] == expected


def test_world_makes_its_own():
    for name in ("sft_source", "prompts_source"):
        with pytest.raises(ValueError, match=f"{name} is set, but source = 'world'"):
            DataConfig(**{name: "x.jsonl"})
    with pytest.raises(ValueError, match="sft_mode = 'add' adds sft_source, which is not set"):
        DataConfig(source="x.jsonl", sft_mode="add")


FORMS = st.sampled_from(["{}", " {}", "{}?", "say  {}"])
ASKED = st.builds(
    lambda form, i: form.format(f"pairs ask the question {i}"), FORMS, st.integers(0, 25)
)
SPOKEN = st.sampled_from(["best", "worst", "else", "worst "])


@settings(
    max_examples=examples(25),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(st.tuples(ASKED, SPOKEN, ASKED, SPOKEN, st.sampled_from("mpu")), max_size=12))
def test_never_a_held_out_prompt_or_a_reply_that_lost(tmp_path, drawn):
    rows: list[dict[str, Any]] = [{"messages": chat("own", "reply")}]
    for one, reply, other, last, kind in drawn:
        if kind == "m":
            rows.append({"messages": chat(one, reply, other, last)})
        elif kind == "p":
            rows.append({"messages": chat(one, reply)})
        else:
            rows.append({"messages": chat(one.upper(), reply)})
    found, summary, lines = prepare(tmp_path, rows, max_bad_fraction=1, eval_fraction=0.4)
    assert summary["rows_used"] + len(lines) == summary["rows"] == 20 + len(rows)
    out = tmp_path / "out"
    held_out = {p.prompt for p in read_rows(out / files.PAIRS_EVAL, Pair)}
    trained = {p.prompt for p in read_rows(out / files.PAIRS_TRAIN, Pair)}
    for one in found:
        for turn in messages_of(one.prompt):
            text = " ".join(turn["content"].lower().split())
            is_first = turn is messages_of(one.prompt)[0]
            assert not (is_first and text in held_out)
        if len(messages_of(one.prompt)) == 1 and messages_of(one.prompt)[0]["content"] in trained:
            assert one.response.strip() != "worst"
