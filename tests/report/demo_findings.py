"""Numbers of a healthy run (the quickstart's, seed 0), and of runs with one symptom each."""

from __future__ import annotations

import copy
import math
from typing import Any

from rlhf.config import PipelineConfig
from rlhf.config.fields import flatten
from rlhf.gates import Check, Verdict
from rlhf.report import Overview, make_overview
from rlhf.report.symptoms import Facts


def share(name: str, value: float, low: float, high: float) -> dict[str, float]:
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def shift(name: str, before: float, after: float, half: float) -> dict[str, Any]:
    change = after - before
    return {"metric": name, "before": before, "after": after, "difference": change,
            "low": change - half, "high": change + half}  # fmt: skip


def probe(rises: float, low: float, high: float) -> dict[str, float]:
    return {**share("rises", rises, low, high), "n": 200}


def healthy() -> dict[str, Any]:
    """Return the parts of `Facts.of` for a run in which nothing stands out."""
    return {
        "policy": {
            "n": 300, "samples_per_prompt": 4,
            "sampled": {
                "n": 300, **share("win_rate", 0.958, 0.948, 0.966),
                **share("judge_win_rate", 0.908, 0.893, 0.921),
                "reward_before": 0.64, "reward_after": 3.068,
                **share("reward_difference", 2.428, 2.341, 2.516),
                "judge_before": 0.982, "judge_after": 2.554, **share("kl", 4.687, 4.535, 4.838),
                "eos_rate_before": 0.989, "eos_rate": 0.999,
                "tokens_before": 26.5, "tokens_after": 31.0,
                "repetition_before": 0.006, "repetition_after": 0.007,
                "distinct_2_before": 0.837, "distinct_2_after": 0.634,
                "entropy_before": 0.507, "entropy_after": 0.27,
            },
            "shifts": [
                shift("tokens", 26.5, 31.0, 0.7), shift("eos_rate", 0.989, 0.999, 0.006),
                shift("repetition", 0.006, 0.007, 0.003), shift("distinct_2", 0.837, 0.634, 0.02),
                shift("entropy", 0.507, 0.27, 0.02),
            ],
            "judge": {"usable": True, **share("accuracy", 0.691, 0.662, 0.719)},
            "over_optimisation": {"state": "no", "evidence": "both find it better"},
        },
        "curve": [
            {"update": i + 1, "reward": 0.83 + 0.07 * i, "kl": 0.13 * i, "clip_fraction": 0.011,
             "explained_variance": min(0.89, -0.13 + 0.1 * i), "optimiser_steps": 4.0}
            for i in range(36)
        ],
        "sft": [{"step": float(15 * i), "loss": 6.85 * 0.976**i} for i in range(113)],
        "watchdog": {
            "frontier": [{"update": 4 * i, "kl": 0.5 * i} for i in range(10)], "chosen": 36,
            "stopped": None,
        },
        "reward_model": {
            "n": 1000, **share("accuracy", 0.759, 0.731, 0.785),
            **share("length_controlled_accuracy", 0.758, 0.73, 0.784),
            **share("prefers_longer", 0.471, 0.44, 0.502),
            "probes": {
                "filler": probe(0.0, 0.0, 0.019), "flattery": probe(0.0, 0.0, 0.019),
                "repeated_sentence": probe(0.535, 0.465, 0.603), "bullets": probe(0.0, 0.0, 0.019),
                "truncated": probe(0.305, 0.245, 0.373), "other_prompt": probe(0.145, 0.103, 0.201),
            },
        },
        "card": {"longer": {"share": 0.497, "share_low": 0.49, "share_high": 0.504, "n": 18000}},
        "verdicts": (
            Verdict("gate-policy", "0" * 64, True, (Check("sampled.kl", 4.7, "≤ 20", True),)),
        ),
        "settings": dict(flatten(PipelineConfig().model_dump())),
    }  # fmt: skip


def changed(**changes: Any) -> dict[str, Any]:
    """Return a healthy run's parts with changes, `__` for a dot; None removes a value."""
    parts = healthy()
    for path, value in changes.items():
        *names, last = path.split("__")
        node = parts
        for name in names:
            node = node.setdefault(name, {})
        if value is None:
            node.pop(last, None)
        elif isinstance(value, dict):
            node[last] = {**node.get(last, {}), **value}
        else:
            node[last] = value
    return copy.deepcopy(parts)


def measured(name: str, before: float, after: float, half: float) -> dict[str, Any]:
    """Return a healthy run's parts with another change of one measure of the replies."""
    last = "eos_rate" if name == "eos_rate" else f"{name}_after"
    parts = changed(policy__sampled={f"{name}_before": before, last: after})
    rows = [row for row in parts["policy"]["shifts"] if row["metric"] != name]
    parts["policy"]["shifts"] = [*rows, shift(name, before, after, half)]
    return parts


