"""Environments: one reward function, weighted components, or comparisons."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from rlhf.config import ComponentSection, PreferenceConfig
from rlhf.data.rows import Prompt
from rlhf.environments.contract import (
    Reply,
    RewardFunction,
    Scored,
    Stop,
    check_values,
    single_component,
)
from rlhf.environments.custom import CustomFunction
from rlhf.environments.stop import StopSequences
from rlhf.errors import ConfigError, TrainingError
from rlhf.statistics import RunningMoments

#: Returns for each (prompt, first reply, second reply) how much better the first is.
Advantages = Callable[[Sequence[tuple[Prompt, str, str]]], Sequence[float]]


class BaseEnvironment:
    """Base of all environments: decodes replies, and identifies custom code."""

    replies_per_prompt = 1
    needs_reference_reply = False

    def __init__(
        self, ending: StopSequences, needs_reward_model: bool, functions: Sequence[CustomFunction]
    ) -> None:
        self.ending, self.needs_reward_model, self.functions = ending, needs_reward_model, functions

    @property
    def stop(self) -> Stop | None:
        """Stop sequences; None if only the end-of-reply token ends a reply."""
        return self.ending if self.ending.sequences else None

    def text(self, ids: Sequence[int]) -> str:
        """Decode a reply's token ids, up to the first stop sequence."""
        return self.ending.text(ids)

    def state_dict(self) -> dict[str, Any]:
        """Digests of custom code."""
        return {"code": {function.where: function.digest for function in self.functions}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check the digests of custom code.

        Raises:
            ConfigError: The code is not that of the state.
        """
        for function in self.functions:
            if state.get("code", {}).get(function.where) != function.digest:
                raise ConfigError(
                    f"{function.where}: the code changed since the checkpoint; put it back, or "
                    "delete the checkpoints to start again"
                )

    def close(self) -> None:
        """End the processes of custom functions; the next call restarts them."""
        for function in self.functions:
            function.close()


class TextGeneration(BaseEnvironment):
    """One reply to each prompt, scored by the reward model or one function."""

    def __init__(self, name: str, function: RewardFunction, **options: Any) -> None:
        super().__init__(**options)
        self.name, self.function = name, function

    def __call__(self, batch: Sequence[Reply]) -> Scored:
        """Score every reply."""
        return single_component(self.name, self.function(batch), batch)


class MultiObjective(BaseEnvironment):
    """A weighted sum of named components, each normalised separately."""

    def __init__(
        self, components: Mapping[str, tuple[ComponentSection, RewardFunction]], **options: Any
    ) -> None:
        super().__init__(**options)
        self.components = components
        self.scales = {name: ComponentScale(config) for name, (config, _) in components.items()}

    def __call__(self, batch: Sequence[Reply]) -> Scored:
        """Score every reply; weighted values are normalised and clipped before the weight."""
        raw: dict[str, list[float]] = {}
        for name, (_, function) in self.components.items():
            raw[name] = check_values(name, function(batch), batch)
        # All raw values are computed before the first scale changes: a failure adds no half batch.
        weighted = {
            name: torch.tensor([config.weight * v for v in self.scales[name](raw[name])])
            for name, (config, _) in self.components.items()
        }
        totals = torch.stack(list(weighted.values())).sum(0)
        return Scored(totals, {name: torch.tensor(v) for name, v in raw.items()}, weighted)

    def state_dict(self) -> dict[str, Any]:
        """Digests of custom code, and statistics of the scales."""
        scales = {name: scale.state_dict() for name, scale in self.scales.items()}
        return {**super().state_dict(), "scales": scales}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the scales.

        Raises:
            ConfigError: Custom code or the names of components differ from those of the state.
        """
        super().load_state_dict(state)
        scales: Mapping[str, Any] = state.get("scales", {})
        if scales.keys() != self.scales.keys():
            raise ConfigError(
                f"the checkpoint's rewards are {', '.join(scales) or 'others'}, this run's are "
                f"{', '.join(self.scales)}; put them back, or delete the checkpoints"
            )
        for name, scale in self.scales.items():
            scale.load_state_dict(scales[name])


class PreferenceComparison(BaseEnvironment):
    """Rewards each reply by comparison with its rivals.

    reward of i = mean over rivals j of σ(dᵢⱼ/τ) − ½, where the advantage dᵢⱼ of i over j is a
    difference of scores or the output of a pair model. It is antisymmetric: the rewards of replies
    that are each other's rivals add up to 0, and a tie is worth 0.

    Args:
        config: Rivals, temperature and replies per prompt.
        judge: Scores single replies; None with `pairs`.
        pairs: Compares two replies; None with `judge`.
        options: Arguments of `BaseEnvironment`.
    """

    def __init__(
        self, config: PreferenceConfig, judge: RewardFunction | None, pairs: Advantages | None,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(**options)
        self.config, self.judge, self.pairs = config, judge, pairs
        self.replies_per_prompt = config.replies_per_prompt
        self.needs_reference_reply = config.rival == "reference"

    def __call__(self, batch: Sequence[Reply]) -> Scored:
        """Score every reply; raw values are scores, or mean advantages by `pairs`."""
        comparisons = self._comparisons(batch)
        advantages, raw = self._judge(batch, comparisons)
        sums, counts = [0.0] * len(batch), [0] * len(batch)
        for (i, _), advantage in zip(comparisons, advantages, strict=True):
            # σ(x) − ½ by tanh, which does not overflow and is odd to the last bit.
            sums[i] += 0.5 * math.tanh(advantage / self.config.temperature / 2)
            counts[i] += 1
        reward = torch.tensor([total / n for total, n in zip(sums, counts, strict=True)])
        return Scored(reward, {"judge": torch.tensor(raw)}, {"judge": reward})

    def _comparisons(self, batch: Sequence[Reply]) -> list[tuple[int, int | None]]:
        """Return (reply, rival) of every comparison; rival None is the reference's reply."""
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

    def _judge(
        self, batch: Sequence[Reply], comparisons: Sequence[tuple[int, int | None]]
    ) -> tuple[list[float], list[float]]:
        """Return the advantage of each comparison, and the raw value of each reply."""
        rivals = [self._reference(batch[i]) if j is None else batch[j] for i, j in comparisons]
        if self.pairs:
            triples = [
                (batch[i].prompt, batch[i].response, rival.response)
                for (i, _), rival in zip(comparisons, rivals, strict=True)
            ]
            advantages = check_values(
                "judge", self.pairs(triples), [batch[i] for i, _ in comparisons]
            )
            return advantages, _means(advantages, [i for i, _ in comparisons], len(batch))
        assert self.judge is not None
        replies = [*batch, *(rivals if self.config.rival == "reference" else [])]
        scores = check_values("judge", self.judge(replies), replies)
        indices = [len(batch) + n if j is None else j for n, (_, j) in enumerate(comparisons)]
        advantages = [scores[i] - scores[j] for (i, _), j in zip(comparisons, indices, strict=True)]
        return advantages, scores[: len(batch)]

    def _reference(self, reply: Reply) -> Reply:
        """Return the reference policy's reply to the same prompt."""
        text = reply.reference_reply
        if text is None:
            raise TrainingError(f"there is no reference reply to {str(reply.prompt)[:80]!r}")
        finished = bool(reply.reference_finished)
        n_tokens = self.ending.count(text) - (not finished)
        return replace(
            reply, response=text, n_tokens=n_tokens, finished=finished, reference_reply=None,
            reference_finished=None,
        )  # fmt: skip


class ComponentScale(RunningMoments):
    """Running normalisation (z-score or min-max) and clipping of component values.

    A batch is added before it is normalised, so that the first one has a scale. If all values are
    equal, each becomes 0.
    """

    def __init__(self, config: ComponentSection) -> None:
        super().__init__()
        self.config = config
        self.low, self.high = math.inf, -math.inf

    def __call__(self, values: Sequence[float]) -> list[float]:
        """Add a batch of values; return them normalised and clipped."""
        scaled = list(values)
        if self.config.normalize != "none":
            self._add(scaled)
            scaled = self._normalise(scaled)
        limit = self.config.clip
        return scaled if limit is None else [max(-limit, min(limit, v)) for v in scaled]

    def _add(self, values: Sequence[float]) -> None:
        self.low, self.high = min(self.low, *values), max(self.high, *values)
        mean = math.fsum(values) / len(values)
        # Added by itself and not by `merge`: the order of additions decides the last bit, and equal
        # seeds must give the same rewards as in earlier versions.
        self.squares += math.fsum((v - mean) ** 2 for v in values)
        self.merge(len(values), mean, 0.0)

    def _normalise(self, values: Sequence[float]) -> list[float]:
        if self.config.normalize == "minmax":
            width = self.high - self.low
            return [(v - self.low) / width if width > 0 else 0.0 for v in values]
        deviation = math.sqrt(self.squares / self.count)
        return [(v - self.mean) / deviation if deviation > 1e-12 else 0.0 for v in values]

    def state_dict(self) -> dict[str, float]:
        """State for a checkpoint; empty before the first batch."""
        return super().state_dict() | {"low": self.low, "high": self.high} if self.count else {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore a state of `state_dict`."""
        if state:
            super().load_state_dict(state)
            self.low, self.high = float(state["low"]), float(state["high"])


def _means(values: Sequence[float], owners: Sequence[int], count: int) -> list[float]:
    """Average the values of each owner; `owners` holds one owner index per value."""
    sums, counts = [0.0] * count, [0] * count
    for value, owner in zip(values, owners, strict=True):
        sums[owner] += value
        counts[owner] += 1
    return [total / n for total, n in zip(sums, counts, strict=True)]
