"""Structure of a transformers model: text configuration, backbone, head, arguments, limits.

Parts are found by what a call of the model runs, not by their names, which differ from family to
family.
"""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf.modeling.source import CONTEXT_FIELDS

#: Field names of a configuration that limit how many tokens an attention layer sees.
_WINDOW_FIELDS = re.compile(
    r"(^|_)(window(_size)?|local_attention|attention_chunk_size|index_topk|index_block_size|"
    r"indexer_budget)$"
)

#: Layers of Mamba whose weights its fused kernels read themselves.
_READ_BY_KERNELS = ("out_proj", "dt_proj", "x_proj")

#: Name of its backbone, by model, and results of tests, by backbone: each is tested once.
_backbones: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
_facts: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()


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


def facts_of(model: Any) -> dict[str, Any]:
    """Return the results of tests of this model; a critic on its backbone has the same."""
    return _facts.setdefault(backbone_of(model), {})


def share_facts(model: Any, twin: Any) -> None:
    """Let a copy of a model use the results of the model's tests."""
    _backbones[core_of(twin)] = _backbones[core_of(model)]
    _facts[backbone_of(twin)] = facts_of(model)


def text_config(model: Any) -> Any:
    """Return the configuration of the language model, also of one that reads images."""
    return core_of(model).config.get_text_config(decoder=True)


def sections_of(config: Any) -> Iterator[Any]:
    """Yield a configuration and those nested in it, such as `text_config`."""
    yield config
    for name in getattr(type(config), "sub_configs", {}):
        nested = getattr(config, name, None)
        if nested is not None:
            yield from sections_of(nested)


def context_of(config: Any) -> float:
    """Return the longest sequence that a model of this configuration computes exactly, in tokens.

    Infinite for one that sets no limit. LongRoPE and dynamic RoPE change the numbers of all tokens
    when a sequence passes a length, so it would not be scored as it was sampled: that length is the
    limit.
    """
    text = config.get_text_config(decoder=True)
    limits = [getattr(text, name, None) for name in CONTEXT_FIELDS]
    first = next((n for n in limits if isinstance(n, int) and n > 0), float("inf"))
    return min(first, _stable_length(text))


def model_name(model: Any) -> str:
    """Return a model's folder or hub id and its family, for messages."""
    config = core_of(model).config
    return f"{config.name_or_path or 'model'!r} (model_type {config.model_type!r})"


def head_of(model: Any) -> Any:
    """Return the layer that maps hidden states to logits, None without one."""
    return core_of(model).get_output_embeddings()


def backbone_of(model: Any) -> Any:
    """Return the part of a model that computes the last hidden states.

    For a language model it is the part that its own call runs: of OPT the decoder, not the module
    that `base_model_prefix` names, and of Llama 4 the module that its prefix does not name.
    """
    core = core_of(model)
    if core not in _backbones:
        _backbones[core] = _find_backbone(core)
    return core.get_submodule(_backbones[core])


def is_read_by_kernel(core: Any, name: str) -> bool:
    """Return whether a layer is Mamba's, and its weight read by a kernel, past the layer."""
    parent, _, last = name.rpartition(".")
    if last not in _READ_BY_KERNELS:
        return False
    mixer = core.get_submodule(parent)
    return isinstance(getattr(mixer, "conv1d", None), nn.Conv1d) and hasattr(mixer, "A_log")


def shared_weights(core: Any) -> set[int]:
    """Return the ids of parameters that several modules hold, such as Zamba's shared blocks.

    Each use of such a weight would have an adapter of its own, and merging would add up all of
    them. A block that is one module at several places has one adapter at all of them.
    """
    holders: dict[int, set[tuple[int, int]]] = {}
    for name, module in core.named_modules(remove_duplicate=False):
        parent = core.get_submodule(name.rpartition(".")[0]) if name else core
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), set()).add((id(parent), id(module)))
    return {key for key, found in holders.items() if len(found) > 1}


@torch.no_grad()
def hidden_width(model: Any) -> int:
    """Return the width of a model's last hidden states.

    `config.hidden_size` is another number where a projection follows the last layer.
    """
    backbone = backbone_of(model)
    with evaluating(backbone):
        return call(backbone, input_ids=_two_tokens(backbone)).last_hidden_state.shape[-1]


@torch.no_grad()
def has_plain_head(model: Any) -> bool:
    """Return whether logits are the head's plain output, not scaled or capped."""
    core, facts = core_of(model), facts_of(model)
    if "plain_head" not in facts:
        head, ids = head_of(core), _two_tokens(core)
        no_autocast = torch.autocast(ids.device.type, enabled=False)
        with evaluating(core), no_autocast, Capture(core) as capture:
            logits = call(core, input_ids=ids).logits
            facts["plain_head"] = head is not None and torch.equal(head(capture.hidden), logits)
    return facts["plain_head"]


