"""Forward passes of a transformers model, on packed sequences where that is exact.

A model that can't be packed exactly (sliding windows shorter than the text, recurrent layers,
attention that is not SDPA) is detected by comparing both ways once, and gets padded batches.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.modeling.device import upload
from rlhf.modeling.matmul import rounding
from rlhf.modeling.packing import ATTENTION, AttentionPlan, Packed

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
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    if not packed:
        index = torch.arange(ids.numel()).view(ids.shape)
        arguments = {
            "input_ids": ids,
            "attention_mask": upload(attention, device),
            "position_ids": upload(positions, device),
        }
        return arguments, index
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


def copy_in(model: Any, dtype: torch.dtype) -> Any:
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
        with (
            evaluating(core),
            torch.autocast(device.type, enabled=False),
            _Capture(core) as capture,
        ):
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


def backbone_of(model: Any) -> Any:
    """Return the part of a model that computes hidden states."""
    core = core_of(model)
    return getattr(core, core.base_model_prefix, core)


def token_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Batch rows by length, each with at most `budget` tokens (one row at least)."""
    batches: list[list[int]] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not batches or tokens + lengths[i] > budget:
            batches.append([])
            tokens = 0
        batches[-1].append(i)
        tokens += lengths[i]
    return batches


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
