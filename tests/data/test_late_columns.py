"""Columns that first appear late in a file, and layouts that the first rows don't show.

Pairs, demonstrations and prompts of their own are read by one rule.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf.config import DataConfig
from rlhf.data import parts
from rlhf.data import rows as files
from rlhf.data.parts import SAMPLE_ROWS
from rlhf.data.prepare import prepare_data
from rlhf.data.rows import Demonstration, Pair, PromptRow, messages_of, read_rows
from rlhf.errors import ConfigError, DataError
from tests.data.helpers import assistant, message, pair, user
from tests.examples import examples

#: Rows of each kind by number: one column of each is first needed in a late row.
KINDS = {
    "source": lambda i: pair(f"ask {i}", f"good {i}", f"bad {i}"),
    "sft_source": lambda i: {"prompt": f"ask {i}", "completion": f"good {i}"},
    "prompts_source": lambda i: {"prompt": f"ask {i}"},
}
READ = {
    "source": (files.PAIRS_TRAIN, Pair),
    "sft_source": (files.DEMONSTRATIONS, Demonstration),
    "prompts_source": (files.PROMPTS_TRAIN, PromptRow),
}
PAIRS = [pair(f"pairs {i}", f"right {i}", f"wrong {i}") for i in range(8)]


def prepare(tmp_path, setting: str, lines: list[Any], **options: Any):
    """The rows that a setting's file gives, the summary, and the quarantine's lines."""
    sources = {"source": PAIRS, setting: lines}
    for name, rows in sources.items():
        text = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        (tmp_path / f"{name}.jsonl").write_text("".join(line + "\n" for line in text))
    named: dict[str, Any] = {name: str(tmp_path / f"{name}.jsonl") for name in sources}
    prepare_data(DataConfig(**named, max_bad_fraction=1, **options), tmp_path)
    name, row_type = READ[setting]
    held_out = read_rows(tmp_path / files.PAIRS_EVAL, Pair) if setting == "source" else []
    left_out = [json.loads(line) for line in (tmp_path / files.QUARANTINE).read_text().splitlines()]
    summary = json.loads((tmp_path / files.SUMMARY).read_text())
    return [*read_rows(tmp_path / name, row_type), *held_out], summary, left_out


@pytest.mark.parametrize("setting", KINDS)
def test_a_late_column_is_read(tmp_path, setting):
    late = SAMPLE_ROWS + 5
    rows = [KINDS[setting](i) for i in range(late)]
    rows += [{**KINDS[setting](late), "system": "Be brief.", "other": 1}]
    found, summary, left_out = prepare(tmp_path, setting, rows)
    system = [{"role": "system", "content": "Be brief."}, user(f"ask {late}")]
    assert [row.prompt for row in found if len(messages_of(row.prompt)) == 2] == [system]
    assert len(found) == late + 1
    assert left_out == []
    assert summary["unused_columns"] == "other"
    assert any("system goes before the prompt" in note for note in summary["notes"])


def test_thumbs_and_answers_that_appear_late_count(tmp_path):
    rows = [KINDS["sft_source"](i) for i in range(SAMPLE_ROWS)]
    rows += [{**KINDS["sft_source"](i), "label": i % 2 == 0} for i in range(300, 304)]
    found, _, left_out = prepare(tmp_path, "sft_source", rows)
    assert [d.prompt for d in found[SAMPLE_ROWS:]] == ["ask 300", "ask 302"]
    assert [line["reason"] for line in left_out] == ["the reply was rated down"] * 2

    answer = "It is boiled with vinegar."
    rows = [KINDS["prompts_source"](i) for i in range(SAMPLE_ROWS)]
    rows += [{"prompt": f"ask {answer}", "answer": answer}]
    found, _, left_out = prepare(tmp_path, "prompts_source", rows)
    assert len(found) == SAMPLE_ROWS
    assert [line["reason"] for line in left_out] == ["prompt ends with the row's answer"]


@pytest.mark.parametrize(
    ("setting", "late"),
    [
        ("source", {"prompt": "x", "response_a": "y", "response_b": "z", "winner": "a"}),
        ("sft_source", {"instruction": "x", "output": "y"}),
        ("prompts_source", {"question": "x"}),
    ],
)
def test_rows_with_nothing_but_late_columns_are_left_out(tmp_path, setting, late):
    rows = [KINDS[setting](i) for i in range(SAMPLE_ROWS)]
    found, _, left_out = prepare(tmp_path, setting, [*rows, late])
    assert len(found) == SAMPLE_ROWS
    assert [line["line"] for line in left_out] == [SAMPLE_ROWS + 1]


def test_late_conversations_beside_prompts_and_replies_stop(tmp_path):
    rows = [KINDS["sft_source"](i) for i in range(SAMPLE_ROWS)]
    late = {"messages": [user("x"), {"role": "assistant", "content": "y"}]}
    text = message(ConfigError, prepare, tmp_path, "sft_source", [*rows, late])
    assert text.startswith("data.sft_source = ")
    assert f"messages first appears in sft_source.jsonl:{SAMPLE_ROWS + 1}" in text


def test_a_reply_in_another_column_is_not_read_as_the_first_ones(tmp_path):
    rows = [{"prompt": f"ask {i}", "answer": f"good {i}"} for i in range(SAMPLE_ROWS)]
    rows += [{"prompt": "ask x", "answer": "draft", "completion": "final"}]
    text = message(ConfigError, prepare, tmp_path, "sft_source", rows)
    assert text.startswith("data.sft_source = ")
    assert "completion first appears in sft_source.jsonl:201" in text
    assert "set the columns to read" in text
    fixed = {"source": str(tmp_path / "sft_source.jsonl"), "chosen_column": "completion",
             "prompt_column": "prompt"}  # fmt: skip
    config = DataConfig(source=str(tmp_path / "source.jsonl"), sft_source=fixed, max_bad_fraction=1)
    # Rows without the column are left out; it need not be in the first rows.
    prepare_data(config, tmp_path)
    found = read_rows(tmp_path / files.DEMONSTRATIONS, Demonstration)
    assert [d.response for d in found] == ["final"]


@pytest.mark.parametrize("setting", KINDS)
@pytest.mark.parametrize("early", [{"id": 1}, "{broken"], ids=["other-columns", "not-json"])
def test_a_layout_that_the_first_rows_do_not_show(tmp_path, setting, early):
    count = SAMPLE_ROWS + 3
    good = [KINDS[setting](i) for i in range(30)]
    late = {**KINDS[setting](30), "system": "Be brief."}
    found, summary, left_out = prepare(tmp_path, setting, [early] * count + good + [late])
    assert len(found) == 31
    assert sum(len(messages_of(row.prompt)) == 2 for row in found) == 1
    assert [line["line"] for line in left_out] == [*range(1, count + 1)]
    own = len(PAIRS) if setting != "source" else 0
    assert summary["rows_used"] + len(left_out) == summary["rows"] == count + 31 + own


@settings(
    max_examples=examples(15),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.sampled_from([*KINDS]),
    st.lists(st.sampled_from(["system", "note", "label", "history", ""]), max_size=6),
)
def test_where_a_column_first_appears_does_not_decide_what_its_rows_mean(
    tmp_path, monkeypatch, setting, names
):
    """Rows with further columns give the same behind the sample as inside of it."""
    monkeypatch.setattr(parts, "SAMPLE_ROWS", 9)
    values = {"system": "Be.", "note": "n", "label": True, "history": [["a", "b"]], "": None}
    if setting == "source":
        names = [name for name in names if name != "label"]
    first = [KINDS[setting](i) for i in range(9)]
    more = [
        {**KINDS[setting](1000 + i), **({name: values[name]} if name else {})}
        for i, name in enumerate(names)
    ]
    results = []
    for rows in ([*first, *more], [*more, *first]):
        found, _, left_out = prepare(tmp_path, setting, rows)
        items = sorted(repr((row.prompt, getattr(row, "response", ""))) for row in found)
        results.append((items, sorted(line["reason"] for line in left_out)))
    assert results[0] == results[1]


MEDIA = ["image", "images", "Image URL", "video_path", "audios", "tools", "tool_calls", "functions"]
CONTENT = ["cat.png", ["cat.png"], [{"bytes": "ab", "path": None}], {"name": "search"}, "[1]"]
EMPTY = [None, "", " ", [], {}, [None], [""], [{"bytes": None, "path": None}], "[]", "null", False]


@pytest.mark.parametrize("setting", KINDS)
@pytest.mark.parametrize("at", [3, SAMPLE_ROWS + 3])
def test_rows_with_content_that_no_model_sees_are_left_out(tmp_path, setting, at):
    """At the beginning of a file and late; empty cells and columns that are set are no fault."""
    rows = [KINDS[setting](i) for i in range(at + 60)]
    for i, name in enumerate(MEDIA):
        rows[at + 2 * i] |= {name: CONTENT[i % len(CONTENT)]}
    for i, value in enumerate(EMPTY):
        rows[at + 20 + i] |= {MEDIA[i % len(MEDIA)]: value}
    found, _, left_out = prepare(tmp_path, setting, rows)
    assert len(found) == len(rows) - len(MEDIA)
    reasons = [f"{name} holds what a model of text does not see" for name in MEDIA]
    assert [line["reason"] for line in left_out] == reasons
    assert left_out[0]["row"] == rows[at]
    named: dict[str, Any] = {"source": str(tmp_path / "source.jsonl")}
    path = str(tmp_path / f"{setting}.jsonl")
    named[setting] = [{"source": path, "ignore_columns": MEDIA}]
    prepare_data(DataConfig(**named), tmp_path)
    assert (tmp_path / files.QUARANTINE).read_text() == ""


@pytest.mark.parametrize("setting", KINDS)
def test_replies_to_images_stop_a_run_and_the_cure_is_named(tmp_path, setting):
    rows = [KINDS[setting](i) | {"images": ["a.png"]} for i in range(8)]
    for name, lines in {"source": PAIRS, setting: rows}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    named: dict[str, Any] = {n: str(tmp_path / f"{n}.jsonl") for n in ("source", setting)}
    text = message(DataError, prepare_data, DataConfig(**named), tmp_path)
    assert "images holds what a model of text does not see" in text
    cure = "data.ignore_columns=images " if setting == "source" else (
        f"data.{setting}='{{source: …, ignore_columns: images}}'"
    )  # fmt: skip
    assert cure in text


def test_tools_of_an_openai_file_are_named_by_their_path(tmp_path):
    rows = [
        {"input": {"messages": [user(f"ask {i}")], "tools": [{"type": "function"}] if i else []},
         "preferred_output": [assistant("good")], "non_preferred_output": [assistant("bad")]}
        for i in range(9)
    ]  # fmt: skip
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = message(DataError, prepare_data, DataConfig(source=str(path)), tmp_path)
    assert "set data.ignore_columns=input.tools" in text
    prepare_data(DataConfig(source=str(path), ignore_columns=("input.tools",)), tmp_path)
