"""Findings: each symptom is found alone, by its numbers; a healthy run has none."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config.fields import field_types
from rlhf.ppo.frontier import DETECTORS, NON_FINITE
from rlhf.report import policy_symptoms, training_symptoms
from rlhf.report.findings import SYMPTOMS, counted, find
from rlhf.report.symptoms import Change, Facts, Finding
from rlhf.report.training_symptoms import STOP_CURES
from tests.report.demo_findings import CASES, changed, facts, healthy, measured

ROOT = Path(__file__).parents[2]
MODULES = (policy_symptoms, training_symptoms)
SOURCES = [Path(str(module.__file__)).read_text() for module in MODULES]
#: Dotted names of settings in a text.
SETTING = re.compile(
    r"(?<![.\w])(?:data|base|sft|reward_model|judge|ppo|evaluation|gates|promotion)(?:\.(?!json|md)[a-z_0-9]+)+"
)
#: Values that a metric of a damaged or older file may have.
ODD = (None, float("nan"), float("inf"), True, "text", "1e400", [], {}, -1.0, 1e308, -1e308, 5e-324,
       10**400)  # fmt: skip


def test_a_healthy_run_has_no_finding():
    assert find(facts(healthy())) == ()


def test_noisy_batches_do_not_speak_against_held_out_replies():
    """17 steps of SmolLM2 went from 2.23 to 2.43, while held-out replies got likelier."""
    noisy = changed(sft=[{"loss": 2.23}] * 9 + [{"loss": 2.43}] * 8)
    names = [finding.symptom for finding in find(facts(noisy))]
    assert names == ["sft_learned_nothing"]
    learned = {"heldout_loss_before": 1.927, "heldout_loss": 1.873}
    assert find(facts(changed(sft=noisy["sft"], sft_metrics=learned))) == ()
    flat = {"heldout_loss_before": 1.927, "heldout_loss": 1.92}
    both = find(facts(changed(sft=noisy["sft"], sft_metrics=flat)))
    assert [finding.symptom for finding in both] == names


@pytest.mark.parametrize(
    ("symptom", "severity", "parts", "words", "cures"), CASES,
    ids=[f"{case[0]}-{i}" for i, case in enumerate(CASES)],
)  # fmt: skip
def test_each_symptom_is_found_alone_with_its_numbers(symptom, severity, parts, words, cures):
    (found,) = find(facts(parts))
    assert (found.symptom, found.severity) == (symptom, severity)
    for word in words:
        assert word in found.text
    for cure in cures:
        assert cure in found.cure
    for sentence in (found.text, found.cure):
        assert sentence.endswith(".")
        assert sentence[0].isupper() or sentence.startswith(("n =", "ppo."))


def test_every_symptom_has_a_case_and_a_row_in_the_guide():
    names = {name for source in SOURCES for name in re.findall(r'Finding\(\s*"(\w+)"', source)}
    assert {case[0] for case in CASES} == names
    guide = (ROOT / "docs/findings.md").read_text()
    assert set(re.findall(r"^\| `(\w+)`", guide, re.MULTILINE)) == names


def test_every_parameter_that_a_cure_names_exists():
    texts = [text for case in CASES for finding in find(facts(case[2])) for text in
             (finding.text, finding.cure)]  # fmt: skip
    texts += [f"{part[1]} " for cures in STOP_CURES.values() for part in cures]
    texts += SOURCES
    texts.append((ROOT / "docs/findings.md").read_text())
    named = {name for text in texts for name in SETTING.findall(text)}
    assert len(named) > 25
    assert [name for name in sorted(named) if field_types(name) is None] == []


def test_every_reason_to_stop_has_a_cure():
    assert set(STOP_CURES) == {*DETECTORS, NON_FINITE}
    for name, cures in STOP_CURES.items():
        (found,) = find(facts(changed(watchdog={"stopped": {"detector": name}, "chosen": 4})))
        assert all(field in found.cure for _, field in cures)


def test_the_watchdogs_cures_follow_the_controller():
    stopped = {"detector": "kl_above_budget", "update": 5}
    adaptive = changed(
        watchdog={"stopped": stopped, "chosen": 4}, settings={"ppo.kl_controller": "adaptive"}
    )
    (found,) = find(facts(adaptive))
    assert found.cure.startswith("Lower ppo.kl_target (now 6), or lower ppo.learning_rate")


def test_a_fall_that_is_likely_and_not_sure_is_a_warning():
    parts = changed(
        policy__sampled={
            "win_rate": 0.5, "win_rate_low": 0.45, "win_rate_high": 0.55, "reward_before": -0.5,
            "reward_after": -0.91, "reward_difference_low": -1.01, "reward_difference_high": 0.19,
        }
    )  # fmt: skip
    assert [(f.symptom, f.severity) for f in find(facts(parts))] == [
        ("reward_fell", "warning"), ("no_gain", "warning"),
    ]  # fmt: skip


def test_cures_follow_the_settings():
    def cure(**settings: Any) -> str:
        parts = measured("eos_rate", 0.95, 0.4, 0.06)
        parts["settings"] |= {name.replace("__", "."): value for name, value in settings.items()}
        (found,) = find(facts(parts))
        return found.cure

    assert "Set ppo.missing_eos (now none) to subtract" in cure(ppo__missing_eos="none")
    assert "Set ppo.missing_eos" in cure(ppo__missing_eos_penalty=None)
    far = changed(policy__sampled={"kl": 34.0}, settings={"ppo.kl_controller": "adaptive"})
    (found,) = find(facts(far))
    assert found.cure.startswith("Lower ppo.kl_target (now 6), or lower ppo.learning_rate")
    # A penalty that is on already is raised further.
    repeats = measured("repetition", 0.01, 0.25, 0.03)
    repeats["settings"]["reward_model.negatives"] = 1.0
    assert "Raise reward_model.negatives (now 1) to 2" in find(facts(repeats))[0].cure


def test_a_fall_within_noise_is_no_finding():
    noise = changed(
        policy__sampled={
            "reward_before": 0.64, "reward_after": 0.62, "reward_difference": -0.02,
            "reward_difference_low": -0.1, "reward_difference_high": 0.06,
        }
    )  # fmt: skip
    assert find(facts(noise)) == ()
    assert find(facts(measured("eos_rate", 0.98, 0.86, 0.5))) == ()
    assert find(facts(measured("tokens", 26.5, 45.0, 60.0))) == ()
    # Curves of a few updates or steps are noise.
    few = [{"explained_variance": -3.0, "clip_fraction": 0.9}] * 7
    assert find(facts(changed(curve=few, sft=[{"loss": 2.0}] * 4))) == ()


def test_how_sure_a_change_is():
    assert Change(1.0, 0.5, -0.8, -0.2).certainty(-1) == "sure"
    assert Change(1.0, 0.5, -1.2, 0.2).certainty(-1) == "likely"
    assert Change(1.0, 0.9, -1.2, 1.0).certainty(-1) == ""
    assert Change(1.0, 0.5, -0.8, -0.2).certainty(1) == ""
    assert Change(0.5, 1.0, 0.2, 0.8).certainty(1) == "sure"
    assert Change(1.0, 0.5).certainty(-1) == "likely"  # without an interval
    assert Change(1.0, 1.0).certainty(-1) == ""


def test_the_run_that_got_worse_and_was_promoted():
    """What the first user met: 16 prompts, wins 75 %, a lower reward, half of the ends."""
    parts = measured("eos_rate", 0.62, 0.31, 0.25)
    parts["policy"]["sampled"] |= {
        "n": 16, "win_rate": 0.75, "win_rate_low": 0.501, "win_rate_high": 0.902,
        "reward_before": -0.5, "reward_after": -0.91, "reward_difference": -0.41,
        "reward_difference_low": -0.95, "reward_difference_high": 0.13,
    }  # fmt: skip
    found = find(facts(parts))
    assert [finding.symptom for finding in found] == [
        "eos_fell", "wins_but_reward_fell", "replies_cut", "too_few_prompts",
    ]  # fmt: skip
    assert counted(found) == "1 serious finding, 2 warnings"


def test_serious_findings_come_first_and_are_counted():
    parts = changed(
        reward_model={"accuracy_low": 0.4, "accuracy_high": 0.6}, sft=[{"loss": 2.0}] * 9,
        policy__sampled={"kl": 34.0, "kl_low": 33.0},
    )  # fmt: skip
    found = find(facts(parts))
    assert [finding.severity for finding in found] == ["serious", "serious", "warning"]
    assert counted(found) == "2 serious findings, 1 warning"
    assert counted([Finding("a", "note", "b", "c")]) == ""


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values, containers too; of long lists those of the first item."""
    found = [path] if path else []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:1])
    for key, value in items:
        is_node = isinstance(value, dict | list) and value
        found += leaves(value, (*path, key)) if is_node else [(*path, key)]
    return found


