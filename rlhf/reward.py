"""Training of reward models by TRL.

The loss is that of Bradley and Terry on preference pairs. With weights w (a pair's `weight`, 1
where it has none) it is Σ w ℓ / Σ w over all pairs, ℓ = −log σ(r_chosen − r_rejected − margin):
weighted maximum likelihood of the Bradley–Terry model. The sum of weights is that of all pairs, not
of a batch, in which a single pair would count as 1 whatever its weight.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PrinterCallback
from trl.trainer.reward_config import RewardConfig as TRLRewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from rlhf.checkpoints.folder import identity_of
from rlhf.checkpoints.trainer import CheckpointMixin, CheckpointPlan, resumable
from rlhf.checkpoints.uploads import CheckpointUploads
from rlhf.config import RewardModelConfig, RuntimeConfig
from rlhf.config.lengths import TokenLimits
from rlhf.data.fitting import Fitting
from rlhf.data.negatives import make_negatives
from rlhf.data.rendering import Renderer
from rlhf.data.rows import PAIRS_TRAIN, Pair, read_rows
from rlhf.errors import ConfigError, DataError, PromptUnusable
from rlhf.files import is_dir, write_json
from rlhf.modeling.classifier import (
    Whole,
    input_limit,
    pads_exactly,
    trained_head,
)
from rlhf.modeling.device import compact_heap, empty_cache, prepare_device
from rlhf.modeling.frozen import check_frozen_dtype, holds_stored, store_frozen
from rlhf.modeling.lora import (
    ADAPTER_FOLDER,
    fit_targets,
    lora_config,
    merge_adapter,
    save_adapter,
    target_module_errors,
)
from rlhf.modeling.members import (
    MEMBERS,
    check_members,
    check_prompts,
    publish_members,
)
from rlhf.modeling.miniature import miniature
from rlhf.modeling.reward import (
    META,
    SCORE_MEAN,
    SCORE_STD,
    Scorer,
    load_unpublished,
    pad_right,
    reward_meta,
    save_reward_model,
)
from rlhf.modeling.structure import has_plain_head, head_of
from rlhf.modeling.tokenizer import fit_embeddings
from rlhf.modeling.weights import weights_digest
from rlhf.ranks import rank_and_count
from rlhf.stage import Progress, StageResult, silent
from rlhf.trl_adapter import (
    MultiProcessMixin,
    ProgressCallback,
    gather_weights,
    quiet_trainer,
    training_arguments,
    unchanged_config,
)

#: Most chosen replies whose scores are the scale of rewards.
REFERENCE_REPLIES = 512


def train_reward_model(
    config: RewardModelConfig,
    data: Path,
    sft: Path | str,
    out_dir: Path,
    *,
    pairs: str = PAIRS_TRAIN,
    limits: TokenLimits | None = None,
    seed: int = 0,
    identity: Mapping[str, str] | None = None,
    checkpoints: Path | None = None,
    uploads: CheckpointUploads | None = None,
    runtime: RuntimeConfig | None = None,
    progress: Progress = silent,
) -> StageResult:
    """Train a reward model on preference pairs; write it to `out_dir`.

    The tokenizer is written beside it. A model trained by LoRA from the SFT policy is written
    merged and, in `adapter/`, as adapter and head alone; `rlhf.json` then has the digest of the
    policy's weights. It always has the mean and deviation of scores of chosen replies. With
    `config.members` above 1 further heads are fitted, and written to `members.safetensors`. With
    `checkpoints`, training continues from the newest one; a resumed run produces the same bytes as
    an uninterrupted one.

    Args:
        config: Hyper-parameters; `config.base` overrides the SFT policy as starting point.
        data: A dataset folder as `prepare_data` writes it.
        sft: Folder of the SFT policy.
        out_dir: Empty folder for the reward model.
        pairs: Name of the dataset's file with the pairs.
        limits: Most tokens of prompts and replies; None is `config.max_length` of both together.
        seed: Seeds the new head and shuffling.
        identity: Digests of `data` and `base`, as far as they are known; the rest is hashed from
            the folders. A checkpoint with another identity is refused.
        checkpoints: Folder to save to and resume from; None trains without checkpoints.
        uploads: Uploads each saved checkpoint to a store, and restores a newer one from it.
        runtime: Device and threads.
        progress: Called after every step.

    Raises:
        ConfigError: The base has no sequence classifier with one label, or can't have members; a
            checkpoint of other inputs.
        DataError: There are no training pairs, none with the margin that is asked for, or the
            model can't be given too many prompts.
        TrainingError: A score of the trained model is not finite.
        CheckpointError: A checkpoint can't be written.
        Interrupted: SIGTERM arrived; a checkpoint was saved.
    """
    preferences = read_rows(data / pairs, Pair)
    _check_margins(preferences, config)
    runtime = runtime or RuntimeConfig()
    device = prepare_device(runtime)
    check_frozen_dtype(config.frozen_dtype, "reward_model", device, runtime)
    leads = rank_and_count()[0] == 0
    torch.manual_seed(seed)
    start = config.base or sft
    model, renderer = load_unpublished(start, config.pooling)
    _check_options(model, start, config)
    check_members(model, start, config.members)
    vocabulary = model.get_input_embeddings().num_embeddings
    fit_embeddings(model, renderer.tokenizer)
    same_base = model.get_input_embeddings().num_embeddings == vocabulary
    limits = (limits or TokenLimits.of(config.max_length)).within(input_limit(model))
    negatives = make_negatives(preferences, config.negatives, seed)
    rows, counts = _encode(preferences, renderer, limits, config.margin_coef, negatives)
    check_prompts(rows, config.members)
    minutes = config.checkpoint_minutes
    plan = None if checkpoints is None or minutes is None else CheckpointPlan(
        checkpoints, minutes, uploads,
        _run_identity(config, start, data / pairs, renderer, limits, seed, identity or {}),
    )  # fmt: skip
    trained, curve = _train(model, rows, config, renderer, seed, device, progress, plan)
    base = None
    if config.lora and not config.base and same_base and is_dir(Path(sft)):
        # With ppo.shared_base PPO loads the adapter alone, onto the policy's base.
        base = weights_digest(Path(sft))
        if leads:
            save_adapter(trained, out_dir / ADAPTER_FOLDER)
    if leads:
        whole = None
        if holds_stored(trained):
            whole = load_unpublished(start, config.pooling)[0]
            fit_embeddings(whole, renderer.tokenizer)
        merged = merge_adapter(trained, whole)
        save_reward_model(merged, renderer, out_dir, base)
        if whole is not None:
            # Scoring takes the device for the whole model: there is no room for both.
            del trained, model
            empty_cache(device)
        # FSDP's hooks stay on a model, in one process too, and fail on weights that are whole.
        is_sharded = config.sharding == "fsdp"
        scorer = Scorer(out_dir, device, limits, model=None if is_sharded else merged)
        chosen = _reference_replies(scorer, preferences, seed)
        meta = {**reward_meta(out_dir), **_scale_of(scorer(*chosen))}
        if config.members > 1:
            publish_members(scorer, out_dir, rows, config.members, seed, chosen)
            meta[MEMBERS] = config.members
        write_json(out_dir / META, meta)
        write_json(out_dir / "curve.json", curve)
    last = curve[-1] if curve else {}
    metrics = {"pairs": len(rows) - counts.get("negatives", 0), "loss": last.get("loss")}
    if config.members > 1:
        metrics[MEMBERS] = config.members
    return StageResult({**metrics, "train_accuracy": last.get("accuracy"), **counts})


def _run_identity(
    config: RewardModelConfig, start: Path | str, pairs: Path, renderer: Renderer,
    limits: TokenLimits, seed: int, known: Mapping[str, str],
) -> dict[str, str]:  # fmt: skip
    folders = {"data": pairs.parent}
    values = {"pairs": pairs.name, "seed": str(seed), "tokenizer": renderer.template_hash}
    if "base" in known or is_dir(Path(start)):
        folders["base"] = Path(start)
    else:
        values["base"] = str(start)
    return identity_of(
        config, folders, known, ("base",), **values,
        limits=limits.model_dump_json(exclude={"max_bad_fraction"}),
    )  # fmt: skip


def _reference_replies(
    scorer: Scorer, pairs: Sequence[Pair], seed: int
) -> tuple[list[Any], list[str]]:
    """Return prompts and chosen replies of some training pairs.

    Their scores are the scale of `ppo.reward_normalization: reference`: those of replies that
    people preferred, which do not change while a policy does.
    """
    fitting = Fitting(scorer.renderer, scorer.limits)
    chosen: list[Pair] = []
    for pair in random.Random(seed).sample(pairs, len(pairs)):
        with suppress(PromptUnusable):
            fitting.check(pair.prompt)
            chosen.append(pair)
        if len(chosen) == REFERENCE_REPLIES:
            break
    return [pair.prompt for pair in chosen], [pair.chosen for pair in chosen]


def _scale_of(scores: Tensor) -> dict[str, float]:
    """Return mean and standard deviation (n − 1) of scores, by their names in `rlhf.json`."""
    scores = scores.double()
    deviation = float(scores.std()) if len(scores) > 1 else 0.0
    return {SCORE_MEAN: float(scores.mean()), SCORE_STD: deviation}


def _check_margins(pairs: Sequence[Pair], config: RewardModelConfig) -> None:
    if config.margin_coef and pairs and all(pair.margin is None for pair in pairs):
        raise DataError(
            f"reward_model.margin_coef = {config.margin_coef:g}: no pair has a margin; give scores "
            "of the replies or set data.margin_column, or set it to 0"
        )


def _check_options(model: Any, start: Path | str, config: RewardModelConfig) -> None:
    """Refuse options that the model has no use for.

    Raises:
        ConfigError: A language-model loss on a base whose head does not share the input's
            embeddings, options of decoders for another model, or one that padding changes.
    """
    if isinstance(model, Whole):
        name, base = type(model).__name__, f"reward_model.base = {str(start)!r}"
        for field, value, default in (
            ("pooling", config.pooling, "last"),
            ("lm_loss_coef", config.lm_loss_coef, 0),
        ):
            if value != default:
                raise ConfigError(
                    f"reward_model.{field} = {value!r} is for decoders, and {base} is scored by "
                    f"{name}'s own forward pass; set it to {default}"
                )
        if not pads_exactly(model):
            raise ConfigError(
                f"{base}: padding changes the scores of {name}, so it can't be trained on batches; "
                "start from another base"
            )
    elif config.lm_loss_coef and not model.config.tie_word_embeddings:
        raise ConfigError(
            f"reward_model.lm_loss_coef = {config.lm_loss_coef} needs a base with tied embeddings, "
            f"and {start} has none; set it to 0"
        )
    elif config.lm_loss_coef and not _has_plain_head(model.config):
        raise ConfigError(
            f"reward_model.lm_loss_coef = {config.lm_loss_coef} needs a base whose logits are "
            f"products with its embeddings, and {start} scales, shifts or caps them; set it to 0"
        )


def _has_plain_head(config: Any) -> bool:
    """Return whether the language model of a configuration has plain products for logits."""
    try:
        small: Any = miniature(config, AutoModelForCausalLM)
    except ValueError:  # there is none of this family, so that nobody knows
        return False
    return has_plain_head(small) and getattr(head_of(small), "bias", None) is None


def _encode(
    pairs: list[Pair],
    renderer: Renderer,
    limits: TokenLimits | int,
    margin_coef: float = 0,
    negatives: Sequence[Pair] = (),
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Render and tokenize pairs within the limits.

    With a `margin_coef` each row has the margin that TRL's RewardTrainer subtracts from the
    difference of the rewards: −log σ(r_chosen − r_rejected − margin).

    Returns:
        The rows, behind them those of the negatives, and counts: of negatives; of pairs with a
        reply that was cut, of those left out because their replies differ only behind the cut, of
        prompts that were shortened or left out, of pairs without a margin, and of those with a
        weight. Weights have the mean 1.
    """
    fitting = Fitting(renderer, limits)
    weights: list[float] = []

    def encode(pair: Pair) -> dict[str, Any] | None:
        one = fitting.encode(pair.prompt, pair.chosen)
        other = fitting.encode(pair.prompt, pair.rejected)
        fitting.count_dropped(one.turns_dropped)
        fitting.counts["pairs_cut"] += one.is_cut or other.is_cut
        if one.response == other.response:
            fitting.counts["pairs_equal_when_cut"] += 1
            return None
        length = max(len(one.ids), len(other.ids))
        row: dict[str, Any] = {"chosen_ids": one.ids, "rejected_ids": other.ids, "length": length}
        row["reply_at"] = len(one.prompt)
        if one.types is not None:
            row |= {"chosen_types": one.types, "rejected_types": other.types}
        if margin_coef:
            row["margin"] = margin_coef * (pair.margin or 0.0)
            fitting.counts["pairs_without_margin"] += pair.margin is None
        fitting.counts["pairs_weighted"] += pair.weight is not None
        weights.append(1.0 if pair.weight is None else pair.weight)
        return row

    def encode_whole(pair: Pair) -> dict[str, Any] | None:
        # A chosen reply that lost its end would be preferred to negatives that have theirs.
        return None if fitting.encode(pair.prompt, pair.chosen).is_cut else encode(pair)

    rows = [row for row in fitting.map(pairs, encode) if row is not None]
    counted = fitting.metrics()
    if rows:
        # Counts tell of the preferences alone, and so does the limit of prompts that can't be used.
        fitting = Fitting(renderer, fitting.limits.model_copy(update={"max_bad_fraction": 1.0}))
        made = [row for row in fitting.map(negatives, encode_whole) if row is not None]
        rows += made
        counted |= {"negatives": len(made)} if made else {}
    if not rows and pairs:
        raise DataError(
            f"reward_model.max_length = {fitting.limits.max_length}: all {len(pairs)} pairs are "
            "equal within it; raise it, or shorten the prompts"
        )
    if not rows:
        raise DataError("no preference pairs to train on; check data.source and data.eval_fraction")
    if counted.get("pairs_weighted"):
        mean = sum(weights) / len(weights)
        rows = [{**row, "weight": w / mean} for row, w in zip(rows, weights, strict=True)]
    return rows, counted


