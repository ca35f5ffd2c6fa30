"""Comparison of a model's batched results with its own results on single rows.

A batched way to compute a model (packed, padded, with a cache) is used only where it agrees with
plain calls on single rows without padding or cache. Each way is tried once per loaded model, on a
few short rows that are longer than a small attention window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.modeling.device import plain_float32
from rlhf.modeling.structure import attention_window, backbone_of, call, core_of, evaluating

#: Largest difference relative to the largest number, in float32 and in reduced precision.
TOLERANCE, ROUGH_TOLERANCE = 1e-4, 3e-2

#: Widest window of attention that the rows of a test are longer than; MiniMax M3 selects blocks of
#: 128 tokens.
TRIED_WINDOW = 160

#: Rows of tokens, tried in turn: a router's near-tie may send one token to another expert.
ATTEMPTS = 2


@dataclass(frozen=True)
class Agreement:
    """Whether two results agree, and the two numbers that differ most."""

    holds: bool
    expected: float = 0.0
    actual: float = 0.0


def agrees_with_rows(
    model: Any, lengths: Sequence[int], compute: Callable[[list[list[int]]], list[Tensor]]
) -> Agreement:
    """Compare `compute` with the last hidden states of single rows.

    Args:
        model: Its backbone is called on each row alone.
        lengths: Lengths of the rows.
        compute: Computes the hidden states of each row, (tokens, width), together. An error of any
            kind counts as a difference.
    """
    backbone, result = backbone_of(model), Agreement(False)
    for attempt in range(ATTEMPTS):
        rows = rows_of(model, lengths, attempt)
        with testing(model):
            expected = [hidden_of(backbone, row) for row in rows]
            try:
                actual = compute(rows)
            except Exception:  # a model's code may fail in any way on an unusual batch
                return Agreement(False, float("nan"), float("nan"))
            result = agreement(model, actual, expected)
        if result.holds:
            return result
    return result


@contextmanager
def testing(model: Any) -> Iterator[None]:
    """Context of a test: no gradients, dropout or autocast."""
    device = next(model.parameters()).device
    no_autocast = torch.autocast(device.type, enabled=False)
    with torch.no_grad(), evaluating(model), no_autocast, plain_float32(device):
        yield


def length_past_window(model: Any, otherwise: int) -> int:
    """Return a row length that a narrow window of attention ends within, else `otherwise`."""
    window = attention_window(model)
    return int(window) + 3 if window <= TRIED_WINDOW else otherwise


def rows_of(model: Any, lengths: Sequence[int], attempt: int = 0) -> list[list[int]]:
    """Return rows of varied tokens."""
    embeddings: Any = core_of(model).get_input_embeddings()
    highest = min(embeddings.num_embeddings, 97)
    numbers = iter(range(attempt * 1000, attempt * 1000 + sum(lengths)))
    return [[(next(numbers) * 37 + 11) % highest for _ in range(n)] for n in lengths]


def hidden_of(backbone: Any, row: Sequence[int]) -> Tensor:
    """Compute the last hidden states of one row, by the model's own call."""
    ids = torch.tensor([row], device=next(backbone.parameters()).device)
    return call(backbone, input_ids=ids).last_hidden_state[0]


def agreement(model: Any, actual: Sequence[Tensor], expected: Sequence[Tensor]) -> Agreement:
    """Compare numbers, each (tokens, width), within what rounding in the model's precision does."""
    exact = next(model.parameters()).dtype in (torch.float32, torch.float64)
    tolerance = TOLERANCE if exact else ROUGH_TOLERANCE
    ours, theirs = (torch.cat([*t]).float() for t in (actual, expected))
    gaps = (ours - theirs).abs()
    # In reduced precision routers of experts send single tokens elsewhere, in any batch.
    gap = gaps.max() if exact else gaps.max(1).values.median()
    worst = int(torch.nan_to_num(gaps, torch.inf).argmax())
    return Agreement(
        bool(gap <= tolerance * theirs.abs().max().clamp(min=1e-6)),
        float(theirs.flatten()[worst]),
        float(ours.flatten()[worst]),
    )
