"""Symptoms of the trainings: data, SFT, reward model, PPO's updates, gates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf.report.reward_model import PROBES
from rlhf.report.symptoms import (
    Facts,
    Finding,
    capital,
    mapping,
    mean_of,
    rows_of,
    share_with_interval,
    value_of,
)
from rlhf.report.text import number, percent, percent_range, sentence, words

#: Probes that only add words, and the others that a reward model may like.
LENGTH_PROBES = ("filler", "repeated_sentence")
OTHER_PROBES = ("flattery", "bullets", "truncated")
#: Width of an accuracy's interval up to which few pairs are no reason for a coin within it: it is
#: that of 100 pairs.
CHANCE_WIDTH = 0.2
#: Lower end of the rises of `other_prompt` from which a reward model surely reads little of the
#: prompt: one that reads none has 0.5, the quickstart's 0.15 (docs/trust.md).
PROMPT_UNREAD = 0.4
#: The longer reply is preferred this far off a coin: the threshold of the data card's warning.
SHORTCUT = 0.05
#: Logged steps of SFT from which its curve is judged: fewer are noise.
LEAST_STEPS = 5
#: Least fall of SFT's loss from the first tenth of its steps to the last: the quickstart's falls by
#: 93 %, a model that was fine-tuned on such data before by some per cent.
SFT_FALL = 0.01
#: Least rise of SFT's loss on held-out replies: at most 128 of them tell no less.
SFT_RISE = 0.02
#: PPO updates from which its curves are judged.
LEAST_UPDATES = 8
#: Share of tokens with a clipped ratio: some 0.1 to 0.2 is usual (Huang et al. 2024); above this
#: most of each update's later steps change nothing but the clip.
CLIPPED = 0.3
#: Share of the updates that `target_kl` ended early.
ENDED_EARLY = 0.5
#: What cures a reason for which the watchdog stopped a run: parameters, each with its direction.
STOP_CURES = {
    "over_optimisation": (("lower", "ppo.total_episodes"), ("raise", "ppo.kl_coef")),
    "kl_above_budget": (("raise", "ppo.kl_coef"), ("lower", "ppo.learning_rate")),
    "entropy_collapse": (("raise", "ppo.kl_coef"), ("raise", "ppo.entropy_coef")),
    "length_explosion": (("raise", "ppo.kl_coef"), ("raise", "reward_model.negatives")),
    "eos_loss": (("raise", "ppo.missing_eos_penalty"), ("raise", "ppo.max_new_tokens")),
    "value_collapse": (
        ("lower", "ppo.critic_learning_rate"), ("raise", "ppo.critic_warmup_updates"),
    ),
    "non_finite": (("lower", "ppo.learning_rate"), ("lower", "ppo.max_grad_norm")),
}  # fmt: skip


def watchdog_stopped(facts: Facts) -> Finding | None:
    """Find a run that the watchdog stopped, or whose best policy came before its end."""
    chosen = value_of(facts.watchdog.get("chosen"))
    goes_on = (
        ""
        if chosen is None
        else " The SFT policy goes on."
        if chosen == 0
        else f" The policy of update {number(int(chosen))} goes on."
    )
    if facts.watchdog.get("stopped"):
        stopped = mapping(facts.watchdog.get("stopped"))
        name = str(stopped.get("detector") or "unknown")
        update = value_of(stopped.get("update"))
        when = "" if update is None else f" after update {number(int(update))}"
        planned = STOP_CURES.get(name, (("raise", "ppo.kl_coef"), ("lower", "ppo.learning_rate")))
        cure = ", or ".join(
            # An adaptive controller moves the coefficient to its target, whatever its start.
            facts.stay_closer if field == "ppo.kl_coef" else f"{does} {facts.now(field)}"
            for does, field in planned
        )
        evidence = str(stopped.get("evidence") or "").strip().rstrip(".")
        return Finding(
            "watchdog_stopped", "serious" if chosen == 0 else "warning",
            f"The watchdog stopped PPO{when} ({words(name)})"
            f"{f': {evidence}' if evidence else ''}.{goes_on}",
            f"{capital(cure)}.",
        )  # fmt: skip
    updates = [value_of(row.get("update")) for row in rows_of(facts.watchdog.get("frontier"))]
    last = max((x for x in updates if x is not None), default=None)
    if chosen is None or last is None or chosen >= last:
        return None
    return Finding(
        "best_was_earlier", "note",
        f"Of {number(int(last))} updates of PPO the policy was best after {number(int(chosen))} by "
        f"the watchdog's looks, which is the one that goes on.",
        f"Lower {facts.now('ppo.total_episodes')}, or {facts.stay_closer}, so that the last "
        "updates are not lost.",
    )  # fmt: skip


def critic_explains_nothing(facts: Facts) -> Finding | None:
    """Find a critic that predicts returns no better than their mean does."""
    if len(facts.curve) < LEAST_UPDATES:
        return None
    recent = facts.curve[-max(1, len(facts.curve) // 4) :]
    explained = mean_of(recent, "explained_variance")
    if explained is None or explained > 0:
        return None
    return Finding(
        "critic_explains_nothing", "warning",
        f"The critic explains nothing of the returns: its explained variance is {number(explained)}"
        f" on average in the last {len(recent)} of {len(facts.curve)} updates (1 is perfect, 0 is "
        "that of predicting the mean).",
        f"Raise {facts.now('ppo.critic_learning_rate')}, or give the critic a start by "
        f"{facts.now('ppo.critic_warmup_updates')} of 5 or more.",
    )  # fmt: skip


def updates_too_large(facts: Facts) -> Finding | None:
    """Find optimiser steps that leave the trust region: clipped ratios, updates that end early."""
    if len(facts.curve) < LEAST_UPDATES:
        return None
    clipped = mean_of(facts.curve, "clip_fraction")
    if clipped is not None and clipped > CLIPPED:
        return Finding(
            "clip_fraction_high", "warning",
            f"The ratio is clipped on {percent(clipped)} of the tokens, on average over "
            f"{len(facts.curve)} updates: each update goes too far.",
            f"Lower {facts.now('ppo.learning_rate')} or {facts.now('ppo.num_ppo_epochs')}, or "
            f"raise {facts.now('ppo.mini_batch_size')}.",
        )  # fmt: skip
    planned = _planned_steps(facts)
    steps = [x for row in facts.curve if (x := value_of(row.get("optimiser_steps"))) is not None]
    early = sum(x < planned for x in steps) if planned is not None else 0
    if planned is None or not steps or early <= ENDED_EARLY * len(steps):
        return None
    mean = sum(steps) / len(steps)
    return Finding(
        "updates_end_early", "warning",
        f"{facts.now('ppo.target_kl')} ended {early} of {len(steps)} updates early: {mean:.1f} of "
        f"{number(int(planned))} optimiser steps are taken on average.",
        f"Lower {facts.now('ppo.learning_rate')}, or give its start a warm-up by "
        f"{facts.now('ppo.lr_warmup_updates')}; if the KL stays low, raise ppo.target_kl.",
    )  # fmt: skip


def _planned_steps(facts: Facts) -> float | None:
    """Return the optimiser steps of an update that nothing ends early; None without a limit."""
    names = ("target_kl", "num_ppo_epochs", "chunk_size", "mini_batch_size")
    limit, epochs, chunk, mini = (value_of(facts.value(f"ppo.{name}")) for name in names)
    if limit is None or epochs is None or chunk is None or mini is None or mini < 1:
        return None
    return epochs * -(-chunk // mini)


def sft_learned_nothing(facts: Facts) -> Finding | None:
    """Find an SFT whose loss did not fall, neither in training nor on held-out replies."""
    losses = [x for row in facts.sft if (x := value_of(row.get("loss"))) is not None]
    if len(losses) < LEAST_STEPS:
        return None
    before, after = _heldout_losses(facts)
    # Of few steps the batches differ more than the model changes.
    if before is not None and after is not None and before - after > SFT_FALL * before:
        return None
    part = max(1, len(losses) // 10)
    first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
    if first - last > SFT_FALL * abs(first):
        return None
    return Finding(
        "sft_learned_nothing", "warning" if last >= first else "note",
        f"SFT's training loss {'did not fall' if last >= first else 'hardly fell'}, from "
        f"{number(first)} to {number(last)} nats a token ({len(losses)} logged steps).",
        f"Raise {facts.now('sft.learning_rate')} or {facts.now('sft.epochs')}; if the base was "
        f"fine-tuned on such replies before, set {facts.now('sft.enabled')} to false.",
    )  # fmt: skip


def sft_overfitted(facts: Facts) -> Finding | None:
    """Find an SFT after which held-out replies are less likely than before."""
    before, after = _heldout_losses(facts)
    if before is None or after is None or after <= before * (1 + SFT_RISE):
        return None
    return Finding(
        "sft_overfitted", "warning",
        f"SFT made the preferred replies to held-out prompts less likely: from {number(before)} to "
        f"{number(after)} nats a token.",
        f"Lower {facts.now('sft.epochs')} or {facts.now('sft.learning_rate')}; if data.sft_source "
        "holds replies of another kind than the pairs, that may be meant.",
    )  # fmt: skip


def _heldout_losses(facts: Facts) -> tuple[float | None, float | None]:
    """Return SFT's losses on held-out replies, before and after it."""
    before, after = ("heldout_loss_before", "heldout_loss")
    return value_of(facts.sft_metrics.get(before)), value_of(facts.sft_metrics.get(after))