def checked_texts(parts: dict[str, Any]) -> None:
    for finding in find(Facts.of(**parts)):
        text = f"{finding.text} {finding.cure}"
        assert not re.search(r"\b(nan|inf|None)\b", text), text


@pytest.mark.parametrize("case", [None, *range(len(CASES))])
def test_no_odd_value_stops_it_or_is_shown(case):
    base = healthy() if case is None else CASES[case][2]
    # All values in all places of all cases would take a minute: the cases take turns.
    values = ("missing", *ODD) if case is None else (ODD[case % len(ODD)],)
    metrics = {k: v for k, v in base.items() if k not in ("verdicts", "settings")}
    places = leaves(metrics)
    for path in places if case is None else places[case % 5 :: 5]:
        for value in values:
            parts = copy.copy(base)
            node: Any = parts
            for key in path[:-1]:
                node[key] = copy.copy(node[key])
                node = node[key]
            if value == "missing":
                del node[path[-1]]
            else:
                node[path[-1]] = value
            checked_texts(parts)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["sampled", "shifts", "metric", "win_rate", "reward_before", "stopped"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.dictionaries(
    st.sampled_from(["policy", "curve", "sft", "watchdog", "reward_model", "card", "settings"]),
    JSON,
))  # fmt: skip
def test_parts_of_any_shape(parts):
    checked_texts(parts)


def test_an_empty_run_has_no_finding():
    assert find(Facts()) == ()
    assert len(SYMPTOMS) == len(set(SYMPTOMS))