def call(model: Any, **arguments: Any) -> Any:
    """Call a model without cache, and without the arguments that its forward does not name.

    The attention plan of a packed row is always passed: it goes to the attention function.
    """
    plan = {k: v for k, v in arguments.items() if k.startswith("rlhf_")}
    return model(**named_arguments(model, **arguments, use_cache=False), **plan)


def named_arguments(model: Any, **arguments: Any) -> dict[str, Any]:
    """Return the arguments that a model's forward names."""
    names = argument_names(model)
    return {k: v for k, v in arguments.items() if k in names}


def argument_names(model: Any) -> set[str]:
    """Return the names of the parameters of a transformers model's forward."""
    return {*inspect.signature(type(core_of(model)).forward).parameters}


def cache_parameter(model: Any) -> str:
    """Return the name of a model's cache parameter.

    transformers 5.24 renamed `past_key_values` to `cache`, model by model.
    """
    return "cache" if "cache" in argument_names(model) else "past_key_values"


def attention_window(model: Any) -> float:
    """Return the shortest attention window of a layer, in tokens; infinite without one."""
    return min(attention_windows(model), default=float("inf"))


def attention_windows(model: Any) -> set[int]:
    """Return the attention windows of all layers, in tokens."""
    config = text_config(model)
    types = getattr(config, "layer_types", None)
    if types is not None and set(types) <= {"full_attention"}:
        return set()
    return {*_windows(config.to_dict())}


def stable_length(model: Any) -> float:
    """Return the longest sequence for which rotary frequencies are those of a shorter one.

    LongRoPE and dynamic RoPE choose the frequencies of all tokens by the longest position in a
    batch.
    """
    return _stable_length(text_config(model))


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


class Capture:
    """Captures a backbone's last hidden states, and the autocast dtype, during a call."""

    def __init__(self, model: Any) -> None:
        self.backbone = backbone_of(model)
        self.hidden: Any = None
        self.cast: torch.dtype | None = None

    def __enter__(self) -> Capture:
        self.hook = self.backbone.register_forward_hook(self._store)
        return self

    def __exit__(self, *_: object) -> None:
        self.hook.remove()

    def _store(self, _module: Any, _inputs: Any, output: Any) -> None:
        self.hidden = output.last_hidden_state
        device = self.hidden.device.type
        if torch.is_autocast_enabled(device):
            self.cast = torch.get_autocast_dtype(device)


@torch.no_grad()
def _find_backbone(core: Any) -> str:
    """Return the name within a model of the part whose last hidden states its head reads.

    A model without output embeddings is a backbone itself, or a classifier, whose prefix is right.
    """
    names = {module: name for name, module in core.named_modules()}
    if core.get_output_embeddings() is None:
        return names.get(core.base_model, "")
    calls: list[tuple[str, Any]] = []
    inputs: list[Any] = []
    parts = [m for m in core.modules() if isinstance(m, PreTrainedModel) and m is not core]
    hooks = [
        part.register_forward_hook(
            lambda part, _, output: calls.append(
                (names[part], getattr(output, "last_hidden_state", None))
            )
        )
        for part in parts
    ]
    head = core.get_output_embeddings()
    hooks.append(head.register_forward_pre_hook(lambda _, args: inputs.append(args[0])))
    try:
        with evaluating(core):
            call(core, input_ids=_two_tokens(core))
    finally:
        for hook in hooks:
            hook.remove()
    # The outermost part returns last.
    found = [(name, hidden) for name, hidden in reversed(calls) if hidden is not None]
    feeding = [n for n, h in found if any(h.shape == i.shape and h.equal(i) for i in inputs)]
    return (feeding or [name for name, _ in found] or [names.get(core.base_model, "")])[0]


def _two_tokens(model: Any) -> torch.Tensor:
    return torch.arange(2, device=next(model.parameters()).device)[None]


def _stable_length(config: Any) -> float:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    lengths = []
    for part in [rope, *(v for v in rope.values() if isinstance(v, dict))]:
        kind = str(part.get("rope_type", part.get("type", "default")))
        original = part.get("original_max_position_embeddings")
        original = original or getattr(config, "original_max_position_embeddings", None)
        if "dynamic" in kind:
            lengths.append(config.max_position_embeddings)
        elif kind in ("longrope", "su"):
            lengths.append(original or config.max_position_embeddings)
    return min(lengths, default=float("inf"))


def _windows(value: Any, name: str = "") -> Iterator[int]:
    """Yield the windows in a configuration, which may be nested."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _windows(part, str(key))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _windows(part, name)
    elif type(value) is int and value > 0 and _WINDOW_FIELDS.search(name):
        # ModernBERT's `local_attention` counts both sides.
        yield value // 2 if name == "local_attention" else value
