"""The three environments."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from rlhf.config import ComponentSection, PreferenceConfig
from rlhf.data.rows import Prompt
from rlhf.environments.contract import Reply, Scored, Stop, Values, checked, single
from rlhf.environments.custom import CustomFunction
from rlhf.environments.scale import Scale
from rlhf.environments.stop import Ending
from rlhf.errors import ConfigError, TrainingError

#: How much better the first reply is than the second, for each (prompt, first, second).
Advantages = Callable[[Sequence[tuple[Prompt, str, str]]], Sequence[float]]


class Base:
    """What the environments share: decoding, and a state that names the code it depends on."""

    replies_per_prompt = 1
    needs_reference_reply = False

    def __init__(
        self, ending: Ending, needs_reward_model: bool, functions: Sequence[CustomFunction]
    ) -> None:
        self.ending, self.needs_reward_model, self.functions = ending, needs_reward_model, functions

    @property
    def stop(self) -> Stop | None:
        """What ends a reply; None if nothing but the end-of-reply token does."""
        return self.ending if self.ending.sequences else None

    def text(self, ids: Sequence[int]) -> str:
        """Text of a reply's token ids, without the stop sequence and what comes after it."""
        return self.ending.text(ids)

    def state_dict(self) -> dict[str, Any]:
        """Running statistics, and the identity of custom code."""
        return {"code": {function.where: function.digest for function in self.functions}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from such a state.

        Raises:
            ConfigError: Custom code is another than it was.
        """
        for function in self.functions:
            if state.get("code", {}).get(function.where) != function.digest:
                raise ConfigError(
                    f"{function.where}: the code changed since the checkpoint; put it back, or "
                    "delete the checkpoints to start again"
                )

    def close(self) -> None:
        """End the processes of custom functions; a further call starts them again."""
        for function in self.functions:
            function.close()


class TextGeneration(Base):
    """One reply to each prompt, scored by the reward model or one function."""

    def __init__(self, name: str, values: Values, **shared: Any) -> None:
        super().__init__(**shared)
        self.name, self.values = name, values

    def __call__(self, batch: Sequence[Reply]) -> Scored:
        """Score every reply."""
        return single(self.name, self.values(batch), batch)


class MultiObjective(Base):
    """A weighted sum of named components, each scaled on its own."""

    def __init__(
        self, components: Mapping[str, tuple[ComponentSection, Values]], **shared: Any
    ) -> None:
        super().__init__(**shared)
        self.components = components
        self.scales = {name: Scale(config) for name, (config, _) in components.items()}

    def __call__(self, batch: Sequence[Reply]) -> Scored:
        """Score every reply; raw parts are as computed, weighted ones scaled, clamped, weighed."""
        raw: dict[str, list[float]] = {}
        for name, (_, values) in self.components.items():
            raw[name] = checked(name, values(batch), batch)
        # All raw values are there before any is taken up: a failure leaves no half of a batch.
        weighted = {
            name: torch.tensor([config.weight * v for v in self.scales[name](raw[name])])
            for name, (config, _) in self.components.items()
        }
        totals = torch.stack(list(weighted.values())).sum(0)
        return Scored(totals, {name: torch.tensor(v) for name, v in raw.items()}, weighted)

    def state_dict(self) -> dict[str, Any]:
        """The scales' statistics."""
        scales = {name: scale.state_dict() for name, scale in self.scales.items()}
        return {**super().state_dict(), "scales": scales}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from such a state."""
        super().load_state_dict(state)
        scales: Mapping[str, Any] = state.get("scales", {})
        if scales.keys() != self.scales.keys():
            raise ConfigError(
                f"the checkpoint's rewards are {', '.join(scales) or 'others'}, this run's are "
                f"{', '.join(self.scales)}; put them back, or delete the checkpoints"
            )
        for name, scale in self.scales.items():
            scale.load_state_dict(scales[name])


class PreferenceComparison(Base):
    """Each reply is rewarded for what it wins against its rivals.

    reward of i = mean over rivals j of σ(dᵢⱼ/τ) − ½, where dᵢⱼ is how much better i is than j: a
    difference of scores, or what a pair model says. It is antisymmetric (the rewards of a prompt's
    replies add up to 0 where they are each other's rivals), and ties are worth 0.
    """

    def __init__(
        self, config: PreferenceConfig, judge: Values | None, pairs: Advantages | None,
        **shared: Any,
    ) -> None:  # fmt: skip
        super().__init__(**shared)
        self.config, self.judge, self.pairs = config, judge, pairs
        self.replies_per_prompt = config.replies_per_prompt
        self.needs_reference_reply = config.rival == "reference"

    def __call__(self, batch: Sequence[Reply]) -> Scored:
        """Score every reply; raw is the judge's mean advantage, or its score of the reply."""
        duels = self._duels(batch)
        advantages, raw = self._judged(batch, duels)
        sums, counts = [0.0] * len(batch), [0] * len(batch)
        for (i, _), advantage in zip(duels, advantages, strict=True):
            sums[i] += _preference(advantage / self.config.temperature)
            counts[i] += 1
        reward = torch.tensor([total / n for total, n in zip(sums, counts, strict=True)])
        return Scored(reward, {"judge": torch.tensor(raw)}, {"judge": reward})

    def _duels(self, batch: Sequence[Reply]) -> list[tuple[int, int | None]]:
        """(reply, rival) for every comparison; the rival None is the reference's reply."""
        if self.config.rival == "reference":
            return [(i, None) for i in range(len(batch))]
        groups: dict[int, list[int]] = defaultdict(list)
        for i, reply in enumerate(batch):
            groups[reply.group].append(i)
        for members in groups.values():
            if len(members) < 2:
                text = batch[members[0]].response[:80]
                raise TrainingError(
                    f"the reply {text!r} has no rival: every prompt needs at least two replies"
                )
        return [(i, j) for members in groups.values() for i in members for j in members if i != j]

    def _judged(
        self, batch: Sequence[Reply], duels: Sequence[tuple[int, int | None]]
    ) -> tuple[list[float], list[float]]:
        """The advantage of each duel, and the raw value of each reply."""
        rivals = [self._reference(batch[i]) if j is None else batch[j] for i, j in duels]
        if self.pairs:
            asked = [
                (batch[i].prompt, batch[i].response, rival.response)
                for (i, _), rival in zip(duels, rivals, strict=True)
            ]
            fighting = [batch[i] for i, _ in duels]
            advantages = checked("judge", self.pairs(asked), fighting)
            means = _means(advantages, [i for i, _ in duels], len(batch))
            return advantages, means
        assert self.judge is not None
        everyone = [*batch, *(rivals if self.config.rival == "reference" else [])]
        scores = checked("judge", self.judge(everyone), everyone)
        places = [len(batch) + n if j is None else j for n, (_, j) in enumerate(duels)]
        advantages = [scores[i] - scores[p] for (i, _), p in zip(duels, places, strict=True)]
        return advantages, scores[: len(batch)]

    def _reference(self, reply: Reply) -> Reply:
        """The reference policy's reply, in the place of the policy's."""
        text = reply.reference_reply
        if text is None:
            raise TrainingError(f"there is no reference reply to {str(reply.prompt)[:80]!r}")
        finished = bool(reply.reference_finished)
        n_tokens = self.ending.count(text) - (not finished)
        return replace(
            reply, response=text, n_tokens=n_tokens, finished=finished, reference_reply=None,
            reference_finished=None,
        )  # fmt: skip


def _means(values: Sequence[float], owners: Sequence[int], count: int) -> list[float]:
    sums, counts = [0.0] * count, [0] * count
    for value, owner in zip(values, owners, strict=True):
        sums[owner] += value
        counts[owner] += 1
    return [total / n for total, n in zip(sums, counts, strict=True)]


def _preference(x: float) -> float:
    """σ(x) − ½, by tanh: it does not overflow, and is odd to the last bit."""
    return 0.5 * math.tanh(x / 2)