def reward_model_at_chance(facts: Facts) -> Finding | None:
    """Find a reward model that may be a coin, or that prefers the rejected replies."""
    model = facts.reward_model
    low, high = (value_of(model.get(f"accuracy_{end}")) for end in ("low", "high"))
    if low is None or high is None or low > 0.5:
        return None
    n = value_of(model.get("n"))
    pairs = "" if n is None else f" of {number(int(n))} held-out pairs"
    text = f"The reward model ranks {share_with_interval(model, 'accuracy')}{pairs} right"
    if high < 0.5:
        return Finding(
            "reward_model_reversed", "serious", f"{text}: surely less than a coin does.",
            _of_a_ready_one(facts)
            or "Look whether chosen and rejected are swapped: data.chosen_column and "
            "data.rejected_column, or the meaning of labels in data.labels.",
        )  # fmt: skip
    return Finding(
        "reward_model_at_chance", "serious" if high - low <= CHANCE_WIDTH else "warning",
        f"{text}: it may be a coin, which has 50\u00a0%.",
        _of_a_ready_one(facts)
        or f"Train it on more pairs or with {facts.now('reward_model.epochs')} raised, or start it "
        f"from a larger model by {facts.now('reward_model.base')}; raise "
        f"{facts.now('data.eval_fraction')} if so few pairs can't tell.",
    )  # fmt: skip


