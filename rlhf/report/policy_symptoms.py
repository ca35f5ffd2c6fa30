"""Symptoms of a policy's evaluation: what PPO did to the replies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rlhf.report.symptoms import (
    Facts,
    Finding,
    capital,
    mapping,
    moved,
    share_with_interval,
    value_of,
)
from rlhf.report.text import number, percent

#: Fall of the share of replies that end from which it is said: as the rule that `rlhf init` writes
#: ("hardly fewer replies may end by themselves than of the SFT policy").
EOS_DROP = 0.1
#: Share of the replies that end below which it is said: the bound of the gate's default rule.
EOS_LOW = 0.8
#: A length this many times the start's: PPO often doubles lengths (Singhal et al. 2023); this is
#: half of that way, and the quickstart, which is healthy, has 1.2.
GROWTH = 1.5
#: KL in nats a reply beyond which a reply has little to do with SFT's: the gate's default bound.
KL_FAR = 20.0
#: KL below which nothing was learnt: a typical reply is then 1.1 times as likely as under SFT.
KL_NONE = 0.1
#: Share of the start's entropy that healthy runs keep at least (docs/trust.md, the watchdog).
ENTROPY_KEPT = 0.1
#: Rise of the share of repeated 3-grams: one sentence of ten that is said again.
REPETITION_RISE = 0.1
#: Share of the start's different pairs of words that healthy runs keep: the quickstart keeps 0.76.
DISTINCT_KEPT = 0.5
#: Width of a win rate's interval: at 20 points a win rate of 60 % can't be told from one of 50 %.
WIDE = 0.2
#: Width beyond which it is said though the win rate is surely above a half: other figures, such as
#: lengths and single groups, are known no better.
VERY_WIDE = 0.3


def reward_fell(facts: Facts) -> Finding | None:
    """Find a mean reward below SFT's, whether or not most replies win."""
    change, rate = facts.change("reward"), facts.metric("win_rate")
    certainty = change.certainty(-1) if change else ""
    if change is None or not certainty:
        return None
    verb = "fell" if certainty == "sure" else "may have fallen"
    is_sure = certainty == "sure" or _is_lost(facts.sampled, "win_rate")
    severity = "serious" if is_sure else "warning"
    text = f"The mean reward {verb} {moved(change, facts)}"
    if rate is not None and rate > 0.5:
        return Finding(
            "wins_but_reward_fell", severity,
            f"{text}, although {facts.wins()} of the comparisons are won: many replies gain a "
            "little, and a few lose much.",
            f"Read the replies that lose most before using this policy, {facts.stay_closer}, and "
            "add {metric: sampled.reward_difference, min: 0} to gates.policy, so that such a "
            "policy is not promoted.",
        )  # fmt: skip
    won = f", and {facts.wins()} of the comparisons with SFT are won" if rate is not None else ""
    return Finding(
        "reward_fell", severity, f"{text}{won}.",
        f"{capital(facts.stay_closer)} or lower {facts.now('ppo.learning_rate')}, so that PPO "
        "leaves the SFT policy less quickly.",
    )  # fmt: skip


def loses_to_sft(facts: Facts) -> Finding | None:
    """Find a policy that loses most comparisons by the reward model, whatever its mean reward."""
    if not _is_lost(facts.sampled, "win_rate") or reward_fell(facts) is not None:
        return None  # a lower mean reward is told with the wins
    change = facts.change("reward")
    is_higher = change is not None and change.after > change.before
    although = (
        f", although the mean reward rose {moved(change, facts)}: many replies lose, and a few "
        "gain much"
        if change is not None and is_higher
        else ""
    )
    return Finding(
        "loses_to_sft", "serious",
        f"Surely most comparisons with SFT are lost: {facts.wins()} are won by the reward model"
        f"{although}.",
        f"{capital(facts.stay_closer)} or lower {facts.now('ppo.learning_rate')}, read the replies "
        "that lose most, and add {metric: sampled.win_rate, min: 0.5, on: low} to "
        "gates.policy, so that such a policy is not promoted.",
    )  # fmt: skip


def gold_prefers_sft(facts: Facts) -> Finding | None:
    """Find a policy that is surely worse than SFT by the true score that the data have."""
    if not _is_lost(facts.sampled, "gold_win_rate"):
        return None
    return Finding(
        "gold_prefers_sft", "serious",
        f"By the gold score the policy got worse: {facts.wins('gold_')} of the comparisons with "
        f"SFT are won, and {facts.wins()} by the reward model that trained it.",
        f"Stop earlier by a lower {facts.now('ppo.total_episodes')}, {facts.stay_closer}, or train "
        f"the reward model on more pairs and {facts.more_negatives}.",
    )  # fmt: skip


