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
from rlhf.modeling.critic import critic_from, freeze
from rlhf.modeling.lora import lora_config
from rlhf.modeling.reward import Scorer, load_reward_model
from rlhf.ppo.rewards import Reply, Scored
from rlhf.ppo.rollout import log_probs_and_entropy
from rlhf.ppo.trainer import PPOTrainer


class TokenReward:
    """The reward model's score of just the tokens that the policy wrote, as TRL scores them.

    The product's own reward ends every reply with an end token; a reply that was cut has none.
    """

    def __init__(self, scorer: Scorer, missing_eos_penalty: float) -> None:
        self.scorer, self.missing_eos_penalty = scorer, missing_eos_penalty

    def __call__(self, batch: Sequence[Reply]) -> Scored:
        """Score every reply with its own prompt."""
        renderer = self.scorer.renderer
        rows = []
        for reply in batch:
            encoded = renderer.encode(reply.prompt, reply.response, CONTEXT)
            rows.append(encoded.ids if reply.finished else encoded.ids[:-1])
        scores = self.scorer.score_ids(rows)
        unfinished = torch.tensor([not r.finished for r in batch], dtype=scores.dtype)
        totals = scores - self.missing_eos_penalty * unfinished
        return Scored(totals, {"reward_model": scores})


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
        "lr_final_fraction": 1.0,
        "adam_beta2": 0.999,
        # TRL ignores its own; this is large enough never to clip.
        "max_grad_norm": 1e9,
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
        values["lora"] = LORA
    return PPOConfig(**{**values, **work.ours})


class OurSide:
    """The product's trainer; `update` does one update on given prompts.

    `compare` also computes what only the comparison needs, outside the clock.
    """

    def __init__(self, work: Workload, folder: Path, compare: bool) -> None:
        self.work, self.compare = work, compare
        config, renderer = configuration(work), load_renderer(folder / "policy")
        policy, reference = load_biased_policy(folder), None
        classifier = load_reward_model(folder / "reward", renderer)
        if config.lora:
            # Here policy, reference, critic and reward model will share one base.
            torch.manual_seed(work.seed)  # of the adapters
            policy = peft.get_peft_model(policy, lora_config(config.lora, "CAUSAL_LM", dropout=0.0))
        else:
            reference = freeze(load_biased_policy(folder))
        critic = critic_from(classifier)
        with torch.no_grad():  # TRL's critic starts with the reward model's head, without bias
            critic.value_head.weight.copy_(classifier.score.weight)
        critic.value_head.bias.requires_grad_(False)
        reward = TokenReward(
            Scorer(folder / "reward", torch.device("cpu"), CONTEXT), work.missing_eos_penalty
        )
        self.trainer = PPOTrainer(
            config, policy, reference, critic, reward, renderer, Accelerator(cpu=True), work.seed
        )

    def update(self, number: int, prompts: list[list[int]]) -> Update:
        """One update on these prompts, with the sampling seed that the other side has."""
        trainer, seed = self.trainer, self.work.sampling_seed(number)
        texts = [text_of(ids) for ids in prompts]
        trainer._set_learning_rates(1.0)
        clock = Clock()
        replies = trainer._sample(texts, seed=seed)  # pyright: ignore[reportArgumentType]
        clock.mark("rollout")
        decoded = [trainer.renderer.decode(row) for row in replies.rows()]
        scored = trainer._score(texts, decoded, replies)  # pyright: ignore[reportArgumentType]
        buffer, _ = trainer._evaluate(replies, scored)
        clock.mark("scoring")
        reference = self._reference(replies) if self.compare else buffer.log_probs
        aside = Clock()  # what the comparison needs is no part of the update
        trainer._optimise(buffer, seed=seed + 1)
        aside.mark("optimisation")
        tensors = {
            "log_probs": buffer.log_probs,
            "reference_log_probs": reference,
            "values": buffer.values,
            "advantages": buffer.advantages,
        }
        return Update(
            clock.wall | aside.wall, clock.cpu | aside.cpu, prompts, replies.rows(),
            replies.mask.cpu(), tensors, self._weights,
        )  # fmt: skip

    @torch.no_grad()
    def _reference(self, replies: Any) -> Tensor:
        return log_probs_and_entropy(self.trainer.reference, replies, 1.0)[0]

    def _weights(self) -> dict[str, Tensor]:
        """Trained weights, named as on TRL's side."""
        names = {"backbone.": "model.", "value_head.": "score."}
        found = {
            f"policy.{n}": p for n, p in self.trainer.policy.named_parameters() if p.requires_grad
        }
        for name, parameter in self.trainer.critic.named_parameters():
            if parameter.requires_grad:
                ours, theirs = next(pair for pair in names.items() if name.startswith(pair[0]))
                found[f"critic.{theirs}{name.removeprefix(ours)}"] = parameter
        return {n: p.detach() for n, p in found.items()}
