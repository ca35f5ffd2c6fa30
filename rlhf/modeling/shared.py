"""Critics that share the policy's weights: a head on its states, or an adapter on its base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from rlhf.modeling.critic import Critic

#: Name of the critic's adapter beside the policy's.
CRITIC = "critic"


class HeadCritic(Critic):
    """A value head and nothing more: the states are the policy's own."""

    def __init__(self, hidden_size: int) -> None:
        nn.Module.__init__(self)
        self.value_head = _zeroed(hidden_size)

    @property
    def backbone(self) -> Any:
        """There is none."""
        raise AttributeError("a head on the policy has no backbone of its own")


class AdapterCritic(Critic):
    """The policy's base with a LoRA adapter of the critic's own, and a value head."""

    def __init__(self, policy: Any) -> None:
        nn.Module.__init__(self)
        # In a tuple, so that the policy's weights are not counted as the critic's.
        self._policy = (policy,)
        self.value_head = _zeroed(policy.config.hidden_size)

    @property
    def backbone(self) -> Any:
        """The shared transformer; inside of `active` with the critic's adapter."""
        model = self._policy[0].get_base_model()
        return getattr(model, model.base_model_prefix)

    @contextmanager
    def active(self) -> Iterator[None]:
        """While the shared base computes as the critic; may be nested."""
        policy = self._policy[0]
        before = policy.active_adapter
        policy.set_adapter(CRITIC)
        try:
            yield
        finally:
            policy.set_adapter(before)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The adapter's weights and the head's."""
        adapter = {
            name: p for name, p in self._policy[0].named_parameters() if f".{CRITIC}." in name
        }
        return {**adapter, **super().trainable()}


def _zeroed(hidden_size: int) -> nn.Linear:
    head = nn.Linear(hidden_size, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head
