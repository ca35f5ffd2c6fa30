"""Workload of `benchmarks.ppo`: models, tokenizer, prompts and reply lengths."""

from __future__ import annotations

import math
import random
import re
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rlhf.config import LoraConfig
from rlhf.data.rendering import END, PAD, load_renderer
from rlhf.errors import ConfigError
from rlhf.files import read_json, write_json
from rlhf.modeling.base import load_policy
from rlhf.modeling.lora import ADAPTER_FOLDER, lora_config, save_adapter
from rlhf.modeling.reward import load_reward_model, save_reward_model
from rlhf.modeling.weights import weights_digest

PROMPT_TOKENS = (16, 32)
CONTEXT = 256
NEVER = -100.0
#: Chat template that adds nothing to the prompt.
BARE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
LORA = LoraConfig(r=16, alpha=32, dropout=0.0)


@dataclass(frozen=True)
class Size:
    """Architecture of a Llama-type model, and the shape of one PPO update on it."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocab: int
    batch: int
    new_tokens: int
    epochs: int
    key_value_heads: int | None = None

    @property
    def body(self) -> int:
        """Return the weights of all layers, which multiply every token."""
        shared = (self.key_value_heads or self.heads) / self.heads
        attention = 2 * self.hidden**2 + 2 * int(shared * self.hidden**2)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head(self) -> int:
        """Return the weights of the language-model head, tied to the embedding."""
        return self.hidden * self.vocab

    @property
    def parameters(self) -> int:
        """Return the number of weights, norms excepted."""
        return self.body + self.head


SIZES = {
    "2m": Size(128, 5, 4, 352, 8_192, batch=32, new_tokens=64, epochs=4),
    "15m": Size(288, 6, 6, 768, 32_000, batch=16, new_tokens=48, epochs=2),
    "124m": Size(768, 12, 12, 2_048, 50_257, batch=8, new_tokens=32, epochs=2),
    "500m": Size(1_024, 24, 16, 5_120, 32_000, batch=64, new_tokens=128, epochs=2),
}


@dataclass(frozen=True)
class Workload:
    """Settings of a benchmark run; `batch` and `new_tokens` override the size's.

    `model` is the folder of a real model, which takes the place of a random one of the size.
    """

    size_name: str = "2m"
    lengths: Literal["full", "varying"] = "full"
    mode: Literal["exact", "fast"] = "exact"
    lora: bool = False
    updates: int = 4
    seed: int = 0
    micro_batch: int | None = None
    learning_rate: float = 1e-5
    kl_coef: float = 0.05
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    value_loss_coef: float = 0.5
    missing_eos_penalty: float = 1.0
    ours: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    batch: int | None = None
    new_tokens: int | None = None
    prompt_tokens: tuple[int, int] = PROMPT_TOKENS
    model: str | None = None

    @property
    def size(self) -> Size:
        size = size_of(self.model) if self.model else SIZES[self.size_name]
        return replace(
            size, batch=self.batch or size.batch, new_tokens=self.new_tokens or size.new_tokens
        )

    @property
    def context(self) -> int:
        """Return the positions of the models.

        A prompt may fill half of them, and an end token must fit.
        """
        longest = self.prompt_tokens[1]
        return max(CONTEXT, 2 * longest, longest + self.size.new_tokens + 1)

    @property
    def comparable(self) -> bool:
        """Return whether both sides must compute the same numbers."""
        return self.mode == "exact" and not self.lora

    def sampling_seed(self, update: int) -> int:
        """Return the seed of torch's generator before an update's sampling."""
        return 1_000_003 * (self.seed + 1) + update

    def prompts(self) -> list[list[int]]:
        """Return token ids of prompts, more than the run needs.

        TRL's loader must never start over.
        """
        rng = random.Random(self.seed)
        words = [*words_of(self.model)] if self.model else range(2, self.size.vocab)
        return [
            rng.choices(words, k=rng.randint(*self.prompt_tokens))
            for _ in range((self.updates + 2) * self.size.batch)
        ]

    def text_of(self, ids: list[int]) -> str:
        """Return text that the tokenizer encodes as these ids."""
        return "".join(words_of(self.model)[i] for i in ids) if self.model else text_of(ids)


def write_models(work: Workload, folder: Path) -> None:
    """Write policy and reward model, their tokenizer, and the head's bias.

    A real model's reward model has a random head.
    """
    torch.manual_seed(work.seed)
    tokenizer: Any
    if work.model:
        policy, tokenizer = load_policy(work.model), real_tokenizer(work.model)
    else:
        policy, tokenizer = LlamaForCausalLM(architecture(work)), word_tokenizer(work.size.vocab)
    policy.save_pretrained(folder / "policy")
    end = int(tokenizer.eos_token_id)
    write_json(folder / "bias.json", {str(i): b for i, b in biases(policy, work, end).items()})
    del policy
    if work.model:
        classifier: Any = AutoModelForSequenceClassification.from_pretrained(
            work.model, num_labels=1, dtype=torch.float32
        )
        classifier.config.pad_token_id = tokenizer.pad_token_id
    else:
        classifier = LlamaForSequenceClassification(architecture(work))
    classifier.save_pretrained(folder / "reward")
    for name in ("policy", "reward"):
        tokenizer.save_pretrained(folder / name)
    if work.lora:
        write_adapter(folder)


def architecture(work: Workload) -> LlamaConfig:
    """Return the configuration of policy and reward model."""
    size = work.size
    config = LlamaConfig(
        vocab_size=size.vocab, hidden_size=size.hidden, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.heads,
        intermediate_size=size.intermediate, max_position_embeddings=work.context,
        tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    config.num_labels = 1
    return config


def word_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word.

    Text and tokens then always agree, and the time measured is PPO's.
    """
    words = {PAD: 0, END: 1, **{f"w{i}": i for i in range(2, vocab)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, padding_side="left",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.chat_template = BARE
    return fast


@cache
def size_of(model: str) -> Size:
    """Return the size of a model of Llama's architecture, with a small update."""
    config: Any = AutoConfig.from_pretrained(model)
    return Size(
        config.hidden_size, config.num_hidden_layers, config.num_attention_heads,
        config.intermediate_size, config.vocab_size, batch=8, new_tokens=32, epochs=2,
        key_value_heads=config.num_key_value_heads,
    )  # fmt: skip


def real_tokenizer(model: str) -> Any:
    """Return a model's tokenizer as both sides use it: padding is token 0, prompts stand bare.

    Raises:
        ConfigError: Token 0 may occur in texts, or is the end token.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    if 0 not in tokenizer.all_special_ids or tokenizer.eos_token_id == 0:
        raise ConfigError(f"--model {model}: token 0 is no control token that can be padding")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.padding_side = "left"
    tokenizer.chat_template = BARE
    return tokenizer


@cache
def words_of(model: str) -> dict[int, str]:
    """Return tokens that are a word with its space, which any sequence of them encodes as."""
    tokenizer = real_tokenizer(model)
    texts = {i: tokenizer.decode([i]) for i in range(len(tokenizer))}
    words = {i: text for i, text in texts.items() if re.fullmatch(" [a-z]{3,}", text)}
    return {i: text for i, text in words.items() if tokenizer(text).input_ids == [i]}


def biases(policy: Any, work: Workload, end: int = 1) -> dict[int, float]:
    """Return the biases of the logits by token.

    They rule out padding, and the end token's sets the reply lengths.
    """
    return {0: NEVER, end: end_bias(policy, work, end)}


@torch.no_grad()
def end_bias(policy: Any, work: Workload, end: int = 1) -> float:
    """Return the bias of the end token's logit.

    Full lengths: it is never drawn. Varying: replies have a third of the cap on average, measured
    on random text, because a random model's logits hardly depend on their input.
    """
    if work.lengths == "full":
        return NEVER
    rows = torch.tensor([(p * 2)[:16] for p in work.prompts()[:16]], device=policy.device)
    logits = policy(input_ids=rows, use_cache=False).logits.double()
    share = end_share(work.size.new_tokens)
    return float(
        math.log(share / (1 - share)) + logits.logsumexp(-1).mean() - logits[..., end].mean()
    )


def end_share(cap: int) -> float:
    """Return p of a geometric length, cut at `cap`, with mean cap/3.

    The mean is (1 − (1 − p)^cap) / p.
    """
    low, high = 1e-6, 1.0
    for _ in range(60):
        p = (low + high) / 2
        low, high = (p, high) if (1 - (1 - p) ** cap) / p > cap / 3 else (low, p)
    return (low + high) / 2


def write_adapter(folder: Path) -> None:
    """Write a reward model that is an adapter on the policy's base."""
    classifier: Any = load_reward_model(folder / "policy", load_renderer(folder / "policy"))
    save_reward_model(
        classifier, load_renderer(folder / "policy"), folder / "shared",
        weights_digest(folder / "policy"),
    )  # fmt: skip
    save_adapter(
        peft.get_peft_model(classifier, lora_config(LORA, "SEQ_CLS")),
        folder / "shared" / ADAPTER_FOLDER,
    )


def load_biased_policy(folder: Path) -> Any:
    """Load the policy and add the saved bias to its head."""
    saved = read_json(folder / "bias.json")
    return add_bias(load_policy(folder / "policy"), {int(i): b for i, b in saved.items()})


def add_bias(policy: Any, biases: dict[int, float]) -> Any:
    """Add a frozen bias to the policy's head; its weight stays tied to the embedding."""
    embedding = policy.get_input_embeddings().weight
    head = nn.Linear(1, 1, bias=True)
    head.in_features, head.out_features = embedding.shape[1], embedding.shape[0]
    head.weight = embedding
    bias = torch.zeros(embedding.shape[0], device=embedding.device)
    for token, value in biases.items():
        bias[token] = value
    head.bias = nn.Parameter(bias, requires_grad=False)
    policy.lm_head = head
    return policy


def text_of(ids: list[int]) -> str:
    """Return text that the tokenizer encodes as these ids."""
    return " ".join(f"w{i}" for i in ids)


def as_json(work: Workload) -> dict[str, Any]:
    """Return the workload's settings and sizes as JSON."""
    return {**asdict(work), "size": {**asdict(work.size), "parameters": work.size.parameters}}
