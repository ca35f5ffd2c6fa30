"""Sample evaluations with all of trust: calibration, slices, probes, judge, champion, watchdog."""

from __future__ import annotations

import math
import random
from typing import Any

from rlhf.gates import Check, Verdict

CHAMPION = "sha256:" + "c4a3f0" * 10 + "beef"
PROBES = {
    "filler": (0.22, -0.61),
    "repeated_sentence": (0.31, -0.42),
    "truncated": (0.08, -1.9),
    "flattery": (0.63, 0.27),
    "bullets": (0.52, 0.04),
    "other_prompt": (0.11, -2.3),
}
SLICES = {
    "group:billing": (0.812, 260), "group:delivery": (0.772, 310), "group:returns": (0.792, 240),
    "group:new templates": (0.732, 190), "chosen_longer": (0.83, 420), "long_prompt": (0.71, 380),
    "similar_length": (0.66, 120),
}  # fmt: skip


def share(name: str, value: float, n: int) -> dict[str, float]:
    half = 1.96 * math.sqrt(value * (1 - value) / n)
    low, high = max(value - half, 0.0), min(value + half, 1.0)
    return {name: value, f"{name}_low": low, f"{name}_high": high, f"{name}_size": n,
            f"{name}_error": half / 1.96}  # fmt: skip


def mean(name: str, value: float, half: float) -> dict[str, float]:
    return {name: value, f"{name}_low": value - half, f"{name}_high": value + half}


def reward_model_trust() -> dict[str, Any]:
    """Return the parts that stand beside a reward model's accuracy."""
    draw = random.Random(1)
    edges = [round(-3 + 0.5 * i, 1) for i in range(17)]
    counts = [round(110 * math.exp(-(((e + 0.25 - 1.1) / 1.5) ** 2))) for e in edges[:-1]]
    bins = []
    for i in range(10):
        low = 0.5 + i * 0.05
        n = 40 + round(160 * draw.random())
        right = min(0.99, 0.5 + (low + 0.025 - 0.5) * 0.82)
        bins.append({"low": low, "high": low + 0.05, "confidence": low + 0.026, "n": n,
                     **share("accuracy", right, n)})  # fmt: skip
    slices = {k: {**share("accuracy", v, n), "n": n, "prompts": n} for k, (v, n) in SLICES.items()}
    return {
        "prompts": 912, "log_loss": 0.468, "log_loss_calibrated": 0.451, "brier": 0.152,
        "ece": 0.041, "ece_chance": 0.022, **share("prefers_longer", 0.61, 980),
        "notes": ["log_loss_calibrated: too few prompts"], "temperature": 1.31, "reliability": bins,
        **share("baseline_format", 0.534, 1000), **share("length_controlled_accuracy", 0.741, 700),
        "margins": {
            "edges": edges,
            "right": [n if e >= 0 else 0 for e, n in zip(edges, counts, strict=False)],
            "wrong": [0 if e >= 0 else n for e, n in zip(edges, counts, strict=False)],
        },
        "members": members(),
        "by_slice": slices, "worst_slice": "similar_length", "worst": slices["similar_length"],
        "probes": {
            name: {
                **share("rises", rises, 300), "mean_change": change, "n": 300,
                "example": {
                    "prompt": "Where is my parcel?", "reply": "It arrives tomorrow before noon.",
                    "probed": f"It arrives tomorrow before noon. ({name})", "before": 1.2,
                    "after": 1.2 + change,
                },
            }
            for name, (rises, change) in PROBES.items()
        },
    }  # fmt: skip


def members() -> dict[str, Any]:
    """Return the evaluation of four members whose disagreement foretells errors."""
    edges, right = (0.02, 0.11, 0.17, 0.26, 0.71), (0.89, 0.83, 0.76, 0.64)
    pairs = [
        ("Where is my parcel?", "It arrives tomorrow.", "I can look that up for you.", -0.21, 0.71),
        ("Can I return this?", "Yes, within 30 days.", "Yes, you can.", 0.34, 0.66),
    ]
    return {
        "heads": 4, "n": 1000, "prompts": 912, **share("accuracy", 0.786, 1000),
        "accuracies": [0.782, 0.775, 0.79, 0.771], "disagreement_mean": 0.204,
        "by_disagreement": [
            {"low": edges[i], "high": edges[i + 1], **share("accuracy", right[i], 250), "n": 250}
            for i in range(4)
        ],
        "examples": [
            {"prompt": prompt, "group": None, "chosen": chosen, "rejected": rejected,
             "margin": margin, "disagreement": disagreement, "right": float(margin > 0)}
            for prompt, chosen, rejected, margin, disagreement in pairs
        ],
    }  # fmt: skip


