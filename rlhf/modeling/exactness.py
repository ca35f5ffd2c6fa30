"""Comparison of the fast paths through a model with plain calls of transformers.

A plain call gives the model one sequence alone: no padding, no packing, no cache. Whatever a path
with several sequences computes must equal it up to rounding; where it does not, a family's code
depends on a sequence's neighbours, on padding, or on a state that a cache does not carry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.config import LoraConfig
from rlhf.errors import ConfigError
from rlhf.modeling.critic import Critic
from rlhf.modeling.frozen import restore
from rlhf.modeling.generate import Replies, generate
from rlhf.modeling.logprobs import log_probs_and_entropy, reply_values
from rlhf.modeling.lora import POLICY, idle_layers, merge_adapter, parameters_of, with_adapter
from rlhf.modeling.packed import check_causal
from rlhf.modeling.reward import Scorer
from rlhf.modeling.sampling import Sampling
from rlhf.modeling.structure import call, evaluating

#: Largest difference that counts as rounding, in float32, as a share of the largest magnitude.
TOLERANCE = 2e-3
#: Tokens of a reply.
NEW_TOKENS = 8
#: Between which results there is a difference, in messages.
_ALONE = "a sequence among others and the same one alone"
_MERGED = "a model with an adapter and the same one with the adapter merged; choose target_modules"


class NotExact(ConfigError):
    """A model computes another result for a sequence among others than for it alone."""


@torch.no_grad()
def check_policy(policy: Any, prompts: Sequence[list[int]], tokenizer: Any) -> None:
    """Compare a language model's decoder and log-probabilities with plain calls.

    Args:
        policy: A causal language model in float32, on its device.
        prompts: Token ids of prompts of different lengths.
        tokenizer: Provides the pad and end-of-reply tokens.

    Raises:
        NotExact: A result depends on more than its own sequence.
        ConfigError: A result depends on later tokens.
    """
    replies = _replies(policy, prompts, tokenizer)
    with evaluating(policy):
        check_causal(policy)
        log_probs, _ = log_probs_and_entropy(policy, replies, 1.0)
        for index, (prompt, reply) in enumerate(_rows(replies)):
            plain = _logits(policy, prompt + reply, len(reply) + 1)[:-1]
            drawn = torch.tensor(reply, device=plain.device)[:, None]
            chosen, best = plain.gather(1, drawn)[:, 0], plain.max(1).values
            _compare("a decoded token's logit and the highest one", chosen, best, plain)
            expected = plain.log_softmax(1).gather(1, drawn)[:, 0]
            _compare("log-probabilities", log_probs[index, : len(reply)], expected, plain)


@torch.no_grad()
def check_critic(critic: Critic, replies: Replies) -> None:
    """Compare a critic's values, for which its head gets random weights, with plain calls.

    Raises:
        NotExact: A value depends on more than its own sequence.
    """
    head = critic.value_head
    before = head.weight.clone()
    torch.nn.init.normal_(head.weight, generator=torch.Generator(head.weight.device).manual_seed(0))
    try:
        with evaluating(critic), critic.active():
            values = reply_values(critic, replies)
            for index, (prompt, reply) in enumerate(_rows(replies)):
                ids = torch.tensor([prompt + reply], device=head.weight.device)
                plain = critic(
                    input_ids=ids, attention_mask=torch.ones_like(ids),
                    position_ids=torch.arange(ids.shape[1], device=ids.device)[None],
                )[0, len(prompt) - 1 :]  # fmt: skip
                _compare("values", values[index, : len(plain)], plain, plain)
    finally:
        head.weight.copy_(before)


@torch.no_grad()
def check_scorer(scorer: Scorer, rows: Sequence[list[int]]) -> None:
    """Compare a reward model's scores of sequences in a batch with those of each one alone.

    Raises:
        NotExact: A score depends on more than its own sequence.
    """
    together = scorer.score_ids([*rows])
    device = scorer.device
    alone = []
    for row in rows:
        ids = torch.tensor([row], device=device)
        logits = scorer.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        alone.append(logits.flatten()[0].float().cpu())
    _compare("rewards", together, torch.stack(alone), torch.stack(alone))


@torch.no_grad()
def check_adapter(policy: Any, lora: LoraConfig, section: str, rows: Sequence[list[int]]) -> None:
    """Compare a model with a random adapter with the same adapter merged into its weights.

    They differ where a family reads a layer's weights past the layer, or shares a layer. Weights in
    fewer bits are compared with plain layers of the numbers that these stand for.

    Args:
        policy: A causal language model, which is changed.
        lora: The adapter's section.
        section: Its name, for errors.
        rows: Token ids of sequences.

    Raises:
        ConfigError: The adapter does not fit the model.
        NotExact: What is published would be another function than what is trained.
    """
    adapted = with_adapter(policy, lora, section, quiet=True)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in parameters_of(adapted, POLICY).items():
        if "lora_B" in name:  # which starts at zero
            drawn = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
            parameter.copy_(drawn / lora.alpha)
    with evaluating(adapted):
        with idle_layers(adapted) as idle:
            before = [_logits(adapted, row, len(row)) for row in rows]
        merged = merge_adapter(restore(adapted))
        names = sorted({name.rpartition(".")[2] for name in idle})
        between = f"{_MERGED} without {', '.join(names[:9])}" if names else _MERGED
        for row, expected in zip(rows, before, strict=True):
            result = _logits(merged, row, len(row))
            _compare(f"{section}.lora: logits", result, expected, between=between)


def replies_of(policy: Any, prompts: Sequence[list[int]], tokenizer: Any) -> Replies:
    """Return greedy replies that end at different steps; see `check_policy`."""
    with torch.no_grad():
        return _replies(policy, prompts, tokenizer)


def _replies(policy: Any, prompts: Sequence[list[int]], tokenizer: Any) -> Replies:
    # Each row ends one step after the row before it, so that rows are dropped at every step.
    lengths = {tuple(prompt): 1 + index % NEW_TOKENS for index, prompt in enumerate(prompts)}
    remaining = sorted(lengths.values())

    def stop(rows: list[list[int]]) -> list[bool]:
        step = len(rows[0])
        ending = sum(length <= step for length in remaining) - (len(remaining) - len(rows))
        return [index < ending for index in range(len(rows))]

    return generate(policy, [*prompts], tokenizer, Sampling(NEW_TOKENS, 0.0), 0, stop)


def _rows(replies: Replies) -> list[tuple[list[int], list[int]]]:
    """Return the valid tokens of each prompt and its reply."""
    width = replies.ids.shape[1] - replies.mask.shape[1]
    prompts = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(
            replies.ids[:, :width].cpu(), replies.attention[:, :width], strict=True
        )
    ]
    return [*zip(prompts, replies.rows(), strict=True)]


def _logits(policy: Any, ids: list[int], last: int) -> Tensor:
    """Return the logits after the last tokens of a sequence, by a plain call."""
    input_ids = torch.tensor([ids], device=next(policy.parameters()).device)
    return call(policy, input_ids=input_ids, logits_to_keep=last).logits[0, -last:].float()


def _compare(
    name: str, ours: Tensor, plain: Tensor, scale: Tensor | None = None, between: str = _ALONE
) -> None:
    """Compare two results; rounding is a share of the largest number in `scale`, or in `plain`.

    Raises:
        NotExact: They differ by more than rounding, or are not finite.
    """
    gap = (ours.to(plain.device).float() - plain.float()).abs().max()
    largest = (plain if scale is None else scale).float().abs().max()
    allowed = TOLERANCE * float(largest.clamp(min=1e-3))
    if not bool(gap <= allowed):  # NaN is not
        raise NotExact(
            f"{name}: {float(gap):.2g} apart, and rounding is at most {allowed:.2g}, between "
            f"{between}"
        )
