"""Log-probabilities and entropies straight from hidden states, with few logits alive at a time.

The logits of a batch are its largest tensor by far. Here they are made in slices. For the backward
pass one tensor of exponentials is kept where it is small; else it is made again, slice by slice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf.modeling.matmul import rounding

SLICE, ACCELERATOR_SLICE = 2**22, 2**26
"""Logits made at a time: 16 MiB in float32, near a CPU's cache; an accelerator wants few launches
and has room for 256 MiB."""
KEEP, ACCELERATOR_KEEP = 2**25, 2**27
"""Logits kept for the backward pass: 128 MiB in float32, 512 on an accelerator; beyond, they are
made again."""


def token_log_probs(
    head: Any,
    hidden: Float[Tensor, "tokens width"],
    targets: Int[Tensor, " tokens"],
    temperature: float = 1.0,
    entropy: bool = True,
    *,
    slice_size: int | None = None,
    keep: int | None = None,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """log softmax(head(hidden) / temperature) at the targets, and the entropy in nats (or zeros).

    The result is float32 (float64 for such a model) and the same, bit by bit, with and without
    gradients.
    """
    if temperature <= 0:
        temperature = 1.0
    on_cpu = hidden.device.type == "cpu"
    slice_size = slice_size or (SLICE if on_cpu else ACCELERATOR_SLICE)
    keep = keep if keep is not None else (KEEP if on_cpu else ACCELERATOR_KEEP)
    vocabulary = head.weight.shape[0] if hasattr(head, "weight") else 2**16
    rows = max(1, slice_size // vocabulary)
    if type(head) is nn.Linear:
        wants = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (hidden, head.weight, head.bias)
        )
        n = len(hidden)
        extra = rounding(n, hidden.device)
        if extra:
            hidden, targets = F.pad(hidden, (0, 0, 0, extra)), F.pad(targets, (0, extra))
        keeps = wants and len(hidden) * vocabulary <= keep
        # Autocast would lower the entropy's products; what it wants lowered is so in `hidden`.
        with torch.autocast(hidden.device.type, enabled=False):
            result: Any = _LinearLogProbs.apply(
                hidden, head.weight, head.bias, targets, temperature, entropy, rows, keeps
            )
        return result[0][:n], result[1][:n]
    parts = [
        checkpoint(_plain, head, h, t, temperature, entropy, use_reentrant=False)
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    log_probs, entropies = zip(*parts, strict=True)  # pyright: ignore[reportArgumentType]
    return torch.cat(log_probs), torch.cat(entropies)


def _plain(
    head: Any, hidden: Tensor, targets: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor]:
    return from_logits(head(hidden), targets, temperature, entropy)


def from_logits(
    logits: Float[Tensor, "tokens vocabulary"],
    targets: Int[Tensor, " tokens"],
    temperature: float,
    entropy: bool,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """The same from logits that are there already, by autograd."""
    if temperature > 0:
        logits = logits / temperature
    if logits.dtype != torch.float64:
        logits = logits.float()
    log_p = torch.log_softmax(logits, -1)
    chosen = log_p.gather(-1, targets[:, None]).squeeze(-1)
    if not entropy:
        return chosen, torch.zeros_like(chosen)
    return chosen, -(log_p.exp() * log_p).sum(-1)


class _LinearLogProbs(torch.autograd.Function):
    """`token_log_probs` of a plain linear head.

    With z the logits, p their softmax, H its entropy: ∂ log p_t / ∂z = onehot(t) − p and
    ∂H / ∂z = −p (log p + H).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
        temperature: float, entropy: bool, rows: int, keeps: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        n, vocabulary = len(hidden), len(weight)
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        scaled, matrix, offset = _scaled(hidden, weight, bias, temperature)
        log_probs = torch.empty(n, dtype=exact, device=hidden.device)
        entropies = torch.zeros_like(log_probs)
        sums, tops = torch.empty_like(log_probs), torch.empty_like(log_probs)
        kept = torch.empty(n if keeps else 0, vocabulary, dtype=exact, device=hidden.device)
        for start in range(0, n, rows):
            part = slice(start, min(start + rows, n))
            z = _logits(scaled[part], matrix, offset, exact)
            chosen = z.gather(1, targets[part, None]).squeeze(1)
            top = z.max(1).values
            z.sub_(top[:, None])
            e = torch.exp(z, out=kept[part]) if keeps else (z.exp() if entropy else z.exp_())
            total = e.sum(1)
            log_probs[part] = chosen - top - total.log()
            if entropy:
                entropies[part] = total.log() - torch.linalg.vecdot(e, z) / total
            sums[part], tops[part] = total, top
        ctx.save_for_backward(hidden, weight, bias, targets, sums, tops, entropies)
        ctx.kept = kept if keeps else None
        ctx.options = (temperature, entropy, rows)
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        return log_probs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden, weight, bias, targets, sums, tops, entropies = ctx.saved_tensors
        temperature, entropy, rows = ctx.options
        grad, grad_entropy = grads[0], grads[1] if entropy else None
        kept, ctx.kept = ctx.kept, None
        scaled, matrix, offset = _scaled(hidden, weight, bias, temperature)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        out = torch.empty_like(scaled) if wants_hidden else None
        out_weight = torch.zeros_like(matrix) if wants_weight else None
        out_bias = torch.zeros_like(bias) if wants_bias else None
        if kept is not None:
            rows = len(hidden)  # all there: one product
        for start in range(0, len(hidden), max(rows, 1)):
            part = slice(start, start + rows)
            if kept is None:
                z = _logits(scaled[part], matrix, offset, sums.dtype)
                e = z.sub_(tops[part, None]).exp_()
            else:
                e = kept
            slopes = _slopes(
                e, targets[part], sums[part], entropies[part], grad[part],
                None if grad_entropy is None else grad_entropy[part],
            ).to(matrix.dtype)  # fmt: skip
            if out is not None:
                torch.mm(slopes, matrix, out=out[part])
            if out_weight is not None:
                out_weight.addmm_(slopes.t(), scaled[part])
            if out_bias is not None:
                out_bias += slopes.sum(0) / temperature
        if out is not None:
            out = (out / temperature if temperature != 1 else out).to(hidden.dtype)
        if out_weight is not None:
            out_weight = out_weight.to(weight.dtype)
        return out, out_weight, out_bias, None, None, None, None, None


def _scaled(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Operands of the product; it is cheaper to scale the hidden states than the logits."""
    if temperature != 1:
        hidden = hidden / temperature
        bias = None if bias is None else bias / temperature
    return hidden, weight.to(hidden.dtype), bias if bias is None else bias.to(hidden.dtype)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return F.linear(hidden, weight, bias).to(dtype)


def _slopes(
    e: Tensor, targets: Tensor, sums: Tensor, entropies: Tensor, grad: Tensor,
    grad_entropy: Tensor | None,
) -> Tensor:  # fmt: skip
    """The loss's gradient by the logits, written over the exponentials."""
    p = e.div_(sums[:, None])
    if grad_entropy is None:
        slopes = p.mul_(-grad[:, None])
    else:
        bent = torch.xlogy(p, p).addcmul_(p, entropies[:, None]).mul_(-grad_entropy[:, None])
        slopes = bent.addcmul_(p, grad[:, None], value=-1)
    return slopes.scatter_add_(1, targets[:, None], grad[:, None])
