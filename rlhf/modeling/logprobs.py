"""Log-probabilities, entropies and values of replies, in little memory.

The logits of a batch are its largest tensor by far, so they are computed from the hidden states in
slices. For the backward pass a tensor of exponentials is stored if it is small, and otherwise
computed again, slice by slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf.modeling.device import rounding, upload
from rlhf.modeling.generate import Replies
from rlhf.modeling.kept_sets import EXCLUDED, KeptSets, exclude
from rlhf.modeling.packed import (
    arguments_of,
    captured_logits,
    final_hidden,
    packs,
    row_groups,
    take_rows,
)
from rlhf.modeling.precision import in_own_precision
from rlhf.modeling.structure import has_plain_head, head_of

SLICE, ACCELERATOR_SLICE = 2**22, 2**26
"""Logits computed at a time: 16 MiB in float32, about a CPU's cache; on an accelerator 256 MiB, as
few launches are faster there."""

KEEP, ACCELERATOR_KEEP = 2**25, 2**27
"""Logits stored for the backward pass at most: 128 MiB in float32, 512 MiB on an accelerator; more
are computed again."""


def log_probs_and_entropy(
    policy: Any, replies: Replies, temperature: float, entropy: bool = True
) -> tuple[Float[Tensor, "batch reply"], Float[Tensor, "batch reply"]]:
    """Compute log-probabilities of reply tokens and entropies of their distributions.

    Entropies are in nats, and all zero without `entropy`. Both results are zero where the mask is
    false. The logits are divided by `temperature`. Where the replies carry kept sets, the softmax
    is over these; top-k and top-p are never applied again, since the sets of other weights would be
    other sets. So the ratio of a policy with itself is exactly 1.
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
    """Compute the logits over `temperature` from which each valid token was drawn.

    They are of the whole vocabulary, whatever the replies' kept sets are.
    """
    groups = row_groups(policy, replies.attention)
    if len(groups) > 1:
        parts: list[Tensor] = [replies.ids.new_empty(0)] * len(replies.ids)
        for rows in groups:
            part = replies.take(rows)
            logits = reply_logits(policy, part, temperature).split(part.valid.sum(1).tolist())
            for row, own in zip(rows.tolist(), logits, strict=True):
                parts[row] = own
        return torch.cat(parts)
    arguments, index = _model_arguments(policy, replies)
    _, logits = captured_logits(policy, arguments, _previous_tokens(index, replies))
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits / temperature if temperature > 0 else logits


def reply_values(critic: Any, replies: Replies) -> Float[Tensor, "batch states"]:
    """Compute the critic's value of each state of a reply, (batch, reply + 1).

    Column t is the value of the prefix before reply token t. The column after a row's last valid
    token is the value of the whole reply; later columns are zero.
    """
    groups = row_groups(critic, replies.attention)
    if len(groups) > 1:
        return _joined([(rows, reply_values(critic, replies.take(rows))) for rows in groups])
    arguments, index = _model_arguments(critic, replies)
    values = critic(**arguments).flatten()
    states = upload(_state_tokens(index, replies), values.device)
    return _scatter(values[states], _state_mask(replies.valid))


