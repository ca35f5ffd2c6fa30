"""`rlhf compare-runs`: configurations, metrics and replies of two runs side by side."""

from __future__ import annotations

import re

import pytest

from flows.compare_runs import compare_runs
from rlhf.errors import ArtifactMissing, ConfigError
from rlhf.report import RunOutcome
from tests.history.conftest import HOSTILE, sample
from tests.report.test_render import Tree

A = {"win_rate": 0.5, "win_rate_low": 0.4, "win_rate_high": 0.6, "kl": 1.0}
B = {**A, "win_rate": 0.7, "win_rate_low": 0.6, "win_rate_high": 0.8, "kl": 3.0}


def rows(gain: float, judge: float | None = None, prompts: int = 8) -> list[dict]:
    return [
        sample([{"role": "user", "content": f"p{i}"}], gain + i / 10,
               None if judge is None else judge + i / 10, after=f"reply {gain:g} to {i}")
        for i in range(prompts)
    ]  # fmt: skip


@pytest.fixture
def runs(made):
    """Two runs with the same judge and different reward models."""
    judge = made.publish("judge", {}, {})
    for name, figures, gain, by_judge in (("a", A, 0.0, 0.0), ("b", B, 1.0, 2.0)):
        made.refs = {"judge": judge, "reward-model": made.publish("reward-model", {}, {})}
        config = {"ppo.kl_coef": "0.1" if name == "a" else "0.05", "runtime.threads": name}
        more = {"ppo.lora": "none"} if name == "b" else {}
        made.run(
            f"run-{name}", f"2026-11-0{1 + (name == 'b')}", RunOutcome.PROMOTED,
            evaluation=figures, rows=rows(gain, by_judge), config={**config, **more},
        )  # fmt: skip
    return made


def test_what_differs_and_what_came_of_it(runs, as_json):
    found = as_json(compare_runs, "run-a", "run-b")
    assert found["configuration"] == [
        {"key": "ppo.kl_coef", "a": "0.1", "b": "0.05"},
        {"key": "ppo.lora", "a": None, "b": "none"},
    ]
    by_name = {each["name"]: each for each in found["metrics"]}
    assert (by_name["sampled.win_rate"]["a"], by_name["sampled.win_rate"]["b_low"]) == (0.5, 0.6)
    assert (by_name["sampled.kl"]["a_low"], by_name["sampled.kl"]["b"]) == (None, 3.0)
    # By the judge that both have: the reward models are different ones.
    gain = found["gain"]
    assert (gain["scorer"], gain["value"], gain["prompts"]) == ("judge", pytest.approx(2.0), 8)
    assert [each["difference"] for each in found["replies"]] == [pytest.approx(2.0)] * 8
    assert found["replies"][0]["a"].startswith("reply 0 to")
    assert found["replies"][0]["b"].startswith("reply 1 to")


def test_at_eighty_columns_and_on_a_page(runs, shown, tmp_path):
    out = shown(compare_runs, "run-a", "run-b", html=tmp_path / "two.html")
    assert re.search(r"│ ppo\.kl_coef +│ 0\.1 +│ 0\.05 +│", out)
    assert re.search(r"win_rate +│ 0\.50 \(0\.40–0\.60\) │ 0\.70 \(0\.60–0\.80\)", out)
    assert "b is better: by the judge of both runs b's replies score +2.00 more" in out
    assert "8 prompts were answered by both" in out
    tables = [line for line in out.splitlines() if line.startswith(("│", "┃"))]
    assert max(map(len, tables)) <= 80
    texts = " ".join(" ".join(Tree((tmp_path / "two.html").read_text()).texts).split())
    for text in (
        "run-b against run-a",
        "b is better",
        "ppo.kl_coef",
        "0.60–0.80",
        "reply 1 to 7",
    ):
        assert text in texts, text


def test_without_a_common_scorer_nothing_is_decided(runs, made, as_json):
    made.refs = {"judge": made.publish("judge", {}, {})}
    made.run("run-c", "2026-11-03", RunOutcome.NOT_BETTER, evaluation=B, rows=rows(5.0, 5.0))
    found = as_json(compare_runs, "run-a", "run-c")
    assert found["gain"] is None
    assert found["replies"][0]["difference"] is None
    assert "scores are of different reward models and judges" in found["notes"][0]


def test_other_prompts_and_a_run_without_replies(runs, made, as_json):
    made.run("run-d", "2026-11-04", RunOutcome.NOT_BETTER, evaluation=A, rows=[sample("x", 1.0)])
    made.run("run-e", "2026-11-05", RunOutcome.GATE_REJECTED)
    assert "no prompt was answered by both" in as_json(compare_runs, "run-a", "run-d")["notes"][0]
    found = as_json(compare_runs, "run-e", "run-a")
    assert found["notes"] == ["no replies to compare: the policy of run-e was not evaluated"]
    assert [each["a"] for each in found["metrics"]] == [None, None]


def test_errors_and_hostile_text(runs, made, shown, tmp_path):
    with pytest.raises(ConfigError, match="are the same run; give two"):
        shown(compare_runs, "run-a", "run-a")
    with pytest.raises(ArtifactMissing, match="'nope': no run with a report"):
        shown(compare_runs, "run-a", "nope")
    evil = [{**row, "after": HOSTILE} for row in rows(0.0)]
    made.run("evil", HOSTILE, RunOutcome.NOT_BETTER, evaluation=A, reason=HOSTILE,
             config={HOSTILE: HOSTILE}, rows=evil)  # fmt: skip
    out = shown(compare_runs, "evil", "run-b", html=tmp_path / "evil.html")
    assert "\x1b" not in out
    assert "<script" not in (tmp_path / "evil.html").read_text()
