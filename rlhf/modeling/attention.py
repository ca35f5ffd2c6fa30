"""Causal attention of short sequences on a CPU, in blocks that stay in its cache.

torch's own kernel is made for long sequences. At the length of a reply it is slower than plain
matrix products on small blocks, and several times slower where float32 products go through oneDNN
(`torch.set_float32_matmul_precision("medium")`). Here they always go through MKL, because oneDNN
would prepare code for every new length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.modeling.matmul import plain_float32

BLOCK = 2**18
"""Attention weights computed at a time: 1 MiB in float32."""
LONGEST = 512
"""Beyond this many tokens torch's kernel is taken: the weights kept here grow with the square."""


def suits(query: Tensor, width: int, dropout: float) -> bool:
    """Whether `blockwise` is exact and of advantage here."""
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
    """Causal attention within each row of each rectangle (rows, width) of slots.

    The last dimension holds `heads[0]` query heads or `heads[1]` key and value heads side by side;
    query head i belongs to key head i // (heads[0] / heads[1]).
    """
    saves = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    lowered = torch.is_autocast_enabled("cpu")
    exact = [t.float() for t in (query, key, value)] if lowered else [query, key, value]
    # Autocast would lower the products of the forward pass, but not those of the backward pass.
    with torch.autocast("cpu", enabled=False):
        result: Any = _Blockwise.apply(*exact, tuple(rectangles), heads, scale, saves)
    return result.to(value.dtype)


def _blocks(rectangles: Sequence[tuple[int, int]], heads: int) -> Iterator[tuple[slice, int, int]]:
    """Parts of the rectangles: their slots, number of rows, and width."""
    start = 0
    for rows, width in rectangles:
        most = max(1, BLOCK // (heads * width * width))
        for first in range(0, rows, most):
            n = min(most, rows - first)
            yield slice(start, start + n * width), n, width
            start += n * width


def _split(part: Tensor, rows: int, width: int, kv_heads: int, shared: int) -> Tensor:
    """(rows × width, heads × dim) to (rows × kv_heads, shared × width, dim), contiguous.

    Query heads that share a key head stand one below the other.
    """
    split = part.view(rows, width, kv_heads, shared, -1).permute(0, 2, 3, 1, 4)
    return split.reshape(rows * kv_heads, shared * width, -1)


def _join(block: Tensor, target: Tensor, rows: int, width: int, kv_heads: int, shared: int) -> None:
    """The reverse of `_split`, written into `target`."""
    view = target.view(rows, width, kv_heads, shared, -1).permute(0, 2, 3, 1, 4)
    view.copy_(block.view(rows, kv_heads, shared, width, -1))


class _Blockwise(torch.autograd.Function):
    """With P the weights and G the gradient of the result: dV = PᵀG, dP = GVᵀ,
    dS = P ∘ (dP − rowsum(P ∘ dP)), dQ = dS K, dK = dSᵀ Q.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, rectangles: Any, heads: Any,
        scale: float, saves: bool,
    ) -> Tensor:  # fmt: skip
        shared = heads[0] // heads[1]
        out = query.new_empty(len(query), value.shape[1] * shared)
        with plain_float32(query.device):
            kept = _forward(out, query, key, value, rectangles, heads, scale, saves)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.options = (rectangles, heads, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        query, key, value, *kept = ctx.saved_tensors
        rectangles, heads, scale = ctx.options
        with plain_float32(query.device):
            slopes = _backward(grads[0], query, key, value, kept, rectangles, heads, scale)
        return *slopes, None, None, None, None


def _forward(
    out: Tensor, query: Tensor, key: Tensor, value: Tensor, rectangles: Any, heads: Any,
    scale: float, saves: bool,
) -> list[Tensor]:  # fmt: skip
    """Fill `out`; the attention weights of each block, if wanted."""
    shared = heads[0] // heads[1]
    kept, masks = [], {}
    for part, rows, width in _blocks(rectangles, heads[0]):
        if width not in masks:
            ones = torch.ones(width, width, dtype=torch.bool)
            mask = query.new_zeros(width, width).masked_fill_(~ones.tril(), -torch.inf)
            masks[width] = mask.repeat(shared, 1)
        q = _split(query[part], rows, width, heads[1], shared)
        k, v = (_split(t[part], rows, width, heads[1], 1) for t in (key, value))
        weights = torch.baddbmm(masks[width], q, k.transpose(1, 2), alpha=scale).softmax(-1)
        _join(torch.bmm(weights, v), out[part], rows, width, heads[1], shared)
        if saves:
            kept.append(weights)
    return kept


def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, kept: Any, rectangles: Any,
    heads: Any, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients by query, key and value."""
    shared = heads[0] // heads[1]
    d_query, d_key, d_value = (torch.empty_like(t) for t in (query, key, value))
    for (part, rows, width), p in zip(_blocks(rectangles, heads[0]), kept, strict=True):
        q, g = (_split(t[part], rows, width, heads[1], shared) for t in (query, grad))
        k, v = (_split(t[part], rows, width, heads[1], 1) for t in (key, value))
        _join(torch.bmm(p.transpose(1, 2), g), d_value[part], rows, width, heads[1], 1)
        d_p = torch.bmm(g, v.transpose(1, 2))
        slopes = torch.ops.aten._softmax_backward_data(d_p, p, -1, p.dtype).mul_(scale)
        _join(torch.bmm(slopes, k), d_query[part], rows, width, heads[1], shared)
        _join(torch.bmm(slopes.transpose(1, 2), q), d_key[part], rows, width, heads[1], 1)
    return d_query, d_key, d_value