def token_log_probs(
    head: Any,
    hidden: Float[Tensor, "tokens width"],
    targets: Int[Tensor, " tokens"],
    temperature: float = 1.0,
    entropy: bool = True,
    kept: KeptSets | None = None,
    *,
    slice_size: int | None = None,
    keep: int | None = None,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """Compute log softmax(head(hidden) / temperature) at targets, entropies in nats.

    Without `entropy` the entropies are zeros. Results are float32 (float64 for a float64 model) and
    bit-equal with and without gradients.

    Args:
        head: Output layer of the language model.
        hidden: Final hidden state before each target.
        targets: Token ids.
        temperature: Divides the logits; 0 or less counts as 1.
        entropy: Whether to compute entropies.
        kept: Sets of tokens that the softmax is over, of the same tokens; None is all tokens.
        slice_size: Logits computed at a time; None is `SLICE` or `ACCELERATOR_SLICE`.
        keep: Logits stored for the backward pass at most; None is `KEEP` or `ACCELERATOR_KEEP`.
    """
    if temperature <= 0:
        temperature = 1.0
    on_cpu = hidden.device.type == "cpu"
    slice_size = slice_size or (SLICE if on_cpu else ACCELERATOR_SLICE)
    keep = keep if keep is not None else (KEEP if on_cpu else ACCELERATOR_KEEP)
    vocabulary = head.weight.shape[0] if hasattr(head, "weight") else 2**16
    rows = max(1, slice_size // vocabulary)
    if type(head) is nn.Linear:
        needs_grad = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (hidden, head.weight, head.bias)
        )
        n = len(hidden)
        extra = rounding(n, hidden.device)
        if extra:
            hidden, targets = F.pad(hidden, (0, 0, 0, extra)), F.pad(targets, (0, extra))
        store = needs_grad and len(hidden) * vocabulary <= keep
        # Autocast would round the entropy's products; `hidden` already has autocast's precision.
        with torch.autocast(hidden.device.type, enabled=False):
            result: Any = _LinearLogProbs.apply(
                hidden, head.weight, head.bias, targets, temperature, entropy, kept, rows, store
            )
        return result[0][:n], result[1][:n]

    def of_slice(hidden: Tensor, targets: Tensor, start: int) -> tuple[Tensor, Tensor]:
        excluded = None if kept is None else kept.excluded(start, start + len(targets))
        return log_probs_from_logits(head(hidden), targets, temperature, entropy, excluded)

    parts = [
        checkpoint(of_slice, h, t, i * rows, use_reentrant=False)
        for i, (h, t) in enumerate(zip(hidden.split(rows), targets.split(rows), strict=True))
    ]
    log_probs, entropies = zip(*parts, strict=True)  # pyright: ignore[reportArgumentType]
    return torch.cat(log_probs), torch.cat(entropies)


def log_probs_from_logits(
    logits: Float[Tensor, "tokens vocabulary"],
    targets: Int[Tensor, " tokens"],
    temperature: float,
    entropy: bool,
    excluded: Bool[Tensor, "tokens vocabulary"] | None = None,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """Compute the results of `token_log_probs` from given logits, by autograd."""
    if temperature > 0:
        logits = logits / temperature
    if logits.dtype != torch.float64:
        logits = logits.float()
    if excluded is not None:
        logits = exclude(logits.clone(), excluded)
    log_p = torch.log_softmax(logits, -1)
    log_probs = log_p.gather(-1, targets[:, None]).squeeze(-1)
    if not entropy:
        return log_probs, torch.zeros_like(log_probs)
    return log_probs, -(log_p.exp() * log_p).sum(-1)


def _evaluate(
    policy: Any, head: Any, replies: Replies, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute log-probs and entropies, and with a value head the values of states."""
    groups = row_groups(policy, replies.attention)
    if len(groups) > 1:
        parts = [
            (r, _evaluate(policy, head, replies.take(r), temperature, entropy)) for r in groups
        ]
        log_probs, entropies = (_joined([(r, part[i]) for r, part in parts]) for i in (0, 1))
        if head is None:
            return log_probs, entropies, None
        return log_probs, entropies, _joined([(r, part[2]) for r, part in parts])
    arguments, index = _model_arguments(policy, replies)
    previous = _previous_tokens(index, replies)
    valid = upload(replies.valid.flatten().nonzero().squeeze(1), replies.ids.device)
    targets = replies.reply_ids.flatten()[valid]
    values = None
    if has_plain_head(policy):
        hidden, cast = final_hidden(policy, arguments)
        rows = cast(take_rows(hidden, previous))
        results = token_log_probs(
            head_of(policy), rows, targets, temperature, entropy, replies.kept
        )
    else:
        hidden, logits = captured_logits(policy, arguments, previous)
        kept = replies.kept
        excluded = None if kept is None else kept.excluded(0, len(logits))
        results = log_probs_from_logits(logits, targets, temperature, entropy, excluded)
    if head is not None:
        states = take_rows(hidden, _state_tokens(index, replies))
        flat = in_own_precision(head, states).squeeze(-1)
        flat = flat if flat.dtype == torch.float64 else flat.float()
        values = _scatter(flat, _state_mask(replies.valid))
    log_probs, entropies = (_scatter(t, replies.valid) for t in results)
    return log_probs, entropies, values


def _joined(parts: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
    """Join the results of groups of rows; columns that a group lacks are zero."""
    results = [F.pad(t, (0, _width(parts) - t.shape[1])) for _, t in parts if t is not None]
    order = torch.cat([rows for rows, _ in parts]).argsort()
    return torch.cat(results)[upload(order, results[0].device)]


def _width(parts: Sequence[tuple[Tensor, Tensor | None]]) -> int:
    return max(t.shape[1] for _, t in parts if t is not None)


def _model_arguments(model: Any, replies: Replies) -> tuple[dict[str, Any], Tensor]:
    """Arguments of the model's call, and each token's row among the hidden states.

    The rows are on the CPU.
    """
    longest = int(replies.attention.sum(1).max())
    return arguments_of(replies.ids, replies.attention, packs(model, longest))


def _previous_tokens(index: Tensor, replies: Replies) -> Int[Tensor, " tokens"]:
    """Return the indices of the tokens that precede the valid reply tokens."""
    return index[:, -replies.mask.shape[1] - 1 : -1][replies.valid]


def _state_tokens(index: Tensor, replies: Replies) -> Int[Tensor, " states"]:
    """Select from an index of all tokens the last token of each state."""
    states = _state_mask(replies.valid)
    return index[:, -states.shape[1] :][states]


def _state_mask(mask: Bool[Tensor, "batch reply"]) -> Bool[Tensor, "batch states"]:
    """Mask of each reply's states: one before it, and one after each valid token."""
    return F.pad(mask, (1, 0), value=True)


def _scatter(flat: Tensor, mask: Bool[Tensor, "rows columns"]) -> Tensor:
    """Write values row by row into a mask's true cells; the others are zero.

    The mask is on the CPU. `masked_scatter` would do the same, but its backward pass makes the host
    wait.
    """
    cells = upload(mask.flatten().nonzero().squeeze(1), flat.device)
    return flat.new_zeros(mask.numel()).index_copy(0, cells, flat).view(mask.shape)


class _LinearLogProbs(torch.autograd.Function):
    """Autograd function of `token_log_probs` for a plain linear head.

    With z the logits, p their softmax, H its entropy: ∂ log p_t / ∂z = onehot(t) − p and
    ∂H / ∂z = −p (log p + H). Outside of the kept sets p is 0, and so are both.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
        temperature: float, entropy: bool, kept: KeptSets | None, rows: int, store: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        n, vocabulary = len(hidden), len(weight)
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        scaled, matrix, offset = _scale_operands(hidden, weight, bias, temperature)
        log_probs = torch.empty(n, dtype=dtype, device=hidden.device)
        entropies = torch.zeros_like(log_probs)
        sums, tops = torch.empty_like(log_probs), torch.empty_like(log_probs)
        stored = torch.empty(n if store else 0, vocabulary, dtype=dtype, device=hidden.device)
        for start in range(0, n, rows):
            part = slice(start, min(start + rows, n))
            z = _logits(scaled[part], matrix, offset, dtype)
            if kept is not None:
                kept.exclude_(z, part.start)
            chosen = z.gather(1, targets[part, None]).squeeze(1)
            top = z.max(1).values
            z.sub_(top[:, None])
            e = torch.exp(z, out=stored[part]) if store else (z.exp() if entropy else z.exp_())
            total = e.sum(1)
            log_probs[part] = chosen - top - total.log()
            if entropy:
                if kept is not None:
                    z.clamp_(min=EXCLUDED)  # 0 · −∞ is NaN
                entropies[part] = total.log() - torch.linalg.vecdot(e, z) / total
            sums[part], tops[part] = total, top
        ctx.save_for_backward(hidden, weight, bias, targets, sums, tops, entropies)
        ctx.stored = stored if store else None
        ctx.options = (temperature, entropy, kept, rows)
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        return log_probs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden, weight, bias, targets, sums, tops, entropies = ctx.saved_tensors
        temperature, entropy, kept, rows = ctx.options
        grad, grad_entropy = grads[0], grads[1] if entropy else None
        stored, ctx.stored = ctx.stored, None
        scaled, matrix, offset = _scale_operands(hidden, weight, bias, temperature)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        out = torch.empty_like(scaled) if needs_hidden else None
        out_weight = torch.zeros_like(matrix) if needs_weight else None
        out_bias = torch.zeros_like(bias) if needs_bias else None
        if stored is not None:
            rows = len(hidden)  # nothing to compute again: one product for all rows
        for start in range(0, len(hidden), max(rows, 1)):
            part = slice(start, min(start + rows, len(hidden)))
            if stored is None:
                z = _logits(scaled[part], matrix, offset, sums.dtype)
                if kept is not None:
                    kept.exclude_(z, part.start)
                e = z.sub_(tops[part, None]).exp_()
            else:
                e = stored
            gradient = _logit_gradients(
                e, targets[part], sums[part], entropies[part], grad[part],
                None if grad_entropy is None else grad_entropy[part],
            ).to(matrix.dtype)  # fmt: skip
            if out is not None:
                torch.mm(gradient, matrix, out=out[part])
            if out_weight is not None:
                out_weight.addmm_(gradient.t(), scaled[part])
            if out_bias is not None:
                out_bias += gradient.sum(0) / temperature
        if out is not None:
            out = (out / temperature if temperature != 1 else out).to(hidden.dtype)
        if out_weight is not None:
            out_weight = out_weight.to(weight.dtype)
        return out, out_weight, out_bias, None, None, None, None, None, None


def _scale_operands(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Divide operands by the temperature, which is cheaper than dividing the logits."""
    if temperature != 1:
        hidden = hidden / temperature
        bias = None if bias is None else bias / temperature
    return hidden, weight.to(hidden.dtype), bias if bias is None else bias.to(hidden.dtype)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return F.linear(hidden, weight, bias).to(dtype)


def _logit_gradients(
    e: Tensor, targets: Tensor, sums: Tensor, entropies: Tensor, grad: Tensor,
    grad_entropy: Tensor | None,
) -> Tensor:  # fmt: skip
    """Compute the loss's gradient with respect to the logits; overwrites `e`."""
    p = e.div_(sums[:, None])
    if grad_entropy is None:
        gradients = p.mul_(-grad[:, None])
    else:
        of_entropy = torch.xlogy(p, p).addcmul_(p, entropies[:, None]).mul_(-grad_entropy[:, None])
        gradients = of_entropy.addcmul_(p, grad[:, None], value=-1)
    return gradients.scatter_add_(1, targets[:, None], grad[:, None])
