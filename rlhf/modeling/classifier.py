"""Sequence classifiers with one label, of any family: class, head and forward pass.

Two kinds, told apart by what the model computes, not by names:

- `Pooled`: a causal model whose class scores every token by a head on its hidden state and takes
  the last one, as the decoders do (GPT-2, Llama, Qwen). Here the last token is found by position,
  never by pad id, and scores may be summed over a reply instead.
- `Whole`: anything else, such as an encoder (BERT, RoBERTa, DeBERTa, ModernBERT) with a pooler or
  a dense head on its first token. The class's own forward pass gives the score.

A family without a classifier in transformers gets transformers' generic one: a linear head called
`score`, without bias, on the last token's hidden state.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
)

from rlhf.errors import ConfigError
from rlhf.modeling.agreement import testing
from rlhf.modeling.base import context_length
from rlhf.modeling.packed import position_ids
from rlhf.modeling.precision import in_own_precision
from rlhf.modeling.pretrained import check_weights, load_pretrained, loading_error
from rlhf.modeling.structure import backbone_of, call, core_of, facts_of

#: Weights in a checkpoint that a classifier has no use for: heads of a language model, a pooler
#: that its head does not read, and buffers that older versions of transformers saved.
_SPARE = re.compile(
    r"(^|\.)(lm_head|embed_out|cls|output_projection|\w*_predictions|vocab_\w+|pooler)\."
    r"|(^|\.)(position_ids|inv_freq|masked_bias|attn\.bias)$"
)
#: Largest difference of two results that count as equal, relative to the largest number.
_TOLERANCE = 1e-4


def load_classifier(folder: Path | str) -> Any:
    """Load a sequence classifier with one label, or make one from another model.

    A model that is no classifier gets a new head, whose last layer is zero, so that all first
    scores are 0. The result is a `Pooled` or a `Whole`, in float32.

    Args:
        folder: Local folder or hub id.

    Raises:
        ConfigError: The model can't be loaded, has not exactly one label, its weights are not those
            of the whole model, or no classifier can be made from its architecture.
    """
    loader, is_classifier = _loader(folder)
    model = load_pretrained(loader, folder, other_head=not is_classifier, spare=_SPARE)
    kind = Pooled if _scores_last_token(model, folder) and is_causal(model) else Whole
    if not is_classifier:
        layer = last_layer(model)
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
    name = type(model).__name__
    model.__class__ = type(name, (kind, type(model)), {"__module__": __name__})
    return model


def check_classifier(folder: Path | str, field: str) -> None:
    """Check a local model for `load_classifier` without reading its weights.

    Raises:
        ConfigError: As `load_classifier`, except for weights that are not finite.
    """
    loader, is_classifier = _loader(folder)
    check_weights(folder, loader, field=field, other_head=not is_classifier, spare=_SPARE)


def _loader(folder: Path | str) -> tuple[Any, bool]:
    """Return the loader of a model as a classifier with one label, and whether it is one.

    Raises:
        ConfigError: It has not exactly one label, or no classifier can be made from it.
    """
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise loading_error(folder, error) from error
    is_classifier = any("SequenceClassification" in a for a in config.architectures or [])
    if is_classifier and config.num_labels != 1:
        raise ConfigError(
            f"reward model {str(folder)!r} has {config.num_labels} labels; a reward model needs a "
            "sequence-classification model with exactly one (num_labels=1)"
        )
    config.num_labels = 1
    model_class, config = classifier_class(config, folder)

    def load(path: Any, **options: Any) -> Any:
        return model_class.from_pretrained(path, config=config, **options)

    return load, is_classifier


def classifier_class(config: Any, folder: Path | str = "") -> tuple[Any, Any]:
    """Return the class of an architecture's sequence classifiers, transformers' own or generic.

    Args:
        config: The model's configuration.
        folder: Names the model in errors.

    Returns:
        The class, and the configuration for it: of several modalities that of the text.

    Raises:
        ConfigError: The architecture is no language model.
    """
    if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)], config
    causal: Any = None
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        causal = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        if causal.config_class is config.sub_configs.get("text_config"):
            config = config.get_text_config()
            config.num_labels = 1
    if causal is None or type(config) not in MODEL_MAPPING:
        raise ConfigError(
            f"reward model {str(folder)!r}: transformers has neither a sequence classifier nor a "
            f"language model for {config.model_type!r}; start from another base"
        )
    family = next(c for c in causal.__mro__ if PreTrainedModel in c.__bases__)
    name = re.sub(r"For\w+$|LMHeadModel$", "", causal.__name__) + "ForSequenceClassification"
    # The weights have the names of the language model's, so that its adapters fit, too.
    attributes = {
        "base_model_prefix": _backbone_name(causal, config),
        "__module__": family.__module__,
    }
    return type(name, (GenericClassifier, family), attributes), config


class GenericClassifier(GenericForSequenceClassification):
    """Base of the classes that are made for families without a classifier of their own."""


def _backbone_name(causal: Any, config: Any) -> str:
    """Return the name of a language model's backbone; Llama 4 has another as its prefix."""
    backbone: Any = MODEL_MAPPING[type(config)]
    with torch.device("meta"):
        children = causal(config).named_children()
    names = [name for name, child in children if isinstance(child, backbone)]
    return names[0] if names else causal.base_model_prefix


