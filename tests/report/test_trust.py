"""The answers of the first screen, the verdict tables, and names of metrics in words."""

import pytest

from rlhf.gates import Check, Verdict
from rlhf.report.metric_words import metric_name
from rlhf.report.trust import better, trust_answers
from rlhf.report.verdicts import verdict_views
from tests.report import demo, demo_trust

CHAMPION = demo_trust.CHAMPION


def rate(value, low, high, prefix=""):
    return {f"{prefix}win_rate": value, f"{prefix}win_rate_low": low,
            f"{prefix}win_rate_high": high}  # fmt: skip


def verdict(*checks, **fields):
    approved = all(check.passed for check in checks)
    return Verdict("gate-policy", "0" * 64, approved, checks, **fields)


def against_champion(*checks, policy=None, **fields):
    answers = trust_answers(policy or {"prompts_from": "run"}, verdict(*checks, **fields))
    return answers[1]


@pytest.mark.parametrize(
    ("metrics", "answer"),
    [
        (rate(0.9, 0.8, 0.95), "yes"),
        (rate(0.5, 0.4, 0.6), "not shown"),
        (rate(0.4, 0.3, 0.49), "no"),
        # A lower end of exactly a half is not above it.
        (rate(0.6, 0.5, 0.7), "not shown"),
        # Both scorers have to agree: by the reward model alone it was trained to please it.
        (rate(0.9, 0.8, 0.95) | rate(0.8, 0.7, 0.9, "judge_"), "yes"),
        (rate(0.9, 0.8, 0.95) | rate(0.55, 0.49, 0.6, "judge_"), "not shown"),
        (rate(0.9, 0.8, 0.95) | rate(0.4, 0.3, 0.49, "judge_"), "no"),
        # Gold is known for generated data alone, and decides nothing.
        (rate(0.9, 0.8, 0.95) | rate(0.4, 0.3, 0.49, "gold_"), "yes"),
        # Without an interval nothing is shown.
        ({"win_rate": 0.9}, "not shown"),
        ({"win_rate": 0.9, "win_rate_low": float("nan"), "win_rate_high": 1.0}, "not shown"),
        ({"win_rate": float("nan"), "win_rate_low": 0.8, "win_rate_high": 0.9}, "unknown"),
        ({"win_rate": "0.9 or so", "win_rate_low": []}, "unknown"),
        ({}, "unknown"),
    ],
)
def test_better_needs_every_scorers_interval(metrics, answer):
    assert better(metrics) == answer
    assert trust_answers({"sampled": metrics})[0].answer == answer


def test_the_first_screen_of_a_promoted_run():
    lines = [answer.line for answer in demo.trust_report().trust]
    assert lines == [
        "better than SFT: yes (win rate 83.7 %, 79.1–87.5 %; judge 80.6 %, 76.1–85.1 %; gold "
        "77.6 %, 72.6–82.0 %)",
        # 0.59 ± 1.96 √(0.59 · 0.41/300) = 0.59 ± 0.0557, and the judge's ± 0.0562.
        "better than the champion: yes (champion c4a3f0c4a3f0; win rate 59.0 %, 53.4–64.6 %; judge "
        "56.1 %, 50.5–61.7 %; gold 55.2 %, 49.6–60.8 %; look 2 of 10 at these prompts)",
        "over-optimised: no (the judge's win rate is 3.1 points below the reward model's, and its "
        "score rose too)",
    ]


def test_the_gates_checks_decide_on_the_champion():
    worse = Check("champion.judge_win_rate", 0.55, "≥ 0.5", False, 0.49, 0.6, kind="champion")
    # By the 95 % interval it were better; the gate asks for more confidence, and decides.
    policy = {"champion": {"policy": CHAMPION, **rate(0.55, 0.51, 0.6)}}
    found = against_champion(worse, policy=policy, champion=CHAMPION, look=3, looks=10)
    assert (found.answer, found.tone) == ("no", "kept")
    assert "champion.judge_win_rate = 0.55, needs ≥ 0.5" in found.evidence
    assert "look 3 of 10" in found.evidence
    # The whole 95 % interval below a half is more than "not shown to be better".
    lost = {"champion": {"policy": CHAMPION, **rate(0.4, 0.3, 0.49)}}
    found = against_champion(worse, policy=lost, champion=CHAMPION)
    assert (found.answer, found.tone) == ("no, it is worse", "rejected")
    spent = Check("look", 11.0, "≤ 10", False, note="raise data.rotation", kind="champion")
    spent_line = against_champion(spent, policy=policy, champion=CHAMPION).line
    assert "look = 11, needs ≤ 10 (raise data.rotation)" in spent_line
    # A failed rule of another kind says nothing on the champion.
    rule = Check("sampled.kl", 30.0, "≤ 20", False)
    good = Check("champion.win_rate", 0.6, "≥ 0.5", True, kind="champion")
    assert against_champion(rule, good, policy=policy, champion=CHAMPION).answer == "yes"


