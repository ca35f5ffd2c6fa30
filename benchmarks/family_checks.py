"""Checks of one family in the matrix of families and stages (`benchmarks.families`).

Each check raises `Wrong` or whatever fails; otherwise it returns a note. They are a file of their
own because they run in the family's process, and nothing in them knows of limits or tables.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rlhf.config import (
    BaseModelConfig,
    LoraConfig,
    PPOConfig,
    RewardModelConfig,
    SFTConfig,
    load_config,
)
from rlhf.data.rendering import Renderer
from rlhf.data.rows import DEMONSTRATIONS, Demonstration, read_rows
from rlhf.modeling.agreement import hidden_of
from rlhf.modeling.base import context_length, load_base
from rlhf.modeling.critic import critic_from
from rlhf.modeling.decoders import check_exactness, decoder_of, pad_left
from rlhf.modeling.generate import Replies
from rlhf.modeling.logprobs import log_probs_and_entropy, reply_values
from rlhf.modeling.lora import POLICY, merge_adapter, parameters_of, with_adapter
from rlhf.modeling.reward import Scorer
from rlhf.modeling.structure import backbone_of, call, facts_of
from rlhf.modeling.tokenizer import load_tokenizer
from rlhf.ppo.train import train_policy
from rlhf.rehearsal import rehearse
from rlhf.rehearsal_rows import Sample
from rlhf.reward import train_reward_model
from rlhf.sft import train_sft
from tests.library import toys
from tests.library.families import make_model

#: Nats, and units of logits, scores and values, that float32 may differ by.
TOLERANCE = 1e-3

# The first is longer than the small windows and rotary limits of the families.
PROMPTS = [[(7 * i + 5) % 97 for i in range(26)], [8, 40, 11], [70, 6], [31, 18, 90, 22, 41], [15]]
REPLIES = [[20, 44, 9], [13, 52, 77, 30, 8, 26, 61], [10, 3, 88, 34], [29], [55, 42, 19, 84, 66]]

# Five steps on all rows at a learning rate that changes nothing: the loss logged is the base's.
SFT = SFTConfig(epochs=5, batch_size=16, learning_rate=1e-12, max_length=48)
REWARD = RewardModelConfig(epochs=1, batch_size=8, learning_rate=1e-3, max_length=48)
PPO = PPOConfig(
    total_episodes=8, chunk_size=8, mini_batch_size=4, num_ppo_epochs=1, learning_rate=1e-4,
    kl_coef=0.05, max_new_tokens=6, top_k=0,
)  # fmt: skip
LORA = LoraConfig(r=2, alpha=4.0)


class Wrong(Exception):
    """A result differs from the plain one."""


class NotRehearsed(Exception):
    """A family has no miniature, so nothing was tried before training."""


@dataclass
class Case:
    """One family's model and the folders of its stages."""

    family: str
    root: Path
    results: dict[str, str] = field(default_factory=dict)

    @property
    def base(self) -> Path:
        return self.root / "base"

    def model(self) -> Any:
        """Load the base as a stage does."""
        config = BaseModelConfig(path=str(self.base))
        return load_base(config, [], 0)[0].eval()

    def plain(self, folder: Path | None = None) -> Any:
        """Load a folder by transformers alone."""
        load: Any = AutoModelForCausalLM.from_pretrained
        model, info = load(folder or self.base, dtype=torch.float32, output_loading_info=True)
        lost = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
        if lost:
            raise Wrong(f"published weights: {lost[:2]}")
        return model.eval()

    def folder(self, name: str) -> Path:
        folder = self.root / name
        folder.mkdir()
        return folder


def _load(case: Case) -> str:
    """Load the base as SFT does, with the test of exactness; save and load it again."""
    make_model(case.family, 300).save_pretrained(case.base)
    shutil.copytree(case.root.parent / "tokenizer", case.base, dirs_exist_ok=True)
    model = case.model()
    check_exactness(model)
    _compare(logits_of(model, PROMPTS[0]), logits_of(case.plain(), PROMPTS[0]), "logits")
    return ""


