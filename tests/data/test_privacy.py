"""Policy for rows with personal data: counted, replaced, left out, or not looked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.config import DataConfig
from rlhf.data import rows as files
from rlhf.data.personal import find_personal_data
from rlhf.data.prepare import prepare_data
from rlhf.errors import DataError
from tests.data.helpers import assistant, message, pair, rows, user
from tests.examples import examples

MAIL, PHONE, CARD = "jane.doe@example.com", "+49 30 901820", "4111 1111 1111 1111"
DIRTY = [
    pair(f"Mail {MAIL} for me.", "Done, I wrote.", "No."),
    pair("Whom do I call?", f"Ring {PHONE}.", f"Ring {PHONE} or {MAIL}."),
    pair([user(f"I am {MAIL}"), assistant("Hi."), user("My name?")], "Jane.", "Bob."),
    {**pair("Who pays?", "He does.", "She."), "system": f"The card is {CARD}."},
]


def prepare(tmp_path: Path, data: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    """Prepare these rows with 40 clean ones, and return the summary."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*rows(40), *data]))
    out = tmp_path / "out"
    out.mkdir()
    source = str(tmp_path / "a.jsonl")
    prepare_data(DataConfig(source=source, max_bad_fraction=1, **options), out)
    return json.loads((out / files.SUMMARY).read_text())


def written(tmp_path: Path, *names: str) -> str:
    paths = [tmp_path / "out" / name for name in names] or sorted((tmp_path / "out").iterdir())
    return "".join(content(path) for path in paths)


def content(path: Path) -> str:
    """Text of a file, rows of Parquet as JSON lines without ids, which are hashes."""
    if path.suffix != ".parquet":
        return path.read_text()
    rows = [vars(row) for row in files.read_rows(path, files._TYPES[path.name])]
    ids = ("id", "row_ids")
    return "".join(
        json.dumps({k: v for k, v in row.items() if k not in ids}, ensure_ascii=False) + "\n"
        for row in rows
    )


def quarantined(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written(tmp_path, files.QUARANTINE).splitlines()]


def test_flag_counts_rows_by_kind_and_repeats_no_value(tmp_path):
    summary = prepare(tmp_path, DIRTY)
    assert summary["rows_with_personal_data"] == 4
    assert summary["personal_data"] == {"email": 3, "phone": 1, "card": 1}
    note = "4 rows hold personal data (email in 3, phone in 1, card in 1): kept as they are; "
    assert any(text.startswith(note) for text in summary["notes"])
    assert find_personal_data(json.dumps(summary)) == []
    assert (summary["rows_used"], summary["left_out"]) == (44, {})
    assert MAIL in written(tmp_path, files.PAIRS_TRAIN, files.PAIRS_EVAL)


def test_ignore_does_not_look(tmp_path):
    summary = prepare(tmp_path, DIRTY, personal_data="ignore")
    assert "personal_data" not in summary
    assert not any("personal" in note for note in summary["notes"])
    pairs = written(tmp_path, files.PAIRS_TRAIN, files.PAIRS_EVAL)
    assert all(value in pairs for value in (MAIL, PHONE, CARD))


def test_rated_replies_are_redacted_and_used(tmp_path):
    data = [
        {"prompt": f"Whom do I ask, {i}?", "completion": f"{text} {MAIL} {i}", "label": up}
        for i in range(6)
        for text, up in (("Ask", True), ("Never ask", False))
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in data))
    (tmp_path / "out").mkdir()
    config = DataConfig(source=str(tmp_path / "a.jsonl"), personal_data="redact")
    prepare_data(config, tmp_path / "out")
    summary = json.loads((tmp_path / "out" / files.SUMMARY).read_text())
    assert (summary["rows_used"], summary["left_out"]) == (12, {})
    assert "Never ask [EMAIL] 0" in written(tmp_path, files.PAIRS_TRAIN, files.PAIRS_EVAL)


def test_redact_replaces_in_every_turn_and_leaves_no_value_in_any_file(tmp_path):
    summary = prepare(tmp_path, DIRTY, personal_data="redact")
    assert summary["rows_used"] == 44
    assert find_personal_data(written(tmp_path)) == []
    pairs = written(tmp_path, files.PAIRS_TRAIN, files.PAIRS_EVAL)
    for text in ("Mail [EMAIL] for me.", "Ring [PHONE] or [EMAIL].", "I am [EMAIL]",
                 "The card is [CARD]."):  # fmt: skip
        assert text in pairs


def test_quarantine_leaves_rows_out_as_a_choice_and_writes_placeholders(tmp_path):
    summary = prepare(tmp_path, DIRTY, personal_data="quarantine")
    assert summary["left_out"] == {"holds personal data": 4}
    assert summary["rows_used"] == 40
    assert find_personal_data(written(tmp_path)) == []
    first = quarantined(tmp_path)[0]
    assert first["detail"] == "the row holds personal data (email)"
    assert first["row"]["prompt"] == "Mail [EMAIL] for me."
    assert first["line"] == 41


def test_rows_left_out_as_a_choice_do_not_stop_the_stage(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*rows(9), *DIRTY]))
    (tmp_path / "out").mkdir()
    config = DataConfig(source=str(tmp_path / "a.jsonl"), personal_data="quarantine")
    prepare_data(config, tmp_path / "out")  # 4 of 13 rows, and max_bad_fraction is 0.1
    assert len(quarantined(tmp_path)) == 4


def test_replies_that_differ_in_personal_data_alone_are_left_out_for_that_reason(tmp_path):
    data = [
        pair("Whom?", "Ask ann@x.org.", "Ask bob@x.org."),
        pair("Who?", f"{MAIL} x", f"{MAIL} x"),
        pair("Who else?", f"{MAIL} y", f"{MAIL} y"),
    ]
    summary = prepare(tmp_path, data, personal_data="redact")
    assert summary["left_out"] == {
        "replies differ in personal data alone": 1,
        "both replies are the same": 2,
    }