def loses_to_champion(facts: Facts) -> Finding | None:
    """Find a policy that surely loses most comparisons with the champion of its line."""
    champion = mapping(facts.policy.get("champion"))
    scorers = (("gold_", "gold score"), ("judge_", "judge"), ("", "reward model"))
    lost = [(prefix, by) for prefix, by in scorers if _is_lost(champion, f"{prefix}win_rate")]
    if not lost:
        return None
    wins = " and ".join(
        f"{share_with_interval(champion, f'{prefix}win_rate')} by the {by}" for prefix, by in lost
    )
    # The gate decides, which a configuration may have switched off.
    is_off = "gates.champion" in facts.settings and facts.value("gates.champion") is None
    gate = "switch gates.champion on, so that it stays" if is_off else "gates.champion decides"
    return Finding(
        "loses_to_champion", "warning",
        f"Surely most comparisons with the champion are lost: {wins} are won.",
        f"Keep the champion ({gate}); for the next run {facts.stay_closer}, or add newer pairs.",
    )  # fmt: skip


def _is_lost(metrics: Mapping[str, Any], name: str) -> bool:
    """Return whether a win rate is surely below a half."""
    rate, high = (value_of(metrics.get(f"{name}{end}")) for end in ("", "_high"))
    return rate is not None and high is not None and high < 0.5


def figures_not_finite(facts: Facts) -> Finding | None:
    """Find an evaluation without the figures that tell what became of the policy."""
    if not facts.policy:
        return None
    needed = {
        "reward under SFT": "reward_before", "reward after PPO": "reward_after",
        "win rate": "win_rate", "KL from SFT": "kl",
    }  # fmt: skip
    lacking = [words for words, name in needed.items() if facts.metric(name) is None]
    # Of these there need be none, but one that was measured is a number.
    measured = {"judge's win rate": "judge_win_rate", "gold win rate": "gold_win_rate",
                "share of replies that end": "eos_rate"}  # fmt: skip
    lacking += [
        words
        for words, name in measured.items()
        if facts.sampled.get(name) is not None and facts.metric(name) is None
    ]
    if not lacking:
        return None
    return Finding(
        "figures_not_finite", "serious",
        f"Figures are missing or not finite: the evaluation has no usable {', '.join(lacking)}, so "
        "that nothing shows whether the policy got better.",
        f"Do not use this policy: lower {facts.now('ppo.learning_rate')} or "
        f"{facts.now('ppo.max_grad_norm')}, and look in the curves where training stopped being "
        "finite.",
    )  # fmt: skip


def judge_disagrees(facts: Facts) -> Finding | None:
    """Find a gain that only the reward model sees, or a policy that the judge finds worse."""
    state = mapping(facts.policy.get("over_optimisation")).get("state")
    high = facts.metric("judge_win_rate_high")
    if state != "suspected" and not (high is not None and high < 0.5):
        return None
    known = mapping(facts.policy.get("judge"))
    right = (
        f" (the judge is right on {share_with_interval(known, 'accuracy')} of held-out pairs)"
        if value_of(known.get("accuracy")) is not None
        else ""
    )
    text = (
        f"The judge prefers the policy to SFT in {facts.wins('judge_')} of the comparisons, the "
        f"reward model that trained it in {facts.wins()}"
    )
    if state != "suspected":
        return Finding(
            "judge_prefers_sft", "serious", f"{text}{right}: by the judge it got worse.",
            f"{capital(facts.stay_closer)} or lower {facts.now('ppo.learning_rate')}, and look at "
            "the reward model's probes.",
        )  # fmt: skip
    return Finding(
        "over_optimised", "serious",
        f"{text}{right}: what only the trained reward sees is over-optimisation.",
        f"Stop earlier by a lower {facts.now('ppo.total_episodes')}, {facts.stay_closer}, or train "
        f"the reward model on more pairs and {facts.more_negatives}.",
    )  # fmt: skip


