"""The index of the folder of reports: runs by name, outcome and date, with links."""

from __future__ import annotations

import re
from html import unescape

from rlhf.report import render
from rlhf.report.index import NAME, list_pages, write_index
from tests.report import demo
from tests.report.test_render import Tree


def page(name: str, started: str, **more) -> str:
    update = {"run_name": name, "started": started, **more}
    return render(demo.rejected_report().model_copy(update=update))


def test_runs_stand_with_outcome_date_and_link_and_vanish_with_their_page(tmp_path):
    (tmp_path / "a-1.html").write_text(page("weekly-1", "2026-11-01T08:00:00+00:00"))
    (tmp_path / "b 2.html").write_text(page("weekly-2", "2026-11-08T08:00:00+00:00"))
    (tmp_path / "compare-3.html").write_text("<title>x &amp; y</title>")
    write_index(tmp_path)
    shown = (tmp_path / NAME).read_text()
    texts = " ".join(" ".join(Tree(shown).texts).split())
    assert texts.index("weekly-2 Rejected by a gate 8 November 2026") < texts.index("weekly-1")
    assert "x & y" in texts
    assert "3 pages in this folder" in texts
    links = re.findall(r'<article.*?href="([^"]*)"', shown, re.DOTALL)
    assert links == ["compare-3.html", "b%202.html", "a-1.html"]  # it is of now
    (tmp_path / "a-1.html").unlink()
    write_index(tmp_path)
    assert "weekly-1" not in (tmp_path / NAME).read_text()
    assert {p.name for p in tmp_path.iterdir()} == {"b 2.html", "compare-3.html", NAME}


def test_hostile_names_survive_the_way_through_the_page(tmp_path):
    name = demo.HOSTILE + "'>\x1b\u202e"
    (tmp_path / "x.html").write_text(page(name, "soon", reason=name * 99))
    (tmp_path / "'>&.html").write_text("<meta name=\"rlhf-run\" content='{broken'>")
    listed = {each.name: each for each in list_pages(tmp_path)}
    assert listed.keys() == {name, "'>&.html"}
    assert len(listed[name].reason) == 300
    write_index(tmp_path)
    shown = (tmp_path / NAME).read_text()
    assert "<script" not in shown
    assert "\x1b" not in shown
    assert r"\x1b\u202e" in unescape(shown)
    assert 'href="%27%3E%26.html"' in shown


def test_a_folder_that_can_not_be_written_fails_nothing(tmp_path):
    write_index(tmp_path / "none")
    assert [*tmp_path.iterdir()] == []
