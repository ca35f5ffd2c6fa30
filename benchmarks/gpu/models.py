"""Random models of a PPO run, created on the device; no large file is written."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from benchmarks.gpu.section import Context
from benchmarks.ppo import workload
from benchmarks.ppo.ours import configuration, share_base, trainer_of, trl_critic
from benchmarks.ppo.workload import LORA, Size, Workload, add_bias, architecture, biases, text_of
from rlhf.config import PPOConfig
from rlhf.data.rows import PromptRow
from rlhf.files import write_json
from rlhf.modeling.critic import Critic, freeze
from rlhf.modeling.lora import ADAPTER_FOLDER, lora_config, save_adapter
from rlhf.modeling.reward import BASE_WEIGHTS, META, Scorer
from rlhf.modeling.weights import weights_digest
from rlhf.ppo.trainer import PPOTrainer, Rollouts

TINY = Size(64, 2, 4, 128, 500, batch=4, new_tokens=8, epochs=2)
workload.SIZES.setdefault("tiny", TINY)


@dataclass(frozen=True)
class Scale:
    """Sizes of the speed sections' work."""

    prompt_tokens: int = 128
    new_tokens: int = 128
    batch: int = 64
    rows: tuple[int, ...] = (8, 64, 256)
    repeats: int = 2
    updates: int = 2
    micro_batch: int = 16
    profiled_tokens: tuple[int, int] = (8, 24)
    #: First and last number of rows of the search for the largest batch, which doubles them.
    decode_from: int = 512
    decode_to: int = 8192
    micro_to: int = 512


FULL = Scale()
SMALL = Scale(
    prompt_tokens=8, new_tokens=8, batch=4, rows=(2, 4), repeats=1, updates=1, micro_batch=2,
    profiled_tokens=(2, 4), decode_from=4, decode_to=8, micro_to=4,
)  # fmt: skip


def build(work: Workload, folder: Path, **options: Any) -> PPOTrainer:
    """Build the product's trainer with random models.

    `folder` gets tokenizers and adapters. `options` are fields of the ppo section and win over the
    workload's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = workload.word_tokenizer(work.size.vocab)
    for name in ("policy", "reward"):
        tokenizer.save_pretrained(folder / name)
    config = configuration(dataclasses.replace(work, ours={**work.ours, **options}))
    torch.manual_seed(work.seed)
    with torch.device(work.device):
        policy = LlamaForCausalLM(architecture(work)).eval()
        classifier = LlamaForSequenceClassification(architecture(work)).eval()
    policy = add_bias(policy, biases(policy, work))
    if config.shared_base:
        parts = _on_one_base(config, policy, classifier, folder, work)
    else:
        parts = _each_by_itself(config, policy, classifier, folder, work)
    return trainer_of(config, parts, folder, work)


def _each_by_itself(
    config: PPOConfig, policy: Any, classifier: Any, folder: Path, work: Workload
) -> tuple[Any, Any, Critic, Scorer]:
    reference = freeze(copy.deepcopy(policy))
    if config.lora:
        policy = peft.get_peft_model(policy, lora_config(config.lora, "CAUSAL_LM", dropout=0.0))
        reference = None
    critic = trl_critic(copy.deepcopy(classifier))
    classifier.pooling, classifier.marker = "last", None
    device = torch.device(work.device)
    scorer = Scorer(
        folder / "reward", device, work.context, model=classifier, precision=config.precision
    )
    return policy, reference, critic, scorer


def _on_one_base(
    config: PPOConfig, policy: Any, classifier: Any, folder: Path, work: Workload
) -> tuple[Any, Any, Critic, Scorer]:
    """Share the policy as base: write the reward model as an adapter alone."""
    workload.word_tokenizer(work.size.vocab).save_pretrained(folder / "shared")
    # The folder has no weights: both digests are the digest of no file.
    write_json(
        folder / "shared" / META,
        {"pooling": "last", BASE_WEIGHTS: weights_digest(folder / "policy")},
    )
    adapted = peft.get_peft_model(classifier, lora_config(LORA, "SEQ_CLS"))
    save_adapter(adapted, folder / "shared" / ADAPTER_FOLDER)
    return share_base(config, policy, folder, work)


def sample(trainer: PPOTrainer, rows: list[PromptRow], tokens: int, seed: int = 0) -> Rollouts:
    """Sample a rollout with `tokens` as the longest reply."""
    before = trainer.sampling
    trainer.sampling = dataclasses.replace(before, max_new_tokens=tokens)
    try:
        return trainer.sample(rows, seed=seed)
    finally:
        trainer.sampling = before


def work_of(
    context: Context, size: str, lengths: Literal["full", "varying"] = "full", **changes: Any
) -> Workload:
    """Return the workload of the speed sections; all prompts have one length."""
    scale = scale_of(context)
    values: dict[str, Any] = {
        "mode": "fast", "updates": 4, "micro_batch": scale.micro_batch, "batch": scale.batch,
        "new_tokens": scale.new_tokens, "prompt_tokens": (scale.prompt_tokens,) * 2,
        "device": context.device, **changes,
    }  # fmt: skip
    return Workload("tiny" if context.tiny else size, lengths, **values)


def scale_of(context: Context) -> Scale:
    """Return the full sizes, or the smoke test's."""
    return SMALL if context.tiny else FULL


def rows_of(work: Workload, count: int) -> list[PromptRow]:
    """Return random prompts as text."""
    prompts = dataclasses.replace(work, batch=count, updates=1).prompts()
    return [PromptRow(text_of(ids)) for ids in prompts[:count]]
