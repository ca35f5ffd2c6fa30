"""The critic: a backbone with a linear value head on every position."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlhf.modeling.precision import in_own_precision


class Critic(nn.Module):
    """Value of every prefix; the head starts at zero, so that the first values are all 0.

    A zeroed head keeps the reward model's *scale* out of the first advantages while its features
    are there to be used (Stiennon et al. 2020, appendix G.1 initialise from the reward model).
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone
        self.value_head = nn.Linear(backbone.config.hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def active(self) -> AbstractContextManager[Any]:
        """While its backbone computes for it; one of its own always does."""
        return nullcontext()

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def forward(
        self,
        input_ids: Int[Tensor, "batch time"],
        attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "1 1 1 1"],
        position_ids: Int[Tensor, "batch time"],
        **options: Any,
    ) -> Float[Tensor, "batch time"]:
        """Value of the prefix that ends at each position; `options` are the backbone's."""
        hidden = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
            **options,
        ).last_hidden_state
        values = in_own_precision(self.value_head, hidden).squeeze(-1)
        return values if values.dtype == torch.float64 else values.float()


def critic_from(model: Any) -> Critic:
    """A critic on the backbone of a language model or sequence classifier."""
    return Critic(getattr(model, model.base_model_prefix))


def freeze(model: Any) -> Any:
    """The model in evaluation mode without gradients."""
    return model.eval().requires_grad_(False)
