"""Loading of a PPO run's models, as separate networks or as adapters on one base."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from rlhf.config import PPOConfig
from rlhf.data.rendering import Renderer, load_renderer
from rlhf.data.rows import PromptRow
from rlhf.environments import Environment, build_environment, check_rendering
from rlhf.errors import ConfigError
from rlhf.gates import Approved
from rlhf.modeling.base import context_of, load_policy
from rlhf.modeling.critic import Critic, critic_from, freeze
from rlhf.modeling.lora import CRITIC, REWARD, copy_adapter, lora_config, named_targets
from rlhf.modeling.reward import Scorer, load_reward_model
from rlhf.modeling.shared import AdapterCritic, HeadCritic, SharedScorer
from rlhf.ppo.models import Models
from rlhf.ranks import Ranks


def load_models(
    config: PPOConfig,
    sft: Path,
    reward_model: Approved[Path] | None,
    seed: int,
    device: torch.device,
    rows: Sequence[PromptRow] = (),
) -> tuple[Models, Environment, Renderer]:
    """Load the models, environment and renderer of a PPO run.

    The environment, which scores replies, is built here because it shares the loaded reward model
    with the critic and the policy.

    Args:
        config: Determines the models and what they share.
        sft: Folder of the starting policy.
        reward_model: Folder of the approved reward model; None for an environment without one.
        seed: Seed of torch's global generator, which initialises adapters.
        device: Device of the models.
        rows: Training prompts, which the environment checks.

    Raises:
        ConfigError: A reward model is required and missing, or does not fit the policy or, with
            `shared_base`, its weights; or the environment does not work.
    """
    torch.manual_seed(seed)
    # Effectively no timeout: a dead process is detected by its closed connections.
    timeout = InitProcessGroupKwargs(timeout=timedelta(days=7))
    accelerator = Accelerator(cpu=device.type == "cpu", kwargs_handlers=[timeout])
    ranks = Ranks(accelerator.process_index, accelerator.num_processes, accelerator.device)
    renderer = load_renderer(sft)
    policy, reference = _load_policy_and_reference(config, sft)
    context = context_of(policy)
    scorer = None
    if reward_model is not None:
        folder = reward_model.subject
        if config.shared_base:
            scorer = SharedScorer(policy, sft, folder, device, context, config.precision)
        else:
            scorer = Scorer(folder, device, context, precision=config.precision)
        check_rendering(renderer, folder, scorer)
    environment = build_environment(
        config, scorer, renderer, rows, device=device, context=context, ranks=ranks,
    )  # fmt: skip
    critic = _load_critic(config, sft, policy, renderer, scorer, reward_model)
    models = Models(config, policy, reference, critic, accelerator, ranks)
    return models, environment, renderer


def _load_policy_and_reference(config: PPOConfig, sft: Path) -> tuple[Any, Any]:
    """Load the policy, and a reference unless the policy with its adapters off is one."""
    policy = load_policy(sft)
    if not config.lora:
        return policy, freeze(load_policy(sft))
    with named_targets("ppo", config.lora):
        adapted = peft.get_peft_model(policy, lora_config(config.lora, "CAUSAL_LM", dropout=0.0))
    return adapted, None


def _load_critic(
    config: PPOConfig, sft: Path, policy: Any, renderer: Renderer, scorer: Scorer | None,
    reward_model: Approved[Path] | None,
) -> Critic:  # fmt: skip
    """Load the critic that `config.critic` names."""
    if config.critic == "policy":
        return critic_from(load_policy(sft))
    if config.critic == "head":
        return HeadCritic(policy.config.hidden_size)
    if config.critic == "adapter":
        assert config.lora is not None
        policy.add_adapter(CRITIC, lora_config(config.lora, "CAUSAL_LM", dropout=0.0))
        return AdapterCritic(policy)
    if scorer is None or reward_model is None:
        raise ConfigError(
            "ppo.critic = 'reward_model', but there is none; set ppo.critic to "
            + ("adapter" if config.shared_base else "policy")
        )
    if scorer.renderer.template_hash != renderer.template_hash:
        raise ConfigError(
            f"ppo.critic = 'reward_model', but {str(reward_model.subject)!r} has another tokenizer "
            "than the policy; set ppo.critic to policy"
        )
    if config.shared_base:
        copy_adapter(policy, REWARD, CRITIC)
        return AdapterCritic(policy)
    return critic_from(load_reward_model(reward_model.subject, scorer.renderer))