def reward_model_counts_words(facts: Facts) -> Finding | None:
    """Find a reward model that likes more words, whatever they say."""
    model = facts.reward_model
    fooled = _liked_probes(model, LENGTH_PROBES)
    known = value_of(model.get("length_controlled_accuracy"))
    low = value_of(model.get("length_controlled_accuracy_low"))
    # A model that may be a coin anyway is another finding.
    overall = value_of(model.get("accuracy_low"))
    if not fooled and (known is None or low is None or low > 0.5 or (overall or 0) <= 0.5):
        return None
    text = (
        _probe_text(fooled[0], model)
        if fooled
        else "Where length decides nothing, the reward model ranks "
        f"{share_with_interval(model, 'length_controlled_accuracy')} of the pairs right, and "
        f"{share_with_interval(model, 'accuracy')} of all: without counting words it may be a coin."
    )
    return Finding(
        "reward_model_counts_words", "warning", text,
        _of_a_ready_one(facts)
        or f"{capital(facts.more_negatives)}, and add pairs whose shorter reply is chosen; replies "
        "will grow otherwise.",
    )  # fmt: skip


def reward_model_ignores_prompt(facts: Facts) -> Finding | None:
    """Find a reward model to which a good reply to another prompt is as good."""
    probe = mapping(mapping(facts.reward_model.get("probes")).get("other_prompt"))
    rises, high = value_of(probe.get("rises")), value_of(probe.get("rises_high"))
    # Of many replies an interval may lie between that bound and a half.
    is_certain = (value_of(probe.get("rises_low")) or 0) > PROMPT_UNREAD
    if rises is None or high is None or (high <= 0.5 and not is_certain):
        return None
    reads = "may not read" if not is_certain else "does not read" if high > 0.5 else "hardly reads"
    return Finding(
        "reward_model_ignores_prompt", "warning" if is_certain else "note",
        f"The reward model {reads} the prompt: a good "
        f"reply to another one scores higher in {share_with_interval(probe, 'rises')} of "
        f"{_count(probe)} replies.",
        _of_a_ready_one(facts)
        or f"{capital(facts.more_negatives)}, and raise {facts.now('reward_model.max_length')} if "
        "prompts are cut.",
    )  # fmt: skip