def worse() -> Overview:
    """Return the overview of a run that a gate let pass, and that got worse."""
    parts = measured("eos_rate", 0.62, 0.31, 0.05)
    parts["policy"]["sampled"] |= {
        "n": 16, **share("win_rate", 0.75, 0.501, 0.902), "reward_before": -0.5,
        "reward_after": -0.91, **share("reward_difference", -0.41, -0.95, 0.13),
    }  # fmt: skip
    parts["watchdog"]["chosen"] = 24
    return make_overview(facts(parts))


def facts(parts: dict[str, Any]) -> Facts:
    return Facts.of(**parts)


def _reward(rate: tuple[float, float, float], half: float) -> dict[str, Any]:
    return changed(
        policy__sampled={
            **share("win_rate", *rate), "reward_before": -0.5, "reward_after": -0.91,
            **share("reward_difference", -0.41, -0.41 - half, -0.41 + half),
        }
    )  # fmt: skip


def _curve(**values: Any) -> dict[str, Any]:
    return changed(curve=[{**row, **values} for row in healthy()["curve"]])


STOPPED = {"detector": "eos_loss", "update": 12, "evidence": "31.0% of the replies end"}
#: A symptom and how serious it is; a run that has this alone; words of its sentence; words of its
#: cure.
CASES: tuple[tuple[str, str, dict[str, Any], tuple[str, ...], tuple[str, ...]], ...] = (
    ("reward_fell", "serious", _reward((0.42, 0.36, 0.48), 0.2),
     ("fell from −0.50 to −0.91", "−0.61 to −0.21, 300 prompts", "42.0"),
     ("Raise ppo.kl_coef (now 0.1)", "lower ppo.learning_rate (now 1e-05)")),
    # Surely most replies lose, whatever the mean's interval.
    ("reward_fell", "serious", _reward((0.42, 0.36, 0.48), 0.6),
     ("may have fallen from −0.50 to −0.91", "−1.01 to +0.19"), ("ppo.kl_coef",)),
    ("wins_but_reward_fell", "serious", _reward((0.75, 0.7, 0.8), 0.2),
     ("fell from −0.50 to −0.91", "although 75.0", "(70.0–80.0"),
     ("sampled.reward_difference", "gates.policy")),
    ("loses_to_sft", "serious", changed(policy__sampled=share("win_rate", 0.3, 0.28, 0.32)),
     ("30.0", "(28.0–32.0", "although the mean reward rose from 0.64 to 3.07", "a few gain much"),
     ("Raise ppo.kl_coef (now 0.1)", "lower ppo.learning_rate", "metric: sampled.win_rate")),
    ("gold_prefers_sft", "serious",
     changed(policy__sampled=share("gold_win_rate", 0.2, 0.18, 0.22)),
     ("20.0", "(18.0–22.0", "95.8"), ("ppo.total_episodes (now 4608)", "raise ppo.kl_coef")),
    ("loses_to_champion", "warning",
     changed(policy__champion={**share("win_rate", 0.45, 0.42, 0.48),
                               **share("judge_win_rate", 0.55, 0.5, 0.6)}),
     ("45.0", "(42.0–48.0", "by the reward model are won"),
     ("gates.champion decides", "raise ppo.kl_coef")),
    ("loses_to_champion", "warning",
     changed(policy__champion=share("judge_win_rate", 0.45, 0.42, 0.48),
             settings={"gates.champion": None}),
     ("by the judge are won",), ("switch gates.champion on",)),
    ("figures_not_finite", "serious",
     changed(policy__sampled={"reward_after": math.nan, "kl": math.nan, "win_rate": None}),
     ("no usable reward after PPO, win rate, KL from SFT",),
     ("lower ppo.learning_rate", "ppo.max_grad_norm")),
    ("figures_not_finite", "serious", changed(policy__sampled={"judge_win_rate": math.inf}),
     ("no usable judge's win rate",), ("Do not use",)),
    ("figures_not_finite", "serious", changed(policy={"sampled": {}}), ("no usable reward under",),
     ("Do not use",)),
    ("over_optimised", "serious",
     changed(policy__over_optimisation={"state": "suspected"},
             policy__sampled=share("judge_win_rate", 0.45, 0.4, 0.52)),
     ("45.0", "(40.0–52.0", "95.8", "the judge is right on 69.1"),
     ("lower ppo.total_episodes (now 4608)", "raise ppo.kl_coef",
      "raise reward_model.negatives (now 0) to 1")),
    ("judge_prefers_sft", "serious",
     changed(policy__sampled=share("judge_win_rate", 0.4, 0.35, 0.45)),
     ("40.0", "(35.0–45.0", "it got worse"), ("Raise ppo.kl_coef",)),
    ("eos_fell", "serious", measured("eos_rate", 0.95, 0.4, 0.06),
     ("fell by half or more, from 95.0", "to 40.0", "−61.0 to −49.0 points, 300 prompts",
      "ppo.max_new_tokens (now 128)"),
     ("Raise ppo.missing_eos_penalty (now 1)", "raise ppo.max_new_tokens")),
    ("eos_fell", "warning", measured("eos_rate", 0.98, 0.85, 0.2), ("may have fallen from 98.0",),
     ("ppo.missing_eos_penalty",)),
    # Below what the gate's default rule asks for.
    ("eos_fell", "warning", measured("eos_rate", 0.82, 0.73, 0.02), ("fell from 82.0", "to 73.0"),
     ("ppo.missing_eos_penalty",)),
    ("replies_cut", "note", measured("eos_rate", 0.81, 0.79, 0.06),
     ("Only 79.0", "of SFT's replies 81.0"), ("ppo.max_new_tokens",)),
    ("replies_cut", "note", measured("eos_rate", 0.62, 0.62, 0.02),
     ("Only 62.0", "of SFT's replies 62.0"), ("Raise ppo.max_new_tokens (now 128)", "sft.epochs")),
    ("replies_cut", "warning", measured("eos_rate", 0.3, 0.31, 0.02), ("Only 31.0",),
     ("sft.max_length",)),
    ("replies_grow", "warning", measured("tokens", 26.5, 66.25, 3),
     ("2.5 times", "from 26.5 to 66.2 tokens", "+36.8 to +42.8", "47.1"),
     ("Raise ppo.kl_coef", "raise reward_model.negatives (now 0) to 1")),
    ("replies_shrink", "warning", measured("tokens", 26.5, 10.6, 1),
     ("0.4 times", "to 10.6 tokens"),
     ("set ppo.gamma (now 0.99) to 1", "ppo.max_new_tokens")),
    ("kl_explodes", "serious", changed(policy__sampled=share("kl", 34.0, 33.0, 35.0)),
     ("34.0 nats", "at least 33.0"),
     ("Raise ppo.kl_coef", "set ppo.kl_controller (now fixed) to adaptive")),
    ("nothing_learned", "warning",
     changed(policy__sampled={**share("win_rate", 0.5, 0.45, 0.55), **share("kl", 0.01, 0, 0.02)}),
     ("0.010 nats", "50.0", "(45.0–55.0"),
     ("Raise ppo.learning_rate", "ppo.num_ppo_epochs (now 4)")),
    ("no_gain", "warning", changed(policy__sampled=share("win_rate", 0.51, 0.46, 0.56)),
     ("4.69 nats", "51.0"), ("reward_model.epochs", "raise ppo.total_episodes")),
    ("entropy_collapse", "warning", measured("entropy", 0.507, 0.03, 0.02),
     ("from 0.51 to 0.030 nats", "300 prompts"), ("Raise ppo.kl_coef", "ppo.entropy_coef (now 0)")),
    ("replies_repeat", "warning", measured("repetition", 0.01, 0.25, 0.03),
     ("from 1.0", "to 25.0"), ("Raise reward_model.negatives (now 0) to 1",)),
    ("replies_alike", "warning", measured("distinct_2", 0.84, 0.3, 0.03),
     ("from 84.0", "to 30.0"), ("ppo.num_ppo_epochs",)),
    ("too_few_prompts", "note",
     changed(policy__sampled={"n": 16, **share("win_rate", 0.75, 0.51, 0.89)}),
     ("n = 16", "75.0", "(51.0–89.0", "38 points"),
     ("Raise data.eval_fraction", "about 60 prompts")),
    ("too_few_prompts", "warning",
     changed(policy__sampled={"n": 16, **share("win_rate", 0.6, 0.35, 0.8)},
             settings={"evaluation.prompts": 16}),
     ("n = 16", "does not tell better from worse"), ("Raise evaluation.prompts (now 16)",)),
    ("reward_model_at_chance", "serious",
     changed(reward_model={"n": 100, **share("accuracy", 0.531, 0.433, 0.626)}),
     ("53.1", "(43.3–62.6", "of 100 held-out pairs", "a coin"),
     ("reward_model.epochs (now 1) raised", "data.eval_fraction (now 0.1)")),
    ("reward_model_at_chance", "serious",
     changed(reward_model=share("accuracy", 0.531, 0.433, 0.626),
             settings={"ppo.reward_model_path": "owner/model"}),
     ("53.1",), ("Take another reward model by ppo.reward_model_path (now owner/model)",)),
    ("reward_model_at_chance", "warning",
     changed(reward_model={"n": 30, **share("accuracy", 0.6, 0.42, 0.76)}),
     ("60.0", "30 held-out pairs"), ("data.eval_fraction",)),
    ("reward_model_reversed", "serious",
     changed(reward_model=share("accuracy", 0.4, 0.37, 0.43)),
     ("40.0", "(37.0–43.0", "less than a coin"), ("data.chosen_column", "data.labels")),
    ("reward_model_counts_words", "warning",
     changed(reward_model__probes={"filler": probe(0.78, 0.71, 0.84)}),
     ("a sentence of filler is added", "78.0", "(71.0–84.0", "of 200 replies"),
     ("Raise reward_model.negatives (now 0) to 1", "shorter reply is chosen")),
    ("reward_model_counts_words", "warning",
     changed(reward_model=share("length_controlled_accuracy", 0.52, 0.47, 0.57)),
     ("Where length decides nothing", "52.0", "75.9"), ("shorter reply is chosen",)),
    ("reward_model_ignores_prompt", "warning",
     changed(reward_model__probes={"other_prompt": probe(0.5, 0.43, 0.57)}),
     ("does not read the prompt", "50.0", "200 replies"), ("reward_model.max_length (now 256)",)),
    ("reward_model_ignores_prompt", "warning",
     changed(reward_model__probes={"other_prompt": probe(0.47, 0.45, 0.49)}),
     ("hardly reads the prompt", "47.0", "(45.0–49.0"), ("reward_model.negatives",)),
    ("reward_model_ignores_prompt", "note",
     changed(reward_model__probes={"other_prompt": probe(0.45, 0.2, 0.7)}),
     ("may not read the prompt", "45.0"), ("reward_model.negatives",)),
    ("reward_model_fooled", "warning",
     changed(reward_model__probes={"flattery": probe(0.7, 0.63, 0.76)}),
     ("flattery is added", "70.0", "(63.0–76.0"), ("data.contradictions",)),
    ("reward_model_fooled", "warning",
     changed(reward_model__probes={"truncated": probe(0.7, 0.63, 0.76)}),
     ("the end is cut off", "70.0"), ("reward_model.negatives",)),
    ("watchdog_stopped", "warning", changed(watchdog={"stopped": STOPPED, "chosen": 8}),
     ("after update 12", "(EOS loss)", "31.0% of the replies", "The policy of update 8"),
     ("Raise ppo.missing_eos_penalty", "raise ppo.max_new_tokens")),
    ("watchdog_stopped", "serious", changed(watchdog={"stopped": STOPPED, "chosen": 0}),
     ("The SFT policy goes on",), ("ppo.missing_eos_penalty",)),
    ("best_was_earlier", "note", changed(watchdog={"chosen": 24}),
     ("Of 36 updates", "best after 24"), ("Lower ppo.total_episodes",)),
    ("critic_explains_nothing", "warning", _curve(explained_variance=-0.12),
     ("−0.12", "last 9 of 36 updates"),
     ("Raise ppo.critic_learning_rate (now none)", "ppo.critic_warmup_updates (now 0)")),
    ("clip_fraction_high", "warning", _curve(clip_fraction=0.41), ("41.0", "36 updates"),
     ("Lower ppo.learning_rate", "raise ppo.mini_batch_size (now 8)")),
    ("updates_end_early", "warning", changed(settings={"ppo.target_kl": 0.02}),
     ("ppo.target_kl (now 0.02)", "36 of 36 updates", "4.0 of 64"),
     ("Lower ppo.learning_rate", "ppo.lr_warmup_updates (now 0)")),
    ("sft_learned_nothing", "note", changed(sft=[{"loss": 2.31}] * 5 + [{"loss": 2.3}] * 5),
     ("hardly fell, from 2.31 to 2.30",), ("sft.enabled (now true) to false",)),
    ("sft_learned_nothing", "warning", changed(sft=[{"loss": 2.31}] * 50),
     ("did not fall, from 2.31 to 2.31", "50 logged steps"),
     ("Raise sft.learning_rate (now 0.001)", "sft.epochs")),
    ("sft_overfitted", "warning",
     changed(sft_metrics={"heldout_loss_before": 2.31, "heldout_loss": 2.6}),
     ("from 2.31 to 2.60 nats",), ("Lower sft.epochs", "sft.learning_rate (now 0.001)")),
    ("longer_is_preferred", "note",
     changed(card__longer={"share": 0.71, "share_low": 0.69, "share_high": 0.73, "n": 6000}),
     ("71.0", "(69.0–73.0", "6\u2009000 pairs"), ("gates.reward_model",)),
    ("gate_without_rules", "warning",
     changed(verdicts=(Verdict("gate-policy", "0" * 64, True, ()),)),
     ("gate-policy", "no rules"), ("gates.policy",)),
)  # fmt: skip
