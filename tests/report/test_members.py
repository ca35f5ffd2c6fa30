"""The reward model's members on the page."""

import pytest

from rlhf.report import render
from rlhf.report.members import members_view
from rlhf.report.policy import policy_view
from tests.report import demo, demo_trust


def part(low, value, high, **others):
    return {"low": 0.1, "high": 0.2, "accuracy": value, "accuracy_low": low,
            "accuracy_high": high, "n": 40, **others}  # fmt: skip


def test_the_members_of_the_demo():
    view = members_view({"accuracy": 0.782, "members": demo_trust.members()})
    assert (view.css, view.headline) == ("passed", "Disagreement foretells errors.")
    # 0.89 ± 1.96 √(0.89 · 0.11/250) = ± 0.0388; 0.64 ± 1.96 √(0.64 · 0.36/250) = ± 0.0595
    assert view.evidence.replace("\u00a0", " ") == (
        "Right where the members agree best: 89.0 % (85.1–92.9 %); where they agree least: 64.0 % "
        "(58.0–70.0 %)."
    )
    assert [row.label for row in view.chart.rows] == [
        "Disagreement 0.020–0.11", "Disagreement 0.11–0.17", "Disagreement 0.17–0.26",
        "Disagreement 0.26–0.71",
    ]  # fmt: skip
    assert [row.value.replace("\u00a0", " ") for row in view.chart.rows][::3] == [
        "89.0 %",
        "64.0 %",
    ]
    assert [line.label[:7] for line in view.chart.references] == ["coin 50", "overall"]
    figures = {figure.label: figure.value.replace("\u00a0", " ") for figure in view.figures}
    assert figures == {
        "Members": "4", "Accuracy of their mean": "78.6 %", "Accuracy of each": "77.1–79.0 %",
        "Mean disagreement": "0.20",
    }  # fmt: skip
    first, second = view.disputed
    assert (first.disagreement, first.margin, first.ranked) == ("0.71", "−0.21", "wrong")
    assert (second.margin, second.ranked) == ("+0.34", "right")
    assert first.parts[0] == ("Prompt", "Where is my parcel?")


@pytest.mark.parametrize(
    ("parts", "headline"),
    [
        # Intervals that overlap tell nothing; disjoint ones do, in either direction.
        ([part(0.8, 0.85, 0.9), part(0.7, 0.75, 0.81)], "Disagreement does not clearly foretell"),
        ([part(0.8, 0.85, 0.9), part(0.7, 0.75, 0.79)], "Disagreement foretells errors"),
        ([part(0.6, 0.65, 0.7), part(0.71, 0.8, 0.9)], "Disagreement is larger where it is right"),
        ([part(0.6, 0.65, 0.7)], "Too few pairs"),
        ([], "Too few pairs"),
        ([part(None, 0.9, None), part(None, 0.1, None)], "Disagreement does not clearly foretell"),
        ([{"accuracy": "x"}, 3, {}], "Disagreement does not clearly foretell"),
    ],
)
def test_what_the_quarters_say(parts, headline):
    view = members_view({"members": {"by_disagreement": parts}})
    assert view.headline.startswith(headline)
    assert view.figures == view.disputed == ()


def test_without_members():
    assert members_view(None) is None
    assert members_view({"accuracy": 0.7}) is None
    assert members_view({"members": 3}) is None
    page = render(demo.full_report())
    assert "Members" not in page
    assert "members differ" not in page


def test_the_page():
    page = render(demo.trust_report())
    assert page.index("Can it be fooled?") < page.index("<h3>Members</h3>")
    for text in (
        "Disagreement foretells errors.", "Accuracy by disagreement of the members",
        "Pairs on which the members differ most", "Disagreement 0.71, margin −0.21, ranked wrong",
        "I can look that up for you.", "agreement is no proof", "<dt>members differ</dt>",
    ):  # fmt: skip
        assert text in page
    broken = demo.trust_report().model_copy(
        update={"reward_model": {"members": {"examples": [{"prompt": "<b>x"}, 1], "heads": []}}}
    )
    assert "&lt;b&gt;x" in render(broken)


def test_the_policys_disagreement():
    view = policy_view({"sampled": demo_trust.sampled_trust(), "greedy": {"reward_after": 1}})
    (row,) = [row for row in view.compared if row.label.startswith("Disagreement")]
    assert row.cells == (("0.38", "was 0.21"), ("–", ""))