def head_modules(model: Any) -> dict[str, nn.Module]:
    """Return a classifier's modules that are not the backbone, by name, in order.

    Those without parameters, such as dropout, are included.
    """
    backbone = backbone_of(model)
    return {name: child for name, child in model.named_children() if child is not backbone}


def trained_head(model: Any) -> list[str]:
    """Return the names of the head's modules that have parameters, poolers included."""
    names = [name for name, m in head_modules(model).items() if any(True for _ in m.parameters())]
    pooler = getattr(backbone_of(model), "pooler", None)
    return [*names, "pooler"] if isinstance(pooler, nn.Module) else names


def last_layer(model: Any) -> Any:
    """Return the linear layer whose output is a classifier's score; None without one."""
    layers = [
        layer
        for module in head_modules(model).values()
        for layer in module.modules()
        if isinstance(layer, nn.Linear) and layer.out_features == 1
    ]
    return layers[-1] if layers else None


@torch.no_grad()
def is_causal(model: Any) -> bool:
    """Return whether a hidden state depends on no later token, which a critic needs."""
    core, facts = backbone_of(model), facts_of(model)
    if model.config.is_encoder_decoder:
        return False
    if "is_causal" in facts:  # once, before frozen layers may be stored in bfloat16
        return facts["is_causal"]
    ids = _probe(model)
    other = ids.clone()
    other[0, -1] = ids[0, 0]
    with testing(model):
        one, two = (
            call(core, input_ids=i, attention_mask=torch.ones_like(i)).last_hidden_state[:, :-1]
            for i in (ids, other)
        )
    # Tiny random encoders differ by 1e-3 of the largest number, and rounding by 1e-6.
    facts["is_causal"] = bool((one - two).abs().max() <= 1e-5 * one.abs().max())
    return facts["is_causal"]


@torch.no_grad()
def pads_exactly(model: Any) -> bool:
    """Return whether a `Whole` gives a row the same score with padding behind it."""
    ids = _probe(model)
    width = ids.shape[1] - 3
    short = ids[:, :width].clone()
    if model.config.is_encoder_decoder:
        short[0, -1] = ids[0, -1]
    mask = torch.ones(2, ids.shape[1], dtype=torch.long, device=ids.device)
    mask[0, width:] = 0
    pad = model.config.get_text_config().pad_token_id or 0
    filler = torch.full((1, 3), pad, device=ids.device)
    both = torch.cat([torch.cat([short, filler], dim=1), ids])
    with testing(model), _ramp(last_layer(model)):
        try:
            padded = model(both, mask).logits[0]
        except ValueError:  # of a class that asks for something in all rows
            return False
        return _agree(padded, model(short, torch.ones_like(short)).logits[0])


def input_limit(model: Any) -> int:
    """Return the most tokens that a classifier reads.

    Positions of RoBERTa and its kin begin behind the pad token's id: of 514 there are 512 to use.
    """
    limit = context_length(model)
    for name, layer in model.named_modules():
        is_table = isinstance(layer, nn.Embedding) and name.endswith("position_embeddings")
        if is_table and layer.padding_idx is not None:
            limit = min(limit, layer.num_embeddings - layer.padding_idx - 1)
    return limit


class Pooled:
    """Mixin for a sequence classifier that scores tokens: pools by position, never by pad id."""

    pooling = "last"
    marker: int | None = None

    def forward(
        self: Any, input_ids: Tensor, attention_mask: Tensor, **_: Any
    ) -> SequenceClassifierOutputWithPast:
        """Compute scores (batch, 1) as `logits`, and the last hidden states."""
        hidden = call(
            backbone_of(self),
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids(attention_mask),
        ).last_hidden_state
        counted = counted_tokens(input_ids, attention_mask, self.marker)
        scores = pool(apply_head(self, hidden).squeeze(-1).float(), counted, self.pooling)
        return SequenceClassifierOutputWithPast(
            logits=scores[:, None],  # pyright: ignore[reportArgumentType]
            hidden_states=(hidden,),
        )


class Whole:
    """Mixin for a sequence classifier whose score is that of its class's own forward pass."""

    pooling = "own"
    marker: int | None = None

    def forward(
        self: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        **_: Any,
    ) -> Any:
        """Compute scores (batch, 1) as `logits`, by the class's own forward pass."""
        own = super().forward  # pyright: ignore[reportAttributeAccessIssue]
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None and takes_token_types(self):
            arguments["token_type_ids"] = token_type_ids
        return own(**arguments, return_dict=True)


