"""LoRA adapters by peft: several on one base, at most one of them active."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf.config import LoraConfig
from rlhf.config.text import shown_value
from rlhf.errors import ConfigError
from rlhf.files import write_json
from rlhf.limits import matches_whole
from rlhf.modeling.frozen import FrozenLinear, holds_stored, parameter_count
from rlhf.modeling.structure import is_read_by_kernel, shared_weights

#: Names of the adapters; "default" is the name that peft gives a single one.
POLICY, REWARD, CRITIC = "default", "reward", "critic"

#: Folder of a reward model's or policy's adapter, beside the merged weights.
ADAPTER_FOLDER = "adapter"

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"

#: Share of a model's weights below which a matrix outside of its layers is not reported.
_SMALL = 0.01

log = logging.getLogger(__name__)


def lora_config(
    config: LoraConfig,
    task: Literal["CAUSAL_LM", "SEQ_CLS"],
    dropout: float | None = None,
    head: Sequence[str] = ("score",),
) -> peft.LoraConfig:
    """Translate the section to peft's; a reward model's `head` is trained in full."""
    targets = config.target_modules
    return peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]  (a float is fine)
        lora_dropout=config.dropout if dropout is None else dropout,
        target_modules=targets if isinstance(targets, str) else [*targets],
        use_rslora=config.use_rslora,
        task_type=task,
        modules_to_save=[*head] if task == "SEQ_CLS" else None,
    )


def fit_targets(
    config: LoraConfig, model: Any, section: str, heads: Sequence[str] = (), *, quiet: bool = False
) -> LoraConfig:
    """Return the section with `target_modules` as the full names of the model's linear layers.

    peft passes over names without a layer as long as another one matches, and reads a single name
    as a regular expression for whole names.

    Args:
        config: Names as `LoraConfig` describes them.
        model: With or without adapters.
        section: The section's name, for errors.
        heads: Names of modules that are trained in full.
        quiet: Do not log which part of the model gets no adapter.

    Raises:
        ConfigError: A name has no layer.
    """
    layers = _linear_layers(model, heads)
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == "all-linear":
        if not quiet:
            _report_left_out(model, section)
        return config.model_copy(update={"target_modules": tuple(layers)})
    if isinstance(targets, str) and not re.fullmatch(r"[\w.\-]+", targets):
        try:
            found = matches_whole(targets, layers)
        except ValueError as error:
            raise ConfigError(
                f"{section}.lora.target_modules = {shown_value(targets)}: {error}"
            ) from None
        if not found:
            raise _no_layer(model, layers, section, targets, targets)
        return config.model_copy(update={"target_modules": tuple(found)})
    ends = (targets,) if isinstance(targets, str) else targets
    for end in ends:
        if not any(_ends_with(name, end) for name in layers):
            raise _no_layer(model, layers, section, config.target_modules, end)
    found = [name for name in layers if any(_ends_with(name, end) for end in ends)]
    return config.model_copy(update={"target_modules": tuple(found)})


def with_adapter(model: Any, config: LoraConfig, section: str, *, quiet: bool = False) -> Any:
    """Add a new adapter to a causal language model, without dropout.

    Args:
        model: The language model, whose layers are replaced.
        config: Rank, scale and layers of the adapter.
        section: The section's name, for errors.
        quiet: As for `fit_targets`.

    Raises:
        ConfigError: `target_modules` does not fit the model.
    """
    config = fit_targets(config, model, section, quiet=quiet)
    with target_module_errors(section, config):
        return peft.get_peft_model(model, lora_config(config, "CAUSAL_LM", dropout=0.0))


@contextmanager
def target_module_errors(section: str, config: LoraConfig | None) -> Iterator[None]:
    """Context in which peft adds adapters to the layers that `fit_targets` found, or an error.

    Raises:
        ConfigError: peft can't add an adapter to one of the layers.
    """
    try:
        with _exact_targets():
            yield
    except ValueError as error:
        if not config or "target" not in str(error).lower():
            raise
        raise ConfigError(
            f"{section}.lora.target_modules = {config.target_modules!r} does not fit this model "
            f"({' '.join(str(error).split())[:200]}); name modules that it has"
        ) from error


@contextmanager
def _exact_targets() -> Iterator[None]:
    """Keep peft from changing the targets of mixture models.

    Since transformers 5 the experts of such a model are fused in one parameter. For adapters of
    older versions peft takes names such as `gate_proj` for these parameters, and thereby dense
    layers and shared experts of the same name too, which then get no adapter.
    """
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # older versions of peft convert nothing
        yield
        return
    name = "convert_peft_config_for_transformers"
    convert = getattr(conversion, name, None)
    if convert is None:
        yield
        return
    setattr(conversion, name, lambda *_, **__: None)
    try:
        yield
    finally:
        setattr(conversion, name, convert)


def _linear_layers(model: Any, heads: Sequence[str]) -> list[str]:
    """Return the names of the linear layers that may get an adapter."""
    core = _without_adapters(model)
    adapted = [name for name, module in core.named_modules() if isinstance(module, BaseTunerLayer)]
    inside = tuple(f"{name}." for name in adapted)
    output, shared = core.get_output_embeddings(), shared_weights(core)
    layers: list[str] = []
    for name, module in core.named_modules():
        in_head = any(f".{head}." in f".{name}." for head in heads)
        if module is output or in_head or name.startswith(inside):
            continue
        layer: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        weight = layer._parameters.get("weight") if isinstance(layer, nn.Linear | Conv1D) else None
        if not isinstance(layer, nn.Linear | Conv1D) or id(weight) in shared:
            continue
        if _multiplies(layer) and not is_read_by_kernel(core, name):
            layers.append(name)
    return layers


def _multiplies(layer: Any) -> bool:
    """Return whether a linear layer returns its input times its weight, as an adapter assumes.

    Routers (Llama 4, Phi-3.5-MoE) return several tensors, and DeepSeek V4's grouped projections
    multiply each group by its own part of the weight. Only shapes are computed.
    """
    if type(layer).forward in (nn.Linear.forward, Conv1D.forward, FrozenLinear.forward):
        return True
    meta = torch.device("meta")
    weights = {k: torch.empty_like(p, device=meta) for k, p in layer.named_parameters()}
    shape = (1, 1, layer.in_features)
    try:
        result = torch.func.functional_call(layer, weights, torch.empty(shape, device=meta))
    except Exception:  # the code of a family's layer can raise anything
        return False
    return isinstance(result, Tensor) and result.shape == (1, 1, layer.out_features)


def _without_adapters(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def _ends_with(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _no_layer(
    model: Any, layers: Sequence[str], section: str, targets: str | Sequence[str], missing: str
) -> ConfigError:
    """Return the error for a name without a layer, which names those that there are."""
    core = _without_adapters(model)
    shared = shared_weights(core)
    matches = [m for name, m in core.named_modules() if _ends_with(name, missing)]
    reason = f"this model has no linear layer of the name {missing!r}"
    if any(m is core.get_output_embeddings() for m in matches):
        reason = f"{missing!r} is the output head, which gets no adapter"
    elif any(isinstance(m, nn.Embedding) for m in matches):
        reason = f"{missing!r} is an embedding, which gets no adapter"
    elif any(_ends_with(name, missing) for name, p in core.named_parameters() if p.ndim > 2):
        reason = f"{missing!r} holds the fused experts of all layers, which get no adapter"
    elif any(id(getattr(m, "weight", None)) in shared for m in matches):
        reason = f"{missing!r} has weights that several layers share, which get no adapter"
    elif matches:
        reason = f"{missing!r} is no linear layer that can get an adapter"
    names = sorted({name.rpartition(".")[2] for name in layers})
    return ConfigError(
        f"{section}.lora.target_modules = {shown_value(targets)}: {reason}; choose from "
        f"{', '.join(names[:30])}, or write all-linear"
    )


def _report_left_out(model: Any, section: str) -> None:
    """Log which part of a model gets no adapters: fused experts, shared blocks."""
    core = _without_adapters(model)
    total = parameter_count(core)
    keys, output = shared_weights(core), core.get_output_embeddings()
    shared: dict[int, tuple[str, int]] = {}
    for name, module in core.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or module is output:
            continue
        weight = module._parameters.get("weight")
        if weight is not None and id(weight) in keys:  # counted at the first of its layers
            shared.setdefault(id(weight), (f"{name}.weight", weight.numel()))
    if shared:
        log.warning(
            "%s.lora.target_modules = 'all-linear' gives no adapter to weights that several layers "
            "share (%s and %d more, %.0f %% of the weights): they stay as they are",
            section, next(iter(shared.values()))[0], len(shared) - 1,
            100 * sum(count for _, count in shared.values()) / total,
        )  # fmt: skip
    covered = (nn.Linear, Conv1D, nn.Embedding, nn.modules.conv._ConvNd)
    fused = {
        f"{name}.{own}": p.numel()
        for name, module in core.named_modules()
        if not isinstance(module, covered)
        for own, p in module.named_parameters(recurse=False)
        # DBRX keeps its experts in two dimensions; routers and the like are small.
        if p.ndim > 2 or (p.ndim == 2 and p.numel() > _SMALL * total)
    }
    if fused:
        log.warning(
            "%s.lora.target_modules = 'all-linear' gives no adapter to the fused experts (%s and "
            "%d more, %.0f %% of the weights): they stay as they are",
            section, next(iter(fused)), len(fused) - 1, 100 * sum(fused.values()) / total,
        )  # fmt: skip


def merge_adapter(model: Any, base: Any = None) -> Any:
    """Merge the adapter `POLICY` into its base and drop the others.

    Args:
        model: With adapters; a model without any is returned unchanged.
        base: The base in full precision, if the model's own is stored in fewer bits.

    Raises:
        ValueError: It is, and no other is given.
    """
    if not isinstance(model, peft.PeftModel):
        return model
    if base is None and holds_stored(model):
        raise ValueError("an adapter is merged into the base's own weights; give it as `base`")
    if base is not None:
        adapter = parameters_of(model, POLICY)
        with _exact_targets():
            model = peft.get_peft_model(base, model.peft_config[POLICY])
        for name, parameter in parameters_of(model, POLICY).items():
            parameter.data.copy_(adapter[name].data)
    merge: Any = model.merge_and_unload
    return merge(adapter_names=[POLICY])


def save_adapter(model: Any, folder: Path) -> None:
    """Write the adapter, and the head trained in full with it, in peft's layout.

    peft's own method is not used: it adds a model card, names the base by its local path, and
    writes sets in an order that differs between runs.
    """
    config = model.peft_config[POLICY].to_dict()
    fields = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    state = peft.get_peft_model_state_dict(model, adapter_name=POLICY, save_embedding_layers=False)
    folder.mkdir()
    weights = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    save_file(weights, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    fields |= {"base_model_name_or_path": None, "inference_mode": True}
    write_json(folder / ADAPTER_CONFIG, fields)


def load_adapter(model: Any, folder: Path, name: str) -> dict[str, Tensor] | None:
    """Add a saved adapter, frozen, to a causal language model under `name`.

    Returns:
        Weights of the head that was trained with it, without their prefix; None if the adapter
        does not fit the model.
    """
    config: Any = peft.LoraConfig.from_pretrained(str(folder))
    config.task_type, config.modules_to_save = "CAUSAL_LM", None
    config.lora_dropout = 0.0
    saved = load_file(folder / ADAPTER_WEIGHTS)
    prefix = "base_model.model.score."
    head = {k.removeprefix(prefix): saved.pop(k) for k in list(saved) if k.startswith(prefix)}
    with _exact_targets():
        model.add_adapter(name, config)
    result: Any = peft.set_peft_model_state_dict(model, saved, adapter_name=name)
    missing = [k for k in result.missing_keys if f".{name}." in k]
    for parameter in parameters_of(model, name).values():
        parameter.requires_grad_(False)
    return None if missing or result.unexpected_keys else head


def copy_adapter(model: Any, source: str, target: str) -> None:
    """Add an adapter as a copy of another one."""
    config = model.peft_config[source].to_dict()
    with _exact_targets():
        model.add_adapter(target, peft.LoraConfig(**{**config, "inference_mode": False}))
    copies = parameters_of(model, target)
    for name, parameter in parameters_of(model, source).items():
        copies[name.replace(f".{source}.", f".{target}.")].data.copy_(parameter.data)


def parameters_of(model: Any, adapter: str) -> dict[str, Any]:
    """Return the parameters of one adapter, by their names in the whole model."""
    return {name: p for name, p in model.named_parameters() if f".{adapter}." in name}


@contextmanager
def active_adapter(model: Any, adapter: str | None) -> Iterator[None]:
    """Activate one adapter of a model, or none, within a context; may be nested.

    On exit the previous adapter is active again. `requires_grad` of all parameters is preserved:
    peft would make the activated adapter trainable and freeze the others.
    """
    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    before = [(layer.active_adapters, layer.disable_adapters) for layer in layers]
    target = [(names if adapter is None else [adapter], adapter is None) for names, _ in before]
    if target == before:
        yield
        return
    _activate(layers, target)
    try:
        yield
    finally:
        _activate(layers, before)


@contextmanager
def idle_layers(model: Any) -> Iterator[set[str]]:
    """Collect the layers with adapters that no forward pass within the context calls.

    Where their weights matter, the family's code reads them past the layer.
    """
    layers: dict[str, Any] = {
        n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)
    }
    idle = set(layers)

    def called(name: str) -> Any:
        return lambda *_: idle.discard(name)

    hooks = [layer.register_forward_hook(called(name)) for name, layer in layers.items()]
    try:
        yield idle
    finally:
        for hook in hooks:
            hook.remove()


def _activate(layers: list[Any], states: list[tuple[list[str], bool]]) -> None:
    """Set each layer's active adapters, and whether they are disabled."""
    for layer, (names, disabled) in zip(layers, states, strict=True):
        flags = [(p, p.requires_grad) for p in layer.parameters()]
        layer.set_adapter(names)
        layer.enable_adapters(not disabled)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
