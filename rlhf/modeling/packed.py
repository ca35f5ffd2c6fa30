"""Packed sequences: sequences of different length as one row, without padding.

Linear layers then compute on real tokens only. Attention must not cross the borders of sequences,
so the row carries a `Packed` plan, and an attention function registered with transformers cuts the
row into its sequences. A model that can't be packed exactly (sliding windows shorter than the text,
recurrent layers, attention that is not SDPA) is detected by comparing with single rows once, and
gets batches padded on the right, or batches of rows of the same length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf.errors import ConfigError
from rlhf.modeling.agreement import agrees_with_rows, hidden_of, length_past_window
from rlhf.modeling.attention import blockwise, supports_blockwise
from rlhf.modeling.device import rounding, upload
from rlhf.modeling.structure import (
    Capture,
    argument_names,
    attention_window,
    backbone_of,
    call,
    core_of,
    facts_of,
    model_name,
    stable_length,
)

#: Name of the attention function in transformers, and of its argument that carries the plan.
ATTENTION = "rlhf_rows"

#: Squared tokens of padding that cost as much as one more attention call on a CPU: measured at
#: width 192 to 768 on one core, where a call takes some 0.1 ms.
CALL_COST = 2000

#: The same on an accelerator, estimated: a call launches six kernels in some 30 µs, in which a
#: Hopper GPU computes 10 GFLOP, so 4 · width · 10^6 operations at width 2048.
ACCELERATOR_CALL_COST = 2**20


def arguments_of(
    ids: Int[Tensor, "batch time"], attention: Int[Tensor, "batch time"], packed: bool
) -> tuple[dict[str, Any], Int[Tensor, "batch time"]]:
    """Return a model call's arguments, and each token's index in its hidden states.

    Without packing the rows are moved to the left and padded on the right, so that no token of a
    causal model attends to padding, and recurrent layers never read it before a token. The index of
    a padding token is that of some other token: use those of real tokens only.

    Args:
        ids: Tokens, on the model's device; the real tokens of a row are adjacent.
        attention: 1 on real tokens, 0 on padding; on the CPU, so that the host does not wait.
        packed: Pack the rows without padding; requires `packs`.

    Returns:
        Keyword arguments on the device of `ids`, and the index on the CPU.
    """
    device, attention = ids.device, attention.cpu()
    positions = position_ids(attention)
    lengths = attention.sum(1)
    if not packed:
        width = int(lengths.max())
        steps = torch.arange(width)
        columns = (attention.argmax(1, keepdim=True) + steps).clamp(max=ids.shape[1] - 1)
        index = torch.arange(len(ids))[:, None] * width + positions
        arguments = {"input_ids": ids.gather(1, upload(columns, device))}
        if int(lengths.min()) < width:
            mask = (steps < lengths[:, None]).long()
            arguments["attention_mask"] = upload(mask, device)
        return arguments, index
    index = (attention.flatten().cumsum(0) - 1).clamp(min=0).view(ids.shape)
    valid = attention.flatten().nonzero().squeeze(1)
    flat, steps = ids.flatten()[upload(valid, device)], positions.flatten()[valid]
    sizes = lengths.tolist()
    extra = rounding(len(flat), device) if len(set(sizes)) > 1 else 0
    if extra:  # one more sequence, whose result is not used
        flat = F.pad(flat, (0, extra))
        steps = torch.cat([steps, torch.arange(extra)])
        sizes.append(extra)
    return packed_arguments(flat, upload(steps, device), Packed.of(sizes, device)), index


def position_ids(attention: Int[Tensor, "batch time"]) -> Int[Tensor, "batch time"]:
    """Positions counted from each row's first real token."""
    return (attention.cumsum(1) - 1).clamp(min=0)


def packed_arguments(
    ids: Int[Tensor, " tokens"], positions: Int[Tensor, " tokens"], plan: AttentionPlan
) -> dict[str, Any]:
    """Return the keyword arguments of a transformers model for one packed row."""
    # transformers builds no mask if it gets a four-dimensional one; `_attention` ignores it.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)
    return {
        "input_ids": ids[None],
        "position_ids": positions[None],
        "attention_mask": mask,
        ATTENTION: plan,
    }


