"""Listings: at 80 columns nothing that matters is cut off, and `--json` has all of it."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from tasks.console import PlainConsole
from tasks.listing import CUT, Column, show_listing

COLUMNS = (
    Column("run", "name"),
    Column("state", "state"),
    Column("where", "where", wide=True),
    Column("size", "size", show=lambda size: f"{size} B", right=True),
    Column("why", "why"),
)
ROW = {"name": "weekly-2026-11-29-0001", "state": "AwaitingApproval", "where": "gpu on pool",
       "size": 12, "why": "met every gate " * 20}  # fmt: skip


def printed(rows, *, terminal=True, width=80, **options):
    """The lines of a listing."""
    stream = io.StringIO()
    console = PlainConsole(file=stream, width=width, force_terminal=terminal, color_system=None)
    show_listing(rows, COLUMNS, on=console, **options)
    return stream.getvalue().splitlines()


def test_a_terminal_of_80_columns_shows_what_matters_whole():
    lines = printed([ROW, {**ROW, "name": "b", "why": None}])
    assert lines[0].split() == ["run", "state", "size", "why"]
    assert (
        lines[1].split()
        == f"{ROW['name']} AwaitingApproval 12 B met every gate met every gate".split()
    )
    assert lines[-1].split() == ["b", "AwaitingApproval", "12", "B"]
    assert max(map(len, lines)) <= 80
    assert sum("…" in line for line in lines) == 1  # the end of the long text alone


@pytest.mark.parametrize("options", [{"wide": True}, {"terminal": False}])
def test_whole_rows_stand_on_a_line_each(options):
    lines = printed([ROW, ROW], **options)
    assert len(lines) == 3
    assert lines[1].rstrip().endswith(ROW["why"].strip())
    assert ("gpu on pool" in lines[1]) == ("wide" in options)


def test_json_has_every_value():
    assert json.loads("\n".join(printed([ROW], json=True))) == [ROW]
    assert json.loads("\n".join(printed([], json=True))) == []


@settings(max_examples=30)
@given(
    st.lists(st.fixed_dictionaries({key: st.text(max_size=300) for key in ROW}), max_size=4),
    st.integers(40, 200),
)
def test_no_text_leaves_its_row_or_the_screen(rows, width):
    lines = printed(rows, width=width)
    # In columns of a terminal: some characters take none, others two.
    assert max(map(cell_len, lines), default=0) <= width
    assert all(line.isprintable() for line in lines)
    assert len(printed(rows, terminal=False)) == len(rows) + 1


def test_a_text_is_cut_where_it_would_push_the_next_row_away():
    (line,) = printed([{**ROW, "why": "x" * 500}], width=400)[1:]
    assert line.rstrip().endswith("x" * CUT + "…")
