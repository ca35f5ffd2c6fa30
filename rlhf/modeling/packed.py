"""Packed sequences: sequences of different length as one row, without padding.

Linear layers then compute on real tokens only. Attention must not cross the borders of sequences,
so the row carries a `Packed` plan, and an attention function registered with transformers cuts the
row into its sequences. A model that can't be packed exactly (sliding windows shorter than the text,
recurrent layers, attention that is not SDPA) is detected by comparing both ways once, and gets
padded batches.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf.modeling.attention import blockwise, supports_blockwise
from rlhf.modeling.device import rounding, upload

#: Name of the attention function in transformers, and of its argument that carries the plan.
ATTENTION = "rlhf_rows"

#: Squared tokens of padding that cost as much as one more attention call on a CPU: measured at
#: width 192 to 768 on one core, where a call takes some 0.1 ms.
CALL_COST = 2000

#: The same on an accelerator, estimated: a call launches six kernels in some 30 µs, in which a
#: Hopper GPU computes 10 GFLOP, so 4 · width · 10^6 operations at width 2048.
ACCELERATOR_CALL_COST = 2**20

#: Results of `packs` by backbone and of `has_plain_head` by model: each is tested once.
_packs: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
_plain_heads: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def arguments_of(
    ids: Int[Tensor, "batch time"], attention: Int[Tensor, "batch time"], packed: bool
) -> tuple[dict[str, Any], Int[Tensor, "batch time"]]:
    """Return a model call's arguments, and each token's index in its hidden states.

    The index of a padding token is that of some other token: use those of real tokens only.

    Args:
        ids: Tokens, on the model's device.
        attention: 1 on real tokens, 0 on padding; on the CPU, so that the host does not wait.
        packed: Pack the rows without padding; requires `packs`.

    Returns:
        Keyword arguments on the device of `ids`, and the index on the CPU.
    """
    device, attention = ids.device, attention.cpu()
    positions = position_ids(attention)
    if not packed:
        index = torch.arange(ids.numel()).view(ids.shape)
        mask, steps = upload(attention, device), upload(positions, device)
        return {"input_ids": ids, "attention_mask": mask, "position_ids": steps}, index
    index = (attention.flatten().cumsum(0) - 1).clamp(min=0).view(ids.shape)
    valid = attention.flatten().nonzero().squeeze(1)
    flat, steps = ids.flatten()[upload(valid, device)], positions.flatten()[valid]
    lengths = attention.sum(1).tolist()
    extra = rounding(len(flat), device) if len(set(lengths)) > 1 else 0
    if extra:  # one more sequence, whose result is not used
        flat = F.pad(flat, (0, extra))
        steps = torch.cat([steps, torch.arange(extra)])
        lengths.append(extra)
    return packed_arguments(flat, upload(steps, device), Packed.of(lengths, device)), index


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


def packs(model: Any, longest: int) -> bool:
    """Return whether packing is exact for sequences of up to `longest` tokens.

    The first call tests it, and on success leaves the model's attention set to `ATTENTION`.
    """
    backbone = backbone_of(model)
    if _window(backbone.config) < longest:
        return False
    if backbone not in _packs:
        _packs[backbone] = _enable_packing(core_of(model), backbone)
    return _packs[backbone]


def frozen_copy(model: Any, dtype: torch.dtype) -> Any:
    """Copy a model, frozen, with its parameters in `dtype`.

    Parameters of that dtype are shared, not copied. Buffers keep their precision: rotary
    frequencies need all their digits. The result of `packs` holds for the copy as well.
    """
    packs(model, 1)  # sets the attention in the configuration that is copied
    parameters = {
        id(p): torch.nn.Parameter(p.data.to(dtype), requires_grad=False) for p in model.parameters()
    }
    twin = copy.deepcopy(model, parameters)
    _packs[backbone_of(twin)] = _packs[backbone_of(model)]
    return twin


def final_hidden(
    model: Any, arguments: dict[str, Any]
) -> tuple[Float[Tensor, "positions width"], Callable[[Tensor], Tensor]]:
    """Compute the last hidden states, flattened, without the logits.

    Returns:
        The states, and a cast to the dtype of the head's computation, which autocast may lower.
    """
    with _Capture(model) as capture:
        model(**arguments, use_cache=False, logits_to_keep=1)
    hidden, dtype = capture.hidden.flatten(0, 1), capture.cast
    return hidden, lambda t: t if dtype is None else t.to(dtype)


def captured_logits(
    model: Any, arguments: dict[str, Any], index: Int[Tensor, " selected"]
) -> tuple[Float[Tensor, "positions width"], Float[Tensor, "selected vocabulary"]]:
    """Compute the last hidden states, flattened, and the logits of some of them."""
    packed = arguments["input_ids"].shape[0] == 1
    index = upload(index, arguments["input_ids"].device)
    with _Capture(model) as capture:
        logits = model(**arguments, use_cache=False, logits_to_keep=index if packed else 0).logits
    flat = logits.flatten(0, 1)
    return capture.hidden.flatten(0, 1), flat if packed else flat[index]


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


def head_of(model: Any) -> Any:
    """Return the layer that maps hidden states to logits."""
    return core_of(model).get_output_embeddings()


@torch.no_grad()
def has_plain_head(model: Any) -> bool:
    """Return whether logits are the head's plain output, not scaled or capped."""
    core = core_of(model)
    if core not in _plain_heads:
        head, device = head_of(core), next(core.parameters()).device
        ids = torch.arange(2, device=device)[None]
        no_autocast = torch.autocast(device.type, enabled=False)
        with evaluating(core), no_autocast, _Capture(core) as capture:
            logits = core(input_ids=ids, use_cache=False).logits
            _plain_heads[core] = head is not None and torch.equal(head(capture.hidden), logits)
    return _plain_heads[core]


