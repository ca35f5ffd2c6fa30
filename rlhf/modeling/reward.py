"""Reward models: sequence classifiers with one label, pooling, scoring.

The files are those of a transformers sequence classifier. `rlhf.json` beside them adds the pooling,
the rendering of the training data and, for a model with an adapter, the digest of its base.
`Scorer` loads the whole model; `SharedScorer` puts its adapter on the policy's base instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from rlhf.config.lengths import TokenLimits
from rlhf.data.rendering import ASSISTANT, Renderer, load_renderer
from rlhf.errors import ConfigError, TrainingError
from rlhf.files import read_json, write_json
from rlhf.modeling.base import context_length
from rlhf.modeling.device import upload
from rlhf.modeling.lora import (
    ADAPTER_FOLDER,
    REWARD,
    active_adapter,
    load_adapter,
)
from rlhf.modeling.packed import arguments_of, backbone_of, packs, position_ids
from rlhf.modeling.precision import Precision, autocast, in_own_precision, store_in_bfloat16
from rlhf.modeling.pretrained import load_pretrained, loading_error
from rlhf.modeling.weights import save_model, weights_digest

#: File beside the weights.
META = "rlhf.json"

#: Field of it: digest of the base weights on which the adapter in `adapter/` was trained.
BASE_WEIGHTS = "base_weights"


def load_reward_model(folder: Path | str, renderer: Renderer, pooling: str | None = None) -> Any:
    """Load a reward model, or make one from a language model with a zero head.

    Args:
        folder: Local folder or hub id of a sequence classifier or language model.
        renderer: Renders prompt and reply for this model.
        pooling: `last` or `sum`; None is that of `rlhf.json`, by default `last`.

    Raises:
        ConfigError: The model can't be loaded, has not exactly one label, or transformers has no
            classifier for its architecture.
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
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ConfigError(
            f"reward model {str(folder)!r}: transformers has no sequence classifier for "
            f"{config.model_type!r}; start from another base"
        )
    classifier: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    pooled = type(classifier.__name__, (_Pooled, classifier), {})
    model = load_pretrained(
        lambda path, **options: pooled.from_pretrained(path, config=config, **options),
        folder,
        other_head=not is_classifier,
    )
    if not is_classifier:
        torch.nn.init.zeros_(model.score.weight)
    model.config.pad_token_id = renderer.tokenizer.pad_token_id
    set_pooling(model, folder, renderer, pooling)
    return model


def save_reward_model(
    model: Any, renderer: Renderer, folder: Path, base: str | None = None
) -> None:
    """Save weights, tokenizer and `rlhf.json`; `base` is the digest of its base."""
    save_model(model, folder)
    renderer.tokenizer.save_pretrained(folder)
    meta = {"pooling": model.pooling, "template_hash": renderer.template_hash}
    write_json(folder / META, {**meta, BASE_WEIGHTS: base} if base else meta)


