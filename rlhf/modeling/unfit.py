"""Weights that don't fit a model: refused, with what is wrong and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rlhf.errors import ConfigError
from rlhf.files import read_json
from rlhf.modeling.headers import FLOATS, Header
from rlhf.modeling.source import CONFIG
from rlhf.modeling.weights import not_finite

Fail = Callable[[str], ConfigError]

#: Prefixes that wrappers add to the names of weights, and the cure.
_WRAPPERS = {
    "_orig_mod.": "they were saved from a model under torch.compile; save its `_orig_mod`",
    "_fsdp_wrapped_module.": "they were saved from a model under FSDP; gather the full weights, "
    "and save with save_pretrained",
    "base_model.model.": "they were saved from a model with peft adapters; call "
    "merge_and_unload() and save what it returns",
    ".base_layer.": "they were saved from a model with peft adapters; call "
    "merge_and_unload() and save what it returns",
    "module.": "they were saved from a wrapper such as DistributedDataParallel; save its `module`",
    "pretrained_model.": "they were saved from a model with a value head; save its "
    "`pretrained_model`",
}

#: Ends of the names of quantised weights and of their scales: GPTQ and AWQ, compressed-tensors and
#: FP8, bitsandbytes, MXFP4.
_PACKED = (
    ".qweight", ".qzeros", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".absmax",
    ".quant_map", "_proj_blocks", "_proj_scales",
)  # fmt: skip

#: Parts of a model of several modalities that its text model lacks.
_TOWERS = re.compile(
    r"^(model\.)?(vision_model|vision_tower|visual|vqmodel|audio_tower|embed_vision|embed_audio|"
    r"multi_modal_projector|mm_projector)\."
)

#: Weights of heads, which have no numbered layers; BERT's pooler belongs to its heads, too.
_NUMBERED = re.compile(r"\.\d+\.")
_POOLER = re.compile(r"(^|\.)pooler\.")


def refuse_unfit(
    model: Any,
    info: Mapping[str, Collection[Any]],
    headers: Mapping[str, Header],
    fail: Fail,
    other_head: bool,
    spare: re.Pattern[str] | None = None,
) -> None:
    """Refuse weights that the model does not know, lacks, or has in another shape.

    Args:
        model: The loaded model.
        info: What transformers reports: missing_keys, unexpected_keys and mismatched_keys.
        headers: Of the files.
        fail: Makes the error.
        other_head: Leave out heads.
        spare: Leave out these, too.
    """
    masks = {name for name, header in headers.items() if _is_causal_mask(header.shape)}
    unused = {
        key
        for key in info["unexpected_keys"]
        if not (_is_ignored(model, key) or key.endswith(tuple(masks)))
    }
    unused = {key for key in unused if not (spare and spare.search(key))} - towers(model, headers)
    missing, wrong = set(info["missing_keys"]), set(info["mismatched_keys"])
    if other_head:
        backbone = f"{model.base_model_prefix}."
        unused = {k for k in unused if k.startswith(backbone) or _NUMBERED.search(k)}
        missing = {k for k in missing if k.startswith(backbone) and not _POOLER.search(k)}
    if not (unused or missing or wrong):
        return
    shapes = {f"{name} {tuple(a)} instead of {tuple(b)}" for name, a, b in wrong}
    lists = {"of another shape": shapes, "unknown to it": unused, "missing": missing}
    problems = "; ".join(f"{title}: {_first(keys)}" for title, keys in lists.items() if keys)
    raise fail(
        f"its weights don't fit {type(model).__name__} as its {CONFIG} describes it ({problems}); "
        f"{_cure(model, headers, unused, missing, wrong)}"
    )


def towers(model: Any, headers: Mapping[str, Header]) -> set[str]:
    """Return the stored weights of other modalities, where a model is the text part of several.

    Some families, such as Llama 4, have a class for text alone, which does not know the others.
    """
    if model.config.sub_configs or not headers:
        return set()
    whole = read_json(next(iter(headers.values())).path.parent / CONFIG)
    return {name for name in headers if _TOWERS.search(name)} if "text_config" in whole else set()


def _is_causal_mask(shape: tuple[int, ...]) -> bool:
    """Return whether a shape is that of the masks that GPT-2's kind used to store."""
    return len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]


def _is_ignored(model: Any, key: str) -> bool:
    """Return whether a weight is a buffer of old checkpoints, or of a layer for speculation."""
    if re.search(r"(inv_freq|masked_bias|position_ids|cos_cached|sin_cached)$", key):
        return True
    # Multi-token prediction: layers behind the last one, which transformers leaves out.
    layer = re.search(r"\.layers\.(\d+)\.", key)
    config = model.config.get_text_config()
    extra = getattr(config, "num_nextn_predict_layers", None) or 0
    first = getattr(config, "num_hidden_layers", None) or 0
    return bool(layer) and first <= int(layer[1]) < first + extra


