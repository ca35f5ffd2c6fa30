"""Loading of pretrained models: every weight of the files is used, and every parameter is in them.

transformers initialises a parameter at random that its files lack, and ignores what it does not
know. Here either is an error, unless the model's class declares it to be intended or it belongs to
a head that is replaced. `check_weights` finds that out from the headers of the files alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from rlhf.errors import ConfigError
from rlhf.modeling.generation_config import check_generation_config
from rlhf.modeling.headers import FLOATS, DamagedWeights, Header, read_headers
from rlhf.modeling.source import CONFIG, ExternalModel
from rlhf.modeling.weights import StoredDtypes, remember_weights

Fail = Callable[[str], ConfigError]

#: Options of every loading.
_LOADING: dict[str, Any] = {
    "dtype": torch.float32,
    "output_loading_info": True,
    # Otherwise it raises, with the shapes in a table on the console alone.
    "ignore_mismatched_sizes": True,
}

#: Heads other than that of a causal language model, by the end of an architecture's name.
_OTHER_TASKS = (
    "MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering",
    "MultipleChoice", "NextSentencePrediction",
)  # fmt: skip

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

#: Weights of heads, which have no numbered layers; BERT's pooler belongs to its heads, too.
_NUMBERED = re.compile(r"\.\d+\.")
_POOLER = re.compile(r"(^|\.)pooler\.")


def load_pretrained(
    loader: Any,
    folder: Path | str,
    revision: str | None = None,
    *,
    field: str | None = None,
    other_head: bool = False,
    spare: re.Pattern[str] | None = None,
) -> Any:
    """Load in float32, from safetensors only, without running code from a hub.

    `model.stored_dtypes` holds the dtypes of the files, in which `save_model` writes them.

    Args:
        loader: The `from_pretrained` of a transformers class with a `config` of its own.
        folder: Local folder or hub id.
        revision: Of a hub model; None is the newest.
        field: The setting that names the model, for errors.
        other_head: The files may lack the class's head, and hold another one instead.
        spare: Names of weights in the files that the class may leave unused.

    Raises:
        ConfigError: The model can't be loaded, its weights don't fit its configuration, or one is
            not finite.
    """
    path, fail = find_model(folder, revision, field)
    headers = _headers(path, fail)
    with _loading_errors(folder, field):
        # First without weights: those that don't fit would be drawn at random, which takes long.
        _check(loader, headers, fail, other_head, spare)
        model, info = loader(str(path), use_safetensors=True, trust_remote_code=False, **_LOADING)
    _refuse_unfit(model, info, headers, fail, other_head, spare)
    _refuse_not_finite(model, fail)
    model.stored_dtypes = StoredDtypes.of(headers)
    remember_weights(model)
    return model


def load_causal(
    folder: Path | str, revision: str | None = None, *, field: str | None = None
) -> Any:
    """Load a causal language model as `load_pretrained` does."""
    path, fail = find_model(folder, revision, field)
    with _loading_errors(folder, field):
        loader = _causal_loader(path, fail)
    return load_pretrained(loader, folder, revision, field=field)


def check_weights(
    folder: Path | str,
    loader: Any = None,
    *,
    field: str | None = None,
    other_head: bool = False,
    spare: re.Pattern[str] | None = None,
) -> Any:
    """Check that a local model's weights fit its configuration, without reading them.

    The names and shapes in the headers of its files go through transformers' own loading, on the
    meta device: it takes about 0.1 s. Two weights are read, if they are tied and yet both stored.
    That weights are finite is checked by `load_pretrained` alone.

    Args:
        folder: The model's files.
        loader: As for `load_pretrained`; None is that of the causal language model.
        field: The setting that names the model, for errors.
        other_head: As for `load_pretrained`.
        spare: As for `load_pretrained`.

    Returns:
        The model on the meta device, with `stored_dtypes`.

    Raises:
        ConfigError: The files are damaged, or don't fit.
    """
    path, fail = find_model(folder, None, field)
    headers = _headers(path, fail)
    with _loading_errors(folder, field):
        model = _check(loader or _causal_loader(path, fail), headers, fail, other_head, spare)
    model.stored_dtypes = StoredDtypes.of(headers)
    return model


def find_model(
    folder: Path | str, revision: str | None = None, field: str | None = None
) -> tuple[Path, Fail]:
    """Return a model's local folder, from the hub's cache if need be, and its errors' maker.

    Raises:
        ConfigError: There is no model, or its configuration is refused by `ExternalModel`.
    """
    external = ExternalModel(field or "model", str(folder), revision=revision)
    fail = failing(folder, field)
    if external.uri.startswith("s3://"):
        raise fail("a bucket is read by the pipeline's stages only; give a local copy")
    try:
        path = external.fetch(Path()).folder  # a folder's own, or the hub's cache
        external.check_config((path / CONFIG).read_bytes())
    except ConfigError as error:
        reason = str(error).removeprefix(f"{external.field} = {external.uri!r}: ")
        raise fail(reason) from None
    check_generation_config(path, fail)
    return path, fail


def failing(folder: Path | str, field: str | None = None) -> Fail:
    """Return a function that makes a model's ConfigError from a reason."""
    name = f"{field} =" if field else "model"
    return lambda reason: ConfigError(f"{name} {str(folder)!r}: {reason}")


