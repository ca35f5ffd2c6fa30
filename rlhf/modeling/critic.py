"""Critics: a value head on a backbone, an adapter or the policy's hidden states."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rlhf.modeling.lora import CRITIC, active_adapter, parameters_of
from rlhf.modeling.precision import in_own_precision
from rlhf.modeling.structure import backbone_of, call, hidden_width


class Critic(nn.Module):
    """Value of every prefix, by a linear head on the last hidden states of a backbone.

    The head starts at zero, so the first values are 0: a critic that starts from a reward model
    (Stiennon et al. 2020, appendix G.1) has its features, but not its *scale*.
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone
        self.value_head = zero_value_head(hidden_width(backbone))

    def active(self) -> AbstractContextManager[Any]:
        """Context in which the backbone computes as the critic; here a no-op."""
        return nullcontext()

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def forward(
        self,
        input_ids: Int[Tensor, "batch time"],
        **options: Any,
    ) -> Float[Tensor, "batch time"]:
        """Compute the value of each prefix; `options` go to the backbone."""
        hidden = call(self.backbone, input_ids=input_ids, **options).last_hidden_state
        values = in_own_precision(self.value_head, hidden).squeeze(-1)
        return values if values.dtype == torch.float64 else values.float()


class HeadCritic(Critic):
    """A critic without backbone: a value head on the policy's hidden states."""

    def __init__(self, hidden_size: int) -> None:
        nn.Module.__init__(self)
        self.value_head = zero_value_head(hidden_size)

    @property
    def backbone(self) -> Any:
        """Raise AttributeError: the policy computes the hidden states."""
        raise AttributeError("a head on the policy has no backbone of its own")


class AdapterCritic(Critic):
    """A critic on the policy's base: the adapter `CRITIC` and a value head."""

    def __init__(self, policy: Any) -> None:
        nn.Module.__init__(self)
        # A tuple hides the policy from nn.Module, which would register its weights as the critic's.
        self._policy = (policy,)
        self.value_head = zero_value_head(hidden_width(policy))
        for parameter in self.trainable().values():
            parameter.requires_grad_(True)

    @property
    def backbone(self) -> Any:
        """The shared transformer; within `active` it uses the critic's adapter."""
        return backbone_of(self._policy[0])

    def active(self) -> AbstractContextManager[Any]:
        """Context in which the shared base computes as the critic; may be nested."""
        return active_adapter(self._policy[0], CRITIC)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters of the adapter and the head, by name."""
        return {**parameters_of(self._policy[0], CRITIC), **dict(self.named_parameters())}


def critic_from(model: Any) -> Critic:
    """Make a critic from the backbone of a language model or sequence classifier."""
    return Critic(backbone_of(model))


def freeze(model: Any) -> Any:
    """Set a model to evaluation mode without gradients, and return it."""
    return model.eval().requires_grad_(False)


def zero_value_head(hidden_size: int) -> nn.Linear:
    """Return a linear layer with one output whose weights and bias are zero."""
    head = nn.Linear(hidden_size, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head
