"""Numbers that are no figures: null in JSON, a dash in a terminal's table."""

from __future__ import annotations

import ast
import io
import json
import math
from pathlib import Path

import pytest

from flows.compare_runs import _replies as paired_replies
from flows.history import _table, _wide_table
from flows.models import interval
from rlhf.report.history import Entry
from rlhf.report.text import figure, figure_range
from rlhf.report.two_runs import PairedReplies
from tasks.console import PlainConsole
from tasks.listing import Column, show_json, show_listing

NO_FIGURES = [math.nan, math.inf, -math.inf, 1e308, -1e308, None]
FLOWS = Path(__file__).parents[1] / "flows"


def printed(what, width=200) -> str:
    out = io.StringIO()
    PlainConsole(file=out, width=width).print(what)
    return out.getvalue()


def refuse(word: str):
    raise AssertionError(word)


def test_json_has_null_for_what_it_has_no_number_for():
    out = io.StringIO()
    rows = [{"a": math.nan, "b": [(-math.inf, 1.5)], "c": {"d": math.inf}, "e": Path("/x")}]
    show_json(rows, on=PlainConsole(file=out))
    show_listing(rows, [Column("a", "a")], json=True, on=PlainConsole(file=out))
    first, _, second = out.getvalue().partition("]\n[")
    for text in (first + "]", "[" + second):
        (row,) = json.loads(text, parse_constant=refuse)
        assert row == {"a": None, "b": [[None, 1.5]], "c": {"d": None}, "e": "/x"}


def test_every_command_prints_json_by_the_one_function():
    """`json.dumps` writes NaN, which is no JSON; pydantic writes null."""
    for file in FLOWS.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            name = getattr(getattr(node, "func", None), "attr", None) or getattr(
                getattr(node, "func", None), "id", None
            )
            assert name != "dumps", file.name


@pytest.mark.parametrize("value", NO_FIGURES)
def test_a_table_has_a_dash(value):
    assert figure(value, ".2f") == "–"
    assert figure_range(0.1, value, ".2f") == ""
    assert interval({"x": value, "x_low": value, "x_high": 1.0}, "x") == ("–", "–")
    names = ("judge_win_rate", "reward", "kl", "eos_rate", "pairs", "champion_win_rate", "tokens")
    ends = () if value is None else ("", "_low", "_high")
    metrics = {f"{name}{end}": value for name in names for end in ends}
    entry = Entry(line="l", when="2026-11-29", outcome="Promoted", metrics=metrics)
    one = PairedReplies("p", None, "a", "b", {"reward": (value, 0.5)}, value)
    for what in (_table([entry]), _wide_table([entry]), paired_replies(one)):
        text = printed(what)
        assert not {"nan", "inf", "None", "finite"} & {*text.replace("(", " ").split()}, text
        assert "00000000" not in text
        assert "e+308" not in text


def test_a_figure_is_shown():
    entry = Entry(
        line="l", when="2026-11-29", outcome="Promoted",
        metrics={"win_rate": 0.75, "win_rate_low": 0.6, "win_rate_high": 0.9, "pairs": 1200.0},
    )  # fmt: skip
    text = printed(_table([entry]))
    assert "R 0.75 (0.60–0.90)" in text
    assert "1,200" in text
