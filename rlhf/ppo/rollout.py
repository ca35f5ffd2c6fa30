"""Rollouts: sampling replies and computing their token log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.modeling.forward import (
    arguments_of,
    captured_logits,
    evaluating,
    final_hidden,
    has_plain_head,
    head_of,
    packs,
)
from rlhf.modeling.packing import take_rows
from rlhf.modeling.reward import pad_right
from rlhf.ppo.decode import decoder_of
from rlhf.ppo.fused import from_logits, token_log_probs
from rlhf.ppo.sampler import Sampler, Sampling

__all__ = [
    "Replies",
    "Sampling",
    "Stop",
    "generate",
    "joined",
    "log_probs_and_entropy",
    "log_probs_entropy_values",
    "pad_left",
    "position_ids",
    "reply_logits",
    "reply_values",
]

Stop = Callable[[list[list[int]]], list[bool]]
"""Given the reply tokens so far of each live row: which rows end here."""


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

    def to(self, device: torch.device) -> Replies:
        """The same replies on another device."""
        tensors = (self.ids, self.attention, self.mask, self.finished)
        return Replies(*(t.to(device) for t in tensors))

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
    policy: Any,
    prompts: list[list[int]],
    tokenizer: Any,
    sampling: Sampling,
    seed: int,
    stop: Stop | None = None,
    own: slice = slice(None),
) -> Replies:
    """Continue each prompt until the end-of-reply token, `stop`, or `max_new_tokens`.

    The draw depends on `seed` and the weights alone; the global generator is neither read nor
    changed. A row for which `stop` is true has its last token kept and counts as finished.
    Of all rows, those that are `own` are drawn, with the random numbers of their places.
    """
    device = next(policy.parameters()).device
    sampler = Sampler(sampling, len(prompts), seed, device)
    places = torch.arange(len(prompts), device=device)[own]
    ids, attention = (t[own] for t in pad_left(prompts, tokenizer.pad_token_id))
    prompts = prompts[own]
    batch, room = len(prompts), sampling.max_new_tokens
    end = tokenizer.eos_token_id
    replies = torch.full((batch, room), tokenizer.pad_token_id)
    lengths = torch.full((batch,), room)
    finished = torch.zeros(batch, dtype=torch.bool)
    live = torch.arange(batch)
    so_far: list[list[int]] = [[] for _ in prompts]
    with evaluating(policy):
        decoder = decoder_of(policy, prompts, room)
        logits = decoder.start()
        for step in range(room):
            tokens = sampler(logits, places[live.to(device)], step)
            drawn = tokens.cpu()
            replies[live, step] = drawn
            ended = drawn == end
            if stop is not None:
                rows = live.tolist()
                for row, token in zip(rows, drawn.tolist(), strict=True):
                    so_far[row].append(token)
                ended |= torch.tensor(stop([so_far[row] for row in rows]), dtype=torch.bool)
            if ended.any():
                lengths[live[ended]] = step + 1
                finished[live[ended]] = True
                if ended.all():
                    break
                kept = torch.tensor(decoder.drop(ended.tolist()))
                live, tokens = live[kept], tokens[kept.to(device)]
            if step + 1 < room:
                logits = decoder.step(tokens)
    width = int(lengths.max())
    mask = torch.arange(width) < lengths[:, None]
    return Replies(
        torch.cat([ids, replies[:, :width]], 1).to(device),
        torch.cat([attention, mask.long()], 1).to(device),
        mask.to(device),
        finished.to(device),
    )


def joined(parts: Sequence[Replies], pad: int) -> Replies:
    """One batch of replies whose prompts are padded alike."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.mask.shape[1] for part in parts)

    def widened(name: str, value: int) -> Tensor:
        return torch.cat(
            [F.pad(getattr(p, name), (0, width - p.mask.shape[1]), value=value) for p in parts]
        )

    finished = torch.cat([part.finished for part in parts])
    return Replies(widened("ids", pad), widened("attention", 0), widened("mask", 0), finished)


