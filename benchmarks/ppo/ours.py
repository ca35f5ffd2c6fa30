"""Our side of `benchmarks.ppo`: the product's PPOTrainer, driven phase by phase.

Only this module of the benchmark depends on the trainer's internals.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.ppo.process import Clock, Update
from benchmarks.ppo.workload import LORA, Workload, load_biased_policy
from rlhf.config import PPOConfig
from rlhf.data.rendering import load_renderer
from rlhf.data.rows import PromptRow
from rlhf.environments import Reply, Scored
from rlhf.modeling.critic import AdapterCritic, Critic, critic_from, freeze
from rlhf.modeling.lora import CRITIC, REWARD, copy_adapter, lora_config
from rlhf.modeling.reward import Scorer, SharedScorer, load_reward_model
from rlhf.ppo.models import Models
from rlhf.ppo.optimisation import optimise
from rlhf.ppo.trainer import PPOTrainer


class OurSide:
    """The product's trainer on the workload.

    `compare` also computes what only the comparison needs, outside the clock.
    """

    def __init__(self, work: Workload, folder: Path, compare: bool) -> None:
        self.work, self.compare = work, compare
        config = configuration(work)
        four = on_one_base if config.shared_base else each_by_itself
        self.trainer = trainer_of(config, four(config, folder, work), folder, work)

    def update(self, number: int, prompts: list[list[int]]) -> Update:
        """Run one update on these prompts."""
        return run_update(self.trainer, self.work, number, prompts, self.compare)


def configuration(work: Workload) -> PPOConfig:
    """Return the counterpart of TRL's settings; `work.ours` wins."""
    size = work.size
    fast = {"sampler": "inverse_cdf", "precision": "bf16"}
    exact = {"sampler": "multinomial", "precision": "fp32"}
    values: dict[str, Any] = {
        "compat": "trl",
        "total_episodes": work.updates * size.batch,
        "chunk_size": size.batch,
        "mini_batch_size": size.batch,
        "num_ppo_epochs": size.epochs,
        "max_new_tokens": size.new_tokens,
        "top_k": 0,
        "learning_rate": work.learning_rate,
        "lr_scheduler": "constant",
        "adam_beta2": 0.999,
        "max_grad_norm": None,  # TRL 1.12 does not clip, whatever its max_grad_norm
        "kl_coef": work.kl_coef,
        "gamma": work.gamma,
        "gae_lambda": work.gae_lambda,
        "clip_range": work.clip_range,
        "value_clip_range": work.value_clip_range,
        "value_loss_coef": work.value_loss_coef,
        "missing_eos_penalty": work.missing_eos_penalty,
        **(exact if work.mode == "exact" else fast),
    }
    if work.micro_batch:
        values["micro_batch_size"] = work.micro_batch
    if work.lora:
        values.update(lora=LORA, shared_base=True)
    return PPOConfig(**{**values, **work.ours})


def each_by_itself(
    config: PPOConfig, folder: Path, work: Workload
) -> tuple[Any, Any, Critic, Scorer]:
    """Return policy, reference, critic and reward model as four models."""
    device = torch.device(work.device)
    policy, reference = load_biased_policy(folder), None
    if config.lora:
        torch.manual_seed(work.seed)  # for the adapters
        policy = peft.get_peft_model(policy, lora_config(config.lora, "CAUSAL_LM", dropout=0.0))
    else:
        reference = freeze(load_biased_policy(folder))
    classifier = load_reward_model(folder / "reward", load_renderer(folder / "policy"))
    critic = trl_critic(classifier)
    scorer = Scorer(folder / "reward", device, work.context, precision=config.precision)
    return policy, reference, critic, scorer


def trl_critic(classifier: Any) -> Critic:
    """Return the critic as TRL makes it: the reward model's head, without bias."""
    critic = critic_from(classifier)
    with torch.no_grad():
        critic.value_head.weight.copy_(classifier.score.weight)
    critic.value_head.bias.requires_grad_(False)
    return critic


def on_one_base(
    config: PPOConfig, folder: Path, work: Workload
) -> tuple[Any, None, Critic, Scorer]:
    """Return the four models as adapters on one base.

    The base alone is the reference.
    """
    torch.manual_seed(work.seed)
    return share_base(config, load_biased_policy(folder), folder, work)


