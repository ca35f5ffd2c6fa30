"""All replies of an evaluation, ordered so that those worth reading stand first."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rlhf.errors import ConfigError
from rlhf.report.text import number_of

#: Scorers of replies; before PPO, after it, and of the champion.
SCORERS = ("reward", "judge", "gold")
SIDES = ("before", "champion", "after")
#: Orders by name, each with its meaning.
ORDERS = {
    "lost": "what the policy lost against SFT most, by the judge, or without one the reward model",
    "reward": "the same by the reward model",
    "judge": "the same by the judge",
    "gold": "the same by the gold score",
    "champion": "what it lost against the champion most",
    "disagree": "where reward model and judge say the opposite, farthest apart",
    "members": "where the reward model's members differ most",
    "longest": "the longest replies, in characters",
    "prompts": "as stored: by a hash of the prompt",
}


@dataclass(frozen=True)
class Reply:
    """One sample of each policy to a prompt, with the figures that it is ordered by."""

    row: Mapping[str, Any]
    """Prompt, group, texts and scores, by their names in samples.json."""
    sample: int
    """Number of the sample to this prompt, from 1."""
    samples: int
    """How many there are to this prompt."""
    decided_by: str
    """Scorer that decides about a loss: judge or reward."""

    @property
    def gain(self) -> float | None:
        """Score of the policy's reply less that of SFT's; below 0 it lost."""
        return self.gain_by(self.decided_by)

    def gain_by(self, scorer: str, over: str = "before") -> float | None:
        """Return the gain over another policy's reply by one scorer; None if not measured."""
        after = number_of(self.row.get(f"{scorer}_after"))
        before = number_of(self.row.get(f"{scorer}_{over}"))
        return None if after is None or before is None else after - before

    @property
    def length(self) -> int:
        """Characters of the policy's reply, also of one that a page has cut."""
        shown = len(str(self.row.get("after") or ""))
        whole = number_of(self.row.get("characters"))
        return shown if whole is None else max(shown, int(whole))


def all_replies(rows: Sequence[Mapping[str, Any]]) -> list[Reply]:
    """Return every sample of `samples.json` as a reply of its own."""
    has_judge = any(number_of(row.get("judge_after")) is not None for row in rows)
    by = "judge" if has_judge else "reward"
    found: list[Reply] = []
    for row in rows:
        first = {key: value for key, value in row.items() if key != "more"}
        more = row.get("more")
        samples = (
            [first, *({**first, **each} for each in more)] if isinstance(more, list) else [first]
        )
        found += [Reply(each, i, len(samples), by) for i, each in enumerate(samples, 1)]
    return found


def ordered(replies: Sequence[Reply], by: str) -> list[Reply]:
    """Order replies by a name of `ORDERS`; those without its figure come last.

    Raises:
        ConfigError: The name is unknown, or the evaluation has not measured what it orders by.
    """
    if by not in ORDERS:
        raise ConfigError(f"--sort {by!r} is no order; choose one of {', '.join(ORDERS)}")
    if by == "prompts":
        return [*replies]
    measure = _measure(replies, by)
    known = [(value, reply) for reply in replies if (value := measure(reply)) is not None]
    if replies and not known:
        others = [each for each in ORDERS if each == "prompts" or is_known(replies, each)]
        raise ConfigError(
            f"--sort {by}: this evaluation has no figures for it ({_NEEDS.get(by, 'no score')}); "
            f"choose one of {', '.join(others)}"
        )
    known.sort(key=lambda each: each[0])
    placed = {id(reply) for _, reply in known}
    return [*(reply for _, reply in known), *(r for r in replies if id(r) not in placed)]


def lost(replies: Sequence[Reply]) -> list[Reply]:
    """Return the replies that the policy lost against SFT, worst first."""
    return [r for r in ordered(replies, "lost") if (gain := r.gain) is not None and gain < 0]


def contradicted(replies: Sequence[Reply]) -> list[Reply]:
    """Return the replies on which reward model and judge say the opposite, farthest apart first.

    Without a judge they are those on which the reward model's members differ most.

    Raises:
        ConfigError: The evaluation has neither.
    """
    if is_known(replies, "disagree"):
        return [r for r in ordered(replies, "disagree") if _is_contrary(r)]
    if not is_known(replies, "members"):
        raise ConfigError(
            "--disagree: this evaluation has neither a judge's scores nor those of reward-model "
            "members; train with judge.enabled=true or reward_model.members, or use --lost"
        )
    return ordered(replies, "members")


def is_known(replies: Sequence[Reply], by: str) -> bool:
    """Return whether any reply has the figure of an order."""
    measure = _measure(replies, by) if by != "prompts" else lambda _: 0.0
    return any(measure(reply) is not None for reply in replies)


_NEEDS = {
    "judge": "no judge scored it", "gold": "there is no gold score",
    "disagree": "no judge scored it", "members": "the reward model has no members",
    "champion": "there was no champion",
}  # fmt: skip


def _measure(
    replies: Sequence[Reply], by: str
) -> Callable[[Reply], float | None]:  # fmt: skip
    """Return the figure by which replies are ordered, the smallest first."""
    if by == "lost":
        return lambda reply: reply.gain
    if by == "champion":
        return lambda reply: reply.gain_by(reply.decided_by, "champion")
    if by == "longest":
        return lambda reply: -reply.length
    if by == "members":
        return lambda reply: _negative(number_of(reply.row.get("disagreement")))
    if by == "disagree":
        spreads = {name: _spread(replies, name) for name in ("reward", "judge")}
        return partial(_contradiction, spreads)
    return lambda reply: reply.gain_by(by)


def _contradiction(spreads: Mapping[str, float], reply: Reply) -> float | None:
    """Return how far the scorers' gains are apart, each in its standard deviations; negative.

    Where they have the same sign, the figure is above that of all contrary ones.
    """
    reward, judge = (reply.gain_by(name) for name in ("reward", "judge"))
    if reward is None or judge is None:
        return None
    apart = abs(reward / spreads["reward"] - judge / spreads["judge"])
    return -apart if reward * judge < 0 else 1 / (1 + apart)


def _spread(replies: Sequence[Reply], scorer: str) -> float:
    gains = [gain for r in replies if (gain := r.gain_by(scorer)) is not None]
    return (statistics.pstdev(gains) if gains else 0.0) or 1.0


def _is_contrary(reply: Reply) -> bool:
    reward, judge = (reply.gain_by(name) for name in ("reward", "judge"))
    return reward is not None and judge is not None and reward * judge < 0


def _negative(value: float | None) -> float | None:
    return None if value is None else -value
