"""Reward models: sequence classifiers with one label, pooling, scoring.

The files are those of a transformers sequence classifier. `rlhf.json` beside them adds the pooling,
the rendering of the training data and, for a model with an adapter, the digest of its base.
`Scorer` loads the whole model; `SharedScorer` puts its adapter on the policy's base instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, Field, TypeAdapter
from torch import Tensor, nn

from rlhf.config.lengths import TokenLimits
from rlhf.config.training import FrozenDtype
from rlhf.data.rendering import ASSISTANT, Renderer, load_renderer
from rlhf.data.text_pairs import PairRenderer, load_reward_renderer
from rlhf.errors import ConfigError, TrainingError
from rlhf.files import write_json
from rlhf.modeling.classifier import (
    Whole,
    apply_head,
    counted_tokens,
    input_limit,
    is_causal,
    load_classifier,
    pads_exactly,
    pool,
)
from rlhf.modeling.device import upload
from rlhf.modeling.frozen import store_frozen
from rlhf.modeling.lora import (
    ADAPTER_FOLDER,
    REWARD,
    active_adapter,
    load_adapter,
)
from rlhf.modeling.packed import arguments_of, packs, row_groups
from rlhf.modeling.precision import Precision, autocast, store_in_bfloat16
from rlhf.modeling.pretrained import loading_error
from rlhf.modeling.structure import backbone_of, call, core_of
from rlhf.modeling.tokenizer import load_tokenizer
from rlhf.modeling.weights import save_model, weights_digest
from rlhf.saved import read_saved

#: File beside the weights.
META = "rlhf.json"

#: Field of it: digest of the base weights on which the adapter in `adapter/` was trained.
BASE_WEIGHTS = "base_weights"

#: Fields of it: mean and standard deviation of scores of chosen replies of the training pairs.
SCORE_MEAN, SCORE_STD = "score_mean", "score_std"


def load_reward_model(folder: Path | str, renderer: Renderer, pooling: str | None = None) -> Any:
    """Load a reward model, or make one from another model with a head that scores 0.

    Args:
        folder: Local folder or hub id of a sequence classifier or of another model.
        renderer: Renders prompt and reply for this model.
        pooling: `last` or `sum`; None is that of `rlhf.json`, by default `last`. Where the class's
            own forward pass gives the score, as in an encoder, nothing is pooled.

    Raises:
        ConfigError: See `rlhf.modeling.classifier.load_classifier`.
    """
    model = load_classifier(folder)
    _set_rendering(model, folder, renderer, pooling)
    return model


def load_unpublished(folder: Path | str, pooling: str | None = None) -> tuple[Any, Renderer]:
    """Load a reward model as `load_reward_model` does, and make its renderer.

    A tokenizer without chat template or padding is completed like that of a base model. But a model
    that reads both ways, and has no chat template, reads pairs of texts by its own special tokens.

    Raises:
        ConfigError: The model or its tokenizer can't be loaded or is not complete enough.
    """
    model = load_classifier(folder)
    renderer = _pair_renderer(folder) if not is_causal(model) else None
    renderer = renderer or Renderer(load_tokenizer(folder))
    _set_rendering(model, folder, renderer, pooling)
    return model, renderer


def _pair_renderer(folder: Path | str) -> PairRenderer | None:
    """Return a renderer of text pairs; None if the model has a chat template."""
    try:
        renderer = load_reward_renderer(folder)
    except (OSError, ValueError) as error:
        raise loading_error(folder, error) from error
    if not isinstance(renderer, PairRenderer):
        return None
    tokenizer = renderer.tokenizer
    if tokenizer.pad_token is None:
        # Padding is masked, so that any token serves.
        tokenizer.pad_token = [*tokenizer.all_special_tokens, *tokenizer.get_vocab()][0]
    return renderer


def _set_rendering(model: Any, folder: Path | str, renderer: Renderer, pooling: str | None) -> None:
    model.config.get_text_config().pad_token_id = renderer.tokenizer.pad_token_id
    set_pooling(model, folder, renderer, pooling)


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
        precision: Precision of forward passes; a model that scores by its class's own forward pass,
            such as an encoder, always computes in that of its weights.
        frozen_dtype: Dtype in which the linear layers of a model in float32 are held.
    """

    def __init__(
        self, folder: Path, device: torch.device, limits: TokenLimits | int,
        batch_tokens: int = 4096,
        model: Any = None, precision: Precision = "fp32", frozen_dtype: FrozenDtype = "float32",
    ) -> None:  # fmt: skip
        self.renderer = load_reward_renderer(folder)
        model = model or load_reward_model(folder, self.renderer)
        if isinstance(self.renderer, PairRenderer) and is_causal(model):
            self.renderer = Renderer(load_tokenizer(folder))  # a decoder that is not published
        self.model = model.eval().requires_grad_(False)
        self.by_token = not isinstance(model, Whole)
        self.precision: Precision = precision if self.by_token else "fp32"
        if self.precision == "bf16":
            store_in_bfloat16(self.model)
        else:
            store_frozen(self.model, frozen_dtype, device, "ppo")
        self.model.to(device)
        # An external reward model may have a shorter context than the policy.
        self.limits = TokenLimits.of(limits).within(input_limit(self.model))
        self.batch_tokens, self.device = batch_tokens, device
        self.tail: list[int] = reward_meta(folder).get("tail", [])
        self.pads_exactly = self.by_token or pads_exactly(self.model)

    def __call__(self, prompts: list[Any], replies: list[str]) -> Float[Tensor, " batch *columns"]:
        """Score each reply to its own prompt; the result is on the CPU, without further columns.

        Args:
            prompts: Texts or messages.
            replies: One for each prompt.

        Raises:
            PromptUnusable: The model can't be given a prompt.
            TrainingError: A score is not finite.
        """
        rows = [
            self.renderer.encode(prompt, reply, self.limits)
            for prompt, reply in zip(prompts, replies, strict=True)
        ]
        types = [row.types for row in rows if row.types is not None]
        ids = [row.ids if row.is_cut or row.types else self._with_tail(row.ids) for row in rows]
        scores = self.score_ids(ids, *([types] if types else []))
        if not torch.isfinite(scores).all():
            broken = (~torch.isfinite(scores)).view(len(replies), -1).any(1)
            example = replies[int(broken.int().argmax())]
            raise TrainingError(
                f"the reward model's score is not finite for the reply {example[:80]!r}; "
                "its weights are broken: train it again with a lower reward_model.learning_rate"
            )
        return scores

    def _with_tail(self, ids: list[int]) -> list[int]:
        """Append what the template writes behind a chat, if the model was trained with it."""
        whole = [*ids, *self.tail]
        return whole if len(whole) <= input_limit(self.model) else ids

    @torch.no_grad()
    def score_ids(
        self, rows: list[list[int]], types: Sequence[Sequence[int]] | None = None
    ) -> Float[Tensor, " batch *columns"]:
        """Score token sequences, in batches of similar length.

        Args:
            rows: Tokens of each sequence.
            types: Their token types, for a model that reads them.
        """
        if not rows:
            return torch.empty(0)
        batches = token_batches([len(row) for row in rows], self.batch_tokens, self.pads_exactly)
        pad = _padding(self.renderer.tokenizer, self.model)
        parts = []
        for batch in batches:
            ids, mask = pad_right([rows[i] for i in batch], pad)
            if self.by_token:
                parts.append(self._score(ids, mask))
            else:
                parts.append(self._score_whole(ids, mask, types and [types[i] for i in batch]))
        found = torch.cat(parts).cpu()
        scores = torch.empty_like(found)
        scores[[i for batch in batches for i in batch]] = found
        return scores

    def _score(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Compute the scores of `Pooled.forward`, without padding where packing is exact."""
        groups = row_groups(self.model, mask)
        found = torch.cat([self._score_group(ids[rows], mask[rows]) for rows in groups])
        scores = torch.empty_like(found)
        scores[upload(torch.cat(groups), self.device)] = found
        return scores

    def _score_group(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Compute the scores of rows that one forward pass computes exactly."""
        counted = upload(counted_tokens(ids, mask, self.model.marker), self.device)
        ids = upload(ids, self.device)
        arguments, index = arguments_of(ids, mask, packs(self.model, ids.shape[1]))
        with autocast(self.device, self.precision):
            hidden = call(backbone_of(self.model), **arguments).last_hidden_state
            token_scores = apply_head(self.model, hidden).flatten()
        index = upload(index, self.device)
        scores = pool(token_scores[index].float(), counted, self.model.pooling)
        return self._result(scores, hidden, index, counted)

    def _result(self, scores: Tensor, hidden: Tensor, index: Tensor, counted: Tensor) -> Tensor:
        """Return the result of a forward pass, a row for each text; here the scores alone.

        Args:
            scores: Of each row.
            hidden: Hidden states of the model's call.
            index: Place of each row's tokens among them.
            counted: Tokens that are pooled.
        """
        return scores

    def _score_whole(
        self, ids: Tensor, mask: Tensor, types: Sequence[Sequence[int]] | None
    ) -> Tensor:
        """Compute the scores of the class's own forward pass."""
        arguments = {"input_ids": ids, "attention_mask": mask}
        if types:
            arguments["token_type_ids"] = pad_right([[*row] for row in types], 0)[0]
        arguments = {name: upload(tensor, self.device) for name, tensor in arguments.items()}
        return self.model(**arguments).logits.float().squeeze(-1)


def _padding(tokenizer: Any, model: Any) -> int:
    """Return a token for padding; it is masked, so that any token of the model's serves."""
    pad = tokenizer.pad_token_id
    table: Any = core_of(model).get_input_embeddings()
    size = table.num_embeddings
    return pad if pad is not None and pad < size else 0


def token_batches(lengths: Sequence[int], budget: int, mixed: bool = True) -> list[list[int]]:
    """Batch rows by length, each with at most `budget` tokens (one row at least).

    Without `mixed` all rows of a batch have one length.
    """
    batches: list[list[int]] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        is_other = batches and not mixed and lengths[batches[-1][0]] != lengths[i]
        if not batches or is_other or tokens + lengths[i] > budget:
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
    """Read `rlhf.json`; empty for an external model, which has none.

    Raises:
        DataError: It is damaged.
    """
    path = Path(folder) / META
    return read_saved(path, _METAS) if path.is_file() else {}


class _Meta(BaseModel):
    """Content of `rlhf.json`; earlier versions wrote less, later ones may write more."""

    pooling: Literal["last", "sum", "own"] | None = None
    template_hash: str | None = None
    base_weights: str | None = None
    tail: list[Annotated[int, Field(strict=True, ge=0)]] = []
    score_mean: Annotated[float, Field(allow_inf_nan=False)] | None = None
    score_std: Annotated[float, Field(allow_inf_nan=False)] | None = None


_METAS = TypeAdapter(_Meta)


def reference_scale(folder: Path) -> tuple[float, float]:
    """Return mean and standard deviation of a reward model's scores of reference replies.

    Raises:
        ConfigError: Its training has not measured them, or they are all the same.
    """
    meta = reward_meta(folder)
    mean, deviation = meta.get(SCORE_MEAN), meta.get(SCORE_STD)
    if mean is None or deviation is None or deviation <= 0:
        reason = "no scores of reference replies" if mean is None else "one score for all replies"
        raise ConfigError(
            f"ppo.reward_normalization = 'reference', but reward model {str(folder)!r} has "
            f"{reason}; train it again, or set ppo.reward_normalization to running or none"
        )
    return mean, deviation


def set_pooling(
    model: Any, folder: Path | str, renderer: Renderer, pooling: str | None = None
) -> None:
    """Set a reward model's pooling and marker; without `pooling`, that of `rlhf.json`.

    Raises:
        ConfigError: Replies are summed, and the tokenizer has no token that begins them.
    """
    if isinstance(model, Whole):
        return
    model.pooling = pooling or reward_meta(folder).get("pooling", "last")
    if model.pooling == "sum":
        model.marker = renderer.tokenizer.get_vocab().get(ASSISTANT)
        if model.marker is None:
            raise ConfigError(
                f"reward_model.pooling = 'sum' adds up a reply's tokens after {ASSISTANT}, and the "
                f"tokenizer of {str(folder)!r} has no such token, so that the prompt would count "
                "too; set reward_model.pooling to last"
            )


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
