"""PPO's parameters, under the names of the papers and of TRL."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from rlhf.config.models import LoraConfig
from rlhf.config.section import Section


class PPOConfig(Section):
    """Proximal policy optimisation (Schulman et al. 2017) as in Ziegler et al. 2019."""

    total_episodes: int = Field(default=4608, ge=1)
    """Replies to sample in all; the number of updates is this over `chunk_size`, rounded up."""
    chunk_size: int = Field(default=128, ge=1)
    """Rollouts collected under a frozen policy before optimising."""
    mini_batch_size: int = Field(default=8, ge=1)
    """Sequences per optimiser step; the last one of an epoch may be smaller."""
    micro_batch_size: int = Field(default=64, ge=1)
    """Sequences per forward pass; changes memory, not results."""
    num_ppo_epochs: int = Field(default=4, ge=1)
    """Passes over one chunk of rollouts."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak learning rate of the policy."""
    critic_learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of the critic; none uses the policy's."""
    lr_final_fraction: float = Field(default=0.1, ge=0, le=1)
    """The learning rates decay linearly to this share of their peak; 1 keeps them constant."""
    adam_beta2: float = Field(default=0.95, gt=0, lt=1)
    """Second-moment decay of AdamW (first: 0.9)."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients of policy and critic are clipped to this norm, each by itself."""
    gamma: float = Field(default=0.99, gt=0, le=1)
    """Discount per token in generalised advantage estimation."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """λ of generalised advantage estimation (Schulman et al. 2015)."""
    kl_coef: float = Field(default=0.1, ge=0)
    """Weight of the per-token KL penalty, in the reward, against the frozen reference."""
    clip_range: float = Field(default=0.2, gt=0, lt=1)
    """The probability ratio is clamped to 1 ± this."""
    value_clip_range: float | None = Field(default=0.2, gt=0)
    """New values are clamped to the old ones ± this; none switches the clamp off."""
    value_loss_coef: float = Field(default=1.0, ge=0)
    """Multiplies ½·max(clipped, unclipped)² in the critic's loss."""
    max_new_tokens: int = Field(default=128, ge=1)
    """No reply is longer."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; divides the logits of policy and reference alike."""
    top_k: int = Field(default=50, ge=0)
    """Sample from the k likeliest tokens; 0 from all. Never touches the ratio's log-probs."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the smallest set of tokens with this much probability."""
    missing_eos_penalty: float | None = Field(default=1.0, ge=0)
    """Subtracted from the score of a reply that does not end by EOS; none leaves it alone."""
    whiten_rewards: bool = False
    """Divide scores by their standard deviation within each chunk."""
    checkpoint_every: int = Field(default=5, ge=1)
    """Updates between two checkpoints; training resumes exactly from the last one."""
    lora: LoraConfig | None = None
    """Train low-rank adapters of the policy; the reference is the policy with adapters off."""
    critic: Literal["reward_model", "policy"] = "reward_model"
    """The critic starts as a copy of this model's backbone, with a zeroed value head."""

    @model_validator(mode="after")
    def _mini_batch_fits(self) -> Self:
        if self.mini_batch_size > self.chunk_size:
            raise ValueError(
                f"mini_batch_size = {self.mini_batch_size} exceeds chunk_size = "
                f"{self.chunk_size}; lower it to at most chunk_size"
            )
        return self

    @property
    def updates(self) -> int:
        """Number of PPO updates: ⌈total_episodes / chunk_size⌉."""
        return -(-self.total_episodes // self.chunk_size)