def eos_fell(facts: Facts) -> Finding | None:
    """Find replies that end by themselves less often than SFT's."""
    change = facts.change("eos_rate")
    if change is None:
        return None
    is_below = change.after < EOS_LOW <= change.before
    if change.before - change.after < EOS_DROP and not is_below:
        return None
    certainty = change.certainty(-1)
    if not certainty:
        return None
    halved = change.after <= 0.5 * change.before
    verb = "fell" if certainty == "sure" else "may have fallen"
    by = " by half or more," if halved else ""
    return Finding(
        "eos_fell", "serious" if halved and certainty == "sure" else "warning",
        f"The share of replies that end by themselves {verb}{by} "
        f"{moved(change, facts, '%')}; the others are cut off at "
        f"{facts.now('ppo.max_new_tokens')}.",
        f"{_penalty(facts)}, so that an end is worth more than a longer reply, and raise "
        f"{facts.now('ppo.max_new_tokens')} if whole answers need more room.",
    )  # fmt: skip


def _penalty(facts: Facts) -> str:
    """Return the change that makes a missing end cost more."""
    if facts.value("ppo.missing_eos") == "none" or (
        "ppo.missing_eos_penalty" in facts.settings
        and facts.value("ppo.missing_eos_penalty") is None
    ):
        return f"Set {facts.now('ppo.missing_eos')} to subtract with ppo.missing_eos_penalty = 1"
    return f"Raise {facts.now('ppo.missing_eos_penalty')}"


def replies_cut(facts: Facts) -> Finding | None:
    """Find replies that are cut off, also where fewer surely were under SFT."""
    before, after = facts.metric("eos_rate_before"), facts.metric("eos_rate")
    if after is None or after >= EOS_LOW:
        return None
    if before is not None and before >= EOS_LOW and eos_fell(facts) is not None:
        return None  # that finding tells it
    start = "" if before is None else f", of SFT's replies {percent(before)}"
    return Finding(
        "replies_cut", "warning" if after < 0.5 else "note",
        f"Only {percent(after)} of the replies end by themselves within "
        f"{facts.now('ppo.max_new_tokens')} tokens{start}.",
        f"Raise {facts.now('ppo.max_new_tokens')}, or teach SFT to end: raise "
        f"{facts.now('sft.epochs')}, and check that {facts.now('sft.max_length')} does not cut the "
        "demonstrations.",
    )  # fmt: skip


def length_changed(facts: Facts) -> Finding | None:
    """Find replies that are far longer or far shorter than SFT's."""
    change = facts.change("tokens")
    # A reply has a token at least.
    if change is None or change.before < 1 or change.after < 1:
        return None
    ratio = change.after / change.before
    if ratio >= GROWTH and change.certainty(1):
        prefers = share_with_interval(facts.reward_model, "prefers_longer")
        known = value_of(facts.reward_model.get("prefers_longer")) is not None
        why = f"; the reward model prefers the longer of two replies in {prefers}" if known else ""
        return Finding(
            "replies_grow", "warning",
            f"Replies are {ratio:.1f} times as long as SFT's, "
            f"{moved(change, facts, 'tokens')}{why}.",
            f"{capital(facts.stay_closer)} and {facts.more_negatives}, add pairs whose shorter "
            "reply is chosen, or let length cost by ppo.env_type = multi_objective.",
        )  # fmt: skip
    if ratio > 1 / GROWTH or not change.certainty(-1):
        return None
    gamma = value_of(facts.value("ppo.gamma"))
    discount = (
        f"set {facts.now('ppo.gamma')} to 1, because a discount favours scores that come soon"
        if gamma is None or gamma < 1
        else facts.stay_closer
    )
    return Finding(
        "replies_shrink", "warning",
        f"Replies are {ratio:.1f} times as long as SFT's, {moved(change, facts, 'tokens')}.",
        f"If SFT's replies are cut off, raise {facts.now('ppo.max_new_tokens')}, for a short reply "
        f"escapes {facts.now('ppo.missing_eos_penalty')}; else {discount}.",
    )  # fmt: skip


def kl_far(facts: Facts) -> Finding | None:
    """Find a policy that is too far from SFT."""
    kl = facts.metric("kl")
    if kl is None or kl <= KL_FAR:
        return None
    low = facts.metric("kl_low")
    spread = "" if low is None else f", at least {number(low)}"
    controller = facts.now("ppo.kl_controller")
    is_fixed = facts.value("ppo.kl_controller") != "adaptive"
    adaptive = f", set {controller} to adaptive" if is_fixed else ""
    return Finding(
        "kl_explodes", "serious" if low is None or low > KL_FAR else "warning",
        f"The KL from SFT is {number(kl)} nats a reply{spread} (below {KL_FAR:g} is usual): the "
        "replies have little to do with those that the reward model has learnt on.",
        f"{capital(facts.stay_closer)}{adaptive}, or lower {facts.now('ppo.learning_rate')}.",
    )  # fmt: skip


