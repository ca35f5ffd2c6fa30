"""`rlhf history`: what happened to a model line, from its history and the reports of its runs."""

from __future__ import annotations

import re
from html import unescape

import pytest

from flows.history import history
from rlhf import champions
from rlhf.errors import ArtifactMissing, ConfigError
from rlhf.report import RunOutcome
from rlhf.report.history import BY_HAND, ROLLED_BACK, Entry, render_history, with_changes
from tests.history.conftest import HOSTILE
from tests.report.test_render import Tree

GOOD = {
    "win_rate": 0.7, "win_rate_low": 0.6, "win_rate_high": 0.8, "judge_win_rate": 0.65,
    "judge_win_rate_low": 0.55, "judge_win_rate_high": 0.75, "reward_before": 0.1,
    "reward_after": 1.2, "kl": 4.2, "eos_rate": 0.97,
}  # fmt: skip
BAD = {"win_rate": 0.45, "reward_after": -0.2, "kl": 9.0, "eos_rate": 0.5}
FINDING = "The longer reply wins 60 %."


def day(number: int) -> str:
    return f"2026-11-{number:02d}T08:00:00+00:00"


@pytest.fixture
def weeks(made, monkeypatch):
    """Promoted, not better, rejected before PPO, approved by a person, rolled back, by hand."""
    times = iter([day(2), day(23), day(24), day(25)])
    monkeypatch.setattr(champions, "timestamp", lambda: next(times))
    first = made.run("w1", day(1), RunOutcome.PROMOTED, evaluation=GOOD, seconds=60.0)
    made.promote(first, run="w1", why="it met every gate")
    # The same command again finds all but the report cached.
    made.run("w1-again", day(3), RunOutcome.PROMOTED, evaluation=GOOD, refs=first, seconds=0.1)
    data = {"pairs_train": 150, "findings": ["The longer reply wins 63.1 %.", "Few annotators."]}
    drift = {"warnings": ["tokens of chosen: 0.09"]}
    made.run("w2", day(8), RunOutcome.NOT_BETTER, evaluation=BAD, data=data, drift=drift)
    made.run("w3", day(15), RunOutcome.GATE_REJECTED, reason="accuracy = 0.5, needs ≥ 0.6",
             data=data)  # fmt: skip
    made.run("w4-crashed", day(16), RunOutcome.FAILED)
    fourth = made.run("w5", day(22), RunOutcome.AWAITING_APPROVAL, evaluation=GOOD, data=data,
                      seconds=0.2)  # fmt: skip
    made.run(
        "w5",
        day(22).replace("T08", "T09"),
        RunOutcome.PROMOTED,
        evaluation=GOOD,
        refs=fourth,
        data=data,
    )
    made.promote(fourth, run="w5", by="bob")
    champions.rollback(made.store, "default", why="it swears", by="cay")
    rejected = made.run("other-line", day(24), RunOutcome.NOT_BETTER, evaluation=BAD, line="other")
    made.promote(rejected, by="dan", why="all the same", unapproved=True)
    return made


def test_entries_by_time(weeks, as_json):
    entries = [e for e in as_json(history) if e["line"] == "default"]
    assert [(e["outcome"], e["when"][8:10], e["run"], e["by"]) for e in entries] == [
        ("Promoted", "02", "w1", "ann"),
        ("NotBetter", "08", "w2", ""),
        ("GateRejected", "15", "w3", ""),
        ("Promoted", "23", "w5", "bob"),
        (ROLLED_BACK, "24", "", "cay"),
        (BY_HAND, "25", "", "dan"),
    ]
    assert [e["is_champion"] for e in entries] == [False] * 5 + [True]
    # A repeated run does no work: the time is that of the run that did.
    assert [e["seconds"] for e in entries] == [60.0, 10.0, 10.0, 10.0, None, None]
    assert entries[0]["metrics"]["judge_win_rate_low"] == 0.55
    assert entries[4]["policy"] == entries[0]["policy"]
    assert entries[4]["metrics"]["kl"] == 4.2
    # Without a report of this line, by the verdict's evaluation.
    assert entries[5]["metrics"] == {
        "win_rate": 0.45, "reward": -0.2, "kl": 9.0, "eos_rate": 0.5
    }  # fmt: skip
    assert entries[2]["policy"] is None
    assert entries[2]["metrics"] == {"pairs": 150.0}


def test_a_promotion_has_the_figures_of_its_own_verdict(made, as_json):
    """A policy is evaluated twice, and promoted upon the second verdict."""
    refs = made.run("one", day(1), RunOutcome.NOT_BETTER, evaluation=GOOD)
    again = {f"sampled.{key}": value for key, value in {"win_rate": 0.4, "kl": 5.0}.items()}
    evaluation = made.publish("evaluation", {}, {"policy": refs["train-policy"]}, **again)
    parents = {"policy": refs["train-policy"], "evaluation": evaluation}
    made.promote({**refs, "gate-policy": made.publish("verdict", {}, parents)})
    retrained, promoted = (entry["metrics"] for entry in as_json(history))
    assert (retrained["win_rate"], retrained["win_rate_low"]) == (0.7, 0.6)
    # Nothing of the first evaluation is mixed in; the data are the same.
    assert promoted == {"win_rate": 0.4, "kl": 5.0, "pairs": 100.0}


