"""bfloat16 forward passes: autocast, and frozen linear layers stored in bfloat16.

Under autocast a linear layer computes with its weights rounded to bfloat16. Weights that are never
trained can be rounded once: the results are the same, bit by bit, in half the memory and without a
cast in every call. Norms, embeddings and heads of one output stay in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf.modeling.decoders import check_exactness
from rlhf.modeling.packed import packs
from rlhf.modeling.structure import has_plain_head, head_of

Precision = Literal["fp32", "bf16"]


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Return the context of a forward pass: autocast to bfloat16 for `bf16`."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def in_own_precision(layer: nn.Linear, hidden: Tensor) -> Tensor:
    """Apply a head in the precision of its weights, also under autocast.

    Scores and values have one number per token: bfloat16 would save nothing and cost digits.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return layer(hidden.to(layer.weight.dtype))


def store_in_bfloat16(model: Any) -> None:
    """Store the frozen linear layers in bfloat16, of a model used with `autocast`.

    From now on the model must be called in that context only. Layers that share their weights with
    an embedding stay in float32, because a lookup is not rounded. So does the output head's bias,
    which is divided by the temperature before rounding.
    """
    head = head_of(model)
    # These test the model in float32 and cache their results.
    packs(model, 1)
    if head is not None:
        has_plain_head(model)
        check_exactness(model)
    for layer in _frozen_linear(model):
        layer.weight.data = layer.weight.data.to(torch.bfloat16)
        if layer.bias is not None and layer is not head:
            layer.bias.data = layer.bias.data.to(torch.bfloat16)


def _frozen_linear(model: Any) -> Iterator[Any]:
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for layer in model.modules():
        if type(layer) in (nn.Linear, Conv1D) and id(layer.weight) not in embeddings:
            bias_learns = layer.bias is not None and layer.bias.requires_grad
            if not layer.weight.requires_grad and not bias_learns and layer.weight.shape[0] > 1:
                yield layer
