"""Geometry and number formats, against values calculated by hand."""

import math
import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rlhf.report import charts, text
from rlhf.report.data_card import data_card, drift_charts
from rlhf.report.model import StageRow, StageState
from rlhf.report.render import curve_table, lanes

CARD_KEYS = (
    "findings", "longer", "position", "formats", "annotators", "repeats", "slices", "languages",
    "lengths", "left_out", "prompt", "histogram", "quantiles", "rows", "share", "n", "wins",
    "agreement", "pairwise",
)  # fmt: skip


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0, 0.25, 0.5, 0.75, 1]),  # 1 / 4 = 0.25, itself a round step
        (-0.31, 1.76, [-1, 0, 1, 2]),  # 2.07 / 4 = 0.52, the next round step is 1
        (31.4, 38.6, [30, 32, 34, 36, 38, 40]),  # 7.2 / 4 = 1.8 -> 2
        (5.0, 5.0, [5.0, 5.2]),  # flat: span 0.5, step 0.2 (0.125 rounded up), still two ticks
    ],
)
def test_ticks_are_round_and_cover(low, high, ticks):
    assert charts.nice_ticks(low, high, 4) == pytest.approx(ticks)


def test_curve_ends_lie_in_the_corners():
    # y from 0 to 1 over updates 1 to 3: first point bottom left, last top right.
    rows = [{"update": 1, "kl": 0.0}, {"update": 2, "kl": 0.5}, {"update": 3, "kl": 1.0}]
    (curve,) = charts.curves_of(rows)
    bottom, right = charts.HEIGHT - charts.BOTTOM, charts.WIDTH - charts.RIGHT
    middle = (charts.LEFT + right) / 2
    assert curve.lines == (
        f"{charts.LEFT},{bottom} {middle:g},{(bottom + charts.TOP) / 2:g} {right},{charts.TOP}",
    )
    assert curve.end == (right, charts.TOP)
    assert (curve.first, curve.last) == ("0", "1.00")


def test_lengths_are_lines_over_powers_of_two():
    # 256 stands for 128 to 255; 1 of 4 prompts below 128, 3 below 512, so that 256 has none.
    card = {"lengths": {"prompt": {"histogram": {"128": 1, "512": 3}, "quantiles": {"p5": 90}}}}
    found = data_card(card).lengths
    bottom, right = charts.HEIGHT - charts.BOTTOM, charts.WIDTH - charts.RIGHT
    middle = (charts.LEFT + right) / 2
    # Ticks 0, 0.2 … 0.8: 0.75 / 4 = 0.19 -> 0.2.
    height = bottom - charts.TOP
    first, last = bottom - height * 0.25 / 0.8, bottom - height * 0.75 / 0.8
    assert found.lines == (
        ("prompt",
         f"{charts.LEFT},{round(first, 1):g} {middle:g},{bottom} {right},{round(last, 1):g}"),
    )  # fmt: skip
    assert [tick.label for tick in found.x_ticks] == ["<128", "<256", "<512"]
    assert found.rows == (("prompt", (90, None, None, None)),)


def test_lengths_of_two_datasets_are_lines_over_common_classes():
    # Classes 8 and 12: 15 and 63 characters; the new texts are all of the longer class.
    lengths = {"prompts": {"before": [0.0] * 8 + [1.0], "after": [0.0] * 12 + [1.0]}}
    [chart] = drift_charts({"lengths": lengths})
    assert chart.title == "prompts"
    assert [tick.label for tick in chart.x_ticks] == ["15", "22", "31", "44", "63"]
    points = {side: [tuple(map(float, p.split(","))) for p in line.split()]
              for side, line in chart.lines}  # fmt: skip
    bottom = charts.HEIGHT - charts.BOTTOM
    assert points["before"][0] == (charts.LEFT, charts.TOP)
    assert points["after"][-1] == (charts.WIDTH - charts.RIGHT, charts.TOP)
    assert {y for _, y in points["after"][:-1]} == {bottom}
    assert len(points["before"]) == len(points["after"]) == 5


@pytest.mark.parametrize(
    "drift", [None, {}, {"lengths": 3}, {"lengths": {"prompts": {"before": [1.0]}}},
              {"lengths": {"prompts": {"before": [], "after": ["x", None]}}}],
)  # fmt: skip
def test_drift_without_lengths_has_no_chart(drift):
    assert drift_charts(drift) == ()


def test_bars_beyond_a_dozen_are_one():
    card = {"left_out": [{"reason": f"r{i}", "rows": 30 - i, "is_choice": i == 0}
                         for i in range(14)]}  # fmt: skip
    bars = data_card(card).left_out
    assert len(bars) == 13
    assert bars[0] == ("r0", "30", 100.0, "")
    assert bars[1] == ("r1", "29", 96.7, "a fault")
    assert bars[-1] == ("2 more", "35", 0.0, "")  # 18 + 17


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from((*CARD_KEYS, "x", "8")), inner, max_size=6)
        ),
        max_leaves=30,
    )
)
@example({"prompt": {"histogram": {"x": 1, "²": 1, "3": 2}}})
@example({"prompt": {"histogram": {"9" * 99: 1}}})
def test_a_card_of_any_form_is_laid_out(value):
    card = dict.fromkeys(CARD_KEYS, value)
    assert data_card(card) == data_card(card) or "nan" in str(value)


