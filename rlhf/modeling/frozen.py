"""Frozen linear layers stored in 16 or 4 bits, which compute in the precision of their input.

QLoRA (Dettmers et al. 2023) holds the base below adapters in NF4: 4 bits for a weight, and a scale
for each 64 of them that is itself stored in 8 bits. bitsandbytes rounds and restores the numbers.
Its own layer is not used: under autocast it keeps its input's precision, on a CPU it repacks its
weights while evaluating, and code that reads a layer's weight would find packed bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from rlhf.config import RuntimeConfig
from rlhf.config.training import FrozenDtype
from rlhf.errors import ConfigError
from rlhf.modeling import nf4
from rlhf.modeling.nf4 import BLOCK, SCALE_BLOCK
from rlhf.modeling.structure import core_of, is_read_by_kernel, shared_weights

log = logging.getLogger(__name__)


def check_frozen_dtype(
    dtype: FrozenDtype, section: str, device: torch.device, runtime: RuntimeConfig
) -> None:
    """Refuse NF4 without bitsandbytes, and on a CPU that the configuration does not name.

    Args:
        dtype: The section's `frozen_dtype`.
        section: Its name, for errors.
        device: The device of the stage.
        runtime: What selected it.

    Raises:
        ConfigError: It is NF4, and can't be computed here.
    """
    if dtype != "nf4":
        return
    field = f"{section}.frozen_dtype = 'nf4'"
    if device.type not in ("cuda", "cpu"):
        raise ConfigError(
            f"{field} needs a CUDA GPU, and the device is {device.type!r}; set it to auto"
        )
    if device.type == "cpu" and runtime.device == "auto":
        raise ConfigError(
            f"{field} needs a GPU, and torch finds none here: a CPU restores every weight in every "
            "call, which is slow; set it to auto, or runtime.device to cpu to train so all the same"
        )
    nf4.check_package(section)
    try:
        nf4.functions()
    except Exception as error:  # a build for another torch or GPU can raise anything
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{field} needs bitsandbytes, which can't be loaded here ({reason}); install a build "
            "for this torch and GPU, or set it to auto"
        ) from error


def store_frozen(
    model: Any, dtype: FrozenDtype, device: torch.device, section: str, keep: Sequence[str] = ()
) -> None:
    """Store the linear layers of a model that is not trained in fewer bits, in place.

    Left in float32 are the output head, layers that share weights with others, and whatever is no
    linear layer: embeddings, norms, the fused experts of mixture models.

    Args:
        model: On the CPU in float32, without adapters; on the CPU afterwards, too.
        dtype: `auto` stores what loses nothing in 16 bits, on a GPU.
        device: Where it will compute; rounding to NF4 is done there.
        section: The section's name, for errors.
        keep: Names of modules that are trained, or changed, and so stay as they are.

    Raises:
        ConfigError: It is NF4, and the model has no linear layer to store.
    """
    if dtype == "float32" or (dtype == "auto" and device.type != "cuda"):
        return
    stored = 0
    for layer in [*storable_layers(model, keep)]:
        weight = layer.weight.detach()
        weight = weight.T.contiguous() if isinstance(layer, Conv1D) else weight
        if dtype == "nf4":
            packed, scales = _to_nf4(weight.to(device))
            FrozenLinear.convert(layer, weight.shape, packed, scales)
        elif (lowered := _lowered(weight, dtype)) is not None:
            FrozenLinear.convert(layer, weight.shape, lowered, {})
        stored += weight.numel()
    if dtype == "nf4":
        _report(model, stored, section)


def restore(model: Any) -> Any:
    """Turn a model's stored layers into plain ones again, with the numbers that they compute with.

    Returns:
        The model.
    """
    for module in model.modules():
        if isinstance(module, FrozenLinear):
            layer: Any = module
            weight = layer.weight
            layer.__class__ = nn.Linear
            for name in ("stored", *_SCALES):
                if hasattr(layer, name):
                    delattr(layer, name)
            layer.weight = nn.Parameter(weight, requires_grad=False)
    return model


def holds_stored(model: Any) -> bool:
    """Return whether layers of a model are stored in fewer bits."""
    return any(isinstance(module, FrozenLinear) for module in model.modules())


def parameter_count(model: Any) -> int:
    """Return the number of a model's parameters, of which NF4 has two in a byte."""
    packed = [m for m in model.modules() if isinstance(m, FrozenLinear)]
    return sum(p.numel() for p in model.parameters()) + sum(
        layer.in_features * layer.out_features - layer.stored.numel() for layer in packed
    )


