"""The overview: figures before and after PPO, on the page, and read back from a stored report."""

from __future__ import annotations

import re
from html import unescape

import pytest

from rlhf.config.metric_names import POLICY
from rlhf.errors import DataError
from rlhf.report import Overview, RunOutcome, make_overview, outcome_style, render
from rlhf.report.overview import Figure
from rlhf.report.stored_overview import read_report
from rlhf.report.symptoms import Facts, Finding
from tests.report import demo
from tests.report.demo_findings import changed, facts, healthy, measured

BAD = demo.HOSTILE + "</style></title>' onload='x"


def lines(parts):
    return [figure.line for figure in make_overview(facts(parts)).figures]


def test_every_figure_after_ppo_has_its_value_before():
    for path, part in POLICY.items():
        names = {*part.numbers}
        after = {name for name in names if name.endswith("_after")}
        assert {name.replace("_after", "_before") for name in after} <= names, path
        if path != "champion.own":  # what the champion's own values are after
            assert ("eos_rate" in names) == ("eos_rate_before" in names), path
    parts = healthy()
    assert all(figure.before is not None for figure in make_overview(facts(parts)).figures)


def test_figures_of_a_healthy_run():
    shown = make_overview(facts(healthy()))
    assert [figure.line for figure in shown.figures] == [
        "Reward: 0.64 → 3.07 (the reward model's score alone)",
        "Judge's score: 0.98 → 2.55",
        "Replies that end: 98.9\u00a0% → 99.9\u00a0%",
        "Reply length: 26.5 → 31.0 (tokens)",
    ]
    assert shown.sample == "300 held-out prompts × 4 sampled replies of each policy"
    assert shown.alarm == ""


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "0.26 → 2.38 (less 1.00"),
        ({"ppo.missing_eos_penalty": 3.0}, "−0.50 → 1.00 (less 3.00"),
        ({"ppo.missing_eos": "replace"}, None),
        ({"ppo.missing_eos": "none"}, None),
        ({"ppo.missing_eos_penalty": None}, None),
        ({"ppo.reward_fn": "length_penalty"}, None),
        ({"ppo.env_type": "preference_comparison"}, None),
        ({"ppo.multi_objective": True}, None),
    ],
)
def test_the_reward_as_ppo_counts_it(settings, expected):
    parts = measured("eos_rate", 0.62, 0.31, 0.02)
    parts["settings"] |= settings
    found = [line for line in lines(parts) if line.startswith("Reward as PPO counts it")]
    assert len(found) == (expected is not None)
    assert not found or expected in found[0]


def test_no_figures_without_numbers():
    assert make_overview(Facts()) == Overview()
    assert lines(changed(policy__sampled={"reward_after": float("nan")}))[0].startswith("Judge")
    assert Figure("tokens", "Reply length", None, 3.0).line == "Reply length: – → 3.00"


def test_an_outcome_with_findings_is_not_green():
    serious = make_overview(facts(measured("eos_rate", 0.95, 0.4, 0.06)))
    note = make_overview(facts(changed(watchdog={"chosen": 24})))
    assert note.findings
    promoted = RunOutcome.PROMOTED
    assert [outcome_style(promoted, shown) for shown in (None, note, serious)] == [
        "green", "green", "yellow",
    ]  # fmt: skip
    assert outcome_style(RunOutcome.FAILED, serious) == "red"


def page_of(parts):
    shown = make_overview(facts(parts))
    return render(demo.full_report().model_copy(update={"overview": shown})), shown


def test_the_page_has_it_at_the_top():
    page, shown = page_of(measured("eos_rate", 0.62, 0.31, 0.02))
    head = unescape(page[: page.index("<nav")])
    assert shown.findings
    for finding in shown.findings:
        assert finding.text in head
        assert f"<b>Change next:</b> {finding.cure}" in head
    for figure in shown.figures:
        before, after = figure.texts
        assert f'<span class="was">{before}</span> → <b>{after}</b>' in head
    assert f"on {shown.sample}." in head
    assert '<a class="alarm" href="#stands-out">' in head
    assert '<span class="badge is-promoted">' not in head
    assert shown.alarm in head
    # Once, with its value before.
    assert "was −0.31 after SFT" not in head
    assert "was −0.31 after SFT" in render(demo.full_report())


def test_the_page_of_a_healthy_run_says_so():
    page, shown = page_of(healthy())
    assert shown.findings == ()
    assert "no symptom is found" in page
    assert 'class="alarm"' not in page
    assert '<span class="badge is-promoted">' in page[: page.index("<nav")]
    assert "What stands out" not in render(demo.full_report())


def test_text_of_strangers_stays_text():
    shown = Overview(
        (Figure("a", BAD, 1.0, 2.0, note=BAD),), BAD, (Finding(BAD, "serious", BAD, BAD),)
    )
    page = render(demo.full_report().model_copy(update={"overview": shown}))
    assert "<script" not in page.lower()
    assert not re.search(r"<[^>]* onload=", page)


def test_a_stored_report_is_read_back(tmp_path):
    shown = make_overview(facts(measured("eos_rate", 0.95, 0.4, 0.06)))
    report = demo.rejected_report().model_copy(update={"overview": shown})
    path = tmp_path / "report.json"
    path.write_text(report.model_dump_json())
    found = read_report(path)
    assert found.overview == shown
    assert (found.run_name, found.outcome) == (report.run_name, report.outcome)
    assert found.seconds == pytest.approx(sum(stage.seconds or 0.0 for stage in report.stages))


def test_a_report_of_an_earlier_version_gets_an_overview(tmp_path):
    path = tmp_path / "report.json"
    path.write_text(demo.full_report().model_dump_json(exclude={"overview", "samples", "replies"}))
    shown = read_report(path).overview
    assert shown is not None
    assert shown.figures[0].line.startswith("Reward: −0.31 → 1.84")


@pytest.mark.parametrize("content", ["", "3", "{}", "[" * 100_000, '{"outcome": "Better"}'])
def test_a_damaged_report_is_refused(tmp_path, content):
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"report\.json is damaged"):
        read_report(path)
    with pytest.raises(DataError, match="is missing"):
        read_report(tmp_path / "none.json")