def nothing_gained(facts: Facts) -> Finding | None:
    """Find a policy that is still SFT's, or another one that is no better."""
    kl, wins = facts.metric("kl"), facts.metric("win_rate")
    low, high = facts.metric("win_rate_low"), facts.metric("win_rate_high")
    if kl is None or wins is None or low is None or high is None or not low <= 0.5 <= high:
        return None
    if abs(kl) < KL_NONE:
        if facts.watchdog.get("stopped"):
            return None  # an early policy goes on, which that finding says
        return Finding(
            "nothing_learned", "warning",
            f"PPO taught the policy nothing: its KL from SFT is {number(kl)} nats, and it wins "
            f"{facts.wins()} of the comparisons.",
            f"Raise {facts.now('ppo.learning_rate')}, {facts.now('ppo.num_ppo_epochs')} or "
            f"{facts.now('ppo.total_episodes')}.",
        )  # fmt: skip
    if high - low > WIDE:
        return None  # too few prompts to say so
    return Finding(
        "no_gain", "warning",
        f"PPO moved the policy {number(kl)} nats from SFT, and its replies are not shown to be "
        f"better: {facts.wins()} of the comparisons are won.",
        f"Improve the reward model first ({facts.now('reward_model.epochs')}, more pairs), or "
        f"raise {facts.now('ppo.total_episodes')}.",
    )  # fmt: skip


def entropy_collapsed(facts: Facts) -> Finding | None:
    """Find a policy that has hardly a choice left at each token."""
    change = facts.change("entropy")
    if change is None or change.after >= ENTROPY_KEPT * change.before:
        return None
    return Finding(
        "entropy_collapse", "warning",
        f"The entropy of a token fell {moved(change, facts, 'nats')}: the policy says nearly the "
        "same whatever it draws, and has nothing left to learn from.",
        f"{capital(facts.stay_closer)}, raise {facts.now('ppo.entropy_coef')}, or lower "
        f"{facts.now('ppo.learning_rate')}.",
    )  # fmt: skip


def replies_repeat(facts: Facts) -> Finding | None:
    """Find replies that say the same again."""
    change = facts.change("repetition")
    if change is None or change.after - change.before < REPETITION_RISE:
        return None
    if not change.certainty(1):
        return None
    return Finding(
        "replies_repeat", "warning",
        f"Replies repeat themselves: the share of repeated 3-grams rose "
        f"{moved(change, facts, '%')}.",
        f"{capital(facts.more_negatives)}, which teaches the reward model that a sentence said "
        f"again is worse, and {facts.stay_closer}.",
    )  # fmt: skip


def replies_alike(facts: Facts) -> Finding | None:
    """Find replies to one prompt that have become alike."""
    change = facts.change("distinct_2")
    if change is None or change.after > DISTINCT_KEPT * change.before or not change.certainty(-1):
        return None
    return Finding(
        "replies_alike", "warning",
        "The replies to one prompt have become alike: the share of different pairs of words among "
        f"them fell {moved(change, facts, '%')}.",
        f"{capital(facts.stay_closer)}, raise {facts.now('ppo.entropy_coef')}, or lower "
        f"{facts.now('ppo.num_ppo_epochs')}.",
    )  # fmt: skip


def too_few_prompts(facts: Facts) -> Finding | None:
    """Find a win rate whose interval is too wide to say much."""
    n, low, high = (facts.metric(name) for name in ("n", "win_rate_low", "win_rate_high"))
    if n is None or n < 1 or low is None or high is None or not 0 <= low <= high <= 1:
        return None
    is_open = low <= 0.5 <= high
    if high - low <= (WIDE if is_open else VERY_WIDE):
        return None
    # The width falls with the root of the number of prompts.
    needed = 10 * math.ceil(n * ((high - low) / WIDE) ** 2 / 10)
    asked = value_of(facts.value("evaluation.prompts"))
    more = (
        f"Raise {facts.now('data.eval_fraction')} or add data, for all held-out prompts were asked"
        if asked is not None and n < asked
        else f"Raise {facts.now('evaluation.prompts')}, and {facts.now('data.eval_fraction')} if "
        "there are no more held-out prompts"
    )
    return Finding(
        "too_few_prompts", "warning" if is_open else "note",
        f"n = {number(int(n))}: so few held-out prompts leave the win rate over SFT at "
        f"{facts.wins()}, an interval of {100 * (high - low):.0f} points"
        + (", which does not tell better from worse." if is_open else "."),
        f"{more}: about {needed:,} prompts narrow it to {100 * WIDE:.0f} points.",
    )  # fmt: skip