def packs(model: Any, longest: float) -> bool:
    """Return whether packing is exact for sequences of up to `longest` tokens.

    The first call tests it, and on success leaves the model's attention set to `ATTENTION`.
    """
    if min(attention_window(model), stable_length(model)) < longest:
        return False
    facts = facts_of(model)
    if "packs" not in facts:
        facts["packs"] = _enable_packing(core_of(model), backbone_of(model))
    return facts["packs"]


def row_groups(model: Any, attention: Int[Tensor, "batch time"]) -> list[Int[Tensor, " rows"]]:
    """Group rows that one forward pass computes exactly; by length where padding is not exact.

    Args:
        model: The model that is to be called on the rows of each group.
        attention: 1 on real tokens, 0 on padding; on the CPU.

    Raises:
        ConfigError: The model does not compute the same for a row alone, because a token's result
            depends on later tokens.
    """
    lengths = attention.sum(1)
    longest = int(lengths.max())
    if layout_of(model, longest) != "by length" or int(lengths.min()) == longest:
        return [torch.arange(len(lengths))]
    return [(lengths == n).nonzero().squeeze(1) for n in lengths.unique().tolist()]


def layout_of(model: Any, longest: float) -> Literal["packed", "padded", "by length"]:
    """Return the fastest exact way to compute rows of up to `longest` tokens in one forward pass.

    Raises:
        ConfigError: As `row_groups`.
    """
    if packs(model, longest):
        return "packed"
    check_causal(model)
    return "padded" if longest <= stable_length(model) and _pads(model) else "by length"


def final_hidden(
    model: Any, arguments: dict[str, Any]
) -> tuple[Float[Tensor, "positions width"], Callable[[Tensor], Tensor]]:
    """Compute the last hidden states, flattened, without the logits.

    Returns:
        The states, and a cast to the dtype of the head's computation, which autocast may lower.
    """
    with Capture(model) as capture:
        call(model, **arguments, logits_to_keep=1)
    hidden, dtype = capture.hidden.flatten(0, 1), capture.cast
    return hidden, lambda t: t if dtype is None else t.to(dtype)


def captured_logits(
    model: Any, arguments: dict[str, Any], index: Int[Tensor, " selected"]
) -> tuple[Float[Tensor, "positions width"], Float[Tensor, "selected vocabulary"]]:
    """Compute the last hidden states, flattened, and the logits of some of them."""
    selects = arguments["input_ids"].shape[0] == 1 and "logits_to_keep" in argument_names(model)
    index = upload(index, arguments["input_ids"].device)
    with Capture(model) as capture:
        logits = call(model, **arguments, logits_to_keep=index if selects else 0).logits
    flat = logits.flatten(0, 1)
    return capture.hidden.flatten(0, 1), flat if selects else flat[index]


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


@runtime_checkable
class AttentionPlan(Protocol):
    """Attention of one forward pass, passed to the model as a keyword argument."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Attend from (batch, heads, time, dim) to (batch, time, heads, dim)."""
        ...

    def widest(self, key: Tensor) -> int:
        """Most keys of one query."""
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
        call_cost = CALL_COST if device.type == "cpu" else ACCELERATOR_CALL_COST
        rectangles = rectangles_of(lengths, call_cost)
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
        if supports_blockwise(query, self.widest(key), options["dropout_p"]):
            scale = options["scale"] or query.shape[-1] ** -0.5
            query, key, value = flat
            joined: Any = blockwise(query, key, value, self.rectangles, heads[:2], scale)
        else:
            joined = self._attend_by_torch(flat, heads, options)
        if self.fill is not None:
            joined = _Gather.apply(joined, self.read, self.fill, self.filler)
        return joined.view(1, joined.shape[0], heads[0], -1)

    def widest(self, key: Tensor) -> int:
        """Length of the longest sequence."""
        return max(width for _, width in self.rectangles)

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