def test_votes_are_merged_after_redaction(tmp_path):
    data = [pair(f"Mail {name}@x.org", "Yes.", "No.") for name in ("ann", "bob", "eve")]
    summary = prepare(tmp_path, data, personal_data="redact")
    assert summary["rows_merged"] == 2


@pytest.mark.parametrize("policy", ["redact", "quarantine"])
def test_rows_left_out_for_other_reasons_hold_no_values_either(tmp_path, policy: str):
    data = [
        {**pair("p", ""), "note": MAIL},
        {**pair("", "a", "b"), MAIL: {"to": [PHONE], "card": 4111111111111111}},
        pair("tied", "a", "b"),
        {**pair("tied", "b", "a"), "by": MAIL},
        pair("long " + MAIL, "a" * 9000, "b"),
    ]
    prepare(tmp_path, data, personal_data=policy)
    lines = quarantined(tmp_path)
    assert len(lines) == 5
    assert find_personal_data(written(tmp_path)) == []
    assert "4111111111111111" not in written(tmp_path)
    assert "[CARD]" in written(tmp_path, files.QUARANTINE)


@pytest.mark.parametrize("policy", ["flag", "redact", "quarantine"])
def test_messages_repeat_no_value(tmp_path, policy: Any):
    bad = [{"prompt": {"mail": MAIL}, "chosen": "a", "rejected": "b"}] * 3
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps(r) + "\n" for r in [*rows(9), *bad]))
    (tmp_path / "out").mkdir()
    config = DataConfig(source=str(source), personal_data=policy)
    text = message(DataError, prepare_data, config, tmp_path / "out")
    assert "the row holds personal data (email)" in text
    assert find_personal_data(text) == []


@pytest.mark.parametrize(("policy", "kept"), [("flag", MAIL), ("redact", "[EMAIL]")])
def test_references_and_metadata_are_read_too(tmp_path, policy: str, kept: str):
    data = [{**pair("Whose?", "Hers.", "His."), "answer": MAIL, "info": {"by": [PHONE]}}]
    columns = {"reference_column": "answer", "metadata_columns": ("info",)}
    summary = prepare(tmp_path, data, personal_data=policy, **columns)
    assert summary["personal_data"] == {"email": 1, "phone": 1}
    lines = written(tmp_path, files.PROMPTS_TRAIN, files.PROMPTS_EVAL).splitlines()
    row = next(r for r in map(json.loads, lines) if r["prompt"] == "Whose?")
    assert row["reference"] == kept
    assert row["metadata"] == {"info": {"by": [PHONE if policy == "flag" else "[PHONE]"]}}


@pytest.mark.parametrize(
    ("policy", "shown"), [("flag", MAIL), ("ignore", MAIL), ("redact", "[EMAIL]")]
)
@pytest.mark.parametrize("setting", ["sft_source", "prompts_source"])
def test_sources_of_their_own_follow_the_policy(tmp_path, setting, policy: Any, shown: str):
    own = [{"prompt": f"Write to {MAIL}.", "completion": f"To {PHONE}?", "by": CARD}]
    own += [{"prompt": f"Clean {i}?", "completion": "Yes."} for i in range(3)]
    source = {"source": str(tmp_path / "own.jsonl")}
    if setting == "prompts_source":
        source["metadata_columns"] = ["by"]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(r) + "\n" for r in own))
    summary = prepare(tmp_path, [], personal_data=policy, **{setting: [source]})
    name = {"sft_source": files.DEMONSTRATIONS, "prompts_source": files.PROMPTS_TRAIN}[setting]
    assert f"Write to {shown}." in written(tmp_path, name)
    other = {"sft_source": (PHONE, "[PHONE]"), "prompts_source": (CARD, "[CARD]")}[setting]
    assert other[policy == "redact"] in written(tmp_path, name)
    assert "Clean 0?" in written(tmp_path, name)
    assert (summary["rows_used"], summary["left_out"]) == (44, {})
    kinds = {"email": 1, "phone" if setting == "sft_source" else "card": 1}
    assert summary.get("personal_data", {}) == ({} if policy == "ignore" else kinds)


@pytest.mark.parametrize("setting", ["sft_source", "prompts_source"])
def test_sources_of_their_own_are_quarantined_without_values(tmp_path, setting):
    own = [{"prompt": f"Write to {MAIL}.", "completion": "So."}, {"prompt": "a", "completion": "b"}]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(r) + "\n" for r in own))
    path = str(tmp_path / "own.jsonl")
    summary = prepare(tmp_path, [], personal_data="quarantine", **{setting: path})
    assert (summary["rows_used"], summary["left_out"]) == (41, {"holds personal data": 1})
    assert find_personal_data(written(tmp_path)) == []


TEXTS = st.lists(st.sampled_from([MAIL, PHONE, CARD, "hello", "yes", " "]), min_size=1).map(
    " ".join
)


@given(
    st.lists(st.tuples(TEXTS, TEXTS, TEXTS), max_size=6), st.sampled_from(["redact", "quarantine"])
)
@settings(max_examples=examples(40), deadline=None)
def test_no_file_of_a_dataset_holds_any_value(tmp_path_factory, triples, policy: str):
    tmp_path = tmp_path_factory.mktemp("data")
    summary = prepare(tmp_path, [pair(*texts) for texts in triples], personal_data=policy)
    assert find_personal_data(written(tmp_path)) == []
    assert summary["rows_used"] + sum(summary["left_out"].values()) == 40 + len(triples)
