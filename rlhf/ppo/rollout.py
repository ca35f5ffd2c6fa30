"""Generation of replies: sampling from a causal language model with a cache.

`generate` and `Replies` are the interface. Log-probabilities of replies are evaluated apart.
"""

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
from rlhf.ppo.decode import decoder_of, pad_left
from rlhf.ppo.fused import log_probs_from_logits, token_log_probs
from rlhf.ppo.sampler import Sampler, Sampling

Stop = Callable[[list[list[int]]], list[bool]]
"""Stopping rule: takes each live row's reply tokens so far, returns whether the row ends here."""

READ_EVERY = 8
"""Steps between two reads of drawn tokens from an accelerator. Each read makes the host wait for
everything launched; between two reads an ended row is decoded for up to 7 steps more."""


@dataclass(frozen=True)
class Replies:
    """A batch of replies: prompts padded on the left, replies on the right.

    `ids` and `attention` are (batch, prompt + reply). `mask` is (batch, reply), true up to and
    including the end-of-reply token; it is made by position, because a sampled pad token is a token
    like any other. `attention` stays on the CPU, since shapes depend on it and reading it from an
    accelerator would make the host wait.
    """

    ids: Int[Tensor, "batch total"]
    attention: Int[Tensor, "batch total"]
    mask: Bool[Tensor, "batch reply"]
    finished: Bool[Tensor, " batch"]

    @property
    def reply_ids(self) -> Int[Tensor, "batch reply"]:
        """Tokens of the replies, without the prompts."""
        return self.ids[:, -self.mask.shape[1] :]

    @property
    def valid(self) -> Bool[Tensor, "batch reply"]:
        """`mask` on the CPU."""
        return self.attention[:, -self.mask.shape[1] :].bool()

    def to(self, device: torch.device) -> Replies:
        """Copy to a device, except `attention`."""
        ids, mask, finished = (upload(t, device) for t in (self.ids, self.mask, self.finished))
        return Replies(ids, self.attention, mask, finished)

    def rows(self) -> list[list[int]]:
        """Valid tokens of each reply."""
        pairs = zip(self.reply_ids.tolist(), self.valid.sum(1).tolist(), strict=True)
        return [ids[:n] for ids, n in pairs]

    def take(self, index: Tensor) -> Replies:
        """Select rows, cut to the longest reply among them; `index` is on the CPU."""
        width = int(self.valid[index].sum(1).max())
        cut = self.ids.shape[1] - self.mask.shape[1] + width
        rows = upload(index, self.ids.device)
        return Replies(
            self.ids[rows, :cut], self.attention[index, :cut], self.mask[rows, :width],
            self.finished[rows],
        )  # fmt: skip


def concatenate(batches: Sequence[Replies], pad: int) -> Replies:
    """Concatenate batches of replies whose prompts are padded to the same width."""
    if len(batches) == 1:
        return batches[0]
    width = max(batch.mask.shape[1] for batch in batches)

    def widened(name: str, value: int) -> Tensor:
        return torch.cat(
            [F.pad(getattr(b, name), (0, width - b.mask.shape[1]), value=value) for b in batches]
        )

    finished = torch.cat([batch.finished for batch in batches])
    return Replies(widened("ids", pad), widened("attention", 0), widened("mask", 0), finished)


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
    """Sample a reply to each prompt.

    A reply ends with the end-of-reply token, by `stop`, or after `max_new_tokens`. A row that
    `stop` ends keeps its last token and counts as finished. The tokens depend on `seed` and the
    weights alone; torch's global generator is neither read nor changed.

    Args:
        policy: A causal language model, on its device.
        prompts: Token ids of each prompt.
        tokenizer: Provides the pad and end-of-reply tokens.
        sampling: Sampling parameters.
        seed: Seed of the batch.
        stop: Called with the tokens of live rows at each step, in order.
        own: Prompts to sample for; each row uses the random numbers of its index in `prompts`.
        batch_size: Rows decoded at a time; None decodes all at once. The random numbers are the
            same; if a model's rounding depends on the batch size, a token can differ.
        read_every: Steps between two copies of the drawn tokens to the host, which detect ended
            rows; None is 1 on a CPU and `READ_EVERY` on an accelerator.
    """
    device = next(policy.parameters()).device
    ids, attention = (t[own] for t in pad_left(prompts, tokenizer.pad_token_id))
    indices = torch.arange(len(prompts))[own]
    drawn = _DrawnReplies(
        len(indices), sampling.max_new_tokens, tokenizer.pad_token_id, tokenizer.eos_token_id, stop
    )
    every = read_every or (1 if device.type == "cpu" else READ_EVERY)
    with evaluating(policy):
        for rows in torch.arange(len(indices)).split(batch_size or max(1, len(indices))):
            batch = indices[rows]
            # A new sampler per batch: at each step it makes the random numbers of all prompts.
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
    policy: Any, prompts: list[list[int]], indices: Tensor, sampler: Any, drawn: _DrawnReplies,
    every: int,
) -> None:  # fmt: skip
    """Draw the replies to one batch, whose rows among all prompts are `indices`."""
    device = next(policy.parameters()).device
    max_new_tokens = drawn.tokens.shape[1]
    decoder = decoder_of(policy, prompts, max_new_tokens)
    live, unread = upload(indices, device), []
    logits = decoder.start()
    for step in range(max_new_tokens):
        tokens = sampler(logits, live, step)
        unread.append(tokens)
        if len(unread) == every or step + 1 == max_new_tokens:
            ended = drawn.read(torch.stack(unread).cpu())
            unread = []
            if all(ended):
                break
            if any(ended) and step + 1 < max_new_tokens:
                order = torch.tensor(decoder.drop(ended))
                drawn.keep(order)
                order = upload(order, device)
                live, tokens = live[order], tokens[order]
        if step + 1 < max_new_tokens:
            logits = decoder.step(tokens)


