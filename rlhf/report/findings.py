"""Findings of a run: what stands out in its numbers, and what to change next.

docs/findings.md lists all symptoms. This loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rlhf.report import policy_symptoms as policy
from rlhf.report import training_symptoms as training
from rlhf.report.symptoms import SEVERITIES, Facts, Finding

#: All symptoms, in the order in which findings of one severity are shown: what the policy became,
#: then how it came to that.
SYMPTOMS: tuple[Callable[[Facts], Finding | None], ...] = (
    policy.figures_not_finite,
    policy.reward_fell,
    policy.loses_to_sft,
    policy.judge_disagrees,
    policy.gold_prefers_sft,
    policy.eos_fell,
    policy.replies_cut,
    policy.kl_far,
    training.watchdog_stopped,
    policy.length_changed,
    policy.replies_repeat,
    policy.replies_alike,
    policy.entropy_collapsed,
    policy.nothing_gained,
    policy.loses_to_champion,
    training.reward_model_at_chance,
    training.reward_model_counts_words,
    training.reward_model_ignores_prompt,
    training.reward_model_fooled,
    training.updates_too_large,
    training.critic_explains_nothing,
    training.sft_learned_nothing,
    training.sft_overfitted,
    training.gate_without_rules,
    policy.too_few_prompts,
    training.longer_is_preferred,
)


def find(facts: Facts) -> tuple[Finding, ...]:
    """Return what stands out in a run, the most serious first."""
    found = (symptom(facts) for symptom in SYMPTOMS)
    return tuple(
        sorted(
            (finding for finding in found if finding is not None),
            key=lambda finding: SEVERITIES.index(finding.severity),
        )
    )


def counted(findings: Sequence[Finding]) -> str:
    """Return how much stands out, in words: `2 serious findings, 1 warning`; empty for notes."""
    words = {"serious": ("serious finding", "serious findings"), "warning": ("warning", "warnings")}
    counts = {s: sum(finding.severity == s for finding in findings) for s in words}
    return ", ".join(f"{n} {words[s][n != 1]}" for s, n in counts.items() if n)
