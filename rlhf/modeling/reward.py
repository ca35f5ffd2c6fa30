"""Reward model: a sequence classifier with one label, and how its token scores are pooled.

The checkpoint is a standard transformers sequence-classification model; `rlhf.json` beside it
holds what a standard loader does not know: the pooling and the rendering it was trained with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from rlhf.data.rendering import ASSISTANT, Renderer, load_renderer
from rlhf.errors import ConfigError, TrainingError
from rlhf.files import read_json, write_json
from rlhf.modeling.base import _load, _unusable, context_of
from rlhf.modeling.device import upload
from rlhf.modeling.forward import arguments_of, backbone_of, packs, token_batches
from rlhf.modeling.precision import Precision, autocast, in_own_precision, store_in_bfloat16
from rlhf.modeling.shards import save_model

META = "rlhf.json"
#: Field there: digest of the weights that the adapter in `adapter/` belongs to.
BASE = "base_weights"


def pool(
    token_scores: Float[Tensor, "batch time"],
    counted: Bool[Tensor, "batch time"],
    pooling: str,
) -> Float[Tensor, " batch"]:
    """One score per row: that of the last counted token (`last`) or the sum of all (`sum`)."""
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
    """Tokens after the first `marker` (all, when there is none) that are not padding.

    The *first* marker, so that a policy that writes the marker can't hide what came before it.
    """
    valid = attention_mask.bool()
    if marker is None:
        return valid
    is_marker = input_ids == marker
    after = is_marker.cumsum(1) - is_marker.int() > 0
    return valid & (after | ~is_marker.any(1, keepdim=True))


class _Pooled:
    """Mixed into a transformers sequence classifier: pools by position, never by pad id."""

    pooling = "last"
    marker: int | None = None

    def forward(
        self: Any, input_ids: Tensor, attention_mask: Tensor, **_: Any
    ) -> SequenceClassifierOutputWithPast:
        backbone = getattr(self, self.base_model_prefix)
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        hidden = backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
        token_scores = self.score(hidden).squeeze(-1).float()
        counted = counted_tokens(input_ids, attention_mask, self.marker)
        scores = pool(token_scores, counted, self.pooling)
        return SequenceClassifierOutputWithPast(
            logits=scores[:, None],  # pyright: ignore[reportArgumentType]
            hidden_states=(hidden,),
        )


def load_reward_model(folder: Path | str, renderer: Renderer, pooling: str | None = None) -> Any:
    """Load a reward model, or make one from a language model's backbone with a zeroed head.

    Args:
        folder: Local folder or hub id of a sequence classifier or language model.
        renderer: How (prompt, reply) is rendered for this model.
        pooling: `last` or `sum`; none reads `rlhf.json`, and without one takes `last`.

    Raises:
        ConfigError: The model has another number of labels than one, or no classifier class.
    """
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _unusable(folder, error) from error
    is_classifier = any("SequenceClassification" in a for a in config.architectures or [])
    if is_classifier and config.num_labels != 1:
        raise ConfigError(
            f"reward model {str(folder)!r} has {config.num_labels} labels; a reward model needs a "
            "sequence-classification model with exactly one (num_labels=1)"
        )
    config.num_labels = 1
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ConfigError(
            f"reward model {str(folder)!r}: transformers has no sequence classifier for "
            f"{config.model_type!r}; start from another base"
        )
    kind: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    pooled = type(kind.__name__, (_Pooled, kind), {})
    model = _quiet_load(pooled, folder, config)
    if not is_classifier:
        torch.nn.init.zeros_(model.score.weight)
    model.config.pad_token_id = renderer.tokenizer.pad_token_id
    set_pooling(model, folder, renderer, pooling)
    return model


def set_pooling(
    model: Any, folder: Path | str, renderer: Renderer, pooling: str | None = None
) -> None:
    """Tell a reward model which tokens make its score: as given, or as `rlhf.json` says."""
    model.pooling = pooling or reward_meta(folder).get("pooling", "last")
    if model.pooling == "sum":
        model.marker = renderer.tokenizer.get_vocab().get(ASSISTANT)


def _quiet_load(kind: Any, folder: Path | str, config: Any) -> Any:
    """Load without the warning about a head that is new on purpose."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return _load(
            lambda path, **kw: kind.from_pretrained(path, config=config, **kw), folder, None
        )
    finally:
        logging.set_verbosity(level)