def _enable_packing(core: Any, backbone: Any) -> bool:
    """Compare packed rows with single ones; if they agree, keep `ATTENTION` set."""
    before = core.config._attn_implementation
    if before not in ("sdpa", ATTENTION) or not core._can_set_attn_implementation():
        return False
    if getattr(core.config.get_text_config(decoder=True), "index_topk", None):
        return False  # it selects tokens only under names of attention that it knows
    width = int(max(2, min(8, attention_window(core))))

    def packed(rows: list[list[int]]) -> list[Tensor]:
        core.set_attn_implementation(ATTENTION)
        try:
            return _hidden_of_batch(backbone, rows, packed=True)
        finally:
            core.set_attn_implementation(before)

    def renamed(rows: list[list[int]]) -> list[Tensor]:
        core.set_attn_implementation(ATTENTION)
        try:
            return [hidden_of(backbone, row) for row in rows]
        finally:
            core.set_attn_implementation(before)

    if not agrees_with_rows(core, [width - width // 3, width, width // 2], packed).holds:
        return False
    # Other code may ask for the name of the attention too.
    if not agrees_with_rows(core, [length_past_window(core, 8)], renamed).holds:
        return False
    core.set_attn_implementation(ATTENTION)
    return True


def _pads(model: Any) -> bool:
    """Return whether rows that are padded on the right are computed exactly."""
    facts = facts_of(model)
    if "pads" not in facts:
        longest = int(min(length_past_window(model, 8), stable_length(model)))
        lengths = [max(1, longest - 4), longest, max(1, longest // 2)]
        backbone = backbone_of(model)
        facts["pads"] = agrees_with_rows(
            model, lengths, lambda rows: _hidden_of_batch(backbone, rows, packed=False)
        ).holds
    return facts["pads"]


def check_causal(model: Any) -> None:
    """Refuse a model whose results for the same tokens depend on the tokens that follow.

    Raises:
        ConfigError: It does.
    """
    facts, backbone = facts_of(model), backbone_of(model)
    if "causal" not in facts:
        facts["causal"] = agrees_with_rows(
            model, [6], lambda rows: [_with_more(backbone, row) for row in rows]
        )
    if not facts["causal"].holds:
        gap = facts["causal"]
        raise ConfigError(
            f"base.path: {model_name(model)} is no causal language model: a hidden state is "
            f"{gap.expected:.4g} after the tokens before it, and {gap.actual:.4g} when more tokens "
            "follow; give a model that reads from left to right only"
        )


def _with_more(backbone: Any, row: list[int]) -> Tensor:
    """Compute the hidden states of a row that other tokens follow."""
    return hidden_of(backbone, [*row, *reversed(row[:4])])[: len(row)]


def _hidden_of_batch(backbone: Any, rows: list[list[int]], packed: bool) -> list[Tensor]:
    """Compute the last hidden states of rows together."""
    lengths, width = [len(row) for row in rows], max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    attention = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    ids = ids.to(next(backbone.parameters()).device)
    arguments, index = arguments_of(ids, attention, packed)
    hidden = call(backbone, **arguments).last_hidden_state.flatten(0, 1)
    return [*hidden[index[attention.bool()].to(ids.device)].split(lengths)]


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
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, rlhf_rows: AttentionPlan | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend by the plan of the forward pass; plain SDPA without one.

    It stays the model's attention between calls, because gradient checkpointing calls it again in
    the backward pass.
    """
    for name in ("indices", "block_indices"):  # tokens that a layer selected; SDPA would see all
        if extra.get(name) is not None:
            raise NotImplementedError(f"attention with {name}")
    if rlhf_rows is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **extra
        )
    if attention_mask is not None and attention_mask.numel() > 1:  # made from ours and its own
        raise NotImplementedError("a mask of the model's own")
    for name in ("softcap", "position_bias", "s_aux", "sinks"):
        if extra.get(name) is not None:
            raise NotImplementedError(f"attention with {name}")
    window = extra.get("sliding_window")
    if window is not None and window < rlhf_rows.widest(key):
        raise NotImplementedError(f"a window of {window} tokens on longer sequences")
    return rlhf_rows.attend(query, key, value, dropout_p=dropout, scale=scaling), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
