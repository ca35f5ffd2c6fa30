"""Interfaces of rewards: replies to score, scores, reward functions, environments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.data.rows import Prompt
from rlhf.errors import TrainingError


@dataclass(frozen=True)
class Reply:
    """One reply to score, with its prompt."""

    prompt: Prompt
    response: str
    n_tokens: int
    finished: bool
    """True if it ended by itself, False if it was cut off at the maximum length."""
    reference: str | None = None
    """Reference answer of the prompt's row."""
    metadata: dict[str, Any] = field(default_factory=dict)
    group: int = 0
    """Number of the prompt in the chunk; replies to one prompt share it."""
    reference_reply: str | None = None
    """The reference policy's reply, for environments with `needs_reference_reply`."""
    reference_finished: bool | None = None

    def row(self) -> dict[str, Any]:
        """Return the fields as custom functions and remote services receive them."""
        return dict(vars(self))


@dataclass(frozen=True)
class Scored:
    """Total reward of each reply, its named components, and their weighted values.

    The weighted values add up to the totals.
    """

    totals: Float[Tensor, " batch"]
    components: dict[str, Float[Tensor, " batch"]]
    weighted: dict[str, Float[Tensor, " batch"]]

    def metrics(self) -> dict[str, float]:
        """Return means over replies as `reward/<name>` and `reward_weighted/<name>`."""
        raw = {f"reward/{name}": float(v.mean()) for name, v in self.components.items()}
        return raw | {f"reward_weighted/{n}": float(v.mean()) for n, v in self.weighted.items()}

    def rows(self) -> list[dict[str, Any]]:
        """Return each reply's total and components, for its row in the samples."""
        return [
            {
                "reward": float(total),
                "components": {name: float(v[i]) for name, v in self.components.items()},
                "weighted": {name: float(v[i]) for name, v in self.weighted.items()},
            }
            for i, total in enumerate(self.totals)
        ]


#: Returns one number for each reply of a batch.
RewardFunction = Callable[[Sequence[Reply]], Sequence[float]]


@runtime_checkable
class Reward(Protocol):
    """Scores a batch of replies."""

    def __call__(self, batch: Sequence[Reply]) -> Scored:
        """Score every reply; raises TrainingError if a score is not finite."""
        ...


@runtime_checkable
class Stop(Protocol):
    """Finds stop sequences in replies."""

    def __call__(self, rows: Sequence[Sequence[int]]) -> list[bool]:
        """Return for each row of a reply's token ids whether it contains a stop sequence."""
        ...


@runtime_checkable
class Environment(Protocol):
    """Reward of a PPO run, with the way that replies are sampled for it.

    `build_environment` makes one. The `replies_per_prompt` replies to one prompt share a `group`.
    With its state restored, a resumed run gets the same rewards as an undisturbed one.
    """

    replies_per_prompt: int
    needs_reference_reply: bool
    needs_reward_model: bool

    @property
    def stop(self) -> Stop | None:
        """Stop sequences; None if only the end-of-reply token ends a reply."""
        ...

    def text(self, ids: Sequence[int]) -> str:
        """Decode a reply's token ids, up to the first stop sequence: the text to score."""
        ...

    def __call__(self, batch: Sequence[Reply]) -> Scored:
        """Score every reply; raises TrainingError if a score is not finite."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Running statistics as JSON values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state; raises ConfigError if it is of a different environment."""
        ...


def check_values(name: str, values: Sequence[float], batch: Sequence[Reply]) -> list[float]:
    """Convert a reward function's values to floats.

    Raises:
        TrainingError: Their number is not that of the replies, or one is not finite.
    """
    if len(values) != len(batch):
        raise TrainingError(
            f"reward {name!r} gave {len(values)} values for {len(batch)} replies; it must give one "
            "for each"
        )
    numbers = [float(value) for value in values]
    for value, reply in zip(numbers, batch, strict=True):
        if not math.isfinite(value):
            raise TrainingError(
                f"reward {name!r} is {value} for the reply {reply.response[:80]!r}; it must be "
                "finite: mend what computes it; the last checkpoint is intact"
            )
    return numbers


def single_component(name: str, values: Sequence[float], batch: Sequence[Reply]) -> Scored:
    """Return the scores of a reward with one component."""
    component = torch.tensor(check_values(name, values, batch))
    return Scored(component, {name: component}, {name: component})
