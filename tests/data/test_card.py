"""The data card: written with every dataset, findings first, safe against strangers' text."""

from __future__ import annotations

import json
import re
from dataclasses import astuple

from markdown_it import MarkdownIt

from rlhf.config import DataConfig, WorldConfig
from rlhf.data.audit import Evidence, LeftOut
from rlhf.data.card import write_card
from rlhf.data.prepare import prepare_data
from rlhf.data.records import Comparison, Converted
from rlhf.data.rows import CARD, CARD_TEXT, Pair
from rlhf.data.tallies import Tallies
from rlhf.files import read_json
from rlhf.report import RunOutcome, RunReport, render

MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
EVIL = (
    "<script>alert(1)</script> | [x](javascript:alert(1)) ![](https://evil.example) **b** `c`\n# h"
)


def prepare(tmp_path, rows, **options):
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    out.mkdir()
    result = prepare_data(DataConfig(source=str(source), **options), out)
    return (
        read_json(out / CARD),
        (out / CARD_TEXT).read_text(),
        read_json(out / "summary.json"),
        result,
    )


def log(count, **more):
    """Rows of a comparison log whose first reply wins and is longer."""
    return [
        {"prompt": f"How do I clean kettle number {i}?", "response_a": f"Boil water in it {i}.",
         "response_b": f"No {i}.", "winner": "a", **more}
        for i in range(count)
    ]  # fmt: skip


def test_findings_stand_first_and_in_the_summary(tmp_path):
    rows = [*log(60), {**log(1)[0], "winner": "tie"}, {**log(1)[0], "prompt": ""}]
    card, text, summary, result = prepare(tmp_path, rows)
    warnings = [f["text"] for f in card["findings"] if f["level"] == "warning"]
    assert [warning[:12] for warning in warnings] == ["The longer r", "The first of"]
    assert summary["findings"] == warnings
    assert "findings" not in result.metrics
    assert text.index("**Warning.** The longer reply is preferred in 100 %") < text.index("## Rows")
    assert "| prompt is empty | 1 | yes | rows.jsonl:62 |" in text
    assert "| tie: neither reply is preferred | 1 |  | rows.jsonl:61 |" in text
    assert card["longer"]["n"] == card["pairs"] == 60
    assert card["languages"]["en"]["share"] == 1
    assert [r["rows"] for r in card["left_out"]] == [1, 1]


def test_warnings_stand_before_notes(tmp_path):
    # Replies of equal length: a note; the first of them always wins: a warning.
    card, *_ = prepare(tmp_path, [{**row, "response_b": "x" * 19} for row in log(9)])
    found = [(f["level"], f["text"][:10]) for f in card["findings"]]
    assert found[:2] == [("warning", "The first "), ("note", "The longer")]


def test_half_of_a_surrogate_pair_can_be_written(tmp_path):
    tallies = Tallies()
    tallies.set_columns(["annotator"])
    pair = Pair("p", "good", "bad")
    for name in ("\ud800 one", "\ud800 one", "\ud800 one", "two"):
        tallies.add({"annotator": name}, Converted([Comparison(*astuple(pair)[:3])]))
    left_out = (LeftOut("reply is empty", 1, "\udcff.csv:1", "", False),)
    warnings = write_card(tmp_path, [pair], Evidence(tallies, left_out=left_out), {})
    assert any("? one" in warning for warning in warnings)
    assert read_json(tmp_path / CARD)["left_out"][0]["example"] == "?.csv:1"
    assert "&#92;udcff.csv:1" in (tmp_path / CARD_TEXT).read_text()


def test_the_card_holds_pairs_of_both_sides(tmp_path):
    card, _, summary, _ = prepare(tmp_path, log(60), eval_fraction=0.5)
    assert card["pairs"] == summary["pairs_train"] + summary["pairs_eval"] == 60


def test_the_world_has_a_card(tmp_path):
    world = WorldConfig(pairs=40, demonstrations=10, prompts=10, eval_pairs=20, eval_prompts=10)
    prepare_data(DataConfig(world=world), tmp_path)
    card = read_json(tmp_path / CARD)
    assert (card["pairs"], card["rows"], card["languages"]) == (60, 0, {})
    assert sum(rate["n"] for rate in card["slices"]["group"].values()) == 20


def test_a_hostile_source_breaks_neither_card_nor_report(tmp_path):
    more = [EVIL, "\ud800half", "| a | b |", "plain"]
    rows = [
        {**row, "category": more[i % 4], "annotator": more[i % 4][::-1][:50]}
        for i, row in enumerate(log(80))
    ]
    rows += [{**log(1)[0], "winner": EVIL + "\ud800"}]
    card, text, summary, _ = prepare(tmp_path, rows)
    assert len(card["slices"]["category"]) == 4
    tokens = [t for token in MARKDOWN.parse(text) for t in (token, *(token.children or ()))]
    kinds = {token.type for token in tokens}
    assert not {"html_block", "html_inline", "link_open", "image"} & kinds
    assert "<script" not in MARKDOWN.render(text)
    rows_of_tables = [line for line in text.splitlines() if line.startswith("|")]
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in rows_of_tables]
    heads = [i for i, line in enumerate(rows_of_tables) if line.startswith("|---")]
    for start, end in zip(heads, [*(h - 1 for h in heads[1:]), len(widths)], strict=True):
        assert {*widths[start - 1 : end]} == {widths[start]}
    report = RunReport(
        title="t", run_name="r", started="now", outcome=RunOutcome.FAILED, reason="", seed=0,
        data=summary, card=card,
    )  # fmt: skip
    page = render(report)
    assert page.encode()
    assert report.model_dump_json()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