def position_ids(attention: Int[Tensor, "batch time"]) -> Int[Tensor, "batch time"]:
    """Positions counted from the first real token, whatever the padding before it."""
    return (attention.cumsum(1) - 1).clamp(min=0)


def log_probs_and_entropy(
    policy: Any, replies: Replies, temperature: float, entropy: bool = True
) -> tuple[Float[Tensor, "batch reply"], Float[Tensor, "batch reply"]]:
    """Log-probability of each reply token and the entropy of its distribution in nats.

    Zero where the mask is false; the entropy is zero throughout where it isn't asked for.
    Temperature divides the logits; top-k and top-p never enter, so that the ratio of a policy with
    itself is exactly 1.
    """
    log_probs, entropies, _ = _evaluate(policy, None, replies, temperature, entropy)
    return log_probs, entropies


def log_probs_entropy_values(
    policy: Any, head: Any, replies: Replies, temperature: float, entropy: bool = True
) -> tuple[
    Float[Tensor, "batch reply"], Float[Tensor, "batch reply"], Float[Tensor, "batch states"]
]:
    """Log-probs and entropies as above, and values as `reply_values`, by one forward pass.

    The values are `head` (hidden size to 1) on the policy's own last hidden states.
    """
    log_probs, entropies, values = _evaluate(policy, head, replies, temperature, entropy)
    assert values is not None
    return log_probs, entropies, values


def reply_logits(
    policy: Any, replies: Replies, temperature: float
) -> Float[Tensor, "tokens vocabulary"]:
    """The logits over `temperature` that each valid reply token was drawn from, row by row."""
    arguments, place = _arguments(policy, replies)
    before = place[:, -replies.mask.shape[1] - 1 : -1][replies.mask]
    _, logits = captured_logits(policy, arguments, before)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits / temperature if temperature > 0 else logits


def reply_values(critic: Any, replies: Replies) -> Float[Tensor, "batch states"]:
    """The critic's value of each state of a reply, (batch, reply + 1).

    Column t is the value of the prefix before reply token t; the column after a row's last valid
    token is the value of the whole; zero beyond.
    """
    arguments, place = _arguments(critic, replies)
    wanted, states = _states(place, replies.mask)
    values = critic(**arguments).flatten()
    return _scatter(values[wanted], states)


def _evaluate(
    policy: Any, head: Any, replies: Replies, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    mask, targets = replies.mask, replies.reply_ids[replies.mask]
    arguments, place = _arguments(policy, replies)
    before = place[:, -mask.shape[1] - 1 : -1][mask]
    values = None
    if has_plain_head(policy):
        hidden, cast = final_hidden(policy, arguments)
        chosen = cast(take_rows(hidden, before))
        results = token_log_probs(head_of(policy), chosen, targets, temperature, entropy)
    else:
        hidden, logits = captured_logits(policy, arguments, before)
        results = from_logits(logits, targets, temperature, entropy)
    if head is not None:
        wanted, states = _states(place, mask)
        flat = head(take_rows(hidden, wanted).to(head.weight.dtype)).squeeze(-1)
        values = _scatter(flat if flat.dtype == torch.float64 else flat.float(), states)
    log_probs, entropies = (_scatter(t, mask) for t in results)
    return log_probs, entropies, values


def _arguments(model: Any, replies: Replies) -> tuple[dict[str, Any], Tensor]:
    longest = int(replies.attention.sum(1).max())
    return arguments_of(replies.ids, replies.attention, packs(model, longest))


def _states(place: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where the hidden state of each state of a reply is, and which (batch, reply + 1) exist."""
    states = F.pad(mask, (1, 0), value=True)
    return place[:, -states.shape[1] :][states], states


def _scatter(flat: Tensor, mask: Tensor) -> Tensor:
    """Row by row into the true places of a mask, zero elsewhere."""
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)
