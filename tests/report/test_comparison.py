"""The page of `rlhf compare`: the sections of a run's report, with both models named."""

import re
from html import unescape

import pytest

from rlhf.report.comparison import render_comparison
from rlhf.report.reward_model import reward_model_lines
from tests.report import demo, demo_compare
from tests.report.test_render import Tree, sections

POLICIES = render_comparison(demo_compare.policies(), demo_compare.replies())
MODELS = render_comparison(demo_compare.reward_models(), demo_compare.pairs())


def texts(page):
    return " ".join(" ".join(Tree(page).texts).split())


def part(page, section):
    found = re.search(rf'<section id="{section}">.*?</section>', page, re.DOTALL)
    return texts(found[0])


def head(page):
    return texts(re.search(r"<header.*?</header>", page, re.DOTALL)[0])


def test_two_policies_have_the_sections_of_a_run():
    assert sections(POLICIES) == ["policy", "samples"]
    shown = head(POLICIES)
    a, b = demo_compare.A[7:19], demo_compare.B[7:19]
    assert f"{b} against champion:default b is better" in shown
    assert f"champion:default ({a})" in shown
    assert "300, the gate prompts of a's evaluation 1a2b3c4d5e6f" in shown
    assert "4 to a prompt, temperature 1.00, at most 128 tokens, seed 0" in shown
    # By the words of a run's first screen.
    rates = "win rate 83.7 %, 79.1–87.5 %; judge 80.6 %, 76.1–85.1 %"
    assert f"Is b better than a? yes {rates}" in shown
    assert "Over-optimised? no the judge's win rate is 3.1 points below" in shown
    policy = part(POLICIES, "policy")
    for text in (
        "Against a Win rate over a with 95 % interval", "By group, by the reward model",
        "Wins over a", "KL from a", "b Sampled", "Shifts from a, sampled replies",
        "The judge is a reward model of its own", "3 rows are left out: <script>",
    ):  # fmt: skip
        assert text in policy, text
    assert "SFT" not in texts(POLICIES)
    assert "PPO" not in texts(POLICIES).replace("PPO never sees it", "")


def test_samples_of_policies_are_those_worth_reading():
    shown = part(POLICIES, "samples")
    order = ["judge disagree most", "Where b lost most", "Where b differs most from a"]
    assert [shown.index(text) for text in order] == sorted(shown.index(text) for text in order)
    # The third one has no kind.
    assert demo.samples()[2].prompt not in unescape(shown)
    assert "user: I was charged twice" in shown


def test_two_reward_models_have_both_reports():
    assert sections(MODELS) == ["accuracy", "model-a", "model-b", "samples"]
    accuracy = part(MODELS, "accuracy")
    for text in (
        # 660 + 122 of 1,000 are right by a, 660 + 50 by b.
        "78.2 %", "71.0 %", "−7.2 points", "95 % interval −10.0 to −4.4", "Same choice 83.0 %",
        "Only a right 122 pairs", "Group billing · a", "Group billing · b", "not known",
    ):  # fmt: skip
        assert text in accuracy, text
    for side in ("a", "b"):
        own = part(MODELS, f"model-{side}")
        assert f"Reward model {side} · " in own
        assert "Reliability" in own
        assert "The worst slice is" in own
        assert "Can it be fooled?" in own
        assert "Members" in own
    shown = head(MODELS)
    assert "b is worse" in shown
    assert "1 000, held-out pairs of b's dataset" in shown
    samples = part(MODELS, "samples")
    assert "Where they disagree most" in samples
    assert "margin of a 0.50 of b 0" in samples


def test_without_a_judge_the_page_says_so():
    page = texts(render_comparison(demo_compare.policies("undecided", judge=False), []))
    assert "No difference found" in page
    assert "Is b better than a? not shown" in page
    assert "Over-optimised? unknown not measured" in page
    assert "Decided by reward model" in page


@pytest.mark.parametrize("page", [POLICIES, MODELS], ids=["policies", "models"])
def test_a_comparison_loads_nothing_and_escapes_all(page):
    tree = Tree(page)
    assert tree.open == []
    assert not {"script", "img", "iframe"} & set(tree.tags)
    urls = [value for name, value in tree.attributes if name in ("src", "href")]
    assert all(url.startswith(("#", "data:")) for url in urls)


def test_old_or_odd_evaluations_render():
    for odd in ({}, {"sampled": None}, {"reports": {"before": 3}, "by_slice": []}):
        assert "No difference found" in render_comparison({**odd, "a": None, "scorers": []}, [])


def test_a_reward_model_in_two_lines():
    first, second = reward_model_lines(demo_compare.reward_models()["reports"]["before"])
    # 0.782 ± 1.96 √(0.782 · 0.218/1000) = ± 0.0256; 0.741 ± 1.96 √(0.741 · 0.259/700) = ± 0.0325.
    assert first == (
        "accuracy 78.2 % (75.6–80.8 %) on 1\u2009000 pairs; choose the longer reply 57.1 % "
        "(54.0–60.2 %); where length is no help 74.1 % (70.9–77.3 %)"
    )
    # 0.66 ± 1.96 √(0.66 · 0.34/120) = ± 0.0848. Of the probes flattery raises most scores.
    assert second.startswith(
        "worst slice Similar length 66.0 % (57.5–74.5 %); calibration error (ECE) 4.1 %; worst "
        'probe "flattery is added": the score rises in 63.0 % ('
    )
    assert reward_model_lines(None) == reward_model_lines({"n": 4}) == []
    # An evaluation of an earlier version has its accuracy alone.
    assert reward_model_lines({"accuracy": 0.5}) == ["accuracy 50.0 %"]
