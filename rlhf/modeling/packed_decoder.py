"""Decoder of packed rows: one cache of all rows' keys and values, without padding of prompts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache

from rlhf.modeling.device import plain_float32, upload
from rlhf.modeling.packed import Packed, packed_arguments
from rlhf.modeling.structure import cache_parameter


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

    def widest(self, key: Tensor) -> int:
        return key.shape[2]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        rows, heads, _, dim = query.shape
        # Query heads that share a key head become queries of that head, so nothing is copied.
        grouped = query.reshape(rows, key.shape[1], -1, dim)
        with plain_float32(query.device):
            out = F.scaled_dot_product_attention(
                grouped, key, value, attn_mask=self.mask, **options
            )
        return out.reshape(rows, 1, heads, -1)
