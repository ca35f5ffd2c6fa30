"""LoRA adapters by peft: several on one base, at most one of them active."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import peft
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf.config import LoraConfig
from rlhf.errors import ConfigError
from rlhf.files import write_json

#: Names of the adapters; "default" is the name that peft gives a single one.
POLICY, REWARD, CRITIC = "default", "reward", "critic"

#: Folder of a reward model's adapter, beside the merged weights.
ADAPTER_FOLDER = "adapter"

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def lora_config(
    config: LoraConfig,
    task: Literal["CAUSAL_LM", "SEQ_CLS"],
    dropout: float | None = None,
    head: Sequence[str] = ("score",),
) -> peft.LoraConfig:
    """Translate the section to peft's; a reward model's `head` is trained in full."""
    return peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]  (a float is fine)
        lora_dropout=config.dropout if dropout is None else dropout,
        target_modules=config.target_modules,
        task_type=task,
        modules_to_save=[*head] if task == "SEQ_CLS" else None,
    )


@contextmanager
def target_module_errors(section: str, config: LoraConfig | None) -> Iterator[None]:
    """Turn peft's errors about `target_modules` into errors that name the field.

    Raises:
        ConfigError: `target_modules` does not fit the model.
    """
    try:
        yield
    except ValueError as error:
        if not config or "target" not in str(error).lower():
            raise
        raise ConfigError(
            f"{section}.lora.target_modules = {config.target_modules!r} does not fit this model "
            f"({' '.join(str(error).split())[:200]}); name modules that it has"
        ) from error


def merge_adapter(model: Any, base: Any = None) -> Any:
    """Merge the adapter `POLICY` into its base and drop the others.

    Args:
        model: With adapters; a model without any is returned unchanged.
        base: The base in full precision, if the model's own is stored in bfloat16.
    """
    if not isinstance(model, peft.PeftModel):
        return model
    if base is not None:
        adapter = parameters_of(model, POLICY)
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
    model.add_adapter(name, config)
    result: Any = peft.set_peft_model_state_dict(model, saved, adapter_name=name)
    missing = [k for k in result.missing_keys if f".{name}." in k]
    for parameter in parameters_of(model, name).values():
        parameter.requires_grad_(False)
    return None if missing or result.unexpected_keys else head


def copy_adapter(model: Any, source: str, target: str) -> None:
    """Add an adapter as a copy of another one."""
    config = model.peft_config[source].to_dict()
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


def _activate(layers: list[Any], states: list[tuple[list[str], bool]]) -> None:
    """Set each layer's active adapters, and whether they are disabled."""
    for layer, (names, disabled) in zip(layers, states, strict=True):
        flags = [(p, p.requires_grad) for p in layer.parameters()]
        layer.set_adapter(names)
        layer.enable_adapters(not disabled)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
