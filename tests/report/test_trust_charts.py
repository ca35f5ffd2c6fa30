"""Geometry of the pictures on trust, against values calculated by hand."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rlhf.gates import Check
from rlhf.report import charts, trust_charts
from rlhf.report.members import members_view
from rlhf.report.policy import policy_view
from rlhf.report.render import watchdog_finding
from rlhf.report.reward_model import reward_model_view
from rlhf.report.samples import sample_groups
from rlhf.report.text import interval, p_value, points, sentence
from tests.report import demo

RIGHT_END = charts.WIDTH - charts.RIGHT
KEYS = (
    "accuracy", "accuracy_low", "n", "by_slice", "by_group", "worst_slice", "worst", "reliability",
    "margins", "edges", "right", "wrong", "probes", "rises", "rises_low", "mean_change", "example",
    "prompt", "reply", "log_loss", "temperature", "confidence", "low", "high", "sampled", "greedy",
    "champion", "policy", "win_rate", "judge_win_rate", "judge", "usable", "shifts", "metric",
    "before", "difference", "p_adjusted", "forgetting", "nll_after", "perplexity_after", "notes",
    "over_optimisation", "state", "evidence", "frontier", "update", "kl", "proxy", "chosen",
    "stopped", "detector", "gap", "members", "by_disagreement", "accuracies", "heads", "examples",
)  # fmt: skip


def test_a_calibrated_bin_lies_on_the_diagonal():
    bins = [{"low": 0.5, "high": 1.0, "confidence": 0.75, "accuracy": 0.75, "accuracy_low": 0.5,
             "accuracy_high": 1.0, "n": 20}]  # fmt: skip
    found = trust_charts.reliability_of(bins)
    (point,) = found.bins
    # Both axes go from 0.5 to 1, so that 0.75 is the middle of each.
    assert point.x == (charts.LEFT + RIGHT_END) / 2
    assert point.y == pytest.approx((found.base + charts.TOP) / 2, abs=0.05)
    assert (point.top, point.bottom) == (charts.TOP, found.base)
    assert found.diagonal == f"M{charts.LEFT}.0 {found.base}.0L{RIGHT_END}.0 {charts.TOP}.0"
    # The only bin is the largest: its bar has the whole strip, less the number's 18.
    assert (point.bar, point.size) == (trust_charts.STRIP - 18, "20")
    assert point.label == "predicted 75.0\u00a0%, right 75.0\u00a0% (50.0–100.0\u00a0%), n = 20"
    assert found.rows == (("75.0\u00a0%", "75.0\u00a0%", "50.0–100.0\u00a0%", "20"),)


def test_the_sizes_of_narrow_bins_are_left_to_the_table():
    # The axis has 286 for 0.5: a bin of 0.04 is 22.9 wide, less than "1000" at 6.5 a digit.
    bins = [
        {"low": low, "high": high, "confidence": low, "accuracy": 0.9, "n": 1000}
        for low, high in ((0.5, 0.96), (0.96, 1.0))
    ]
    found = trust_charts.reliability_of(bins)
    assert [each.size for each in found.bins] == ["1000", ""]
    assert [row[-1] for row in found.rows] == ["1\u2009000", "1\u2009000"]


def test_bins_below_a_half_start_the_axis_at_zero():
    bins = [{"low": 0.2, "high": 0.3, "confidence": 0.25, "accuracy": 0.3, "n": 12_345}]
    found = trust_charts.reliability_of(bins)
    assert [tick.label for tick in found.x_ticks] == [
        "0 %",
        "20 %",
        "40 %",
        "60 %",
        "80 %",
        "100 %",
    ]
    assert found.bins[0].x == charts.LEFT + (RIGHT_END - charts.LEFT) / 4
    assert (found.bins[0].top, found.bins[0].size) == (None, "12k")


@pytest.mark.parametrize(
    "bins", [None, [], {}, [{"confidence": 0.5}], [{"confidence": math.nan, "accuracy": 0.5}],
             [{"confidence": 1.5, "accuracy": 0.5}], ["x"]],
)  # fmt: skip
def test_bins_without_numbers_are_no_diagram(bins):
    assert trust_charts.reliability_of(bins) is None


def test_margins_stack_wrong_on_right():
    found = trust_charts.margins_of({"edges": [-1, 0, 1], "right": [0, 3], "wrong": [4, 1]})
    bottom, height = charts.HEIGHT - charts.BOTTOM, charts.HEIGHT - charts.BOTTOM - charts.TOP
    # Both classes have four pairs, and the axis ends at 4: 0, 1, 2, 3, 4.
    assert [tick.label for tick in found.y_ticks] == ["0", "1", "2", "3", "4"]
    first, second = found.bars
    assert (first.right_height, first.wrong_height, first.wrong_top) == (0, height, charts.TOP)
    assert second.right_height == pytest.approx(0.75 * height, abs=0.05)
    assert second.right_top == pytest.approx(bottom - 0.75 * height, abs=0.05)
    assert second.wrong_top == charts.TOP
    assert second.wrong_height + second.right_height == pytest.approx(height)
    assert found.zero == (charts.LEFT + RIGHT_END) / 2
    assert second.label == "0 to 1: 3 right, 1 wrong"


@pytest.mark.parametrize(
    "margins",
    [
        None, {}, {"edges": [0, 1], "right": [], "wrong": []},
        {"edges": [0, 1], "right": [0], "wrong": [0]},  # nothing counted
        {"edges": [1, 0], "right": [1], "wrong": [1]},  # edges fall
        {"edges": [0, math.nan], "right": [1], "wrong": [1]},
    ],
)  # fmt: skip
def test_margins_that_do_not_fit_are_no_histogram(margins):
    assert trust_charts.margins_of(margins) is None


def test_the_frontier_is_over_the_root_of_kl():
    rows = [{"update": 0, "kl": 0.0, "proxy": 0.0, "judge": 1.0},
            {"update": 4, "kl": 1.0, "proxy": 1.0, "judge": 2.0},
            {"update": 8, "kl": 4.0, "proxy": 2.0, "judge": math.nan}]  # fmt: skip
    stopped = {"detector": "max_kl", "update": 8, "evidence": ""}
    found = trust_charts.frontier_of({"frontier": rows, "chosen": 4, "stopped": stopped})
    assert [panel.title for panel in found] == ["Reward model", "Judge"]
    proxy, judge = found
    # √KL is 0, 1, 2: the middle point lies in the middle.
    assert [point.x for point in proxy.points] == [
        charts.LEFT, (charts.LEFT + RIGHT_END) / 2, RIGHT_END,
    ]  # fmt: skip
    assert [point.role for point in proxy.points] == ["", "chosen", "stopped"]
    assert proxy.chosen == judge.chosen == (charts.LEFT + RIGHT_END) / 2
    # Panels share their horizontal axis, though one has fewer points.
    assert proxy.x_ticks == judge.x_ticks
    assert len(judge.points) == 2
    assert proxy.points[1].label == "update 4: 1.00 at 1.00 nats"
    assert trust_charts.frontier_rows({"frontier": rows, "chosen": 4})[1] == (
        "4 · chosen", "1.00", "1.00", "2.00", "–",
    )  # fmt: skip


def test_an_interval_of_the_judge_is_drawn():
    row = {"update": 0, "kl": 1.0, "judge": 1.0, "judge_low": 0.0, "judge_high": 2.0}
    (panel,) = trust_charts.frontier_of({"frontier": [row]})
    (point,) = panel.points
    assert (point.top, point.bottom) == (charts.TOP, charts.HEIGHT - charts.BOTTOM)


@pytest.mark.parametrize(
    ("watchdog", "css", "says"),
    [
        ({"chosen": 12, "stopped": None}, "passed", "Nothing stopped PPO before its end."),
        ({"stopped": {"detector": "max_kl", "update": 8, "evidence": "31 nats"}}, "missed",
         "The watchdog stopped PPO after update 8: max KL."),
        ({"stopped": {"detector": "over_optimisation"}}, "missed",
         "The watchdog stopped PPO: over-optimisation."),
    ],
)  # fmt: skip
def test_the_watchdogs_end_in_a_sentence(watchdog, css, says):
    found = watchdog_finding(watchdog)
    assert (found.css, found.headline) == (css, says)
    assert watchdog_finding(None) is None
    noted = watchdog_finding(watchdog | {"notes": ["update 3 goes on: why", "no judge"]})
    assert noted.evidence.endswith("Update 3 goes on: why. No judge.")


def test_slices_stand_lowest_first_and_the_worst_is_marked():
    view = reward_model_view(demo.trust_report().reward_model)
    names = [row.label for row in view.slices.rows]
    assert names == [
        "Similar length", "Long prompt", "Group new templates", "Group delivery", "Group returns",
        "Group billing", "Chosen longer",
    ]  # fmt: skip
    assert [row.role for row in view.slices.rows] == ["worst"] + ["group"] * 6
    # 0.66 ± 1.96 √(0.66 · 0.34/120) = 0.66 ± 0.0848
    assert view.worst == (
        "Similar length: 66.0\u00a0% (95 % interval 57.5–74.5\u00a0%, n\u00a0=\u00a0120)"
    )


@pytest.mark.parametrize(
    ("low", "high", "css"),
    [(0.51, 0.7, "missed"), (0.3, 0.49, "passed"), (0.4, 0.6, "notrun"), (None, None, "notrun"),
     (0.5, 0.7, "notrun")],
)  # fmt: skip
def test_a_probe_is_read_by_its_interval(low, high, css):
    probe = {"rises": 0.5, "rises_low": low, "rises_high": high}
    (row,) = reward_model_view({"probes": {"flattery": probe}}).probes
    assert (row.name, row.css) == ("Flattery is added", css)


def test_the_margin_of_the_slices_comes_from_the_gates_bounds():
    report = demo.trust_report()
    view = policy_view(report.policy, report.verdicts)
    assert view.margin == "40.0\u00a0%"
    # The gate judges by the judge, so the slices show its win rates.
    assert [row.value for row in view.champion_slices.rows] == [
        "53.0\u00a0%", "56.5\u00a0%", "61.0\u00a0%",
    ]  # fmt: skip
    # Bounds that differ between slices have no common line.
    (verdict,) = (v for v in report.verdicts if v.champion)
    other = Check("champion.by_group.new templates.judge_win_rate", 0.5, "≥ 0.45", False,
                  kind="champion")  # fmt: skip
    both = [verdict, type(verdict)("g", "s", False, (other,))]
    view = policy_view(report.policy, both)
    assert view.margin == ""
    assert [row.role for row in view.champion_slices.rows] == ["worst", "group", "group"]
    assert policy_view(report.policy).margin == ""


def test_differences_of_shares_are_in_points():
    view = policy_view(demo.trust_report().policy)
    (gap,) = (row for row in view.compared if row.label.startswith("Gap"))
    # −0.031 ± 0.024
    assert gap.cells[0] == ("−3.1 points", "95\u00a0% interval −5.5 to −0.7")
    eos = next(row for row in view.shifts if row.name.startswith("Replies that end"))
    assert (eos.difference, eos.significant, eos.p) == ("+0.5 points", False, "0.410")


def test_samples_are_grouped_by_their_kinds():
    report = demo.trust_report()
    groups = sample_groups(report.samples)
    assert [(g.heading.split()[-1], len(g.cards)) for g in groups] == [
        ("most", 1), ("most", 2), ("most", 1), ("prompts", 1),
    ]  # fmt: skip
    # Samples of old evaluations have no kind, and no headings.
    (group,) = sample_groups(demo.samples())
    assert group.heading == ""
    assert sample_groups(()) == []


def test_small_texts():
    assert points(-0.031) == "−3.1"
    assert points(None) == "–"
    assert points(0.0) == points(-0.0001) == "0.0"
    assert interval(-1.0, 2.0) == "−1 to 2"
    assert interval(0.1, 0.2) == "0.1–0.2"
    assert interval(None, 0.2) == interval(0.1, math.nan) == ""
    assert p_value(0.0004) == "<\u20090.001"
    assert p_value(math.nan) == "–"
    assert sentence("it fell") == "It fell."
    assert sentence(None) == ""


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from((*KEYS, "x")), inner, max_size=6)
    ),
    max_leaves=30,
)


@given(VALUES)
@example(10**400)
@example([{"update": 1, "kl": 1e300, "proxy": 1e300}, {"kl": 5e-324, "judge": 5e-324}])
@example([{"kl": 1.0, "proxy": -1.7e308}, {"kl": 2.0, "proxy": 1.7e308}])
@example([{"confidence": 0.5, "accuracy": 0.5, "low": -1e300, "n": -3}] * 2)
@example({"edges": [-1e300, 1e300], "right": [1], "wrong": [1e300]})
@example({"edges": [0, 5e-324], "right": [1], "wrong": [1]})
def test_evaluations_of_any_form_are_laid_out(value):
    everything = dict.fromkeys(KEYS, value)
    for given_value in (everything, value if isinstance(value, dict) else None):
        reward_model_view(given_value)
        members_view(given_value)
        members_view({"members": given_value})
        policy_view(given_value)
        trust_charts.frontier_of(given_value)
        trust_charts.frontier_rows(given_value)
        watchdog_finding(given_value)
    trust_charts.frontier_of({"frontier": value})
    trust_charts.reliability_of(value)
    trust_charts.margins_of(value)