def policy_trust(state: str = "no", better: bool = True) -> dict[str, Any]:
    """Return the parts that stand beside a policy's two modes."""
    groups = {"seen templates": (0.565, 150), "new templates": (0.53, 150), "billing": (0.61, 44)}
    rows = (
        ("tokens", 31.4, 38.2, 1.1, 0.0001), ("eos_rate", 0.978, 0.983, 0.011, 0.41),
        ("repetition", 0.041, 0.052, 0.006, 0.012), ("distinct_1", 0.61, 0.57, 0.02, 0.002),
        ("distinct_2", 0.84, 0.8, 0.021, 0.004), ("entropy", 1.42, 0.87, 0.06, 0.0001),
        ("refusal", 0.013, 0.01, 0.012, 0.63),
    )  # fmt: skip
    evidence = {
        "no": "the judge's win rate is 3.1 points below the reward model's, and its score rose too",
        "suspected": "the judge's score fell by 0.41 (0.22–0.60) while the reward rose by 2.15",
        "unknown": "no judge was usable",
    }[state]
    return {
        "n": 300, "samples_per_prompt": 2, "prompts_from": "champion", "prompts_sha256": "ab" * 32,
        "notes": ["Prompts of the champion's own evaluation; 3 of them don't fit this model."],
        "judge": {
            "usable": True, **share("accuracy", 0.724, 500), "n": 500, "prompts": 460,
            "reason": None, "base": "sft",
        },
        "champion": {
            "policy": CHAMPION, "n": 300, **share("win_rate", 0.59, 300),
            **share("judge_win_rate", 0.561 if better else 0.492, 300),
            **share("gold_win_rate", 0.552, 300),
            **mean("reward_difference", 0.31, 0.11), **mean("judge_difference", 0.14, 0.1),
            "tokens_before": 36.0, "tokens_after": 38.2,
            "own": {"eos_rate": 0.981, "tokens": 36.0, "reward": 1.53, "judge": 1.1},
            "by_group": {
                g: {**share("win_rate", v + 0.02, n), **share("judge_win_rate", v, n), "n": n}
                for g, (v, n) in groups.items()
            },
        },
        "shifts": [
            {"metric": name, "before": a, "after": b, "difference": b - a, "low": b - a - half,
             "high": b - a + half, "p": p / 5, "p_adjusted": p, "significant": p < 0.05}
            for name, a, b, half, p in rows
        ],
        "forgetting": {
            "nll_before": 1.213, "nll_after": 1.262, **mean("nll_difference", 0.049, 0.012),
            "perplexity_before": 3.36, "perplexity_after": 3.53, "n": 300,
        },
        "over_optimisation": {"state": state, "evidence": evidence},
    }  # fmt: skip


def sampled_trust() -> dict[str, Any]:
    """Return what the judge adds to the sampled replies."""
    return {
        **share("judge_win_rate", 0.806, 300), **mean("gap", -0.031, 0.024),
        "judge_before": 0.21, "judge_after": 1.33, "kl_exact": 6.18, "eos_rate_before": 0.978,
        "entropy_before": 1.42, "entropy_after": 0.87, "refusal_before": 0.013,
        "refusal_after": 0.01, "distinct_1_before": 0.61, "distinct_1_after": 0.57,
        "distinct_2_before": 0.84, "distinct_2_after": 0.8, "disagreement_before": 0.21,
        "disagreement_after": 0.38,
    }  # fmt: skip


def watchdog(stopped: bool = True) -> dict[str, Any]:
    """Return the frontier of a run whose judge falls while the reward still rises."""
    rows = []
    for i in range(10):
        root = 0.45 * i
        judge = 0.2 + 1.1 * root - 0.21 * root**2
        rows.append({
            "update": 4 * i, "kl": root**2, "proxy": -0.3 + 0.72 * root - 0.04 * root**2,
            "judge": judge, "judge_low": judge - 0.12, "judge_high": judge + 0.12,
            "gold": 2.1 + 1.0 * root - 0.2 * root**2,
        })  # fmt: skip
    why = {
        "detector": "over_optimisation",
        "update": 36,
        "evidence": "the judge's score fell by 0.41 ± 0.09 since update 24; the reward rose.",
    }
    return {
        "frontier": rows,
        "chosen": 24,
        "stopped": why if stopped else None,
        "notes": ["update 24 goes on: the last that the judge found better before the stop"],
    }


def champion_checks(better: bool = True) -> tuple[Check, ...]:
    rate = 0.561 if better else 0.492
    low = rate - 0.06 if better else rate - 0.08
    return (
        Check("champion.judge_win_rate", rate, "99.5 % lower end ≥ 0.5", better, low, rate + 0.06,
              300, kind="champion"),
        Check("champion.by_group.seen templates.judge_win_rate", 0.565, "95 % lower end ≥ 0.4",
              True, 0.49, 0.63, 150, kind="champion"),
        Check("champion.by_group.billing.judge_win_rate", 0.61, "95 % lower end ≥ 0.4", True, 0.47,
              0.74, 24, "not judged: 24 prompts, and slice_n = 30", "champion"),
        Check("look", 2.0, "≤ 10", True, kind="champion"),
    )  # fmt: skip


def policy_verdict(subject: str, better: bool = True) -> Verdict:
    """Return the verdict on a policy that was compared with a champion."""
    rules = (
        Check("sampled.win_rate", 0.837, "lower end ≥ 0.5", True, 0.791, 0.875, 300),
        Check("sampled.judge_win_rate", 0.806, "lower end ≥ 0.5", True, 0.761, 0.851, 300),
        Check("sampled.kl", 6.41, "≤ 20", True, 6.1, 6.7, 300),
        Check("sampled.eos_rate", 0.983, "≥ 0.8", True, n=300),
        Check("sampled.gold_win_rate", None, "lower end ≥ 0.5", True, note="not measured"),
    )
    return Verdict(
        "gate-policy", subject, better, (*rules, *champion_checks(better)), champion=CHAMPION,
        prompts="ab" * 32, look=2, looks=10,
    )  # fmt: skip