def core_of(model: Any) -> PreTrainedModel:
    """Return the transformers model inside adapters, a critic or a DDP wrapper."""
    while not isinstance(model, PreTrainedModel):
        if hasattr(model, "get_base_model"):  # peft
            model = model.get_base_model()
        elif hasattr(model, "module"):
            model = model.module
        else:
            model = model.backbone
    return model


def cache_parameter(model: Any) -> str:
    """Return the name of a model's cache parameter.

    transformers 5.24 renamed `past_key_values` to `cache`, model by model.
    """
    parameters = inspect.signature(type(core_of(model)).forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def backbone_of(model: Any) -> Any:
    """Return the part of a model that computes hidden states."""
    core = core_of(model)
    return getattr(core, core.base_model_prefix, core)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Switch dropout off, and restore the mode of each module afterwards."""
    training = [m for m in model.modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@runtime_checkable
class AttentionPlan(Protocol):
    """Attention of one forward pass, passed to the model as a keyword argument."""

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


def _window(config: Any) -> float:
    """Return the shortest attention window of a layer, in tokens."""
    types = getattr(config, "layer_types", None)
    if types is not None and set(types) <= {"full_attention"}:
        return float("inf")
    limits = (getattr(config, n, None) for n in ("sliding_window", "attention_chunk_size"))
    return min((limit for limit in limits if limit), default=float("inf"))


@torch.no_grad()
def _enable_packing(core: Any, backbone: Any) -> bool:
    """Compare packed and padded results; if they agree, keep `ATTENTION` set."""
    before = core.config._attn_implementation
    if before not in ("sdpa", ATTENTION) or not core._can_set_attn_implementation():
        return False
    device = next(backbone.parameters()).device
    highest = min(backbone.get_input_embeddings().num_embeddings, 97)
    width = int(min(8, _window(backbone.config)))
    ids = (torch.arange(2 * width, device=device).view(2, width) * 37 + 11) % highest
    attention = torch.ones(2, width, dtype=torch.long)
    attention[0, : width // 3] = 0
    valid = attention.bool()

    def run(packed: bool) -> Tensor:
        arguments, index = arguments_of(ids, attention, packed)
        hidden = backbone(**arguments, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1)[index[valid].to(device)].float()

    with evaluating(backbone), torch.autocast(device.type, enabled=False):
        expected = run(packed=False)
        core.set_attn_implementation(ATTENTION)
        try:
            gap = (run(packed=True) - expected).abs().max()
        except (NotImplementedError, RuntimeError, TypeError, ValueError):
            gap = torch.tensor(float("inf"))
    exact = next(backbone.parameters()).dtype in (torch.float32, torch.float64)
    agrees = bool(gap <= (1e-4 if exact else 3e-2) * expected.abs().max().clamp(min=1e-6))
    if not agrees:
        core.set_attn_implementation(before)
    return agrees


class _Capture:
    """Captures a backbone's last hidden states, and the autocast dtype, during a call."""

    def __init__(self, model: Any) -> None:
        self.backbone = backbone_of(model)
        self.hidden: Any = None
        self.cast: torch.dtype | None = None

    def __enter__(self) -> _Capture:
        self.hook = self.backbone.register_forward_hook(self._store)
        return self

    def __exit__(self, *_: object) -> None:
        self.hook.remove()

    def _store(self, _module: Any, _inputs: Any, output: Any) -> None:
        self.hidden = output.last_hidden_state
        device = self.hidden.device.type
        if torch.is_autocast_enabled(device):
            self.cast = torch.get_autocast_dtype(device)


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
    if rlhf_rows is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **extra
        )
    if extra.get("softcap") is not None or extra.get("position_bias") is not None:
        raise NotImplementedError("soft-capped or biased attention")
    return rlhf_rows.attend(query, key, value, dropout_p=dropout, scale=scaling), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