def _log_probs(case: Case) -> str:
    """Compare log-probabilities and their gradients."""
    model, plain = case.model(), case.plain()
    ours, _ = log_probs_and_entropy(model, batch(), 1.0)
    theirs = [plain_log_probs(plain, p, r) for p, r in zip(PROMPTS, REPLIES, strict=True)]
    for i, row in enumerate(theirs):
        _compare(ours[i, : len(row)], row, "log-prob")
    (ours * batch().mask).sum().backward()
    torch.stack([t.sum() for t in theirs]).sum().backward()
    gradients = dict(plain.named_parameters())
    scale = max(float(p.grad.abs().max()) for p in gradients.values() if p.grad is not None)
    for name, parameter in model.named_parameters():
        other = gradients[name].grad
        if (parameter.grad is None) != (other is None):
            sizes = [0.0 if g is None else float(g.abs().max()) for g in (parameter.grad, other)]
            if any(sizes):
                raise Wrong(f"gradient of {name}: {sizes[0]:.3g}, plain {sizes[1]:.3g}")
        elif other is not None:
            assert parameter.grad is not None
            _compare(parameter.grad / scale, other / scale, f"gradient of {name}")
    return ""


def _values(case: Case) -> str:
    """Compare a critic's values with its head on the plain model's hidden states."""
    critic, plain = critic_from(case.model()), case.plain()
    nn.init.normal_(critic.value_head.weight)
    with torch.no_grad():
        ours = reply_values(critic, batch())
        for i, (p, r) in enumerate(zip(PROMPTS, REPLIES, strict=True)):
            theirs = critic.value_head(hidden_of(backbone_of(plain), [*p, *r])).squeeze(-1)
            _compare(ours[i, : len(r) + 1], theirs[len(p) - 1 :], "value")
    return ""


@torch.no_grad()
def _decode(case: Case) -> str:
    """Compare decoding, while rows end at different steps, with whole rows without a cache."""
    model, plain, steps = case.model(), case.plain(), 7
    tokens = [[(17 * i + 5 * step + 3) % 97 for step in range(steps)] for i in range(len(PROMPTS))]
    ends = {0: [3], 2: [0, 4], 4: [2]}
    decoder = decoder_of(model, PROMPTS, steps)
    logits, live = decoder.start(), list(range(len(PROMPTS)))
    for step in range(steps):
        for row, i in zip(logits, live, strict=True):
            _compare(row, logits_of(plain, [*PROMPTS[i], *tokens[i][:step]])[-1], "logit")
        if step in ends:
            live = [live[i] for i in decoder.drop([i in ends[step] for i in live])]
        logits = decoder.step(torch.tensor([tokens[i][step] for i in live]))
    kept = [k for k, v in facts_of(model).items() if k.startswith("decodes") and v.holds]
    return kept[-1].removeprefix("decodes ")


def _lora(case: Case) -> str:
    """Compare a random adapter on all linear layers with single rows, then publish it merged."""
    model: Any = with_adapter(case.model(), LORA, "ppo", quiet=True).eval()
    for parameter in parameters_of(model, POLICY).values():
        nn.init.normal_(parameter, std=0.1)
    ours, _ = log_probs_and_entropy(model, batch(), 1.0)
    for i, (p, r) in enumerate(zip(PROMPTS, REPLIES, strict=True)):
        _compare(ours[i, : len(r)], plain_log_probs(model, p, r), "log-prob")
    before = logits_of(model, PROMPTS[0])
    merge_adapter(model).save_pretrained(case.folder("lora"))
    _compare(logits_of(case.plain(case.root / "lora"), PROMPTS[0]), before, "merged logit")
    return ""


def _sft(case: Case) -> str:
    """Train by SFT; the published configuration is the base's."""
    out, data = case.folder("sft"), case.root.parent / "data"
    base = BaseModelConfig(path=str(case.base))
    with mock.patch("rlhf.sft.PLAIN_LOGITS", 0):  # real vocabularies are large: TRL's fused loss
        metrics = train_sft(SFT, base, data, out, runtime=toys.RUNTIME).metrics
    _published(case, out)
    plain = case.plain()
    renderer = Renderer(load_tokenizer(case.base))
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in read_rows(data / DEMONSTRATIONS, Demonstration):
            encoded = renderer.encode(row.prompt, row.response, SFT.max_length)
            log_p = plain_log_probs(plain, encoded.prompt, encoded.response)
            total, tokens = total - float(log_p.sum()), tokens + len(log_p)
    _compare(torch.tensor(metrics["loss"]), torch.tensor(total / tokens), "SFT loss")
    return ""


def _reward(case: Case) -> str:
    """Train a reward model; scores of rows together are those of single rows."""
    out, data = case.folder("reward"), case.root.parent / "data"
    train_reward_model(REWARD, data, case.root / "sft", out, runtime=toys.RUNTIME)
    scorer = Scorer(out, toys.DEVICE, 128)
    rows = [[*p, *r] for p, r in zip(PROMPTS, REPLIES, strict=True)]
    rows = [row for row in rows if len(row) <= context_length(scorer.model)]
    alone = torch.cat([scorer.score_ids([row]) for row in rows])
    _compare(scorer.score_ids(rows), alone, "score")
    return ""


