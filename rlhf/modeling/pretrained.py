"""Loading of pretrained models: every weight of the files is used, and every parameter is in them.

transformers initialises a parameter at random that its files lack, and ignores what it does not
know. Here either is an error, unless the model's class declares it to be intended or it belongs to
a head that is replaced. `check_weights` finds that out from the headers of the files alone.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from rlhf.errors import ConfigError
from rlhf.limits import MAX_MODEL_BYTES, read_some
from rlhf.modeling.generation_config import check_generation_config
from rlhf.modeling.headers import FLOATS, DamagedWeights, Header, read_headers
from rlhf.modeling.source import CONFIG, ExternalModel
from rlhf.modeling.unfit import (
    Fail,
    refuse_different_ties,
    refuse_not_finite,
    refuse_packed,
    refuse_unfit,
    towers,
)
from rlhf.modeling.weights import StoredDtypes, remember_weights

log = logging.getLogger(__name__)

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
    refuse_unfit(model, info, headers, fail, other_head, spare)
    refuse_not_finite(model, fail)
    if left_out := towers(model, headers):
        log.warning(
            "model %r: %d weights of other modalities are left out (first: %s); what is published "
            "is %s, of text alone", str(folder), len(left_out), min(left_out), type(model).__name__
        )  # fmt: skip
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
        external.check_config(read_some(path / CONFIG, MAX_MODEL_BYTES))
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
    shows_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # nothing is read that would take time
    try:
        model, info = loader(None, state_dict=tensors, device_map={"": "meta"}, **_LOADING)
    finally:
        if shows_bars:
            transformers_logging.enable_progress_bar()
    refuse_unfit(model, info, headers, fail, other_head, spare)
    refuse_different_ties(model, headers, fail)
    refuse_packed(model, headers, fail)
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


def _meta(header: Header) -> Tensor:
    """Return a tensor without memory, of a header's shape."""
    dtype = torch.float32 if header.dtype in FLOATS else torch.uint8
    return torch.empty(header.shape, dtype=dtype, device="meta")