def test_missing_values_leave_a_gap():
    values = [1.0, 2.0, math.nan, 2.0, None, 3.0]
    (curve,) = charts.curves_of([{"update": i, "entropy": v} for i, v in enumerate(values)])
    assert [len(line.split()) for line in curve.lines] == [2, 1, 1]


def test_long_curves_keep_their_spikes():
    rows = [{"update": i, "reward": 100.0 if i == 7003 else 0.0} for i in range(10_000)]
    rows[2000:2500] = [{"update": i, "reward": None} for i in range(2000, 2500)]
    (curve,) = charts.curves_of(rows)
    assert len(curve.lines) == 2
    points = [point for line in curve.lines for point in line.split()]
    assert len(points) <= charts.MAX_POINTS
    assert any(point.endswith(f",{charts.TOP}") for point in points)


def test_interval_positions():
    # Ends 0.5 and 0.86, a little wider, to twentieths: the track goes from 0.45 to 0.9.
    metrics = {"accuracy": 0.675, "accuracy_low": 0.6, "accuracy_high": 0.75, "n": 10}
    chart = charts.interval_chart(
        [("m", "main", metrics, "accuracy")], [("coin", "coin", 0.5), ("top", "ceiling", 0.86)]
    )
    (row,) = chart.rows
    # (0.675 - 0.45) / 0.45 = 50 %, (0.6 - 0.45) / 0.45 = 33.33 %, (0.75 - 0.45) / 0.45 = 66.67 %
    assert (row.at, row.start, row.end) == (50.0, 33.33, 66.67)
    assert [tick.label for tick in chart.ticks] == ["50 %", "60 %", "70 %", "80 %", "90 %"]
    assert charts.interval_chart([("m", "main", {}, "accuracy")], []) is None


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"), (math.nan, "not finite"), (0.0, "0"), (-0.312, "−0.31"), (1.842, "1.84"),
        (38.24, "38.2"), (0.0493, "0.049"), (0.0041, "0.0041"), (1e-5, "1.0e−5"),
        (6000, "6\u2009000"), (1234.5, "1\u2009234"),
        (300, "300"), (-math.inf, "not finite"), (True, "–"),
    ],
)  # fmt: skip
def test_numbers(value, shown):
    assert text.number(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "–"), (0.04, "40 ms"), (0.9, "0.9 s"), (9.96, "10 s"), (59.6, "1 min 00 s"),
        (71, "1 min 11 s"), (8040, "2 h 14 min"),
    ],
)  # fmt: skip
def test_durations(seconds, shown):
    assert text.duration(seconds) == shown


def test_exact_does_not_round_a_fail_into_a_pass():
    assert text.exact(0.49998) == "0.49998"
    assert text.exact(None) == "missing"


def test_names_and_digests():
    assert text.words("train-sft") == "Train SFT"
    assert text.words("left_out") == "Left out"
    assert text.short("sha256:0123456789abcdef") == "0123456789ab"
    assert text.short(None) == "–"
    assert text.bound(">= 0.5") == "≥ 0.5"


def test_the_first_gate_opens_the_second_lane():
    names = ("prepare-data", "gate-reward-model", "train-policy", "gate-policy", "promote")
    rows = [StageRow(name=name, state=StageState.NOT_RUN) for name in names]
    assert [[s.name for s in lane] for lane in lanes(rows)] == [
        ["prepare-data", "gate-reward-model"], ["train-policy", "gate-policy", "promote"],
    ]  # fmt: skip
    assert lanes([]) == []


def test_long_tables_keep_every_nth_row_and_the_last():
    columns, rows, step = curve_table([{"update": i, "kl": 0.5} for i in range(1, 201)])
    # 200 rows in at most 60 (plus the last): every 4th.
    assert (columns, step, len(rows)) == (["update", "kl"], 4, 51)
    assert rows[0] == ["1", "0.50"]
    assert rows[-1] == ["200", "0.50"]


def _luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_contrast_is_at_least_aa_in_both_modes():
    css = Path(charts.__file__).with_name("style.css").read_text(encoding="utf-8")
    css = css.replace("#fff;", "#ffffff;")
    light, dark = (
        dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", block.partition("}")[0]))
        for block in css.split("@media screen and (prefers-color-scheme: dark)")[:2]
    )
    tones = ("good", "info", "warn", "bad")
    pairs = [(a, b) for a in ("text", "muted", "accent") for b in ("page", "card", "sunken")]
    pairs += [(tone, back) for tone in tones for back in ("card", f"{tone}-soft")]
    pairs += [("muted", f"{tone}-soft") for tone in tones] + [("judge", "card")]
    for palette in (light, dark):
        for fore, back in pairs:
            a, b = sorted((_luminance(palette[fore]), _luminance(palette[back])))
            assert (b + 0.05) / (a + 0.05) >= 4.5, (fore, back)