def loading_error(folder: Path | str, error: Exception, field: str | None = None) -> ConfigError:
    """Return the ConfigError for a model or tokenizer that transformers can't load."""
    return failing(folder, field)(
        f"can't be loaded ({_reason(error)}); give a hub id, artifact:<digest>, s3://bucket/"
        "prefix or a local folder with config.json, a tokenizer and safetensors"
    )


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Errors of one field name it on the first line, and the reason on the second.
    return " ".join(lines[:2])[:200] or type(error).__name__


def _headers(path: Path, fail: Fail) -> dict[str, Header]:
    try:
        return read_headers(path)
    except DamagedWeights as error:
        raise fail(str(error)) from None


def _check(
    loader: Any,
    headers: Mapping[str, Header],
    fail: Fail,
    other_head: bool,
    spare: re.Pattern[str] | None = None,
) -> Any:
    """Load a model on the meta device from names and shapes; return it if they fit."""
    tensors = {name: _meta(header) for name, header in headers.items()}
    model, info = loader(None, state_dict=tensors, device_map={"": "meta"}, **_LOADING)
    _refuse_unfit(model, info, headers, fail, other_head, spare)
    _refuse_different_ties(model, headers, fail)
    _refuse_packed(model, headers, fail)
    return model


def _causal_loader(path: Path, fail: Fail) -> Any:
    """Return the loader of the class that AutoModelForCausalLM would choose.

    Raises:
        ConfigError: The architecture is of another task, or has no causal language model.
    """
    config = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    refuse_other_task(config, fail)
    try:
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise fail(
            f"transformers has no causal language model for model_type {config.model_type!r}; "
            "give another base"
        ) from None
    if isinstance(model_class, tuple | list):
        names = config.architectures or ()
        model_class = next((c for c in model_class if c.__name__ in names), model_class[0])
    # A text model of a model with several modalities has the configuration of its text.
    text = config.sub_configs.get("text_config")
    if text is not None and model_class.config_class == text:
        config = config.get_text_config()
    return lambda name, **options: model_class.from_pretrained(name, config=config, **options)


def refuse_other_task(config: Any, fail: Fail) -> None:
    """Refuse a configuration whose architecture is no causal language model.

    One of BERT's kind loads as such without an error, and sees the tokens that it is to predict.

    Raises:
        ConfigError: It is of another task.
    """
    for name in config.architectures or ():
        if str(name).endswith(_OTHER_TASKS):
            raise fail(
                f"must be a causal language model, and this one is {name}; give the model that it "
                "was made from, or another one"
            )


@contextmanager
def _loading_errors(folder: Path | str, field: str | None) -> Iterator[None]:
    """Turn any error of transformers into one line; its report on the console is left out."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    except (ConfigError, MemoryError):
        raise
    except Exception as error:  # a broken configuration raises any class
        cure = f"restore the {CONFIG} that was saved with its weights, or update transformers"
        if "flash" in str(error).lower():
            cure = f"remove attn_implementation or _attn_implementation from its {CONFIG}"
        raise failing(folder, field)(
            f"can't be loaded by transformers {transformers.__version__} ({_reason(error)}); {cure}"
        ) from error
    finally:
        transformers_logging.set_verbosity(level)


def _refuse_unfit(
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
    unused = {key for key in unused if not (spare and spare.search(key))}
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


def _refuse_different_ties(model: Any, headers: Mapping[str, Header], fail: Fail) -> None:
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


def _refuse_packed(model: Any, headers: Mapping[str, Header], fail: Fail) -> None:
    """Refuse integers and 8-bit floats where the model has weights: a quantised model."""
    parameters = {name for name, _ in model.named_parameters()}
    for name, header in headers.items():
        if name in parameters and header.dtype not in FLOATS:
            raise fail(
                f"its weight {name} is stored as {header.dtype}, so the model is quantised, though "
                f"its {CONFIG} has no quantization_config; give the model in bfloat16"
            )


def _refuse_not_finite(model: Any, fail: Fail) -> None:
    """Refuse a model with NaN or infinity in a weight; reads each weight once."""
    for name, weight in model.state_dict().items():
        # min and max are NaN if one element is; they need no memory of the weight's size.
        if not weight.is_floating_point() or weight.numel() == 0:
            continue
        if not torch.stack(torch.aminmax(weight)).isfinite().all():
            count = int((~weight.isfinite()).sum())
            raise fail(
                f"{count} of the {weight.numel():,} values of its weight {name} are NaN or "
                "infinite; copy or download the model again, or give another one"
            )


def _meta(header: Header) -> Tensor:
    """Return a tensor without memory, of a header's shape."""
    dtype = torch.float32 if header.dtype in FLOATS else torch.uint8
    return torch.empty(header.shape, dtype=dtype, device="meta")
