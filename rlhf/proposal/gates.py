"""Rules of the gates by the number of held-out rows, and what so many can show."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rlhf.config import PipelineConfig
from rlhf.errors import ConfigError
from rlhf.gate_sizes import POWER, Sizes, check_gate_sizes, spread_of
from rlhf.inference import CONFIDENCE, detectable_share
from rlhf.proposal.choice import Choice, tree_of
from rlhf.proposal.facts import DataFacts

#: A true share above which few models are: gates that find no smaller one would reject good ones.
RARE = 0.75
#: Plans of comparisons on one set of gate prompts, the default first.
_LOOKS = (10, 5, 2, 1)


@dataclass(frozen=True)
class Judgement:
    """Smallest effects that gates on the held-out rows can detect."""

    accuracy: float | None
    """Least true accuracy that is told from a coin in four of five runs; None: not even 1."""
    win_rate: float | None
    """The same for a policy's true win rate over its start."""

    @property
    def is_trial(self) -> bool:
        """Whether so few rows show too little for a gate to decide alone."""
        return any(share is None or share > RARE for share in (self.accuracy, self.win_rate))

    @property
    def accuracy_in_words(self) -> str:
        """Return the smallest accuracy that is told from chance."""
        if self.accuracy is None:
            return "not even a perfect model"
        return f"a model that is right in {self.accuracy:.0%} or more"

    @property
    def win_rate_in_words(self) -> str:
        """Return the smallest win rate that is found better."""
        if self.win_rate is None:
            return "not even a policy that always wins"
        return f"a win rate of {self.win_rate:.0%} or more"


def judge_sizes(data: DataFacts, prompts: int, samples: int) -> Judgement:
    """Return what so many held-out rows show with a power of 80 %.

    Args:
        data: The split.
        prompts: Gate prompts that the policies answer.
        samples: Replies sampled to each.
    """
    confidence = (1 + CONFIDENCE) / 2
    # Pairs of one prompt are dependent; how much is not known yet, so each prompt counts once.
    spreads = ((data.held_out_prompts, 0.5), (prompts, spread_of(samples)))
    accuracy, win_rate = (
        detectable_share(0.5, count, spread, confidence, POWER) for count, spread in spreads
    )
    return Judgement(accuracy, win_rate)


def gate_choices(
    data: DataFacts, config: PipelineConfig, sizes: Sizes, judgement: Judgement
) -> Iterator[Choice]:
    """Yield the rules, the comparison with the champion, and who decides.

    Args:
        data: The split.
        config: Configuration with the default gates.
        sizes: Numbers of held-out rows.
        judgement: What they can show.
    """
    yield from _reward_rules(data, judgement)
    yield from _policy_rules(data, sizes, judgement)
    looks = _looks(config, sizes)
    default = config.gates.champion
    if looks is None:
        yield Choice(
            "gates.champion", None,
            f"{sizes.prompts} gate prompts can't show that a policy is better than the champion",
        )  # fmt: skip
    elif default is not None and looks != default.looks:
        yield Choice(
            "gates.champion", {"looks": looks},
            f"{sizes.prompts} gate prompts allow no more comparisons with champions on them",
        )  # fmt: skip
    if judgement.is_trial or looks is None:
        yield Choice(
            "promotion.approval", "manual",
            f"{sizes.prompts} gate prompts are too few for gates to decide alone: a person does",
            "promotion", "by your approval",
        )  # fmt: skip


def _reward_rules(data: DataFacts, judgement: Judgement) -> Iterator[Choice]:
    field, count = "gates.reward_model[]", f"{data.held_out_pairs:,} pairs"
    if judgement.is_trial:
        yield Choice(
            field, {"metric": "accuracy", "min": 0.5},
            f"{count} tell {judgement.accuracy_in_words} from a coin; so by the estimate alone, "
            "which a coin passes every second time",
            "gates", "a trial, on estimates",
        )  # fmt: skip
        return
    yield Choice(
        field, {"metric": "accuracy", "on": "low", "min": 0.5},
        f"surely better than a coin; {count} tell {judgement.accuracy_in_words} from one",
        "gates", "on interval ends",
    )  # fmt: skip
    rule = {"metric": "length_controlled_accuracy", "on": "low", "min": 0.5}
    if data.lengths_differ:
        yield Choice(field, rule, "also where length decides nothing")
    else:
        yield Choice(
            field, {**rule, "if_missing": "skip"},
            "can't be measured yet: in all held-out pairs the same side is the longer one",
        )  # fmt: skip
    yield Choice(
        field,
        {"metric": "probes.other_prompt.rises", "on": "high", "max": 0.5, "if_missing": "skip"},
        "a good reply to another prompt must score lower, or the prompt is not read",
    )  # fmt: skip


def _policy_rules(data: DataFacts, sizes: Sizes, judgement: Judgement) -> Iterator[Choice]:
    field, count = "gates.policy[]", f"{sizes.prompts} prompts × {sizes.samples} replies"
    rule: dict[str, object] = {"metric": "sampled.win_rate", "min": 0.5}
    if judgement.is_trial:
        reason = f"{count} show {judgement.win_rate_in_words}; so by the estimate alone"
    else:
        rule = {"metric": "sampled.win_rate", "on": "low", "min": 0.5}
        reason = f"surely better than the SFT policy; {count} show {judgement.win_rate_in_words}"
    yield Choice(field, rule, reason)
    yield Choice(
        field, {**rule, "metric": "sampled.judge_win_rate", "if_missing": "skip"},
        "also by a judge that PPO has not seen, if there is one",
    )  # fmt: skip
    yield Choice(
        field, {"metric": "sampled.reward_difference", "min": 0.0},
        "the mean reward must not fall, which a few large losses do beside many small wins",
    )  # fmt: skip
    yield Choice(
        field, {"metric": "sampled.kl", "max": 20.0},
        "nats; beyond them a reply has little to do with the SFT policy",
    )  # fmt: skip
    yield Choice(
        field, {"metric": "sampled.eos_rate", "min": "sampled.eos_rate_before", "margin": -0.1},
        "hardly fewer replies may end by themselves than of the SFT policy",
    )  # fmt: skip


def _looks(config: PipelineConfig, sizes: Sizes) -> int | None:
    """Return the most comparisons with a champion that so many prompts allow; None if none."""
    for looks in _LOOKS:
        plan = tree_of([Choice("gates.champion.looks", looks, "")])
        gates = type(config.gates).model_validate(
            {**plan["gates"], "reward_model": None, "policy": None}
        )
        try:
            check_gate_sizes(config.model_copy(update={"gates": gates}), sizes, has_champion=True)
        except ConfigError:
            continue
        return looks
    return None