def _first(keys: Collection[str]) -> str:
    """List the first two keys in their natural order, and the number of the others."""
    natural = sorted(keys, key=lambda k: [p.zfill(6) if p.isdigit() else p for p in k.split(".")])
    others = len(keys) - 2
    return ", ".join(natural[:2]) + (f" and {others} more" if others > 0 else "")


def _cure(
    model: Any,
    headers: Mapping[str, Header],
    unused: Collection[str],
    missing: Collection[str],
    wrong: Collection[Any],
) -> str:
    """Return what to do about weights that don't fit."""
    for prefix, cure in _WRAPPERS.items():
        if any(key.startswith(prefix) or f".{prefix.strip('.')}." in key for key in unused):
            return cure
    if _are_packed(unused, headers):
        return (
            f"they are quantised, though its {CONFIG} has no quantization_config; give the model "
            "in bfloat16"
        )
    heads = ("score.", "classifier.", "classification_head.", "v_head.", "value_head.", "summary.")
    if any(key.startswith(heads) for key in unused):
        return "give the language model that this classifier was made from"
    again = "copy or download all of the model's files again"
    if wrong:
        return f"restore the {CONFIG} that was saved with these weights, or {again}"
    if unused and missing:
        return (
            f"their names are not those of {type(model).__name__}; save it with its save_pretrained"
        )
    return _cure_of_layers(model, headers, {*unused, *missing}) or (
        f"remove them, or restore the {CONFIG} that was saved with them" if unused else again
    )


def _are_packed(unused: Collection[str], headers: Mapping[str, Header]) -> bool:
    """Return whether weights that a model does not know are those of a quantised one, or scales."""
    return any(
        key.endswith(_PACKED) or (key in headers and headers[key].dtype not in FLOATS)
        for key in unused
    )


def _cure_of_layers(model: Any, headers: Collection[str], keys: Collection[str]) -> str:
    """Return the cure where whole layers are missing or too many, or the head is missing."""
    again = "copy or download all of the model's files again"
    head = model.get_output_embeddings()
    names = {f"{name}." for name, module in model.named_modules() if module is head}
    if head is not None and all(key.startswith(tuple(names)) for key in keys):
        return (
            f"{again}; if its head shares the weights of the embedding, set tie_word_embeddings to "
            f"true in {CONFIG}"
        )
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None) or 0
    stored = {layer for layer in map(_layer, headers) if layer is not None}
    concerned = {_layer(key) for key in keys}
    if stored == set(range(len(stored))) and stored ^ set(range(layers)) == concerned:
        return (
            f"{again}, or correct num_hidden_layers = {layers} in {CONFIG} if the model has "
            f"{len(stored)}"
        )
    return ""


def _layer(key: str) -> int | None:
    """Return the number of a weight's layer; None outside of layers."""
    match = _NUMBERED.search(key)
    return int(match[0].strip(".")) if match else None


def refuse_different_ties(model: Any, headers: Mapping[str, Header], fail: Fail) -> None:
    """Refuse weights that the configuration ties, and the files hold apart and different.

    transformers would leave them apart, and other programs that read the files would not.
    """
    ties = model.get_expanded_tied_weights_keys(all_submodels=True)
    for target, source in ties.items():
        both = [
            next((key for key in headers if f".{key}".endswith(f".{name}")), None)
            for name in (target, source)
        ]
        if both[0] is None or both[1] is None or both[0] == both[1]:
            continue
        one, other = (_read(key, headers[key]) for key in both if key)
        if one.shape != other.shape or not torch.equal(one, other):
            raise fail(
                f"its {CONFIG} ties {target} to {source}, and the files hold two that differ; set "
                "tie_word_embeddings to false if both are meant, or save the model again without "
                "the first"
            )


def _read(name: str, header: Header) -> Tensor:
    with safe_open(header.path, framework="pt") as file:
        return file.get_tensor(name)


def refuse_packed(model: Any, headers: Mapping[str, Header], fail: Fail) -> None:
    """Refuse integers and 8-bit floats where the model has weights: a quantised model."""
    parameters = {name for name, _ in model.named_parameters()}
    for name, header in headers.items():
        if name in parameters and header.dtype not in FLOATS:
            raise fail(
                f"its weight {name} is stored as {header.dtype}, so the model is quantised, though "
                f"its {CONFIG} has no quantization_config; give the model in bfloat16"
            )


def refuse_not_finite(model: Any, fail: Fail) -> None:
    """Refuse a model with NaN or infinity in a weight; reads each weight once."""
    for name, count in not_finite(model):
        size = model.state_dict()[name].numel()
        raise fail(
            f"{count} of the {size:,} values of its weight {name} are NaN or infinite; copy or "
            "download the model again, or give another one"
        )
