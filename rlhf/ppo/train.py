"""Stage: PPO. Updates, checkpoints, and the exact resume from one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import peft
import torch
from accelerate import Accelerator

from rlhf.config import PPOConfig, RuntimeConfig
from rlhf.data.rendering import load_renderer
from rlhf.data.rows import PROMPTS_TRAIN, PromptRow, read_rows
from rlhf.environments import build_environment, check_rendering
from rlhf.errors import ConfigError, DataError
from rlhf.gates import Approved
from rlhf.modeling.base import device_of, load_policy
from rlhf.modeling.critic import critic_from, freeze
from rlhf.modeling.lora import lora_config, merged
from rlhf.modeling.reward import Scorer, load_reward_model
from rlhf.ppo.checkpoint import TrainState, load_checkpoint, save_checkpoint
from rlhf.ppo.trainer import PPOTrainer, mix
from rlhf.progress import Progress, silent
from rlhf.stage import StageResult, write_json


def train_policy(
    config: PPOConfig,
    data: Path,
    sft: Path,
    reward_model: Approved[Path],
    out_dir: Path,
    *,
    seed: int = 0,
    identity: Mapping[str, str] | None = None,
    checkpoints: Path | None = None,
    runtime: RuntimeConfig | None = None,
    progress: Progress = silent,
) -> StageResult:
    """Optimise the SFT policy against the reward model and write the result to `out_dir`.

    Args:
        config: Hyper-parameters.
        data: A dataset folder as `prepare_data` writes it; its training prompts are used.
        sft: Folder of the starting policy, which is the KL reference too.
        reward_model: Folder of a reward model that passed its gate (`rlhf.gates.require`).
        out_dir: Empty folder for the policy; `curve.json` has a row per update.
        seed: Seeds prompt order and sampling.
        identity: Names and digests of the inputs; a checkpoint with others is refused.
        checkpoints: Folder to save to and resume from; none trains without.
        runtime: Device and threads.
        progress: Told of every update.

    Raises:
        ConfigError: Rendering mismatch, or a checkpoint of other inputs.
        DataError: There are no prompts.
        TrainingError: A loss or score is not finite.
    """
    device = device_of(runtime or RuntimeConfig())
    rows = read_rows(data / PROMPTS_TRAIN, PromptRow)
    trainer = _trainer(config, sft, reward_model.subject, seed, device, rows)
    if not rows:
        raise DataError("no prompts to train the policy on; check data.source")
    models = {"policy": trainer.policy, "critic": trainer.critic}
    full_identity = {**(identity or {}), "config": _digest(config), "seed": str(seed)}
    state = TrainState()
    if checkpoints:
        state = load_checkpoint(checkpoints, models, trainer.optimizer, full_identity)
    if state.environment:
        trainer.environment.load_state_dict(state.environment)
    while state.update < config.updates:
        batch = prompts_of_update(rows, state.update, config, seed)
        metrics = trainer.update(state.update, batch)
        state.update += 1
        state.curve.append({"update": state.update, **metrics})
        progress(state.update, config.updates, metrics)
        if checkpoints and state.update % config.checkpoint_every == 0:
            state.environment = trainer.environment.state_dict()
            save_checkpoint(checkpoints, state, models, trainer.optimizer, full_identity)
    policy = merged(trainer.accelerator.unwrap_model(trainer.policy))
    policy.save_pretrained(out_dir)
    trainer.renderer.tokenizer.save_pretrained(out_dir)
    write_json(out_dir / "curve.json", state.curve)
    last = state.curve[-1]
    return StageResult(
        {"updates": state.update, **{k: last[k] for k in ("reward", "kl", "tokens", "eos_rate")}}
    )


def _trainer(
    config: PPOConfig, sft: Path, reward_model: Path, seed: int, device: torch.device,
    rows: Sequence[PromptRow] = (),
) -> PPOTrainer:  # fmt: skip
    torch.manual_seed(seed)
    accelerator = Accelerator(cpu=device.type == "cpu")
    renderer = load_renderer(sft)
    policy = load_policy(sft)
    scorer = Scorer(reward_model, device, policy.config.max_position_embeddings)
    check_rendering(renderer, reward_model, scorer)
    if config.critic == "reward_model":
        if scorer.renderer.template_hash != renderer.template_hash:
            raise ConfigError(
                f"ppo.critic = 'reward_model', but {str(reward_model)!r} has another tokenizer "
                "than the policy; set ppo.critic to policy"
            )
        critic = critic_from(load_reward_model(reward_model, scorer.renderer))
    else:
        critic = critic_from(load_policy(sft))
    reference = None
    if config.lora:
        policy = peft.get_peft_model(policy, lora_config(config.lora, "CAUSAL_LM", dropout=0.0))
    else:
        reference = freeze(load_policy(sft)).to(device)
    environment = build_environment(
        config, scorer, renderer, rows, device=device, context=policy.config.max_position_embeddings
    )
    return PPOTrainer(config, policy, reference, critic, environment, renderer, accelerator, seed)


def prompts_of_update(
    rows: list[PromptRow], update: int, config: PPOConfig, seed: int
) -> list[PromptRow]:
    """The prompts of one update: a fresh seeded shuffle for every pass over the data.

    Episodes are replies, several to a prompt in some environments.
    """
    chosen: list[PromptRow] = []
    order: list[int] = []
    per_prompt = config.replies_per_prompt
    chunk, total = config.chunk_size // per_prompt, config.total_episodes // per_prompt
    for episode in range(update * chunk, min((update + 1) * chunk, total)):
        lap, position = divmod(episode, len(rows))
        if not order or position == 0:
            generator = torch.Generator().manual_seed(mix(seed, lap))
            order = torch.randperm(len(rows), generator=generator).tolist()
        chosen.append(rows[order[position]])
    return chosen


def _digest(config: PPOConfig) -> str:
    # Where and how often to checkpoint changes nothing that is learnt.
    return hashlib.sha256(config.model_dump_json(exclude={"checkpoint_every"}).encode()).hexdigest()
