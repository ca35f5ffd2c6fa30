"""Rollouts: sampling replies and computing their token log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import peft
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from rlhf.environments.contract import Stop
from rlhf.modeling.reward import pad_right


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn; temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True)
class Replies:
    """A batch of replies: prompts padded on the left, replies on the right.

    `ids` and `attention` are (batch, prompt + reply); `mask` is (batch, reply), true up to and
    including the end-of-reply token. It is made from positions: a pad token that was sampled is a
    token like any other.
    """

    ids: Int[Tensor, "batch total"]
    attention: Int[Tensor, "batch total"]
    mask: Bool[Tensor, "batch reply"]
    finished: Bool[Tensor, " batch"]

    @property
    def reply_ids(self) -> Int[Tensor, "batch reply"]:
        """The replies' tokens."""
        return self.ids[:, -self.mask.shape[1] :]

    def rows(self) -> list[list[int]]:
        """Each reply's valid tokens."""
        pairs = zip(self.reply_ids.tolist(), self.mask.sum(1).tolist(), strict=True)
        return [ids[:n] for ids, n in pairs]

    def take(self, index: Tensor) -> Replies:
        """Some rows, cut to the longest reply among them."""
        mask = self.mask[index]
        width = int(mask.sum(1).max())
        cut = self.ids.shape[1] - self.mask.shape[1] + width
        return Replies(
            self.ids[index, :cut], self.attention[index, :cut], mask[:, :width],
            self.finished[index],
        )  # fmt: skip


def pad_left(
    rows: list[list[int]], pad: int
) -> tuple[Int[Tensor, "batch time"], Int[Tensor, "batch time"]]:
    """Stack prompts of different length, padded on the left; returns ids and their mask."""
    ids, mask = pad_right([row[::-1] for row in rows], pad)
    return ids.flip(1), mask.flip(1)


@torch.no_grad()
def generate(
    policy: Any, prompts: list[list[int]], tokenizer: Any, sampling: Sampling, seed: int,
    stop: Stop | None = None,
) -> Replies:  # fmt: skip
    """Continue each prompt until the end-of-reply token, a stop sequence or `max_new_tokens`.

    The draw depends on `seed` and the weights alone: the global generator is set here and put
    back afterwards.
    """
    device = next(policy.parameters()).device
    ids, attention = (t.to(device) for t in pad_left(prompts, tokenizer.pad_token_id))
    greedy = sampling.temperature == 0
    arguments = (
        {"do_sample": False}
        if greedy
        else {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
        }
    )
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **arguments,
    )
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _only_config(policy, config):
        torch.manual_seed(seed)
        stopped = _StoppedAt(stop, ids.shape[1])
        full = policy.generate(
            input_ids=ids,
            attention_mask=attention,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([stopped] if stop else []),
        )
    reply = full[:, ids.shape[1] :]
    is_end = reply == tokenizer.eos_token_id
    ended_before = is_end.cumsum(1) - is_end.int() > 0
    at = torch.tensor(
        [stopped.lengths.get(i, reply.shape[1]) for i in range(len(reply))], device=device
    )
    mask = ~ended_before & (torch.arange(reply.shape[1], device=device) < at[:, None])
    finished = (is_end & mask).any(1)
    for i in stopped.lengths:
        finished[i] = True
    return Replies(full, torch.cat([attention, mask.long()], 1), mask, finished)


class _StoppedAt(StoppingCriteria):
    """Ends rows at a stop sequence, and remembers how many tokens they had then."""

    def __init__(self, stop: Stop | None, start: int) -> None:
        self.stop, self.start = stop, start
        self.lengths: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        assert self.stop is not None
        rows = input_ids[:, self.start :].tolist()
        for i, found in enumerate(self.stop(rows)):
            if found:
                self.lengths.setdefault(i, len(rows[i]))
        done = [i in self.lengths for i in range(len(rows))]
        return torch.tensor(done, device=input_ids.device)


@contextmanager
def _only_config(policy: Any, config: GenerationConfig) -> Iterator[None]:
    """Keep the defaults that a hub model brings (a repetition penalty, say) out of the draw."""
    model: Any = policy.get_base_model() if isinstance(policy, peft.PeftModel) else policy
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


def position_ids(attention: Int[Tensor, "batch time"]) -> Int[Tensor, "batch time"]:
    """Positions counted from the first real token, whatever the padding before it."""
    return (attention.cumsum(1) - 1).clamp(min=0)


def log_probs_and_entropy(
    policy: Any, replies: Replies, temperature: float
) -> tuple[Float[Tensor, "batch reply"], Float[Tensor, "batch reply"]]:
    """Log-probability of each reply token and the entropy of its distribution.

    Temperature divides the logits; top-k and top-p never enter, so that the ratio of a policy with
    itself is exactly 1.
    """
    width = replies.mask.shape[1]
    logits = policy(
        input_ids=replies.ids,
        attention_mask=replies.attention,
        position_ids=position_ids(replies.attention),
        use_cache=False,
        logits_to_keep=width + 1,
    ).logits[:, :-1]
    if temperature > 0:
        logits = logits / temperature
    log_p = torch.log_softmax(logits.float(), -1)
    chosen = log_p.gather(-1, replies.reply_ids[..., None]).squeeze(-1)
    return chosen, -(log_p.exp() * log_p).sum(-1)


def reply_values(critic: Any, replies: Replies) -> Float[Tensor, "batch reply"]:
    """The critic's value of each state: the prefix *before* the reply token at the same index."""
    width = replies.mask.shape[1]
    values = critic(replies.ids, replies.attention, position_ids(replies.attention))
    return values[:, -width - 1 : -1]
