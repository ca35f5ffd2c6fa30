"""Forgetting: how much worse the policy predicts good replies than before PPO."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf.config.lengths import TokenLimits
from rlhf.data.fitting import Fitting
from rlhf.data.rendering import Encoded, Renderer
from rlhf.data.rows import PAIRS_EVAL, Pair, iterate_rows
from rlhf.inference import mean_of
from rlhf.modeling.decoders import pad_left
from rlhf.modeling.device import upload
from rlhf.modeling.generate import Replies
from rlhf.modeling.logprobs import log_probs_and_entropy
from rlhf.modeling.reward import pad_right, token_batches

#: Held-out replies to predict at most.
MOST = 200
#: Most tokens of a forward pass.
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class HeldOutReplies:
    """Chosen replies of held-out pairs, tokenised, with their prompts' identities."""

    rows: list[Encoded]
    prompts: list[str]


def held_out_replies(data: Path, renderer: Renderer, limits: TokenLimits) -> HeldOutReplies:
    """Return the replies on which forgetting is measured: one of each prompt, at most `MOST`.

    They are the chosen replies of held-out pairs, for which demonstrations are made of chosen
    replies too. What the policy can't be given is left out.
    """
    fitting = Fitting(renderer, limits.model_copy(update={"max_bad_fraction": 1.0}))
    rows: dict[str, Encoded] = {}
    for pair in iterate_rows(data / PAIRS_EVAL, Pair):
        if len(rows) == MOST:
            break
        if (key := repr(pair.prompt)) in rows:
            continue
        for encoded in fitting.map([pair], lambda p: fitting.encode(p.prompt, p.chosen)):
            if encoded.response:
                rows[key] = encoded
    return HeldOutReplies([*rows.values()], [*rows])


@torch.no_grad()
def reply_losses(model: Any, replies: HeldOutReplies, renderer: Renderer) -> NDArray[np.float64]:
    """Return the mean negative log-likelihood of each reply's tokens, in nats."""
    losses = np.zeros(len(replies.rows))
    lengths = [len(row.ids) for row in replies.rows]
    device = next(model.parameters()).device
    for batch in token_batches(lengths, BATCH_TOKENS) if lengths else []:
        batched = _replies([replies.rows[i] for i in batch], renderer, device)
        log_probs, _ = log_probs_and_entropy(model, batched, 1.0, entropy=False)
        means = (log_probs * batched.mask).sum(1) / batched.mask.sum(1)
        losses[batch] = -means.double().cpu().numpy()
    return losses


def measure_forgetting(
    before: NDArray[np.float64], after: NDArray[np.float64], replies: HeldOutReplies
) -> dict[str, Any]:
    """Compare the losses of two policies: `nll` is the mean over replies, perplexity exp(nll).

    Each reply counts once, whatever its length, so that replies are the units of the interval.
    """
    result: dict[str, Any] = {"n": len(before)}
    if not len(before):
        return result
    result |= {"nll_before": float(before.mean()), "nll_after": float(after.mean())}
    result |= mean_of((after - before).tolist(), replies.prompts).metrics("nll_difference")
    for side in ("before", "after"):
        # Beyond exp(700) a float is infinite, which JSON has no number for.
        result[f"perplexity_{side}"] = math.exp(min(result[f"nll_{side}"], 700.0))
    return result


def _replies(rows: list[Encoded], renderer: Renderer, device: torch.device) -> Replies:
    """Return given replies in the form of sampled ones."""
    pad = renderer.tokenizer.pad_token_id
    prompts, prompt_mask = pad_left([row.prompt for row in rows], pad)
    ids, mask = pad_right([row.response for row in rows], pad)
    return Replies(
        upload(torch.cat([prompts, ids], 1), device),
        torch.cat([prompt_mask, mask], 1),
        upload(mask.bool(), device),
        upload(torch.ones(len(rows), dtype=torch.bool), device),
    )