#: Buffers of a layer in NF4: the scales in 8 bits, their scales, offset and code.
_SCALES = ("scales", "scale_scales", "scale_offset", "scale_code")


class FrozenLinear(nn.Linear):
    """A linear layer whose frozen weight is stored in fewer bits.

    `weight` restores it in float32. So code that reads a layer's weight, or its dtype, is right:
    peft creates adapters in float32, and T5 keeps the precision of its states.
    """

    stored: Tensor
    scales: Tensor
    scale_scales: Tensor
    scale_offset: Tensor
    scale_code: Tensor

    @staticmethod
    def convert(
        layer: Any, shape: Sequence[int], stored: Tensor, scales: dict[str, Tensor]
    ) -> None:
        """Turn a linear layer into a stored one, in place: several modules may share it."""
        layer.__class__ = FrozenLinear
        layer.out_features, layer.in_features = shape
        del layer._parameters["weight"]
        layer.stored = nn.Parameter(stored.to("cpu"), requires_grad=False)
        for name, tensor in scales.items():
            layer.register_buffer(name, tensor.to("cpu"), persistent=False)

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The weight that the layer computes with, in float32."""
        return self.dense(torch.float32)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the weight in another precision."""
        if self.stored.is_floating_point():
            return self.stored.to(dtype)
        functional = nf4.functions()
        scales = functional.QuantState(
            absmax=self.scale_scales, blocksize=SCALE_BLOCK, code=self.scale_code,
            dtype=torch.float32,
        )  # fmt: skip
        state = functional.QuantState(
            absmax=self.scales, shape=torch.Size((1, self.out_features * self.in_features)),
            blocksize=BLOCK, quant_type="nf4", offset=self.scale_offset, state2=scales,
            dtype=dtype if dtype in _RESTORED else torch.float32,
        )  # fmt: skip
        weight = functional.dequantize_4bit(self.stored.data, state)
        return weight.view(self.out_features, self.in_features).to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer in the precision of its input, or of autocast."""
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        result: Any = _Product.apply(input, self)
        return result


#: Dtypes in which bitsandbytes restores weights.
_RESTORED = (torch.float32, torch.bfloat16, torch.float16)


class _Product(torch.autograd.Function):
    """Product with a stored weight, which is restored again for the backward pass.

    Otherwise autograd would keep the restored weight of every layer until then.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(states.dtype)
        return F.linear(states, layer.dense(states.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] @ ctx.layer.dense(grads[0].dtype), None


def storable_layers(model: Any, keep: Sequence[str] = ()) -> Iterator[Any]:
    """Yield the linear layers that may be stored in fewer bits."""
    core = core_of(model)
    head = core.get_output_embeddings()
    shared = shared_weights(core)
    for name, layer in core.named_modules():
        is_kept = any(f".{kept}." in f".{name}." for kept in keep)
        if type(layer) not in (nn.Linear, Conv1D) or layer is head or is_kept:
            continue
        weight: Any = layer.weight
        # A score or value has one output; its digits matter more than its size.
        is_whole = id(weight) in shared or min(weight.shape) == 1
        if not is_whole and not is_read_by_kernel(core, name):
            yield layer


def _lowered(weight: Tensor, dtype: FrozenDtype) -> Tensor | None:
    """Return a weight in 16 bits; with `auto` None if that would change a number."""
    if dtype == "bfloat16":
        return weight.to(torch.bfloat16)
    for lower in (torch.bfloat16, torch.float16):
        lowered = weight.to(lower)
        if torch.equal(lowered.to(weight.dtype), weight):
            return lowered
    return None


def _to_nf4(weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Round a weight to NF4; return the packed bytes, and the scales as `_SCALES` names them."""
    # As one row: of rows shorter than a block the CPU's kernel (0.50.2) restores other numbers.
    packed, state = nf4.functions().quantize_4bit(
        weight.reshape(1, -1), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    inner = state.state2
    return packed, dict(
        zip(_SCALES, (state.absmax, inner.absmax, state.offset, inner.code), strict=True)
    )


def _report(model: Any, stored: int, section: str) -> None:
    """Log the share of a model's weights that is in NF4.

    Raises:
        ConfigError: There is none.
    """
    total = parameter_count(model)
    if not stored:
        raise ConfigError(
            f"{section}.frozen_dtype = 'nf4' finds no linear layer to hold in 4 bits in "
            f"{type(core_of(model)).__name__}; set it to auto"
        )
    log.info(
        "%s.frozen_dtype = 'nf4' stores %.0f %% of %s weights in 4 bits; embeddings, output head, "
        "norms and fused experts stay in float32", section, 100 * stored / total, f"{total:,}",
    )  # fmt: skip