def test_what_changed_in_the_data(weeks, as_json):
    entries = as_json(history, "default")
    assert entries[0]["changes"] == []
    # A finding whose figure alone differs is the same one.
    assert entries[1]["changes"] == ["pairs 100 → 150 (+50)", "new: Few annotators."]
    assert entries[1]["drift"] == ["tokens of chosen: 0.09"]
    assert entries[2]["changes"] == ["pairs 150 → 150 (as many)"]
    assert entries[4]["changes"] == []


def test_the_table_fits_eighty_columns(weeks, shown):
    out = shown(history)
    table = [line for line in out.splitlines() if line.startswith(("2026", "when"))]
    assert max(map(len, table)) <= 80
    assert "…" not in "".join(table)
    assert re.search(
        r"2026-11-02 Promoted +\w{8} +J 0\.65 \(0\.55–0\.75\) +1\.20 +4\.20 0\.97\d? +100", out
    )
    assert re.search(r"2026-11-15 GateRejected +– +– ", out)
    assert re.search(r"PromotedByHand +\w{8}\* +R 0\.45 ", out)
    assert out.index("model line default") < out.index("model line other")
    assert "2026-11-02" not in shown(history, "default", limit=2)
    wide = shown(history, "default", wide=True)
    for text in ("by cay: it swears", "new: Few annotators.", "1 min 00 s", "1.20 (SFT 0.10)"):
        assert text in wide, text


def test_the_page(weeks, shown, tmp_path):
    shown(history, html=tmp_path / "history.html")
    page = (tmp_path / "history.html").read_text()
    texts = " ".join(" ".join(Tree(page).texts).split())
    for text in (
        "Model line default", "Wins by the judge", "KL", "Keeps the champion",
        "Rejected by a gate", "Rolled back to this one", "it swears", "new: Few annotators.",
        "drift: tokens of chosen", "champion now",
    ):  # fmt: skip
        assert text in texts, text
    # Five entries with a KL; two of them were no champions.
    kl = next(f for f in page.split("<figure")[1:] if "KL over time" in f)
    assert (kl.count('class="end"'), kl.count('class="ring"')) == (4, 1)
    wins = next(f for f in page.split("<figure")[1:] if "Wins by the judge over" in f)
    assert wins.count('class="whisker"') == 3
    assert "http" not in re.sub(r"xmlns=\S+", "", page).replace("http-equiv", "")
    # It is made anew every week; another file stays.
    shown(history, html=tmp_path / "history.html")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is there already, and no page"):
        shown(history, html=tmp_path / "mine.txt")
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("huge", [1e308, -1e308, 1e300])
def test_numbers_that_are_damage_have_no_place_on_the_page(huge):
    metrics = {"kl": huge, "pairs": huge, "tokens": huge, "win_rate": huge, "reward_gain_low": huge}
    first = Entry("l", day(1), "Promoted", metrics=metrics, data="a")
    second = Entry("l", day(2), "Promoted", metrics={**metrics, "kl": -huge, "pairs": 3}, data="b")
    third = Entry("l", day(3), "Promoted", metrics={"kl": 2.0, "tokens": 5.0}, data="c")
    fourth = Entry("l", day(4), "Promoted", metrics={"kl": 3.0, "tokens": 6.0}, data="d")
    page = render_history(with_changes([first, second, third, fourth]), "s")
    assert "KL over time" in page
    kl = next(f for f in page.split("<figure")[1:] if "KL over time" in f)
    assert kl.count('class="end"') == 2
    assert "0" * 20 not in page


def test_hostile_names_and_reasons_stay_text(made, shown, tmp_path):
    data = {"pairs_train": "many", "findings": [HOSTILE], "source": HOSTILE}
    for number, line in enumerate(("default", HOSTILE)):
        made.run(f"{HOSTILE}{number}", HOSTILE, RunOutcome.NOT_BETTER, evaluation=GOOD,
                 reason=HOSTILE * 20, data=data, line=line)  # fmt: skip
    for options in ({}, {"wide": True}, {"html": tmp_path / "page.html"}):
        out = shown(history, **options)
        assert "\x1b" not in out
        assert "\u202e" not in out
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert r"\x1b[31m" in unescape(page)


def test_a_damaged_report_is_left_out_and_nothing_known_is_an_error(made, shown, as_json):
    with pytest.raises(ArtifactMissing, match="there is no store"):
        shown(history)
    made.publish("report", {"report.json": "[]"}, {})
    with pytest.raises(ArtifactMissing, match="no retraining was decided upon"):
        shown(history)
    made.run("w", day(1), RunOutcome.NOT_BETTER, evaluation=BAD)
    assert len(as_json(history)) == 1
    with pytest.raises(ArtifactMissing, match=r"'x': .*knows no such model line.*: default"):
        shown(history, "x")
    with pytest.raises(ConfigError, match="--limit 0"):
        shown(history, limit=0)