class _DrawnReplies:
    """Replies drawn so far, on the CPU.

    Tokens are read from the device several steps at a time. A row that ended within these steps
    was decoded further until the read; `read` leaves the surplus tokens out.
    """

    def __init__(
        self, rows: int, max_new_tokens: int, pad: int, end: int, stop: Stop | None
    ) -> None:
        self.tokens = torch.full((rows, max_new_tokens), pad)
        self.lengths = torch.full((rows,), max_new_tokens)
        self.finished = torch.zeros(rows, dtype=torch.bool)
        self.end, self.stop = end, stop

    def begin(self, rows: Tensor) -> None:
        """Start a batch: these rows are live."""
        self.live, self.step = rows, 0

    def read(self, block: Int[Tensor, "steps live"]) -> list[bool]:
        """Append some steps' tokens to the live rows; returns which of them have ended."""
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
        """Drop all live rows but these, in this order."""
        self.live = self.live[order]


def log_probs_and_entropy(
    policy: Any, replies: Replies, temperature: float, entropy: bool = True
) -> tuple[Float[Tensor, "batch reply"], Float[Tensor, "batch reply"]]:
    """Compute log-probabilities of reply tokens and entropies of their distributions.

    Entropies are in nats, and all zero without `entropy`. Both results are zero where the mask is
    false. The logits are divided by `temperature`; top-k and top-p are not applied, so that the
    ratio of a policy with itself is exactly 1.
    """
    log_probs, entropies, _ = _evaluate(policy, None, replies, temperature, entropy)
    return log_probs, entropies


def log_probs_entropy_values(
    policy: Any, head: Any, replies: Replies, temperature: float, entropy: bool = True
) -> tuple[
    Float[Tensor, "batch reply"], Float[Tensor, "batch reply"], Float[Tensor, "batch states"]
]:
    """Compute log-probs, entropies and values in one forward pass.

    The first two are as of `log_probs_and_entropy`. The values, shaped as of `reply_values`, are
    `head` (hidden size to 1) on the policy's last hidden states.
    """
    log_probs, entropies, values = _evaluate(policy, head, replies, temperature, entropy)
    assert values is not None
    return log_probs, entropies, values


def reply_logits(
    policy: Any, replies: Replies, temperature: float
) -> Float[Tensor, "tokens vocabulary"]:
    """Compute the logits over `temperature` from which each valid token was drawn."""
    arguments, index = _model_arguments(policy, replies)
    _, logits = captured_logits(policy, arguments, _previous_tokens(index, replies))
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits / temperature if temperature > 0 else logits


def reply_values(critic: Any, replies: Replies) -> Float[Tensor, "batch states"]:
    """Compute the critic's value of each state of a reply, (batch, reply + 1).

    Column t is the value of the prefix before reply token t. The column after a row's last valid
    token is the value of the whole reply; later columns are zero.
    """
    arguments, index = _model_arguments(critic, replies)
    values = critic(**arguments).flatten()
    states = upload(_state_tokens(index, replies), values.device)
    return _scatter(values[states], _state_mask(replies.valid))


def _evaluate(
    policy: Any, head: Any, replies: Replies, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute log-probs and entropies, and with a value head the values of states."""
    arguments, index = _model_arguments(policy, replies)
    previous = _previous_tokens(index, replies)
    valid = upload(replies.valid.flatten().nonzero().squeeze(1), replies.ids.device)
    targets = replies.reply_ids.flatten()[valid]
    values = None
    if has_plain_head(policy):
        hidden, cast = final_hidden(policy, arguments)
        rows = cast(take_rows(hidden, previous))
        results = token_log_probs(head_of(policy), rows, targets, temperature, entropy)
    else:
        hidden, logits = captured_logits(policy, arguments, previous)
        results = log_probs_from_logits(logits, targets, temperature, entropy)
    if head is not None:
        states = take_rows(hidden, _state_tokens(index, replies))
        flat = in_own_precision(head, states).squeeze(-1)
        flat = flat if flat.dtype == torch.float64 else flat.float()
        values = _scatter(flat, _state_mask(replies.valid))
    log_probs, entropies = (_scatter(t, replies.valid) for t in results)
    return log_probs, entropies, values


def _model_arguments(model: Any, replies: Replies) -> tuple[dict[str, Any], Tensor]:
    """Arguments of the model's call, and each token's row among the hidden states.

    The rows are on the CPU.
    """
    longest = int(replies.attention.sum(1).max())
    return arguments_of(replies.ids, replies.attention, packs(model, longest))


def _previous_tokens(index: Tensor, replies: Replies) -> Int[Tensor, " tokens"]:
    """Select from an index of all tokens the one before each valid reply token."""
    return index[:, -replies.mask.shape[1] - 1 : -1][replies.valid]


def _state_tokens(index: Tensor, replies: Replies) -> Int[Tensor, " states"]:
    """Select from an index of all tokens the last token of each state."""
    states = _state_mask(replies.valid)
    return index[:, -states.shape[1] :][states]


def _state_mask(mask: Bool[Tensor, "batch reply"]) -> Bool[Tensor, "batch states"]:
    """Mask of each reply's states: one before it, and one after each valid token."""
    return F.pad(mask, (1, 0), value=True)


def _scatter(flat: Tensor, mask: Bool[Tensor, "rows columns"]) -> Tensor:
    """Write values row by row into a mask's true cells, zero elsewhere; the mask is on the CPU.

    `masked_scatter` would do the same, but its backward pass makes the host wait.
    """
    cells = upload(mask.flatten().nonzero().squeeze(1), flat.device)
    return flat.new_zeros(mask.numel()).index_copy(0, cells, flat).view(mask.shape)