def takes_token_types(model: Any) -> bool:
    """Return whether the class's own forward pass takes token types, as BERT's does."""
    classes: Iterable[Any] = type(model).__mro__
    own = next(c for c in classes if "forward" in vars(c) and c not in (Pooled, Whole))
    return "token_type_ids" in inspect.signature(own.forward).parameters


def apply_head(model: Any, hidden: Tensor) -> Tensor:
    """Apply the modules of a `Pooled`'s head, one after another, to hidden states.

    The last layer computes in the precision of its weights, also under autocast.
    """
    for module in head_modules(model).values():
        if isinstance(module, nn.Linear) and module.out_features == 1:
            hidden = in_own_precision(module, hidden)
        else:
            hidden = module(hidden)
    return hidden


def pool(
    token_scores: Float[Tensor, "batch time"],
    counted: Bool[Tensor, "batch time"],
    pooling: str,
) -> Float[Tensor, " batch"]:
    """Pool token scores: the last counted one (`last`) or the sum of all (`sum`)."""
    if pooling == "sum":
        return (token_scores * counted).sum(1)
    positions = torch.arange(token_scores.shape[1], device=token_scores.device)
    last = (positions * counted).argmax(1)
    return token_scores.gather(1, last[:, None]).squeeze(1)


def counted_tokens(
    input_ids: Int[Tensor, "batch time"],
    attention_mask: Int[Tensor, "batch time"],
    marker: int | None,
) -> Bool[Tensor, "batch time"]:
    """Mask the tokens after the last `marker` of a row that are not padding.

    Without a marker in the row: all. Earlier markers begin past turns of the prompt; no reply holds
    one, for texts are encoded without control tokens.
    """
    valid = attention_mask.bool()
    if marker is None:
        return valid
    is_marker = input_ids == marker
    return valid & (is_marker.flip(1).cumsum(1).flip(1) == 0)


@torch.no_grad()
def _scores_last_token(model: Any, folder: Path | str) -> bool:
    """Return whether a classifier's score is that of its head on the last hidden state.

    The generic classifier's is; its own forward pass does not run for every family.

    Raises:
        ConfigError: Its class can't score a text, or has no linear head with one output.
    """
    layer = last_layer(model)
    if layer is None:
        raise ConfigError(
            f"reward model {str(folder)!r}: {type(model).__name__} has no linear head with one "
            "output; give another model"
        )
    try:
        ids = _probe(model)
        mask = torch.ones_like(ids)
        with testing(model), _ramp(layer):
            if isinstance(model, GenericClassifier):
                apply_head(model, call(backbone_of(model), input_ids=ids).last_hidden_state)
                return True
            own = model(input_ids=ids, attention_mask=mask).logits
            if model.config.is_encoder_decoder:
                return False
            return _agree(_last_token_score(model, ids, mask), own)
    except Exception as error:  # a family's code can raise anything
        raise ConfigError(
            f"reward model {str(folder)!r}: {type(model).__name__} can't score a text "
            f"({' '.join(str(error).split())[:150]}); give a model that reads text alone"
        ) from error


def _last_token_score(model: Any, ids: Tensor, mask: Tensor) -> Tensor | None:
    """Apply a classifier's head to the last hidden state; None where it does not fit."""
    try:
        hidden = call(backbone_of(model), input_ids=ids, attention_mask=mask).last_hidden_state
        return apply_head(model, hidden)[:, -1]
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return None


def _agree(one: Tensor | None, other: Tensor) -> bool:
    if one is None or one.shape != other.shape:
        return False
    return bool((one - other).abs().max() <= _TOLERANCE * other.abs().max())


def _probe(model: Any) -> Int[Tensor, "1 time"]:
    """Return tokens to test a model with; the last ends a sequence where one must."""
    core = core_of(model)
    configs = [model.config.to_dict(), model.config.get_text_config().to_dict()]
    special = [
        value
        for config in configs
        for name, values in config.items()
        if name.endswith(("token_id", "token_index"))
        for value in _as_list(values)  # Llama 3.1 has several ends
    ]
    table: Any = core.get_input_embeddings()
    ids = [i for i in range(3, table.num_embeddings) if i not in special][:9]
    if model.config.is_encoder_decoder:  # BART and T5 score the end token
        ids[-1] = _as_list(configs[1]["eos_token_id"])[0]
    return torch.tensor([ids], device=next(core.parameters()).device)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


@contextmanager
def _ramp(layer: nn.Linear) -> Iterator[None]:
    """Give a layer other weights: a new head is zero, and zeros would agree with anything."""
    weight = layer.weight.data
    layer.weight.data = torch.linspace(-1, 1, weight.numel()).view(weight.shape).to(weight)
    try:
        yield
    finally:
        layer.weight.data = weight