def share_base(
    config: PPOConfig, base: Any, folder: Path, work: Workload
) -> tuple[Any, None, Critic, Scorer]:
    """Put adapters of policy, reward model and critic on a base in memory."""
    assert config.lora is not None
    policy: Any = peft.get_peft_model(base, lora_config(config.lora, "CAUSAL_LM", dropout=0.0))
    device = torch.device(work.device)
    scorer = SharedScorer(
        policy, folder / "policy", folder / "shared", device, work.context, config.precision
    )
    copy_adapter(policy, REWARD, CRITIC)
    return policy, None, AdapterCritic(policy), scorer


def trainer_of(
    config: PPOConfig, parts: tuple[Any, Any, Critic, Scorer], folder: Path, work: Workload
) -> PPOTrainer:
    """Return the product's trainer of policy, reference, critic and reward model."""
    policy, reference, critic, scorer = parts
    accelerator = Accelerator(cpu=work.device == "cpu")
    models = Models(config, policy, reference, critic, accelerator)
    reward: Any = TokenReward(scorer)
    return PPOTrainer(config, models, reward, load_renderer(folder / "policy"), work.seed)


class TokenReward:
    """Reward model's score of the sampled tokens alone, as TRL computes it.

    The product's own reward ends every reply with an end token; a reply that was cut has none.
    """

    replies_per_prompt = 1
    needs_reference_reply = False
    needs_reward_model = True
    stop = None

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    def text(self, ids: Sequence[int]) -> str:
        """Return a reply's text, uncut."""
        return self.scorer.renderer.decode(list(ids))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def __call__(self, batch: Sequence[Reply]) -> Scored:
        """Score every reply with its own prompt."""
        renderer = self.scorer.renderer
        rows = []
        for reply in batch:
            encoded = renderer.encode(reply.prompt, reply.response, self.scorer.limits)
            rows.append(encoded.ids if reply.finished else encoded.ids[:-1])
        scores = self.scorer.score_ids(rows)
        return Scored(scores, {"reward_model": scores}, {"reward_model": scores})


def run_update(
    trainer: PPOTrainer, work: Workload, number: int, prompts: list[list[int]],
    compare: bool = False, clock: Clock | None = None,
) -> Update:  # fmt: skip
    """Run one update on these prompts, with TRL's sampling seed."""
    seed, clock = work.sampling_seed(number), clock or Clock(trainer.device)
    rows = [PromptRow(work.text_of(ids)) for ids in prompts]
    trainer.models.set_learning_rates(number)
    clock.start()
    rollouts = trainer.sample(rows, seed=seed)
    trainer.free()
    clock.mark("rollout")
    trainer.score(rollouts)
    buffer, _, _ = trainer.prepare_buffer(rollouts)
    trainer.free()
    clock.mark("scoring")
    replies, tensors = rollouts.replies, {}
    if compare:
        with torch.no_grad():
            reference = trainer.models.reference_log_probs(replies.to(trainer.device))
        tensors = {
            "log_probs": buffer.log_probs,
            "reference_log_probs": reference.to(buffer.log_probs.device),
            "values": buffer.values[:, :-1],
            "advantages": buffer.advantages,
        }
    clock.skip()  # exclude the comparison's own computations
    optimise(buffer, trainer.models, seed + 1)
    trainer.free()
    clock.mark("optimisation")
    return Update(
        clock.wall, clock.cpu, prompts, replies.rows(), replies.mask.cpu(), tensors,
        lambda: weights_of(trainer),
    )  # fmt: skip


def weights_of(trainer: PPOTrainer) -> dict[str, Tensor]:
    """Return the trained weights, under the names of TRL's side."""
    names = {"backbone.": "model.", "value_head.": "score."}
    parameters = trainer.models.parameters
    weights = {f"policy.{n}": p.detach() for n, p in parameters["policy"].items()}
    for name, parameter in parameters["critic"].items():
        ours, theirs = next(pair for pair in names.items() if name.startswith(pair[0]))
        weights[f"critic.{theirs}{name.removeprefix(ours)}"] = parameter.detach()
    return weights
