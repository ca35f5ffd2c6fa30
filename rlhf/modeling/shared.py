"""Models that share the policy's weights: a head on its states, or adapters on its base."""

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
from rlhf.modeling.critic import Critic
from rlhf.modeling.lora import CRITIC, FOLDER, REWARD, load_adapter, parameters_of, using
from rlhf.modeling.precision import Precision
from rlhf.modeling.reward import BASE, Scorer, reward_meta, set_pooling


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
    """The policy's base with the adapter called `CRITIC`, which is there, and a value head."""

    def __init__(self, policy: Any) -> None:
        nn.Module.__init__(self)
        # In a tuple, so that the policy's weights are not counted as the critic's.
        self._policy = (policy,)
        self.value_head = _zeroed(policy.config.hidden_size)
        for parameter in self.trainable().values():
            parameter.requires_grad_(True)

    @property
    def backbone(self) -> Any:
        """The shared transformer; inside of `active` with the critic's adapter."""
        model = self._policy[0].get_base_model()
        return getattr(model, model.base_model_prefix)

    def active(self) -> AbstractContextManager[Any]:
        """While the shared base computes as the critic; may be nested."""
        return using(self._policy[0], CRITIC)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The adapter's weights and the head's."""
        return {**parameters_of(self._policy[0], CRITIC), **dict(self.named_parameters())}


class AdapterReward(nn.Module):
    """A frozen reward model: an adapter on the policy's base, and a score head of its own.

    It has what `Scorer` asks of a reward model.

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
        """The base's."""
        return self._policy[0].config

    def get_base_model(self) -> Any:
        """The shared transformer, as peft calls it."""
        return self._policy[0].get_base_model()

    def active(self) -> AbstractContextManager[Any]:
        """While the shared base computes as the reward model; may be nested."""
        return using(self._policy[0], REWARD)


class SharedScorer(Scorer):
    """A scorer whose reward model is an adapter on the policy's base."""

    def __init__(
        self, policy: Any, sft: Path, folder: Path, device: torch.device, max_length: int,
        precision: Precision = "fp32",
    ) -> None:  # fmt: skip
        renderer = load_renderer(folder)
        model = AdapterReward(policy, sft, folder, renderer)
        super().__init__(folder, device, max_length, model=model)
        # The base is the policy's, whose critic may get an adapter yet: it is stored lowered later.
        self.precision = precision

    def _score(
        self, ids: Int[Tensor, "batch time"], mask: Int[Tensor, "batch time"]
    ) -> Float[Tensor, " batch"]:
        with self.model.active():
            return super()._score(ids, mask)


def check_adapter(sft: Path, folder: Path) -> Path:
    """The folder of a reward model's adapter, if it is one on this SFT policy.

    Raises:
        ConfigError: There is none, or it was trained on other weights.
    """
    adapter = folder / FOLDER
    if not adapter.is_dir():
        raise ConfigError(
            f"ppo.shared_base = true, but reward model {str(folder)!r} has no {FOLDER}/ folder; "
            "train it from the SFT policy with reward_model.lora, or set ppo.shared_base to false"
        )
    theirs, ours = reward_meta(folder).get(BASE), weights_digest(sft)
    if theirs != ours:
        raise ConfigError(
            f"ppo.shared_base = true, but the adapter of reward model {str(folder)!r} is for a "
            f"base with weights {str(theirs)[:12]}, and this SFT policy's are {ours[:12]}; train "
            "it again from this SFT policy, or set ppo.shared_base to false"
        )
    return adapter


def _zeroed(hidden_size: int) -> nn.Linear:
    head = nn.Linear(hidden_size, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head
