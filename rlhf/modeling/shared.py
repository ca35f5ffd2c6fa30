"""Critics and reward models that share the policy's weights.

They are a head on the policy's hidden states, or an adapter on its base.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rlhf.data.rendering import Renderer, load_renderer
from rlhf.errors import ConfigError
from rlhf.modeling.base import weights_digest
from rlhf.modeling.critic import Critic, zero_value_head
from rlhf.modeling.lora import CRITIC, FOLDER, REWARD, load_adapter, parameters_of, using
from rlhf.modeling.precision import Precision
from rlhf.modeling.reward import BASE, Scorer, reward_meta, set_pooling


class HeadCritic(Critic):
    """A critic without backbone: a value head on the policy's hidden states."""

    def __init__(self, hidden_size: int) -> None:
        nn.Module.__init__(self)
        self.value_head = zero_value_head(hidden_size)

    @property
    def backbone(self) -> Any:
        """Raise AttributeError."""
        raise AttributeError("a head on the policy has no backbone of its own")


class AdapterCritic(Critic):
    """A critic on the policy's base: the adapter `CRITIC` and a value head."""

    def __init__(self, policy: Any) -> None:
        nn.Module.__init__(self)
        # A tuple hides the policy from nn.Module, which would register its weights as the critic's.
        self._policy = (policy,)
        self.value_head = zero_value_head(policy.config.hidden_size)
        for parameter in self.trainable().values():
            parameter.requires_grad_(True)

    @property
    def backbone(self) -> Any:
        """The shared transformer; within `active` it uses the critic's adapter."""
        model = self._policy[0].get_base_model()
        return getattr(model, model.base_model_prefix)

    def active(self) -> AbstractContextManager[Any]:
        """Context in which the shared base computes as the critic; may be nested."""
        return using(self._policy[0], CRITIC)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters of the adapter and the head, by name."""
        return {**parameters_of(self._policy[0], CRITIC), **dict(self.named_parameters())}


class SharedScorer(Scorer):
    """A scorer whose reward model is an adapter on the policy's base."""

    def __init__(
        self, policy: Any, sft: Path, folder: Path, device: torch.device, max_length: int,
        precision: Precision = "fp32",
    ) -> None:  # fmt: skip
        renderer = load_renderer(folder)
        model = AdapterReward(policy, sft, folder, renderer)
        super().__init__(folder, device, max_length, model=model)
        # Scorer must not store the policy's base in bfloat16: the critic may still get an adapter.
        self.precision = precision

    def _score(
        self, ids: Int[Tensor, "batch time"], mask: Int[Tensor, "batch time"]
    ) -> Float[Tensor, " batch"]:
        with self.model.active():
            return super()._score(ids, mask)


class AdapterReward(nn.Module):
    """A frozen reward model: an adapter on the policy's base and a score head.

    Raises:
        ConfigError: The reward model has no adapter, or one for another base.
    """

    pooling = "last"
    marker: int | None = None

    def __init__(self, policy: Any, sft: Path, folder: Path, renderer: Renderer) -> None:
        super().__init__()
        self._policy = (policy,)
        head = load_adapter(policy, check_adapter(sft, folder), REWARD)
        if not head:
            raise ConfigError(
                f"ppo.shared_base = true, but the adapter of reward model {str(folder)!r} does not "
                "fit this SFT policy; train the reward model again, or set ppo.shared_base to false"
            )
        width = head["weight"].shape[1]
        self.score = nn.Linear(width, 1, bias="bias" in head)
        self.score.load_state_dict(head)
        set_pooling(self, folder, renderer)

    @property
    def config(self) -> Any:
        """Configuration of the base."""
        return self._policy[0].config

    def get_base_model(self) -> Any:
        """Return the shared transformer; peft's name for it."""
        return self._policy[0].get_base_model()

    def active(self) -> AbstractContextManager[Any]:
        """Context in which the shared base computes as the reward model; may be nested."""
        return using(self._policy[0], REWARD)


def check_adapter(sft: Path, folder: Path) -> Path:
    """Check that a reward model's adapter fits the SFT policy; return its folder.

    Raises:
        ConfigError: The reward model has no adapter, or one that was trained on other weights.
    """
    adapter = folder / FOLDER
    if not adapter.is_dir():
        raise ConfigError(
            f"ppo.shared_base = true, but reward model {str(folder)!r} has no {FOLDER}/ folder; "
            "train it from the SFT policy with reward_model.lora, or set ppo.shared_base to false"
        )
    trained_on, policy = reward_meta(folder).get(BASE), weights_digest(sft)
    if trained_on != policy:
        raise ConfigError(
            f"ppo.shared_base = true, but the adapter of reward model {str(folder)!r} is for a "
            f"base with weights {str(trained_on)[:12]}, and this SFT policy's are {policy[:12]}; "
            "train it again from this SFT policy, or set ppo.shared_base to false"
        )
    return adapter