def _train(
    model: Any, rows: list[dict[str, Any]], config: RewardModelConfig, renderer: Renderer,
    seed: int, device: torch.device, progress: Progress, plan: CheckpointPlan | None,
) -> tuple[Any, list[dict[str, float]]]:  # fmt: skip
    """Return the trained model, adapters not merged, and its curve."""
    callback = ProgressCallback(progress)
    head = trained_head(model)
    lora = config.lora and fit_targets(config.lora, model, "reward_model", head)
    if lora and config.sharding == "ddp":
        store_frozen(model, config.frozen_dtype, device, "reward_model", head)
    with (
        resumable(plan) as saves, tempfile.TemporaryDirectory() as scratch, quiet_trainer(),
        unchanged_config(model), compact_heap(device, model),
    ):  # fmt: skip
        use_cpu = device.type == "cpu"
        arguments = training_arguments(config, len(rows), Path(scratch), seed, use_cpu)
        with target_module_errors("reward_model", lora):
            trainer = _Trainer(
                model=model,
                args=TRLRewardConfig(**arguments, length_column_name="length"),
                train_dataset=Dataset.from_list(rows),
                processing_class=renderer.tokenizer,
                peft_config=lora_config(lora, "SEQ_CLS", head=head) if lora else None,
                callbacks=[callback],
            )
        if lora and lora.dropout:
            _drop_out_adapters(trainer.model, lora.dropout)
        trainer.lm_loss_coef = config.lm_loss_coef
        for name in ("weight", "reply_at"):
            if name in rows[0]:
                trainer.data_collator = _ColumnCollator(trainer.data_collator, name)
        if "chosen_types" in rows[0]:
            trainer.data_collator = _TypeCollator(trainer.data_collator)
        trainer.remove_callback(PrinterCallback)
        saves.train(trainer, callback)
    return gather_weights(trainer.accelerator.unwrap_model(trainer.model)), callback.curve


