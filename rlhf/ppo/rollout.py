"""Rollouts: sampling replies and computing their token log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.modeling.device import upload
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
from rlhf.modeling.precision import in_own_precision
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

READ_EVERY = 8
"""Steps between two reads of what an accelerator drew. Each makes the host wait for all that it
launched; a row that ended is decoded for up to 7 steps more."""


@dataclass(frozen=True)
class Replies:
    """A batch of replies: prompts padded on the left, replies on the right.

    `ids` and `attention` are (batch, prompt + reply); `mask` is (batch, reply), true up to and
    including the end-of-reply token. It is made from positions: a pad token that was sampled is a
    token like any other. `attention` stays on the CPU wherever the rest is: shapes are decided by
    it, and an accelerator would have to be waited for.
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
        ids, mask, finished = (upload(t, device) for t in (self.ids, self.mask, self.finished))
        return Replies(ids, self.attention, mask, finished)

    @property
    def valid(self) -> Bool[Tensor, "batch reply"]:
        """`mask` on the CPU."""
        return self.attention[:, -self.mask.shape[1] :].bool()

    def rows(self) -> list[list[int]]:
        """Each reply's valid tokens."""
        pairs = zip(self.reply_ids.tolist(), self.valid.sum(1).tolist(), strict=True)
        return [ids[:n] for ids, n in pairs]

    def take(self, index: Tensor) -> Replies:
        """Some rows, cut to the longest reply among them."""
        width = int(self.valid[index].sum(1).max())
        cut = self.ids.shape[1] - self.mask.shape[1] + width
        there = upload(index, self.ids.device)
        return Replies(
            self.ids[there, :cut], self.attention[index, :cut], self.mask[there, :width],
            self.finished[there],
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
    *,
    batch_size: int | None = None,
    read_every: int | None = None,
) -> Replies:
    """Continue each prompt until the end-of-reply token, `stop`, or `max_new_tokens`.

    The draw depends on `seed` and the weights alone; the global generator is neither read nor
    changed. A row for which `stop` is true has its last token kept and counts as finished.

    Args:
        policy: A causal language model, on its device.
        prompts: Token ids of each prompt.
        tokenizer: Its pad and end-of-reply token are used.
        sampling: How to draw.
        seed: Of the draw.
        stop: Ends replies by their tokens so far; called for each step, in order.
        own: The rows to draw, of all prompts, with the random numbers of their places.
        batch_size: Rows decoded at a time; none decodes all at once. The random numbers are the
            same; where a model's rounding depends on the size of a batch, a token can differ.
        read_every: Steps between two copies of the drawn tokens to the host, which tell which rows
            have ended; none takes 1 on a CPU and `READ_EVERY` on an accelerator.
    """
    device = next(policy.parameters()).device
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    ids, attention = (t[own] for t in pad_left(prompts, pad))
    places = torch.arange(len(prompts))[own]
    drawn = _Drawn(len(places), sampling.max_new_tokens, pad, end, stop)
    every = read_every or (1 if device.type == "cpu" else READ_EVERY)
    with evaluating(policy):
        for rows in torch.arange(len(places)).split(batch_size or max(1, len(places))):
            batch = places[rows]
            # Begun anew for each batch: it makes the random numbers of all prompts, in step.
            sampler = Sampler(sampling, len(prompts), seed, device)
            drawn.begin(rows)
            _decode(policy, [prompts[i] for i in batch.tolist()], batch, sampler, drawn, every)
    width = int(drawn.lengths.max())
    mask = torch.arange(width) < drawn.lengths[:, None]
    return Replies(
        upload(torch.cat([ids, drawn.tokens[:, :width]], 1), device),
        torch.cat([attention, mask.long()], 1),
        upload(mask, device),
        upload(drawn.finished, device),
    )


def _decode(
    policy: Any, prompts: list[list[int]], places: Tensor, sampler: Any, drawn: _Drawn, every: int
) -> None:
    """Draw the replies to one batch of prompts; `places` are their rows among all prompts."""
    device = next(policy.parameters()).device
    room = drawn.tokens.shape[1]
    decoder = decoder_of(policy, prompts, room)
    live, unread = upload(places, device), []
    logits = decoder.start()
    for step in range(room):
        tokens = sampler(logits, live, step)
        unread.append(tokens)
        if len(unread) == every or step + 1 == room:
            ended = drawn.read(torch.stack(unread).cpu())
            unread = []
            if all(ended):
                break
            if any(ended) and step + 1 < room:
                kept = torch.tensor(decoder.drop(ended))
                drawn.keep(kept)
                kept = upload(kept, device)
                live, tokens = live[kept], tokens[kept]
        if step + 1 < room:
            logits = decoder.step(tokens)


