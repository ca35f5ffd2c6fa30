"""Comparisons as `rlhf compare` writes them: of policies and of reward models."""

from __future__ import annotations

from typing import Any

from tests.report import demo, demo_trust

A, B = demo.digest("policy a"), demo.digest("policy b")


def policies(verdict: str = "better", judge: bool = True) -> dict[str, Any]:
    """Return the evaluation of two policies; by a judge too, or by the reward model alone."""
    sampled = {**demo.policy()["sampled"], **demo_trust.sampled_trust()}
    if not judge:
        sampled = {k: v for k, v in sampled.items() if not k.startswith(("judge", "gap"))}
    trust = demo_trust.policy_trust()
    by = "judge" if judge else "reward"
    scorers = {"reward": {"name": "abc", "kind": "reward-model", "digest": demo.digest("rm")}}
    if judge:
        scorers["judge"] = {**trust["judge"], "name": "def", "kind": "judge",
                            "digest": demo.digest("judge")}  # fmt: skip
    return {
        "n": 300, "samples_per_prompt": 4, "decided_by": by, "sampled": sampled,
        "shifts": trust["shifts"], "prompts_left_out": {}, "verdict": verdict,
        "verdict_metric": "judge_win_rate" if judge else "win_rate",
        "sentence": f"b is {verdict}: win rate 0.81 (0.76–0.85) on 300 prompts, by {by}",
        "prompts_needed": None,
        **({"over_optimisation": trust["over_optimisation"]} if judge else {}),
        "a": {"name": "champion:default", "kind": "policy", "digest": A},
        "b": {"name": B[7:19], "kind": "policy", "digest": B},
        "sampling": {"samples": 4, "max_new_tokens": 128, "temperature": 1.0, "seed": 0,
                     "stop_sequences": []},
        "notes": [f"3 rows are left out: {demo.HOSTILE}"],
        "prompts_from": "the gate prompts of a's evaluation 1a2b3c4d5e6f", "scorers": scorers,
    }  # fmt: skip


def replies() -> list[dict[str, Any]]:
    """Return the samples of two policies: one of each kind, and one of none."""
    kinds = (["disagree", "lost"], ["changed"], [], ["lost"])
    return [
        {"prompt": [{"role": "user", "content": s.prompt}], "group": s.group, "before": s.before,
         "after": s.after, "reward_before": s.reward_before, "reward_after": 1.0,
         "judge_before": 0.1, "judge_after": None, "kinds": kind}
        for s, kind in zip(demo.samples(), kinds, strict=True)
    ]  # fmt: skip


def reward_models(verdict: str = "worse") -> dict[str, Any]:
    """Return the evaluation of two reward models, the second of which is a local folder."""
    before = {**demo.reward_model(), **demo_trust.reward_model_trust()}
    after = {**before, **demo.reward_model(0.71)}
    slices = {
        name: {
            **{f"accuracy_before{end}": part[f"accuracy{end}"] for end in ("", "_low", "_high")},
            **{f"accuracy_after{end}": part[f"accuracy{end}"] - 0.07
               for end in ("", "_low", "_high")},
            "n": part["n"],
        }
        for name, part in before["by_slice"].items()
    }  # fmt: skip
    accuracies = {
        f"accuracy_{side}{end}": report[f"accuracy{end}"]
        for side, report in (("before", before), ("after", after))
        for end in ("", "_low", "_high")
    }
    return {
        "n": 1000, "prompts": 900, **accuracies,
        "accuracy_difference": -0.072, "accuracy_difference_low": -0.1,
        "accuracy_difference_high": -0.044, "agreement": 0.83, "agreement_low": 0.8,
        "agreement_high": 0.86, "both_right": 660, "only_before_right": 122,
        "only_after_right": 50, "neither_right": 168, "by_group": {}, "by_slice": slices,
        "reports": {"before": before, "after": after}, "pairs_left_out": {}, "verdict": verdict,
        "verdict_metric": "accuracy_difference", "prompts_needed": None,
        "sentence": f"b is {verdict}: accuracy −0.072 (−0.100 to −0.044) on 900 prompts",
        "a": {"name": "3f2a91c04d", "kind": "reward-model", "digest": A},
        "b": {"name": "./" + "a-long-folder-name-" * 5, "kind": "reward-model"},
        "notes": ["what ./x was trained on is not known"],
        "pairs_from": "held-out pairs of b's dataset 1a2b3c4d5e6f",
    }  # fmt: skip


def pairs() -> list[dict[str, Any]]:
    """Return pairs on which two reward models disagree."""
    return [
        {"prompt": s.prompt, "group": s.group, "chosen": s.before, "rejected": s.after,
         "margin_before": 0.5 - i, "margin_after": i / 3, "disagreement": 2.0}
        for i, s in enumerate(demo.samples())
    ]  # fmt: skip
