"""Generation of replies: sampling from a causal language model with a cache.

`generate` decodes in the fastest way that is exact for the model (`decoders`). Log-probabilities of
replies are in `logprobs`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from rlhf.modeling.decoders import decoder_of, pad_left
from rlhf.modeling.device import upload
from rlhf.modeling.kept_sets import KeptSets
from rlhf.modeling.sampling import Sampler, Sampling
from rlhf.modeling.structure import evaluating

Stop = Callable[[list[list[int]]], list[bool]]
"""Stopping rule: takes each live row's reply tokens so far, returns whether the row ends here."""

READ_EVERY = 8
"""Steps between two reads of drawn tokens from an accelerator. Each read makes the host wait for
everything launched; between two reads an ended row is decoded for up to 7 steps more."""


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
    ends: Sequence[int] | None = None,
    batch_size: int | None = None,
    read_every: int | None = None,
) -> Replies:
    """Sample a reply to each prompt.

    A reply ends with an end-of-reply token, by `stop`, or after `max_new_tokens`. A row that
    `stop` ends keeps its last token and counts as finished. The tokens depend on `seed` and the
    weights alone; torch's global generator is neither read nor changed.

    Args:
        policy: A causal language model, on its device.
        prompts: Token ids of each prompt.
        tokenizer: Provides the pad token.
        sampling: Sampling parameters.
        seed: Seed of the batch.
        stop: Called with the tokens of live rows at each step, in order.
        own: Prompts to sample for; each row uses the random numbers of its index in `prompts`.
        ends: End-of-reply tokens; None is the tokenizer's eos alone.
        batch_size: Rows decoded at a time; None decodes all at once. The random numbers are the
            same; if a model's rounding depends on the batch size, a token can differ.
        read_every: Steps between two copies of the drawn tokens to the host, which detect ended
            rows; None is 1 on a CPU and `READ_EVERY` on an accelerator.
    """
    device = next(policy.parameters()).device
    ids, attention = (t[own] for t in pad_left(prompts, tokenizer.pad_token_id))
    indices = torch.arange(len(prompts))[own]
    drawn = _DrawnReplies(
        len(indices), sampling.max_new_tokens, tokenizer.pad_token_id,
        [tokenizer.eos_token_id] if ends is None else ends, stop,
    )  # fmt: skip
    every = read_every or (1 if device.type == "cpu" else READ_EVERY)
    with evaluating(policy):
        for rows in torch.arange(len(indices)).split(batch_size or max(1, len(indices))):
            batch = indices[rows]
            # A new sampler per batch: at each step it makes the random numbers of all prompts.
            sampler = Sampler(sampling, len(prompts), seed, device, drawn.masks.append)
            drawn.begin(rows)
            _decode(policy, [prompts[i] for i in batch.tolist()], batch, sampler, drawn, every)
    width = int(drawn.lengths.max())
    mask = torch.arange(width) < drawn.lengths[:, None]
    kept = drawn.kept_sets(width)
    return Replies(
        upload(torch.cat([ids, drawn.tokens[:, :width]], 1), device),
        torch.cat([attention, mask.long()], 1),
        upload(mask, device),
        upload(drawn.finished, device),
        None if kept is None else kept.to(device),
    )


@dataclass(frozen=True)
class Replies:
    """A batch of replies: prompts padded on the left, replies on the right.

    `ids` and `attention` are (batch, prompt + reply). `mask` is (batch, reply), true up to and
    including the end-of-reply token; it is made by position, because a sampled pad token is a token
    like any other. `attention` stays on the CPU, since shapes depend on it and reading it from an
    accelerator would make the host wait. `kept` are the sets of tokens from which a truncated
    sampler drew (`Sampling.record_kept`); None counts all tokens.
    """

    ids: Int[Tensor, "batch total"]
    attention: Int[Tensor, "batch total"]
    mask: Bool[Tensor, "batch reply"]
    finished: Bool[Tensor, " batch"]
    kept: KeptSets | None = None

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
        kept = None if self.kept is None else self.kept.to(device)
        return Replies(ids, self.attention, mask, finished, kept)

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
            self.finished[rows], None if self.kept is None else self.kept.take(index, width),
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
    sets = [batch.kept for batch in batches if batch.kept is not None]
    kept = KeptSets.concatenate(sets) if sets else None
    return Replies(widened("ids", pad), widened("attention", 0), widened("mask", 0), finished, kept)


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
        self, rows: int, max_new_tokens: int, pad: int, ends: Sequence[int], stop: Stop | None
    ) -> None:
        self.tokens = torch.full((rows, max_new_tokens), pad)
        self.lengths = torch.full((rows,), max_new_tokens)
        self.finished = torch.zeros(rows, dtype=torch.bool)
        self.ends, self.stop = torch.tensor(ends), stop
        #: Tokens that could be drawn at each step since the last read, if the sampler records them.
        self.masks: list[Bool[Tensor, "live vocabulary"]] = []
        self._kept: list[KeptSets] = []
        self._kept_cells: list[Tensor] = []

    def begin(self, rows: Tensor) -> None:
        """Start a batch: these rows are live."""
        self.live, self.step = rows, 0

    def read(self, block: Int[Tensor, "steps live"]) -> list[bool]:
        """Append some steps' tokens to the live rows; return which of them have ended."""
        kept = None
        if self.masks:  # all steps at once: on an accelerator each call makes the host wait
            kept = KeptSets.of_masks(torch.cat(self.masks)).to(block.device)
            self.masks.clear()
        over = torch.zeros(len(self.live), dtype=torch.bool)
        for i, step in enumerate(block):
            going = (~over).nonzero().squeeze(1)
            rows, tokens = self.live[going], step[going]
            self.tokens[rows, self.step] = tokens
            if kept is not None:
                self._kept.append(kept.take(i * len(self.live) + going, 1))
                self._kept_cells.append(rows * self.tokens.shape[1] + self.step)
            self.step += 1
            ended = torch.isin(tokens, self.ends)
            if self.stop is not None:
                so_far = self.tokens[rows, : self.step].tolist()
                ended |= torch.tensor(self.stop(so_far), dtype=torch.bool)
            self.lengths[rows[ended]] = self.step
            self.finished[rows[ended]] = True
            over[going[ended]] = True
            if over.all():
                break
        return over.tolist()

    def kept_sets(self, width: int) -> KeptSets | None:
        """Return the sets of all tokens, in `width` columns; None if they are not recorded."""
        if not self._kept:
            return None
        rows, columns = self.tokens.shape
        sets = KeptSets.assemble(self._kept, self._kept_cells, (rows, columns))
        return sets.take(torch.arange(rows), width)

    def keep(self, order: Tensor) -> None:
        """Drop all live rows but these, in this order."""
        self.live = self.live[order]