class Scorer:
    """Scores replies to prompts by a frozen reward model with its own renderer.

    Args:
        folder: Reward model with its tokenizer.
        device: Device of the model.
        limits: Most tokens of prompts and replies, or of both together; the model's context may
            be shorter.
        batch_tokens: Most tokens of one forward pass.
        model: The model of `folder`, if it is loaded already.
        precision: Precision of forward passes.
    """

    def __init__(
        self, folder: Path, device: torch.device, limits: TokenLimits | int,
        batch_tokens: int = 4096,
        model: Any = None, precision: Precision = "fp32",
    ) -> None:  # fmt: skip
        self.renderer = load_renderer(folder)
        model = model or load_reward_model(folder, self.renderer)
        self.precision: Precision = precision
        self.model = model.eval().requires_grad_(False)
        if precision == "bf16":
            store_in_bfloat16(self.model)
        self.model.to(device)
        # An external reward model may have a shorter context than the policy.
        self.limits = TokenLimits.of(limits).within(context_length(self.model))
        self.batch_tokens, self.device = batch_tokens, device

    def __call__(self, prompts: list[Any], replies: list[str]) -> Float[Tensor, " batch"]:
        """Score each reply to its own prompt; the result is on the CPU.

        Args:
            prompts: Texts or messages.
            replies: One for each prompt.

        Raises:
            PromptUnusable: The model can't be given a prompt.
            TrainingError: A score is not finite.
        """
        rows = [
            self.renderer.encode(prompt, reply, self.limits).ids
            for prompt, reply in zip(prompts, replies, strict=True)
        ]
        scores = self.score_ids(rows)
        if not torch.isfinite(scores).all():
            example = replies[int((~torch.isfinite(scores)).int().argmax())]
            raise TrainingError(
                f"the reward model's score is not finite for the reply {example[:80]!r}; "
                "its weights are broken: train it again with a lower reward_model.learning_rate"
            )
        return scores

    @torch.no_grad()
    def score_ids(self, rows: list[list[int]]) -> Float[Tensor, " batch"]:
        """Score token sequences, in batches of similar length."""
        if not rows:
            return torch.empty(0)
        batches = token_batches([len(row) for row in rows], self.batch_tokens)
        pad = self.renderer.tokenizer.pad_token_id
        parts = [self._score(*pad_right([rows[i] for i in batch], pad)) for batch in batches]
        scores = torch.empty(len(rows))
        scores[[i for batch in batches for i in batch]] = torch.cat(parts).cpu()
        return scores

    def _score(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Compute the scores of `_Pooled.forward`, without padding where packing is exact."""
        counted = upload(counted_tokens(ids, mask, self.model.marker), self.device)
        ids = upload(ids, self.device)
        arguments, index = arguments_of(ids, mask, packs(self.model, ids.shape[1]))
        with autocast(self.device, self.precision):
            hidden = backbone_of(self.model)(**arguments, use_cache=False).last_hidden_state
        token_scores = in_own_precision(self.model.score, hidden).flatten()
        token_scores = token_scores[upload(index, self.device)].float()
        return pool(token_scores, counted, self.model.pooling)


def token_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Batch rows by length, each with at most `budget` tokens (one row at least)."""
    batches: list[list[int]] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not batches or tokens + lengths[i] > budget:
            batches.append([])
            tokens = 0
        batches[-1].append(i)
        tokens += lengths[i]
    return batches


class SharedScorer(Scorer):
    """A scorer whose reward model is an adapter on the policy's base."""

    def __init__(
        self, policy: Any, sft: Path, folder: Path, device: torch.device,
        limits: TokenLimits | int, precision: Precision = "fp32",
    ) -> None:  # fmt: skip
        renderer = load_renderer(folder)
        model = AdapterReward(policy, sft, folder, renderer)
        super().__init__(folder, device, limits, model=model)
        # Scorer must not store the policy's base in bfloat16: the critic may still get an adapter.
        self.precision = precision

    def _score(
        self, ids: Int[Tensor, "batch time"], mask: Int[Tensor, "batch time"]
    ) -> Float[Tensor, " batch"]:
        with self.model.active():
            return super()._score(ids, mask)


class AdapterReward(nn.Module):
    """A frozen reward model: an adapter on the policy's base and a score head.

    Raises:
        ConfigError: The reward model has no adapter, or one for another base.
    """

    pooling = "last"
    marker: int | None = None

    def __init__(self, policy: Any, sft: Path, folder: Path, renderer: Renderer) -> None:
        super().__init__()
        self._policy = (policy,)
        head = load_adapter(policy, check_adapter(sft, folder), REWARD)
        if not head:
            raise ConfigError(
                f"ppo.shared_base = true, but the adapter of reward model {str(folder)!r} does not "
                "fit this SFT policy; train the reward model again, or set ppo.shared_base to false"
            )
        width = head["weight"].shape[1]
        self.score = nn.Linear(width, 1, bias="bias" in head)
        self.score.load_state_dict(head)
        set_pooling(self, folder, renderer)

    @property
    def config(self) -> Any:
        """Configuration of the base."""
        return self._policy[0].config

    def get_base_model(self) -> Any:
        """Return the shared transformer; peft's name for it."""
        return self._policy[0].get_base_model()

    def active(self) -> AbstractContextManager[Any]:
        """Context in which the shared base computes as the reward model; may be nested."""
        return active_adapter(self._policy[0], REWARD)


def check_adapter(sft: Path, folder: Path) -> Path:
    """Check that a reward model's adapter fits the SFT policy; return its folder.

    Raises:
        ConfigError: The reward model has no adapter, or one that was trained on other weights.
    """
    adapter = folder / ADAPTER_FOLDER
    if not adapter.is_dir():
        raise ConfigError(
            f"ppo.shared_base = true, but reward model {str(folder)!r} has no "
            f"{ADAPTER_FOLDER}/ folder; "
            "train it from the SFT policy with reward_model.lora, or set ppo.shared_base to false"
        )
    trained_on, policy = reward_meta(folder).get(BASE_WEIGHTS), weights_digest(sft)
    if trained_on != policy:
        raise ConfigError(
            f"ppo.shared_base = true, but the adapter of reward model {str(folder)!r} is for a "
            f"base with weights {str(trained_on)[:12]}, and this SFT policy's are {policy[:12]}; "
            "train it again from this SFT policy, or set ppo.shared_base to false"
        )
    return adapter


def reward_meta(folder: Path | str) -> dict[str, Any]:
    """Read `rlhf.json`; empty for an external model, which has none."""
    path = Path(folder) / META
    return read_json(path) if path.is_file() else {}


def set_pooling(
    model: Any, folder: Path | str, renderer: Renderer, pooling: str | None = None
) -> None:
    """Set a reward model's pooling and marker; without `pooling`, that of `rlhf.json`."""
    model.pooling = pooling or reward_meta(folder).get("pooling", "last")
    if model.pooling == "sum":
        model.marker = renderer.tokenizer.get_vocab().get(ASSISTANT)


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
    """Mask the tokens after the first `marker` of a row that are not padding.

    Without a marker in the row: all. After the *first*, so that a policy that writes the marker
    can't hide the text before it.
    """
    valid = attention_mask.bool()
    if marker is None:
        return valid
    is_marker = input_ids == marker
    after = is_marker.cumsum(1) - is_marker.int() > 0
    return valid & (after | ~is_marker.any(1, keepdim=True))


def pad_right(
    rows: list[list[int]], pad: int
) -> tuple[Int[Tensor, "batch time"], Int[Tensor, "batch time"]]:
    """Stack rows of different length, padded on the right; return ids and their mask."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids, mask


class _Pooled:
    """Mixin for a sequence classifier: pools by position, never by pad id."""

    pooling = "last"
    marker: int | None = None

    def forward(
        self: Any, input_ids: Tensor, attention_mask: Tensor, **_: Any
    ) -> SequenceClassifierOutputWithPast:
        backbone = getattr(self, self.base_model_prefix)
        hidden = backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids(attention_mask),
            use_cache=False,
        ).last_hidden_state
        token_scores = self.score(hidden).squeeze(-1).float()
        counted = counted_tokens(input_ids, attention_mask, self.marker)
        scores = pool(token_scores, counted, self.pooling)
        return SequenceClassifierOutputWithPast(
            logits=scores[:, None],  # pyright: ignore[reportArgumentType]
            hidden_states=(hidden,),
        )
