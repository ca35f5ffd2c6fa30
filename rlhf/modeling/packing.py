"""Packed sequences: sequences of different length as one row, without padding.

Linear layers then compute on real tokens only. Attention must not cross the borders of sequences,
so the row carries a `Packed` plan, and an attention function registered with transformers cuts the
row into its sequences. A model that can't be packed exactly (sliding windows shorter than the text,
recurrent layers, attention that is not SDPA) is detected by comparing both ways once, and gets
padded batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf.modeling.attention import blockwise, supports_blockwise
from rlhf.modeling.device import upload

#: Name of the attention function in transformers, and of its argument that carries the plan.
ATTENTION = "rlhf_rows"
#: Squared tokens of padding that cost as much as one more attention call on a CPU: measured at
#: width 192 to 768 on one core, where a call takes some 0.1 ms.
CALL_COST = 2000
#: The same on an accelerator, estimated: a call launches six kernels in some 30 µs, in which a
#: Hopper GPU computes 10 GFLOP, so 4 · width · 10^6 operations at width 2048.
ACCELERATOR_CALL_COST = 2**20


@runtime_checkable
class AttentionPlan(Protocol):
    """Attention of a forward pass, handed through the model as `ATTENTION`."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Attend from (batch, heads, time, dim) to (batch, time, heads, dim)."""
        ...


@dataclass(frozen=True, eq=False)
class Packed:
    """Attention plan of a packed row: its sequences, arranged in padded rectangles.

    A rectangle holds sequences of similar length, padded on the right. A causal query never attends
    to later positions, so the padding needs no mask.
    """

    lengths: tuple[int, ...]
    rectangles: tuple[tuple[int, int], ...]
    """(rows, width) of each."""
    fill: Int[Tensor, " slots"] | None
    """Token of each slot (0 for padding); None if the rectangles are the row itself."""
    read: Int[Tensor, " tokens"] | None
    """Slot of each token."""
    filler: Int[Tensor, " padding"] | None
    """Slots that are padding."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Packed:
        """Plan for sequences of these lengths, in this order."""
        lengths = tuple(lengths)
        if len(set(lengths)) == 1:
            return cls(lengths, ((len(lengths), lengths[0]),), None, None, None)
        starts = [0]
        for n in lengths:
            starts.append(starts[-1] + n)
        fill = []
        rectangles = rectangles_of(
            lengths, CALL_COST if device.type == "cpu" else ACCELERATOR_CALL_COST
        )
        for rows in rectangles:
            width = lengths[rows[0]]
            steps = torch.arange(width)
            begin = torch.tensor([starts[i] for i in rows])[:, None]
            size = torch.tensor([lengths[i] for i in rows])[:, None]
            fill.append(torch.where(steps < size, begin + steps, -1).flatten())
        slots = torch.cat(fill)
        padding = slots < 0
        read = torch.empty(starts[-1], dtype=torch.long)
        read[slots[~padding]] = (~padding).nonzero().squeeze(1)
        return cls(
            lengths,
            tuple((len(rows), lengths[rows[0]]) for rows in rectangles),
            upload(slots.clamp(min=0), device),
            upload(read, device),
            upload(padding.nonzero().squeeze(1), device),
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Attend causally within each sequence of a packed row (1, heads, tokens, dim)."""
        heads = (query.shape[1], key.shape[1], value.shape[1])
        flat = [t.transpose(1, 2).flatten(2)[0] for t in (query, key, value)]
        if self.fill is not None:
            flat = [_Gather.apply(t, self.fill, self.read, None) for t in flat]
        widest = max(width for _, width in self.rectangles)
        if supports_blockwise(query, widest, options["dropout_p"]):
            scale = options["scale"] or query.shape[-1] ** -0.5
            query, key, value = flat
            joined: Any = blockwise(query, key, value, self.rectangles, heads[:2], scale)
        else:
            joined = self._attend_by_torch(flat, heads, options)
        if self.fill is not None:
            joined = _Gather.apply(joined, self.read, self.fill, self.filler)
        return joined.view(1, joined.shape[0], heads[0], -1)

    def _attend_by_torch(
        self, flat: list[Tensor], heads: tuple[int, int, int], options: Any
    ) -> Tensor:
        outputs = []
        start = 0
        for rows, width in self.rectangles:
            part = slice(start, start + rows * width)
            q, k, v = (
                t[part].view(rows, width, n, -1).transpose(1, 2)
                for t, n in zip(flat, heads, strict=True)
            )
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=heads[0] != heads[1], **options
            )
            outputs.append(out.transpose(1, 2).reshape(rows * width, -1))
            start = part.stop
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def rectangles_of(lengths: Sequence[int], call_cost: int = CALL_COST) -> list[list[int]]:
    """Group rows by similar length, longest first in the list and in each group.

    A group ends where its padding would cost more than `call_cost` squared tokens.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    waste = 0
    for i in order:
        if groups:
            waste += lengths[groups[-1][0]] ** 2 - lengths[i] ** 2
        if not groups or waste > call_cost:
            groups.append([])
            waste = 0
        groups[-1].append(i)
    return groups


def take_rows(
    source: Float[Tensor, "rows width"], index: Int[Tensor, " selected"]
) -> Float[Tensor, "selected width"]:
    """Return `source[index]` for an index without repeats, with a fast backward pass.

    An index on the CPU selects from a source on an accelerator without blocking the host.
    """
    device = source.device
    if not (torch.is_grad_enabled() and source.requires_grad):
        return source.index_select(0, upload(index, device))
    unselected = torch.ones(len(source), dtype=torch.bool, device=index.device)
    unselected[index] = False
    back = torch.zeros(len(source), dtype=torch.long, device=index.device)
    back[index] = torch.arange(len(index), device=index.device)
    indices = (index, back, unselected.nonzero().squeeze(1))
    result: Any = _Gather.apply(source, *(upload(i, device) for i in indices))
    return result


class _Gather(torch.autograd.Function):
    """Gather rows by an index without repeats, apart from filler rows.

    Filler rows are padding that repeats a row. The backward pass gathers by the inverse index: that
    of general indexing adds row by row, which is slow on a CPU.
    """

    @staticmethod
    def forward(
        ctx: Any, source: Tensor, index: Tensor, back: Tensor, back_filler: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(back, back_filler)
        return source.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        back, filler = ctx.saved_tensors
        grad = grads[0].index_select(0, back)
        if filler is not None:
            grad.index_fill_(0, filler, 0)
        return grad, None, None, None


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    rlhf_rows: AttentionPlan | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """Attend by the plan of the forward pass; plain SDPA without one.

    It stays the model's attention between calls, because gradient checkpointing calls it again in
    the backward pass.
    """
    if rlhf_rows is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **extra
        )
    if extra.get("softcap") is not None or extra.get("position_bias") is not None:
        raise NotImplementedError("soft-capped or biased attention")
    return rlhf_rows.attend(query, key, value, dropout_p=dropout, scale=scaling), None


AttentionInterface.register(ATTENTION, _attention)


AttentionMaskInterface.register(ATTENTION, sdpa_mask)