def _drop_out_adapters(model: Any, rate: float) -> None:
    """Switch on the dropout of adapters' inputs, which TRL switches off with that of the model."""
    for module in model.modules():
        for dropout in getattr(module, "lora_dropout", {}).values():
            dropout.p = rate


class _ColumnCollator:
    """Collator that adds a number of each pair to a batch of TRL's."""

    def __init__(
        self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]], name: str
    ) -> None:
        self._collate, self._name = collate, name

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        numbers = torch.tensor([example[self._name] for example in examples])
        return {**self._collate(examples), self._name: numbers}


class _TypeCollator:
    """Collator that adds the token types of an encoder's rows to a batch of TRL's."""

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self._collate = collate

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [[*row[f"{side}_types"]] for side in ("chosen", "rejected") for row in examples]
        return {**self._collate(examples), "token_type_ids": pad_right(rows, 0)[0]}


class _Trainer(CheckpointMixin, MultiProcessMixin, RewardTrainer):
    """RewardTrainer with weights of pairs, and a language-model loss on the chosen reply."""

    lm_loss_coef = 0.0

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        # RewardTrainer would drop the column that the sampler groups rows by, and the weights.
        for name in ("length", "weight", "reply_at", "chosen_types", "rejected_types"):
            if name not in self._signature_columns:
                self._signature_columns.append(name)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        # The model takes no such arguments.
        weight, reply_at = inputs.pop("weight", None), inputs.pop("reply_at", None)
        result: Any = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss, outputs = result
        if weight is not None:
            chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
            losses = -F.logsigmoid(chosen - rejected - inputs.get("margin", 0.0))
            loss = loss + ((weight - 1) * losses).mean()
        if self.lm_loss_coef:
            loss = loss + self.lm_loss_coef * self._lm_loss(model, inputs, outputs, reply_at)
        return (loss, outputs) if return_outputs else loss

    def _lm_loss(
        self, model: Any, inputs: dict[str, Any], outputs: Any, reply_at: Tensor
    ) -> Tensor:
        """Return the mean next-token loss over the chosen replies: the batch's first half."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        half = len(ids) // 2
        ids = ids[:half]
        columns = torch.arange(ids.shape[1], device=ids.device)
        counted = (mask[:half].bool() & (columns >= reply_at[:, None]))[:, 1:]
        embedding = self.accelerator.unwrap_model(model).get_input_embeddings().weight
        logits = outputs.hidden_states[0][:half, :-1][counted] @ embedding.T
        return F.cross_entropy(logits, ids[:, 1:][counted])
