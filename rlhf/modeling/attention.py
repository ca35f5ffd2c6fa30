"""Causal attention of short sequences on a CPU, in blocks that fit its cache.

torch's SDPA kernel is made for long sequences. At the length of a reply it is slower than plain
matrix products on small blocks, and several times slower where float32 products use oneDNN
(`torch.set_float32_matmul_precision("medium")`). Here they always use MKL, because oneDNN would
generate code for every new length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.modeling.device import plain_float32

#: Attention weights computed at a time: 1 MiB in float32.
BLOCK = 2**18

#: Longest sequence in tokens; the weights saved for the backward pass grow with its square.
LONGEST = 512


def supports_blockwise(query: Tensor, width: int, dropout: float) -> bool:
    """Return whether `blockwise` computes this attention exactly and faster."""
    return (
        query.device.type == "cpu"
        and query.dtype in (torch.float32, torch.float64)
        and width <= LONGEST
        and dropout == 0
    )


def blockwise(
    query: Float[Tensor, "slots q"],
    key: Float[Tensor, "slots k"],
    value: Float[Tensor, "slots v"],
    rectangles: Sequence[tuple[int, int]],
    heads: tuple[int, int],
    scale: float,
) -> Float[Tensor, "slots out"]:
    """Causal attention within each row of a batch laid out as (rows, width) blocks.

    Args:
        query: All query heads side by side.
        key: All key heads side by side.
        value: All value heads side by side.
        rectangles: (rows, width) of each; its slots follow those of the one before.
        heads: Numbers of query heads and of key heads; query head i uses key head
            i // (heads[0] / heads[1]).
        scale: Factor of the scores before the softmax.
    """
    saves = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    lowered = torch.is_autocast_enabled("cpu")
    exact = [t.float() for t in (query, key, value)] if lowered else [query, key, value]
    # Autocast would lower the products of the forward pass but not those of the backward pass.
    with torch.autocast("cpu", enabled=False):
        result: Any = _Blockwise.apply(*exact, tuple(rectangles), heads, scale, saves)
    return result.to(value.dtype)


class _Blockwise(torch.autograd.Function):
    """Attention and its gradients, block by block.

    With P the weights and G the gradient of the result: dV = PᵀG, dP = GVᵀ,
    dS = P ∘ (dP − rowsum(P ∘ dP)), dQ = dS K, dK = dSᵀ Q.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, rectangles: Any, heads: Any,
        scale: float, saves: bool,
    ) -> Tensor:  # fmt: skip
        out = query.new_empty(len(query), value.shape[1] * (heads[0] // heads[1]))
        with plain_float32(query.device):
            weights = _forward(out, query, key, value, rectangles, heads, scale, saves)
        ctx.save_for_backward(query, key, value, *weights)
        ctx.options = (rectangles, heads, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        query, key, value, *weights = ctx.saved_tensors
        rectangles, heads, scale = ctx.options
        with plain_float32(query.device):
            slopes = _backward(grads[0], query, key, value, weights, rectangles, heads, scale)
        return *slopes, None, None, None, None


def _forward(
    out: Tensor, query: Tensor, key: Tensor, value: Tensor, rectangles: Any, heads: Any,
    scale: float, saves: bool,
) -> list[Tensor]:  # fmt: skip
    """Write the result into `out`; return the weights of each block if `saves`."""
    group = heads[0] // heads[1]
    saved, masks = [], {}
    for part, rows, width in _blocks(rectangles, heads[0]):
        if width not in masks:
            ones = torch.ones(width, width, dtype=torch.bool)
            mask = query.new_zeros(width, width).masked_fill_(~ones.tril(), -torch.inf)
            masks[width] = mask.repeat(group, 1)
        q = _split(query[part], rows, width, heads[1], group)
        k, v = (_split(t[part], rows, width, heads[1], 1) for t in (key, value))
        weights = torch.baddbmm(masks[width], q, k.transpose(1, 2), alpha=scale).softmax(-1)
        _join(torch.bmm(weights, v), out[part], rows, width, heads[1], group)
        if saves:
            saved.append(weights)
    return saved


def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, weights: Any, rectangles: Any,
    heads: Any, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients with respect to query, key and value."""
    group = heads[0] // heads[1]
    d_query, d_key, d_value = (torch.empty_like(t) for t in (query, key, value))
    for (part, rows, width), p in zip(_blocks(rectangles, heads[0]), weights, strict=True):
        q, g = (_split(t[part], rows, width, heads[1], group) for t in (query, grad))
        k, v = (_split(t[part], rows, width, heads[1], 1) for t in (key, value))
        _join(torch.bmm(p.transpose(1, 2), g), d_value[part], rows, width, heads[1], 1)
        d_p = torch.bmm(g, v.transpose(1, 2))
        slopes = torch.ops.aten._softmax_backward_data(d_p, p, -1, p.dtype).mul_(scale)
        _join(torch.bmm(slopes, k), d_query[part], rows, width, heads[1], group)
        _join(torch.bmm(slopes.transpose(1, 2), q), d_key[part], rows, width, heads[1], 1)
    return d_query, d_key, d_value


def _blocks(rectangles: Sequence[tuple[int, int]], heads: int) -> Iterator[tuple[slice, int, int]]:
    """Cut the rectangles into parts of at most `BLOCK` weights.

    Yields:
        Slots, number of rows and width of each part.
    """
    start = 0
    for rows, width in rectangles:
        limit = max(1, BLOCK // (heads * width * width))
        for first in range(0, rows, limit):
            n = min(limit, rows - first)
            yield slice(start, start + n * width), n, width
            start += n * width


def _split(part: Tensor, rows: int, width: int, kv_heads: int, group: int) -> Tensor:
    """Reshape (rows × width, heads × dim) to (rows × kv_heads, group × width, dim).

    The result is contiguous; the `group` query heads of one key head follow each other.
    """
    split = part.view(rows, width, kv_heads, group, -1).permute(0, 2, 3, 1, 4)
    return split.reshape(rows * kv_heads, group * width, -1)


def _join(block: Tensor, target: Tensor, rows: int, width: int, kv_heads: int, group: int) -> None:
    """Write a block into `target`, in the shape that it had before `_split`."""
    view = target.view(rows, width, kv_heads, group, -1).permute(0, 2, 3, 1, 4)
    view.copy_(block.view(rows, kv_heads, group, width, -1))
