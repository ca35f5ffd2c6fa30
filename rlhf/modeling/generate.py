"""Generation of replies: sampling from a causal language model with a cache.

`generate` decodes with `PackedDecoder` where packing is exact for the model, and otherwise with
`PaddedDecoder`. Log-probabilities of replies are in `logprobs`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache

from rlhf.modeling.device import plain_float32, upload
from rlhf.modeling.kept_sets import KeptSets
from rlhf.modeling.packed import (
    Packed,
    cache_parameter,
    core_of,
    evaluating,
    packed_arguments,
    packs,
    position_ids,
)
from rlhf.modeling.sampling import Sampler, Sampling

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
        self, rows: int, max_new_tokens: int, pad: int, end: int, stop: Stop | None
    ) -> None:
        self.tokens = torch.full((rows, max_new_tokens), pad)
        self.lengths = torch.full((rows,), max_new_tokens)
        self.finished = torch.zeros(rows, dtype=torch.bool)
        self.end, self.stop = end, stop
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


def decoder_of(
    policy: Any, prompts: list[list[int]], max_new_tokens: int
) -> PackedDecoder | PaddedDecoder:
    """Make the fastest decoder that is exact for this model."""
    longest = max(len(p) for p in prompts) + max_new_tokens
    decoder = PackedDecoder if packs(policy, longest) else PaddedDecoder
    return decoder(policy, prompts, max_new_tokens)


class PackedDecoder:
    """Decoder for models that support packing: prefill without padding, fixed buffers.

    A finished row is overwritten by one of the last rows, so that dropping it copies one row.
    """

    def __init__(self, policy: Any, prompts: list[list[int]], max_new_tokens: int) -> None:
        self.policy, self.prompts = policy, prompts
        self.device = next(policy.parameters()).device
        self.lengths = lengths = [len(p) for p in prompts]
        self.cache = _KVCache(lengths, max(lengths) + max_new_tokens, self.device)
        self.cache_argument = {cache_parameter(policy): self.cache}
        self.positions = upload(torch.tensor(lengths)[:, None], self.device)
        self.mask = None
        if min(lengths) < max(lengths):
            padding = max(lengths) - self.positions
            columns = torch.arange(self.cache.columns, device=self.device)
            self.mask = (columns >= padding)[:, None, None]
        # A four-dimensional mask keeps transformers from making one of its own.
        self.ready_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)

    def start(self) -> Float[Tensor, "rows vocabulary"]:
        """Prefill the cache with the prompts; return the logits after each."""
        lengths = self.lengths
        ids = upload(torch.tensor([i for p in self.prompts for i in p]), self.device)
        positions = upload(torch.cat([torch.arange(n) for n in lengths]), self.device)
        last = upload(torch.tensor(lengths).cumsum(0) - 1, self.device)
        logits = self.policy(
            **packed_arguments(ids, positions, Packed.of(lengths, self.device)),
            **self.cache_argument,
            use_cache=True,
            logits_to_keep=last,
        ).logits[0]
        if self.mask is not None:
            self.mask = torch.zeros_like(self.mask, dtype=self.cache.keys[0].dtype).masked_fill_(
                ~self.mask, -torch.inf
            )
        return logits

    def step(self, tokens: Int[Tensor, " live"]) -> Float[Tensor, "live vocabulary"]:
        """Append one token to each live row; return the logits after it."""
        cache = self.cache
        n = cache.rows
        cache.width += 1
        mask = None if self.mask is None else self.mask[:n, :, :, : cache.width]
        logits = self.policy(
            input_ids=tokens[:, None],
            position_ids=self.positions[:n],
            attention_mask=self.ready_mask,
            **self.cache_argument,
            use_cache=True,
            logits_to_keep=1,
            rlhf_rows=_TokenAttention(mask),
        ).logits[:, -1]
        self.positions += 1
        return logits

    def drop(self, ended: list[bool]) -> list[int]:
        """Drop ended rows; return the old index of each remaining row, in the new order."""
        n = len(ended) - sum(ended)
        holes = [i for i in range(n) if ended[i]]
        last = [i for i in range(n, len(ended)) if not ended[i]]
        if holes:
            targets, sources = (upload(torch.tensor(i), self.device) for i in (holes, last))
            self.cache.move(sources, targets)
            self.positions[targets] = self.positions[sources]
            if self.mask is not None:
                self.mask[targets] = self.mask[sources]
        self.cache.rows = n
        filling = dict(zip(holes, last, strict=True))
        return [filling.get(i, i) for i in range(n)]


class _KVCache(Cache):
    """Keys and values in preallocated buffers; all prompts end in the same column."""

    def __init__(self, lengths: list[int], columns: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self.columns = columns
        self.width = max(lengths)
        self.rows = len(lengths)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        ends = torch.tensor(lengths).cumsum(0)[:, None]
        column = torch.arange(self.width)
        # The token in the packed row for each cell of the padded prompts; for padding any token.
        source = (ends - self.width + column).clamp(min=0)
        padding = column < self.width - torch.tensor(lengths)[:, None]
        self.source = upload(source.flatten(), device)
        self.padding = upload(padding, device)[:, None, :, None] if padding.any() else None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Store packed prompts or one column; return the keys and values to attend to."""
        if layer_idx == len(self.keys):
            return self._prefill(key_states, value_states)
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        n, end = self.rows, self.width
        keys[:n, :, end - 1 : end] = key_states
        values[:n, :, end - 1 : end] = value_states
        return keys[:n, :, :end], values[:n, :, :end]

    def _prefill(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        for store, states in ((self.keys, key_states), (self.values, value_states)):
            _, heads, _, dim = states.shape
            buffer = states.new_zeros(self.rows, heads, self.columns, dim)
            prompts = states[0].index_select(1, self.source).view(heads, self.rows, -1, dim)
            buffer[:, :, : self.width] = prompts.transpose(0, 1)
            if self.padding is not None:  # masked, but a NaN there would spoil the product
                buffer[:, :, : self.width].masked_fill_(self.padding, 0)
            store.append(buffer)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns in use."""
        return self.width if self.keys else 0

    def move(self, sources: Int[Tensor, " moved"], targets: Int[Tensor, " moved"]) -> None:
        """Overwrite target rows by source rows; no row may be both."""
        for buffer in (*self.keys, *self.values):
            used = buffer[:, :, : self.width]
            used.index_copy_(0, targets, used.index_select(0, sources))


class _TokenAttention:
    """Attention of one new token per row to the row's cache."""

    def __init__(self, mask: Tensor | None) -> None:
        self.mask = mask

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        rows, heads, _, dim = query.shape
        # Query heads that share a key head become queries of that head, so nothing is copied.
        grouped = query.reshape(rows, key.shape[1], -1, dim)
        with plain_float32(query.device):
            out = F.scaled_dot_product_attention(
                grouped, key, value, attn_mask=self.mask, **options
            )
        return out.reshape(rows, 1, heads, -1)


class PaddedDecoder:
    """Decoder for all other models, with transformers' own cache and masks."""

    def __init__(self, policy: Any, prompts: list[list[int]], max_new_tokens: int) -> None:
        self.policy = policy
        device = next(policy.parameters()).device
        ids, attention = pad_left(prompts, 0)
        self.ids, self.attention = upload(ids, device), upload(attention, device)
        # Without padding no mask is passed: transformers would read it at every step, to see
        # whether it masks anything.
        self.has_padding = not bool(attention.all())
        self.cache = DynamicCache(config=core_of(policy).config)
        self.cache_argument = {cache_parameter(policy): self.cache}

    def start(self) -> Float[Tensor, "rows vocabulary"]:
        """Prefill the cache with the prompts; return the logits after each."""
        return self._forward(self.ids, position_ids(self.attention))

    def step(self, tokens: Int[Tensor, " live"]) -> Float[Tensor, "live vocabulary"]:
        """Append one token to each live row; return the logits after it."""
        self.attention = F.pad(self.attention, (0, 1), value=1)
        return self._forward(tokens[:, None], self.attention.sum(1, keepdim=True) - 1)

    def drop(self, ended: list[bool]) -> list[int]:
        """Drop ended rows; return the old index of each remaining row, in the new order."""
        order = [i for i, end in enumerate(ended) if not end]
        index = upload(torch.tensor(order, dtype=torch.long), self.attention.device)
        self.cache.batch_select_indices(index)
        self.attention = self.attention[index]
        return order

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.policy(
            input_ids=ids,
            attention_mask=self.attention if self.has_padding else None,
            position_ids=positions,
            **self.cache_argument,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]


def pad_left(
    rows: list[list[int]], pad: int
) -> tuple[Int[Tensor, "batch time"], Int[Tensor, "batch time"]]:
    """Stack prompts, padded on the left; return ids and attention mask."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