def test_many_failed_checks_are_counted():
    checks = [
        Check(f"champion.by_group.g{i}.win_rate", 0.3, "≥ 0.4", False, kind="champion")
        for i in range(5)
    ]
    evidence = against_champion(*checks, champion=CHAMPION).evidence
    assert "g0" in evidence
    assert "g1" in evidence
    assert "g2" not in evidence
    assert "3 more checks not met" in evidence


def test_without_a_comparison_nothing_is_claimed():
    assert against_champion().answer == "there was no champion to compare it with"
    # There may be a champion where the configuration asks for no comparison.
    unasked = trust_answers({"prompts_from": "run"}, verdict(), compares=False)[1]
    assert unasked.line == "better than the champion: not compared (gates.champion is none)"
    # Checks that measured nothing are no proof.
    skipped = Check("champion.win_rate", None, "≥ 0.5", True, note="not measured", kind="champion")
    assert against_champion(skipped, champion=CHAMPION).answer == "unknown"
    # An evaluation from before champions were compared.
    old = trust_answers({"sampled": rate(0.9, 0.8, 0.95)})
    assert [answer.answer for answer in old] == ["yes", "unknown", "unknown"]
    assert old[1].evidence == "this evaluation compares with SFT alone"
    assert old[2].line == "over-optimised: unknown (not measured)"
    # Compared, but no gate asked for it: the intervals speak, and the line says so.
    policy = {"champion": {"policy": CHAMPION, **rate(0.6, 0.55, 0.65)}}
    assert against_champion(policy=policy).answer == "yes"
    assert "the gate compares no champion" in against_champion(policy=policy).evidence
    assert "no gate has compared them" in trust_answers(policy)[1].evidence
    assert trust_answers(None) == trust_answers({}) == ()


def test_a_win_by_the_reward_model_alone_says_so():
    (answer, *_) = trust_answers({"sampled": rate(0.9, 0.8, 0.95)})
    assert answer.evidence.endswith("by the reward model that trained it, without a judge")


@pytest.mark.parametrize(
    ("found", "answer", "tone"),
    [
        ({"state": "no", "evidence": "e."}, "no", "promoted"),
        ({"state": "suspected", "evidence": "e"}, "suspected", "rejected"),
        ({"state": "unknown"}, "unknown", "notrun"),
        ({}, "unknown", "notrun"),
        ("no", "unknown", "notrun"),
        ({"state": None, "evidence": None}, "unknown", "notrun"),
    ],
)
def test_over_optimisation_has_three_states(found, answer, tone):
    last = trust_answers({"over_optimisation": found})[2]
    assert (last.answer, last.tone) == (answer, tone)
    assert not last.evidence.endswith(".")


def test_verdicts_group_the_champions_checks():
    first, second = verdict_views(demo.trust_report().verdicts)
    assert [group.heading for group in first.groups] == [""]
    rules, champion = second.groups
    assert champion.heading == "Against the champion c4a3f0c4a3f0, look 2 of 10 at these prompts"
    assert [(row.rule, row.spread, row.n, row.result) for row in champion.rows] == [
        ("Win rate by the judge, against the champion", "0.501–0.621", "300", "met"),
        (
            "Win rate by the judge, against the champion, seen templates",
            "0.490–0.630",
            "150",
            "met",
        ),
        ("Win rate by the judge, against the champion, billing", "0.470–0.740", "24", "not judged"),
        ("Comparisons on these gate prompts", "", "", "met"),
    ]
    assert champion.rows[2].note == "24 prompts, and slice_n = 30"
    assert [row.result for row in rules.rows] == ["met"] * 4 + ["not measured"]
    assert rules.rows[4].measured == "missing"
    # Three places do for most; in full where they would hide that a bound is missed.
    near = Verdict(
        "gate", "0" * 64, False, (Check("x", 0.49961, "lower end ≥ 0.5", False, 0.4, 0.6),)
    )
    (row,) = verdict_views([near])[0].groups[0].rows
    assert (row.measured, row.spread) == ("0.49961", "0.400–0.600")


@pytest.mark.parametrize(
    ("failed", "css"), [((), "passed"), (("champion",), "kept"), (("champion", "rule"), "rejected"),
                        (("rule",), "rejected")],
)  # fmt: skip
def test_only_the_champions_checks_keep_the_champion(failed, css):
    checks = [Check(kind, 0.4, "≥ 0.5", kind not in failed, kind=kind)
              for kind in ("rule", "champion")]  # fmt: skip
    (view,) = verdict_views([verdict(*checks)])
    assert view.css == css


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("accuracy_low", "Accuracy, lower bound"),
        ("sampled.win_rate", "Win rate by the reward model, sampled replies"),
        ("champion.by_group.v1.2 b.win_rate_low",
         "Win rate by the reward model, lower bound, against the champion, v1.2 b"),
        ("by_slice.long.accuracy", "Accuracy, long"),
        ("probes.filler.rises_high", "How often the score rises, upper bound, probe, filler"),
        ("own.metric_of_mine", "Metric of mine, the champion's own"),
        ("", ""),
    ],
)  # fmt: skip
def test_metrics_in_words(name, shown):
    assert metric_name(name) == shown