def reward_model_fooled(facts: Facts) -> Finding | None:
    """Find a reward model that likes flattery, lists or replies without an end."""
    liked = _liked_probes(facts.reward_model, OTHER_PROBES)
    if not liked:
        return None
    cure = _of_a_ready_one(facts) or (
        f"{capital(facts.more_negatives)}, which teaches it that a cut reply is worse."
        if liked[0] == "truncated"
        else "Add pairs in which the plain reply is chosen, and look at the data card: "
        "data.contradictions = majority leaves out pairs that others contradict."
    )
    text = _probe_text(liked[0], facts.reward_model)
    return Finding("reward_model_fooled", "warning", text, cure)


def longer_is_preferred(facts: Facts) -> Finding | None:
    """Find data in which the longer reply is preferred."""
    longer = mapping(facts.card.get("longer"))
    low, high = value_of(longer.get("share_low")), value_of(longer.get("share_high"))
    if low is None or low <= 0.5 + SHORTCUT or value_of(longer.get("share")) is None:
        return None
    n = value_of(longer.get("n"))
    pairs = "of the pairs" if n is None else f"of {number(int(n))} pairs"
    return Finding(
        "longer_is_preferred", "note",
        f"The longer reply is preferred in {percent(longer['share'])} "
        f"({percent_range(low, high)}) {pairs}: a reward model that counts words is right as "
        "often.",
        "Keep a rule on length_controlled_accuracy in gates.reward_model, and add pairs whose "
        "shorter reply is chosen.",
    )  # fmt: skip


def gate_without_rules(facts: Facts) -> Finding | None:
    """Find a model that no rule has judged."""
    names = [verdict.gate for verdict in facts.verdicts if not verdict.checks]
    if not names:
        return None
    fields = ["gates.reward_model" if "reward" in name else "gates.policy" for name in names]
    return Finding(
        "gate_without_rules", "warning",
        f"Nothing was asked of the model at {' and '.join(names)}: the gate has no rules.",
        f"Write rules in {' and '.join(fields)}; what is left out of a configuration has the "
        "default ones.",
    )  # fmt: skip


def _of_a_ready_one(facts: Facts) -> str:
    """Return the cure for a reward model that was trained elsewhere; empty for one of this run."""
    if not facts.value("ppo.reward_model_path"):
        return ""
    return f"Take another reward model by {facts.now('ppo.reward_model_path')}, or train one here."


def _liked_probes(model: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    """Return the probes that surely raise the score in most cases, the worst first."""
    probes = mapping(model.get("probes"))
    lows = {name: value_of(mapping(probes.get(name)).get("rises_low")) for name in names}
    liked = {name: low for name, low in lows.items() if low is not None and low > 0.5}
    return sorted(liked, key=lambda name: -liked[name])


def _probe_text(name: str, model: Mapping[str, Any]) -> str:
    probe = mapping(mapping(model.get("probes")).get(name))
    does = PROBES.get(name, words(name))
    return sentence(
        f"The reward model can be fooled: {does[:1].lower()}{does[1:]}, and its score rises in "
        f"{share_with_interval(probe, 'rises')} of {_count(probe)} replies"
    )


def _count(probe: Mapping[str, Any]) -> str:
    n = value_of(probe.get("n"))
    return "the" if n is None else number(int(n))
