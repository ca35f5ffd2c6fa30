"""Our side of `benchmarks.ppo`: the product's PPOTrainer on the workload.

All that the benchmark knows of the trainer's inside stands here: it is driven phase by phase.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.side import Clock, Update
from benchmarks.workload import CONTEXT, LORA, Workload, load_biased_policy, text_of
from rlhf.config import PPOConfig
from rlhf.data.rendering import load_renderer
from rlhf.data.rows import PromptRow
from rlhf.environments import Reply, Scored
from rlhf.modeling.critic import Critic, critic_from, freeze
from rlhf.modeling.lora import CRITIC, REWARD, copy_adapter, lora_config
from rlhf.modeling.reward import Scorer, load_reward_model
from rlhf.modeling.shared import AdapterCritic, SharedScorer
from rlhf.ppo.models import Models
from rlhf.ppo.optimise import optimise
from rlhf.ppo.trainer import PPOTrainer

CPU = torch.device("cpu")


class TokenReward:
    """The reward model's score of just the tokens that the policy wrote, as TRL scores them.

    The product's own reward ends every reply with an end token; a reply that was cut has none.
    """

    replies_per_prompt = 1
    needs_reference_reply = False
    needs_reward_model = True
    stop = None

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    def text(self, ids: Sequence[int]) -> str:
        """A reply's text, all of it."""
        return self.scorer.renderer.decode(list(ids))

    def state_dict(self) -> dict[str, Any]:
        """Nothing changes."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing changes."""

    def __call__(self, batch: Sequence[Reply]) -> Scored:
        """Score every reply with its own prompt."""
        renderer = self.scorer.renderer
        rows = []
        for reply in batch:
            encoded = renderer.encode(reply.prompt, reply.response, CONTEXT)
            rows.append(encoded.ids if reply.finished else encoded.ids[:-1])
        scores = self.scorer.score_ids(rows)
        return Scored(scores, {"reward_model": scores}, {"reward_model": scores})


def configuration(work: Workload) -> PPOConfig:
    """The counterpart of TRL's settings; `work.ours` wins."""
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
        "max_grad_norm": None,  # TRL ignores its own
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


def each_by_itself(config: PPOConfig, folder: Path, seed: int) -> tuple[Any, Any, Critic, Scorer]:
    """Policy, reference, critic and reward model, as TRL has them."""
    policy, reference = load_biased_policy(folder), None
    if config.lora:
        torch.manual_seed(seed)  # of the adapters
        policy = peft.get_peft_model(policy, lora_config(config.lora, "CAUSAL_LM", dropout=0.0))
    else:
        reference = freeze(load_biased_policy(folder))
    classifier = load_reward_model(folder / "reward", load_renderer(folder / "policy"))
    critic = critic_from(classifier)
    with torch.no_grad():  # TRL's critic starts with the reward model's head, without bias
        critic.value_head.weight.copy_(classifier.score.weight)
    critic.value_head.bias.requires_grad_(False)
    return policy, reference, critic, Scorer(folder / "reward", CPU, CONTEXT)


def on_one_base(config: PPOConfig, folder: Path, seed: int) -> tuple[Any, None, Critic, Scorer]:
    """The same four as adapters on one base, or as that base alone: the reference."""
    assert config.lora is not None
    torch.manual_seed(seed)
    policy: Any = load_biased_policy(folder)
    policy = peft.get_peft_model(policy, lora_config(config.lora, "CAUSAL_LM", dropout=0.0))
    scorer = SharedScorer(policy, folder / "policy", folder / "shared", CPU, CONTEXT)
    copy_adapter(policy, REWARD, CRITIC)
    return policy, None, AdapterCritic(policy), scorer


class OurSide:
    """The product's trainer; `update` does one update on given prompts.

    `compare` also computes what only the comparison needs, outside the clock.
    """

    def __init__(self, work: Workload, folder: Path, compare: bool) -> None:
        self.work, self.compare = work, compare
        config, renderer = configuration(work), load_renderer(folder / "policy")
        four = on_one_base if config.shared_base else each_by_itself
        policy, reference, critic, scorer = four(config, folder, work.seed)
        models = Models(config, policy, reference, critic, Accelerator(cpu=True))
        reward: Any = TokenReward(scorer)
        self.trainer = PPOTrainer(config, models, reward, renderer, work.seed)

    def update(self, number: int, prompts: list[list[int]]) -> Update:
        """One update on these prompts, with the sampling seed that the other side has."""
        trainer, seed = self.trainer, self.work.sampling_seed(number)
        rows = [PromptRow(text_of(ids)) for ids in prompts]
        trainer.models.set_learning_rates(number)
        clock = Clock()
        rollouts = trainer.sample(rows, seed=seed)
        trainer.free()
        clock.mark("rollout")
        trainer.score(rollouts)
        buffer, _, _ = trainer.evaluate(rollouts)
        trainer.free()
        clock.mark("scoring")
        replies, tensors = rollouts.replies, {}
        if self.compare:
            with torch.no_grad():
                reference = trainer.models.reference_log_probs(replies)
            tensors = {
                "log_probs": buffer.log_probs,
                "reference_log_probs": reference,
                "values": buffer.values[:, :-1],
                "advantages": buffer.advantages,
            }
        aside = Clock()  # what the comparison needs is no part of the update
        optimise(buffer, trainer.models, seed + 1)
        trainer.free()
        aside.mark("optimisation")
        return Update(
            clock.wall | aside.wall, clock.cpu | aside.cpu, prompts, replies.rows(),
            replies.mask.cpu(), tensors, self._weights,
        )  # fmt: skip

    def _weights(self) -> dict[str, Tensor]:
        """Trained weights, named as on TRL's side."""
        names = {"backbone.": "model.", "value_head.": "score."}
        parameters = self.trainer.models.parameters
        found = {f"policy.{n}": p.detach() for n, p in parameters["policy"].items()}
        for name, parameter in parameters["critic"].items():
            ours, theirs = next(pair for pair in names.items() if name.startswith(pair[0]))
            found[f"critic.{theirs}{name.removeprefix(ours)}"] = parameter.detach()
        return found
