"""What training asks of a reward: the batch it hands over, and what comes back."""

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
    """One reply to be scored, always with its own prompt.

    `reference` is the right answer of the prompt's row, `group` the number of its prompt in the
    chunk, and `reference_reply` the reference policy's reply where the environment asks for one,
    which `reference_finished` by itself or was cut off.
    """

    prompt: Prompt
    response: str
    n_tokens: int
    finished: bool
    reference: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    group: int = 0
    reference_reply: str | None = None
    reference_finished: bool | None = None

    def row(self) -> dict[str, Any]:
        """The reply as custom functions and remote services see it."""
        return dict(vars(self))


@dataclass(frozen=True)
class Scored:
    """Totals, the raw named parts, and the weighted ones that add up to the totals."""

    totals: Float[Tensor, " batch"]
    components: dict[str, Float[Tensor, " batch"]]
    weighted: dict[str, Float[Tensor, " batch"]]

    def metrics(self) -> dict[str, float]:
        """Means for the curve: `reward/<name>` raw, `reward_weighted/<name>` as it counts."""
        raw = {f"reward/{name}": float(v.mean()) for name, v in self.components.items()}
        return raw | {f"reward_weighted/{n}": float(v.mean()) for n, v in self.weighted.items()}

    def rows(self) -> list[dict[str, Any]]:
        """Total, raw and weighted parts of each reply, to be stored with it."""
        return [
            {
                "reward": float(total),
                "components": {name: float(v[i]) for name, v in self.components.items()},
                "weighted": {name: float(v[i]) for name, v in self.weighted.items()},
            }
            for i, total in enumerate(self.totals)
        ]


#: One named part of a reward: a batch in, a number for each reply out.
Values = Callable[[Sequence[Reply]], Sequence[float]]


@runtime_checkable
class Reward(Protocol):
    """Anything that scores a batch of replies."""

    def __call__(self, batch: Sequence[Reply]) -> Scored:
        """Score every reply; raises TrainingError if a score is not finite."""
        ...


@runtime_checkable
class Stop(Protocol):
    """Tells which replies have reached a stop sequence."""

    def __call__(self, rows: Sequence[Sequence[int]]) -> list[bool]:
        """Whether each row of a reply's token ids holds a stop sequence."""
        ...


@runtime_checkable
class Environment(Protocol):
    """Where replies are asked for and rewarded; `build_environment` makes one.

    `replies_per_prompt` replies to each prompt share a `group`. `stop` ends a reply before its
    end-of-reply token; `text` gives what is scored of its tokens. The state makes a resumed run
    the same run.
    """

    replies_per_prompt: int
    needs_reference_reply: bool
    needs_reward_model: bool

    @property
    def stop(self) -> Stop | None:
        """What ends a reply; None if nothing but the end-of-reply token does."""
        ...

    def text(self, ids: Sequence[int]) -> str:
        """Text of a reply's token ids, without the stop sequence and what comes after it."""
        ...

    def __call__(self, batch: Sequence[Reply]) -> Scored:
        """Score every reply; raises TrainingError if a score is not finite."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Running statistics, as JSON holds them."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from such a state; raises ConfigError if it is another environment's."""
        ...


def checked(name: str, values: Sequence[float], batch: Sequence[Reply]) -> list[float]:
    """The values as floats.

    Raises:
        TrainingError: There are more or fewer than replies, or one is not finite.
    """
    if len(values) != len(batch):
        raise TrainingError(
            f"reward {name!r} gave {len(values)} values for {len(batch)} replies; it must give one "
            "for each"
        )
    found = [float(value) for value in values]
    for value, reply in zip(found, batch, strict=True):
        if not math.isfinite(value):
            raise TrainingError(
                f"reward {name!r} is {value} for the reply {reply.response[:80]!r}; it must be "
                "finite: mend what computes it; the last checkpoint is intact"
            )
    return found


def single(name: str, values: Sequence[float], batch: Sequence[Reply]) -> Scored:
    """A reward of one part."""
    part = torch.tensor(checked(name, values, batch))
    return Scored(part, {name: part}, {name: part})
