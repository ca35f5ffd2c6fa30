"""Pictures of docs/gates.md: one for each default rule, drawn from the defaults as they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs import generate_gates
from docs.charts import Axis, Chart, Line, Mark, render
from rlhf.config import GatesConfig
from rlhf.config.gates import ChampionGateConfig
from rlhf.inference import share_bound

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "gates.md").read_text(encoding="utf-8")


def test_every_default_rule_has_a_picture():
    gates = GatesConfig()
    rules = {
        (gate, rule.metric)
        for gate in ("reward_model", "policy")
        for rule in getattr(gates, gate) or ()
    }
    rules |= {("champion", name) for name in ChampionGateConfig.model_fields}
    assert rules == generate_gates.PICTURES.keys()


def test_the_page_shows_every_picture_and_names_what_to_do():
    shown = re.findall(r"!\[[^]]+\]\(gates/([\w.]+)\)", PAGE)
    files = {name for name, _ in generate_gates.PICTURES.values()}
    assert {*shown} == files == {file.name for file in (DOCS / "gates").iterdir()}
    cures = PAGE[PAGE.index("## When a gate says no") :]
    reasons = PAGE[PAGE.index("## Default rules") : PAGE.index("## Gates that can't be passed")]
    for gate, metric in generate_gates.PICTURES:
        if gate != "champion":
            assert f"{metric} = " in cures, metric
            assert f"`{metric}`" in reasons, metric
    # Superiority, a slice, the last look.
    for name in ("champion.judge_win_rate = ", "champion.by_group.", "look = "):
        assert f"keep the champion: {name}" in cures, name


def test_the_pictures_are_those_of_the_defaults(tmp_path, monkeypatch):
    monkeypatch.setattr(generate_gates, "FOLDER", tmp_path / "gates")
    generate_gates.main()
    for file in (tmp_path / "gates").iterdir():
        assert file.read_text() == (DOCS / "gates" / file.name).read_text(), (
            f"{file.name}: run `python -m docs.generate_gates`"
        )


def test_numbers_of_the_page():
    # 60 of 100: (0.6 + z²/200 − z √(0.24/100 + z²/40000)) / (1 + z²/100) with t₀.₉₇₅ of 99 degrees
    # of freedom, 1.984: (0.61968 − 1.984 · 0.04998) / 1.03936 = 0.5008. 59 of 100 have 0.491.
    assert generate_gates.needed(100, 0.5) == 60
    assert share_bound(0.6, 100, 100, 0.975)[0] == pytest.approx(0.5008, abs=1e-4)
    assert "of 100 it takes 60 %" in PAGE
    # P(K ≥ 60) of B(100, 0.656) by the normal approximation: z = (65.6 − 59.5) / 4.75 = 1.28.
    assert generate_gates.passing(100, 60, 0.9) == pytest.approx(0.656, abs=0.003)
    assert generate_gates.needed(1000, 0.5) == 532
    from rlhf.evaluation.probes import REPLIES

    assert generate_gates.PROBED == REPLIES


def test_a_chart_by_hand():
    x, y = Axis("x", 0, 10, [(5, "five")]), Axis("y", 1, 100, [(10, "ten")], is_log=True)
    lines = (Line("a <b>", [(0, 1), (10, 100)], "#000"),)
    page = render(Chart("title", "a note", x, y, lines, (Mark("m", 5, 10),)))
    # The picture is 700 wide, less 66 and 22: the middle is 372. One line of the legend moves the
    # top to 69 and the foot to 345: the middle of the logarithms is 207.
    assert 'points="66,345 678,69"' in page
    assert '<circle cx="372.0" cy="207.0"' in page
    assert "a &lt;b&gt;" in page