def _ppo(case: Case, lora: LoraConfig | None = None) -> str:
    """Train by PPO and publish."""
    data, sft = case.root.parent / "data", case.root / "sft"
    reward, critic = case.root / "reward", "reward_model"
    if not (reward / "config.json").is_file():  # a family whose reward model failed
        reward, critic = case.root.parent / "llama-reward" / "reward", "policy"
    out = case.folder("ppo-lora" if lora else "ppo")
    config = toys.changed(PPO, critic="policy" if lora else critic, lora=lora)
    train_policy(config, data, sft, toys.approve(reward), out, runtime=toys.RUNTIME)  # pyright: ignore[reportArgumentType]
    _published(case, out)
    return ""


def _rehearse(case: Case, *overrides: str) -> str:
    """Rehearse the whole run, as its first training stage does.

    Raises:
        NotRehearsed: The rehearsal says why it did not take place.
    """
    config = load_config(
        None,
        [
            f"--base.path={case.base}", "--data.source=none.jsonl", "--sft.max_length=48",
            "--reward_model.max_length=48", "--ppo.max_new_tokens=6", "--ppo.top_k=0",
            "--runtime.threads=1", "--runtime.device=cpu", *overrides,
        ],
    ).config  # fmt: skip
    scratch = case.folder(f"rehearsal{len(overrides)}")
    remarks = rehearse(config, case.base, Sample.of(case.root.parent / "data"), scratch)
    if remarks:
        raise NotRehearsed("; ".join(remarks).replace(str(case.base), case.family))
    return ""


def _rehearse_lora(case: Case) -> str:
    """Rehearse with adapters in each stage."""
    stages = ("sft", "reward_model", "ppo")
    return _rehearse(case, *(f"--{stage}.lora.r={LORA.r}" for stage in stages))


def _published(case: Case, folder: Path) -> None:
    """Check that a folder loads by transformers alone, with the configuration of the base."""
    plain = case.plain(folder)
    if not logits_of(plain, PROMPTS[0]).isfinite().all():
        raise Wrong("published logits are not finite")
    base, other = (json.loads((f / "config.json").read_text()) for f in (case.base, folder))
    different = {k for k in base.keys() | other.keys() if base.get(k) != other.get(k)}
    if different - {"eos_token_id", "pad_token_id"}:
        raise Wrong(f"published config: {sorted(different)}")


def batch() -> Replies:
    """Return the prompts and replies as `generate` does."""
    ids, attention = pad_left(PROMPTS, 0)
    width = max(len(r) for r in REPLIES)
    tail = torch.tensor([r + [0] * (width - len(r)) for r in REPLIES])
    mask = torch.arange(width) < torch.tensor([len(r) for r in REPLIES])[:, None]
    return Replies(
        torch.cat([ids, tail], 1), torch.cat([attention, mask.long()], 1), mask,
        torch.ones(len(REPLIES), dtype=torch.bool),
    )  # fmt: skip


def logits_of(model: Any, row: Sequence[int]) -> Tensor:
    """Compute a row's logits by the model's own call."""
    return call(model, input_ids=torch.tensor([[*row]])).logits[0]


def plain_log_probs(model: Any, prompt: list[int], reply: list[int]) -> Tensor:
    """Compute log-probabilities of one reply by the model's own call."""
    log_p = logits_of(model, [*prompt, *reply]).log_softmax(-1)[len(prompt) - 1 : -1]
    return log_p.gather(1, torch.tensor(reply)[:, None]).squeeze(1)


def _compare(ours: Tensor, theirs: Tensor, name: str) -> None:
    gap = float((ours.detach() - theirs.detach()).abs().max())
    if not gap <= TOLERANCE * max(1.0, float(theirs.detach().abs().max())) or math.isnan(gap):
        raise Wrong(f"{name} differs by {gap:.3g}")


#: The rehearsals come first of what they are asked to foresee.
REHEARSAL, REHEARSAL_LORA = "rehearsal", "rehearsal with LoRA"
CHECKS: dict[str, Callable[[Case], str]] = {
    "load": _load, REHEARSAL: _rehearse, "log-probs": _log_probs, "values": _values,
    "decode": _decode, "SFT": _sft, "reward": _reward, "PPO": _ppo,
    REHEARSAL_LORA: _rehearse_lora, "LoRA": _lora, "PPO with LoRA": lambda case: _ppo(case, LORA),
}  # fmt: skip
