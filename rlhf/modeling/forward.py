"""Calling a transformers model on sequences of different length: packed where that is exact.

A model that can't be packed exactly (sliding windows shorter than the text, recurrent layers,
attention that is not SDPA) is found out by comparing both ways once, and is given padded batches.
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
from rlhf.modeling.packing import ATTENTION, Attending, Packed

_packs: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
_plain_heads: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def arguments_of(
    ids: Int[Tensor, "batch time"], attention: Int[Tensor, "batch time"], packed: bool
) -> tuple[dict[str, Any], Int[Tensor, "batch time"]]:
    """Arguments of a model call, and the index of each token's hidden state in its flat result.

    The index of a padding token is that of some other token: read real tokens only.

    Args:
        ids: Tokens, on the model's device.
        attention: 1 on real tokens, 0 on padding; on the CPU, so that the host need not wait.
        packed: Lay the rows end to end without padding (only where `packs` says so).

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
    if extra:  # one more sequence, which nobody reads
        flat = F.pad(flat, (0, extra))
        steps = torch.cat([steps, torch.arange(extra)])
        lengths.append(extra)
    return packed_arguments(flat, upload(steps, device), Packed.of(lengths, device)), index


def packed_arguments(
    ids: Int[Tensor, " tokens"], positions: Int[Tensor, " tokens"], plan: Attending
) -> dict[str, Any]:
    """One packed row as keyword arguments of a transformers model."""
    # A four-dimensional mask is taken as it is, so that no other one is made; ours ignores it.
    ready = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)
    return {
        "input_ids": ids[None],
        "position_ids": positions[None],
        "attention_mask": ready,
        ATTENTION: plan,
    }


def core_of(model: Any) -> PreTrainedModel:
    """The transformers model inside adapters, a critic, or a wrapper for several processes."""
    while not isinstance(model, PreTrainedModel):
        if hasattr(model, "get_base_model"):  # peft
            model = model.get_base_model()
        elif hasattr(model, "module"):
            model = model.module
        else:
            model = model.backbone
    return model


def backbone_of(model: Any) -> Any:
    """The part of a model that ends in hidden states."""
    core = core_of(model)
    return getattr(core, core.base_model_prefix, core)


def packs(model: Any, longest: int) -> bool:
    """Whether packing is exact for this model and sequences of up to `longest` tokens."""
    backbone = backbone_of(model)
    if _window(backbone.config) < longest:
        return False
    if backbone not in _packs:
        _packs[backbone] = _switch_on(core_of(model), backbone)
    return _packs[backbone]


def copy_in(model: Any, dtype: torch.dtype) -> Any:
    """A frozen copy of a model with its parameters in `dtype`; those that are so are shared.

    Buffers keep their precision: rotary frequencies need all their digits. What was found out about
    the model by calling it holds for the copy, which is not tried again.
    """
    packs(model, 1)  # switches our attention on, in the configuration that is copied
    parameters = {
        id(p): torch.nn.Parameter(p.data.to(dtype), requires_grad=False) for p in model.parameters()
    }
    twin = copy.deepcopy(model, parameters)
    _packs[backbone_of(twin)] = _packs[backbone_of(model)]
    return twin


def _window(config: Any) -> float:
    """The shortest reach of a layer's attention, in tokens."""
    types = getattr(config, "layer_types", None)
    if types is not None and set(types) <= {"full_attention"}:
        return float("inf")
    limits = (getattr(config, n, None) for n in ("sliding_window", "attention_chunk_size"))
    return min((limit for limit in limits if limit), default=float("inf"))


@torch.no_grad()
def _switch_on(core: Any, backbone: Any) -> bool:
    """Try two short sequences both ways; on agreement leave our attention switched on."""
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


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Dropout off, and afterwards each module as it was."""
    training = [m for m in model.modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def token_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Rows in order of length, cut into batches of at most `budget` tokens (one row at least)."""
    batches: list[list[int]] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not batches or tokens + lengths[i] > budget:
            batches.append([])
            tokens = 0
        batches[-1].append(i)
        tokens += lengths[i]
    return batches


class _Capture:
    """Keeps a backbone's last hidden states during a call, whatever wraps the model."""

    def __init__(self, model: Any) -> None:
        self.backbone = backbone_of(model)
        self.hidden: Any = None
        self.cast: torch.dtype | None = None

    def __enter__(self) -> _Capture:
        self.hook = self.backbone.register_forward_hook(self._keep)
        return self

    def __exit__(self, *_: object) -> None:
        self.hook.remove()

    def _keep(self, _module: Any, _inputs: Any, output: Any) -> None:
        self.hidden = output.last_hidden_state
        device = self.hidden.device.type
        if torch.is_autocast_enabled(device):
            self.cast = torch.get_autocast_dtype(device)


def final_hidden(
    model: Any, arguments: dict[str, Any]
) -> tuple[Float[Tensor, "places width"], Callable[[Tensor], Tensor]]:
    """Last hidden states, flattened, without the head's logits.

    Also a cast to what the model's head would compute in, which autocast may have lowered.
    """
    with _Capture(model) as capture:
        model(**arguments, use_cache=False, logits_to_keep=1)
    hidden, dtype = capture.hidden.flatten(0, 1), capture.cast
    return hidden, lambda t: t if dtype is None else t.to(dtype)


def captured_logits(
    model: Any, arguments: dict[str, Any], wanted: Int[Tensor, " wanted"]
) -> tuple[Float[Tensor, "places width"], Float[Tensor, "wanted vocabulary"]]:
    """Last hidden states, flattened, and the model's own logits at some of these rows."""
    packed = arguments["input_ids"].shape[0] == 1
    wanted = upload(wanted, arguments["input_ids"].device)
    with _Capture(model) as capture:
        logits = model(**arguments, use_cache=False, logits_to_keep=wanted if packed else 0).logits
    flat = logits.flatten(0, 1)
    return capture.hidden.flatten(0, 1), flat if packed else flat[wanted]


def head_of(model: Any) -> Any:
    """The layer that turns hidden states into logits."""
    return core_of(model).get_output_embeddings()


@torch.no_grad()
def has_plain_head(model: Any) -> bool:
    """Whether the logits are the head's output itself, neither scaled nor capped afterwards."""
    core = core_of(model)
    if core not in _plain_heads:
        head, device = head_of(core), next(core.parameters()).device
        ids = torch.arange(2, device=device)[None]
        with evaluating(core), torch.autocast(device.type, enabled=False), _Capture(core) as seen:
            logits = core(input_ids=ids, use_cache=False).logits
            _plain_heads[core] = head is not None and torch.equal(head(seen.hidden), logits)
    return _plain_heads[core]