def reward_meta(folder: Path | str) -> dict[str, Any]:
    """What `save_reward_model` noted; empty for a foreign model."""
    path = Path(folder) / META
    return read_json(path) if path.is_file() else {}


def save_reward_model(
    model: Any, renderer: Renderer, folder: Path, base: str | None = None
) -> None:
    """Save weights, tokenizer, pooling, the rendering's identity, and that of an adapter's base."""
    save_model(model, folder)
    renderer.tokenizer.save_pretrained(folder)
    meta = {"pooling": model.pooling, "template_hash": renderer.template_hash}
    write_json(folder / META, {**meta, BASE: base} if base else meta)


class Scorer:
    """Scores replies to prompts by a frozen reward model with a renderer of its own.

    `model` is that of `folder` where it is in memory already.
    """

    def __init__(
        self, folder: Path, device: torch.device, max_length: int, batch_tokens: int = 4096,
        model: Any = None, precision: Precision = "fp32",
    ) -> None:  # fmt: skip
        self.renderer = load_renderer(folder)
        model = model or load_reward_model(folder, self.renderer)
        self.precision: Precision = precision
        self.model = model.eval().requires_grad_(False)
        if precision == "bf16":
            store_in_bfloat16(self.model)
        self.model.to(device)
        # A reward model of others may have less room than the policy.
        self.max_length = min(max_length, context_of(self.model))
        self.batch_tokens, self.device = batch_tokens, device

    def __call__(self, prompts: list[Any], replies: list[str]) -> Float[Tensor, " batch"]:
        """Score each reply as an answer to its own prompt; the result lies on the CPU.

        Raises:
            TrainingError: A score is not finite.
        """
        rows = [
            self.renderer.encode(p, r, self.max_length).ids
            for p, r in zip(prompts, replies, strict=True)
        ]
        scores = self.score_ids(rows)
        if not torch.isfinite(scores).all():
            worst = replies[int((~torch.isfinite(scores)).int().argmax())]
            raise TrainingError(
                f"the reward model's score is not finite for the reply {worst[:80]!r}; "
                "its weights are broken: train it again with a lower reward_model.learning_rate"
            )
        return scores

    @torch.no_grad()
    def score_ids(self, rows: list[list[int]]) -> Float[Tensor, " batch"]:
        """Score token sequences, in batches of similar length and at most `batch_tokens` tokens."""
        if not rows:
            return torch.empty(0)
        batches = token_batches([len(row) for row in rows], self.batch_tokens)
        pad = self.renderer.tokenizer.pad_token_id
        parts = [self._score(*pad_right([rows[i] for i in batch], pad)) for batch in batches]
        scores = torch.empty(len(rows))
        scores[[i for batch in batches for i in batch]] = torch.cat(parts).cpu()
        return scores

    def _score(self, ids: Tensor, mask: Tensor) -> Tensor:
        """As the model's own forward, without computing on padding where that is possible."""
        counted = upload(counted_tokens(ids, mask, self.model.marker), self.device)
        ids = upload(ids, self.device)
        arguments, index = arguments_of(ids, mask, packs(self.model, ids.shape[1]))
        with autocast(self.device, self.precision):
            hidden = backbone_of(self.model)(**arguments, use_cache=False).last_hidden_state
        token_scores = in_own_precision(self.model.score, hidden).flatten()
        token_scores = token_scores[upload(index, self.device)].float()
        return pool(token_scores, counted, self.model.pooling)


def pad_right(
    rows: list[list[int]], pad: int
) -> tuple[Int[Tensor, "batch time"], Int[Tensor, "batch time"]]:
    """Stack rows of different length; returns ids and their mask."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids, mask