class _Drawn:
    """The replies drawn so far, on the CPU.

    What the device draws is read some steps at a time: a row that ended in their midst goes on
    drawing until then, and these tokens are left out here.
    """

    def __init__(self, rows: int, room: int, pad: int, end: int, stop: Stop | None) -> None:
        self.tokens = torch.full((rows, room), pad)
        self.lengths = torch.full((rows,), room)
        self.finished = torch.zeros(rows, dtype=torch.bool)
        self.end, self.stop = end, stop

    def begin(self, rows: Tensor) -> None:
        """These rows are drawn from now on."""
        self.live, self.step = rows, 0

    def read(self, block: Int[Tensor, "steps live"]) -> list[bool]:
        """Take over some steps' tokens of the live rows; which of these rows have ended."""
        over = torch.zeros(len(self.live), dtype=torch.bool)
        for step in block:
            going = (~over).nonzero().squeeze(1)
            rows, tokens = self.live[going], step[going]
            self.tokens[rows, self.step] = tokens
            self.step += 1
            ended = tokens == self.end
            if self.stop is not None:
                so_far = self.tokens[rows, : self.step].tolist()
                ended |= torch.tensor(self.stop(so_far), dtype=torch.bool)
            self.lengths[rows[ended]] = self.step
            self.finished[rows[ended]] = True
            over[going[ended]] = True
            if over.all():
                break
        return over.tolist()

    def keep(self, order: Tensor) -> None:
        """The live rows that stay, in their new order."""
        self.live = self.live[order]


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
    arguments, index = _arguments(policy, replies)
    _, logits = captured_logits(policy, arguments, _before(index, replies))
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits / temperature if temperature > 0 else logits


def reply_values(critic: Any, replies: Replies) -> Float[Tensor, "batch states"]:
    """The critic's value of each state of a reply, (batch, reply + 1).

    Column t is the value of the prefix before reply token t; the column after a row's last valid
    token is the value of the whole; zero beyond.
    """
    arguments, index = _arguments(critic, replies)
    values = critic(**arguments).flatten()
    wanted = upload(_of_states(index, replies), values.device)
    return _scatter(values[wanted], _states(replies.valid))


def _evaluate(
    policy: Any, head: Any, replies: Replies, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    arguments, index = _arguments(policy, replies)
    before = _before(index, replies)
    drawn = upload(replies.valid.flatten().nonzero().squeeze(1), replies.ids.device)
    targets = replies.reply_ids.flatten()[drawn]
    values = None
    if has_plain_head(policy):
        hidden, cast = final_hidden(policy, arguments)
        chosen = cast(take_rows(hidden, before))
        results = token_log_probs(head_of(policy), chosen, targets, temperature, entropy)
    else:
        hidden, logits = captured_logits(policy, arguments, before)
        results = from_logits(logits, targets, temperature, entropy)
    if head is not None:
        states = take_rows(hidden, _of_states(index, replies))
        flat = in_own_precision(head, states).squeeze(-1)
        flat = flat if flat.dtype == torch.float64 else flat.float()
        values = _scatter(flat, _states(replies.valid))
    log_probs, entropies = (_scatter(t, replies.valid) for t in results)
    return log_probs, entropies, values


def _arguments(model: Any, replies: Replies) -> tuple[dict[str, Any], Tensor]:
    """Arguments of the model's call; and on the CPU, where each token's hidden state will be."""
    longest = int(replies.attention.sum(1).max())
    return arguments_of(replies.ids, replies.attention, packs(model, longest))


def _before(index: Tensor, replies: Replies) -> Int[Tensor, " tokens"]:
    """Of an index of all tokens: the token before each valid reply token, row by row."""
    return index[:, -replies.mask.shape[1] - 1 : -1][replies.valid]


def _of_states(index: Tensor, replies: Replies) -> Int[Tensor, " states"]:
    """Of an index of all tokens: the last token of each state of each reply, row by row."""
    states = _states(replies.valid)
    return index[:, -states.shape[1] :][states]


def _states(mask: Bool[Tensor, "batch reply"]) -> Bool[Tensor, "batch states"]:
    """Mask of each reply's states: one before it, and one after each valid token."""
    return F.pad(mask, (1, 0), value=True)


def _scatter(flat: Tensor, mask: Bool[Tensor, "rows columns"]) -> Tensor:
    """Row by row into the true places of a mask on the CPU, zero elsewhere.

    `masked_scatter` would do it too, but the host has to wait in its backward pass.
    """
    places = upload(mask.flatten().nonzero().squeeze(1), flat.device)
    return flat.new_zeros(mask.numel()).index_copy(0, places, flat).view(mask.shape)
