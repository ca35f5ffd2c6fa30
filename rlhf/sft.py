"""SFT stage: supervised fine-tuning of the base model by TRL's SFTTrainer."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import trl.trainer.utils
from datasets import Dataset
from torch.nn import functional as F
from transformers import PrinterCallback
from trl.trainer.sft_config import SFTConfig as TRLSFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from rlhf.checkpoints.folder import identity_of
from rlhf.checkpoints.trainer import CheckpointMixin, CheckpointPlan, resumable
from rlhf.checkpoints.uploads import CheckpointUploads
from rlhf.config import BaseModelConfig, RuntimeConfig, SFTConfig
from rlhf.config.lengths import TokenLimits
from rlhf.data.fitting import Fitting
from rlhf.data.rendering import Renderer, known_ends
from rlhf.data.rows import (
    DEMONSTRATIONS,
    PAIRS_EVAL,
    PAIRS_TRAIN,
    Demonstration,
    Pair,
    read_rows,
)
from rlhf.errors import DataError
from rlhf.files import is_dir, is_file, write_json
from rlhf.modeling.agreement import agreement, rows_of, testing
from rlhf.modeling.base import context_length, load_base
from rlhf.modeling.decoders import check_exactness
from rlhf.modeling.device import compact_heap, prepare_device
from rlhf.modeling.frozen import check_frozen_dtype, holds_stored, store_frozen
from rlhf.modeling.lora import fit_targets, lora_config, merge_adapter, target_module_errors
from rlhf.modeling.structure import argument_names, call, core_of, text_config
from rlhf.modeling.tokenizer import set_ends
from rlhf.modeling.weights import save_model
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

#: Most logits of a micro batch whose loss is computed from all of them (64 MiB in float32). TRL's
#: fused loss saves their memory, and costs a small vocabulary a third of the time (measured on
#: the quickstart: benchmarks/RESULTS.md).
PLAIN_LOGITS = 2**24

#: Held-out replies whose loss is computed before and after training: this share of the rows that
#: are trained on, which costs a thirtieth of the time, and at least and at most so many.
HELD_OUT_SHARE, LEAST_HELD_OUT, MOST_HELD_OUT = 0.05, 8, 128

log = logging.getLogger(__name__)


def train_sft(
    config: SFTConfig,
    base: BaseModelConfig,
    data: Path,
    out_dir: Path,
    *,
    limits: TokenLimits | None = None,
    seed: int = 0,
    identity: Mapping[str, str] | None = None,
    checkpoints: Path | None = None,
    uploads: CheckpointUploads | None = None,
    runtime: RuntimeConfig | None = None,
    progress: Progress = silent,
) -> StageResult:
    """Fine-tune the base model on demonstrations; write it to `out_dir`.

    The tokenizer is written beside it. With `config.enabled` false the base model is written as it
    is. With `checkpoints`, training continues from the newest one; a resumed run produces the same
    bytes as an uninterrupted one.

    Args:
        config: Hyper-parameters.
        base: The model to start from.
        data: A dataset folder as `prepare_data` writes it.
        out_dir: Empty folder for the policy.
        limits: Most tokens of prompts and replies; None is `config.max_length` of both together.
        seed: Seeds initial weights and shuffling.
        identity: Digests of `data` and `base`, as far as they are known; the rest is hashed from
            the folders. A checkpoint with another identity is refused.
        checkpoints: Folder to save to and resume from; None trains without checkpoints.
        uploads: Uploads each saved checkpoint to a store, and restores a newer one from it.
        runtime: Device and threads.
        progress: Called after every step.

    Raises:
        ConfigError: The base can't be loaded or used, or is not computed exactly in batches; a
            checkpoint of other inputs.
        DataError: There are no demonstrations, or the model can't be given too many prompts.
        CheckpointError: A checkpoint can't be written.
        Interrupted: SIGTERM arrived; a checkpoint was saved.
    """
    runtime = runtime or RuntimeConfig()
    device = prepare_device(runtime)
    if config.enabled:
        check_frozen_dtype(config.frozen_dtype, "sft", device, runtime)
    leads = rank_and_count()[0] == 0
    demonstrations = read_rows(data / DEMONSTRATIONS, Demonstration)
    model, tokenizer = load_base(base, _texts(demonstrations, data), seed)
    if base.path is not None:
        check_exactness(model)
    generation = getattr(model, "generation_config", None)
    ends = known_ends(tokenizer, None if generation is None else generation.eos_token_id)
    renderer = Renderer(tokenizer, ends)
    parameters = sum(p.numel() for p in model.parameters())
    metrics: dict[str, Any] = {"parameters": parameters, "vocabulary": len(tokenizer)}
    if config.enabled:
        limits = (limits or TokenLimits.of(config.max_length)).within(context_length(model))
        rows, counts = _encode(demonstrations, renderer, limits)
        if leads and base.path is not None:
            _warn_of_guesses(model, rows, base.path)
        minutes = config.checkpoint_minutes
        plan = None if checkpoints is None or minutes is None else CheckpointPlan(
            checkpoints, minutes, uploads,
            _run_identity(config, base, data, renderer, limits, seed, identity or {}),
        )  # fmt: skip
        held_out = _held_out(data, renderer, limits, config, len(rows)) if leads else []
        model, curve, losses = _train(
            model, rows, held_out, config, renderer, seed, device, progress, plan
        )
        model = merge_adapter(model, load_base(base, (), seed)[0] if holds_stored(model) else None)
        metrics |= {"demonstrations": len(rows), "loss": curve[-1]["loss"] if curve else None}
        metrics |= counts | losses
        if leads:
            write_json(out_dir / "curve.json", curve)
    else:
        metrics["not_trained"] = "sft.enabled = false"
    set_ends(model, renderer.end_ids)  # a trainer may have changed them
    if leads:
        save_model(model, out_dir)
        tokenizer.save_pretrained(out_dir)
    return StageResult(metrics)


def _run_identity(
    config: SFTConfig, base: BaseModelConfig, data: Path, renderer: Renderer, limits: TokenLimits,
    seed: int, known: Mapping[str, str],
) -> dict[str, str]:  # fmt: skip
    folders = {"data": data}
    start = base.model_dump_json(exclude={"path", "revision"})
    if base.path is not None and ("base" in known or is_dir(Path(base.path))):
        folders["base"] = Path(base.path)
    elif base.path is not None:
        start += f" {base.path} {base.revision}"
    return identity_of(
        config, folders, known, tokenizer=renderer.template_hash, start=start, seed=str(seed),
        limits=limits.model_dump_json(exclude={"max_bad_fraction"}),
    )  # fmt: skip


def _texts(demonstrations: list[Demonstration], data: Path) -> Iterator[str]:
    """Yield the training data's prompts and replies, for training a tokenizer."""
    for row in demonstrations:
        yield from (
            [row.prompt] if isinstance(row.prompt, str) else [m["content"] for m in row.prompt]
        )
        yield row.response
    for pair in read_rows(data / PAIRS_TRAIN, Pair):
        yield pair.chosen
        yield pair.rejected


def _encode(
    demonstrations: list[Demonstration], renderer: Renderer, limits: TokenLimits | int
) -> tuple[list[dict[str, list[int]]], dict[str, int]]:
    """Render and tokenize demonstrations within the limits; count what is cut and left out."""
    fitting = Fitting(renderer, limits)

    def encode(row: Demonstration) -> dict[str, list[int]]:
        encoded = fitting.encode(row.prompt, row.response)
        fitting.count_dropped(encoded.turns_dropped)
        fitting.counts["replies_cut"] += encoded.is_cut
        mask = [0] * len(encoded.prompt) + [1] * len(encoded.response)
        return {"input_ids": encoded.ids, "completion_mask": mask}

    rows = fitting.map(demonstrations, encode)
    if not rows:
        raise DataError(
            "no demonstrations to fine-tune on; check data.source or set sft.enabled=false"
        )
    return rows, fitting.metrics()


def _held_out(
    data: Path, renderer: Renderer, limits: TokenLimits, config: SFTConfig, rows: int
) -> list[dict[str, list[int]]]:
    """Render preferred replies to held-out prompts, spread over all of them.

    None of a training whose weights are shared out among processes: no single one could compute.
    """
    is_sharded = config.sharding == "fsdp" and rank_and_count()[1] > 1
    if is_sharded or not is_file(data / PAIRS_EVAL):
        return []
    pairs = read_rows(data / PAIRS_EVAL, Pair)
    share = int(HELD_OUT_SHARE * config.epochs * rows)
    count = min(len(pairs), MOST_HELD_OUT, max(LEAST_HELD_OUT, share))
    spread = [pairs[number * len(pairs) // count] for number in range(count)]
    demonstrations = [Demonstration(pair.prompt, pair.chosen) for pair in spread]
    try:
        return _encode(demonstrations, renderer, limits)[0] if demonstrations else []
    except DataError:  # the evaluation of the reward model says so of all
        return []


def _loss_of(model: Any, rows: list[dict[str, list[int]]]) -> float:
    """Return the mean loss of a token of the replies, in nats."""
    core = core_of(model)
    device = next(core.parameters()).device
    total, count = 0.0, 0
    with testing(core):
        for row in rows:
            ids = torch.tensor([row["input_ids"]], device=device)
            logits = call(core, input_ids=ids).logits[0, :-1].float()
            losses = F.cross_entropy(logits, ids[0, 1:], reduction="none")
            of_reply = torch.tensor(row["completion_mask"][1:], device=device, dtype=torch.bool)
            total += float(losses[of_reply].sum())
            count += int(of_reply.sum())
    return total / max(count, 1)


def _warn_of_guesses(model: Any, rows: list[dict[str, list[int]]], path: str) -> None:
    """Warn of a base that predicts the first replies no better than by guessing.

    Weights with the tokenizer or configuration of another model of the same shapes load without an
    error.
    """
    guess = math.log(model.get_input_embeddings().num_embeddings)
    device = next(model.parameters()).device
    losses = []
    with testing(model):
        for row in rows[:4]:
            # A few tokens before and of the reply, for the model may be large.
            start = row["completion_mask"].index(1)
            before = min(start, 64)
            ids = torch.tensor([row["input_ids"][start - before : start + 32]], device=device)
            logits = call(model, input_ids=ids).logits[0, :-1].float()
            loss_of_each = F.cross_entropy(logits, ids[0, 1:], reduction="none")
            losses.append(loss_of_each[max(before - 1, 0) :])
    loss = float(torch.cat(losses).mean())
    if loss > 0.95 * guess:  # zeros guess, random weights nearly do
        log.warning(
            "base.path = %r: before training it predicts the data's replies no better than by "
            "guessing (%.1f nats a token; guessing has %.1f): its weights are random, or its "
            "tokenizer or config.json is another model's",
            path, loss, guess,
        )  # fmt: skip


def _train(
    model: Any,
    rows: list[dict[str, list[int]]],
    held_out: list[dict[str, list[int]]],
    config: SFTConfig,
    renderer: Renderer,
    seed: int,
    device: torch.device,
    progress: Progress,
    plan: CheckpointPlan | None,
) -> tuple[Any, list[dict[str, float]], dict[str, float]]:
    """Return the trained model, adapters not merged, its curve, and its loss on held-out rows."""
    callback = ProgressCallback(progress)
    lora = config.lora and fit_targets(config.lora, model, "sft")
    if lora and config.sharding == "ddp":
        store_frozen(model, config.frozen_dtype, device, "sft")
    with (
        resumable(plan) as saves, tempfile.TemporaryDirectory() as scratch, quiet_trainer(),
        unchanged_config(model), compact_heap(device, model),
    ):  # fmt: skip
        with target_module_errors("sft", lora):
            trainer = _Trainer(
                model=model,
                args=TRLSFTConfig(
                    **training_arguments(
                        config, len(rows), Path(scratch), seed, device.type == "cpu"
                    ),
                    completion_only_loss=True,
                    packing=False,
                    **_router_loss(model),
                ),
                train_dataset=Dataset.from_list(rows),
                processing_class=renderer.tokenizer,
                peft_config=lora_config(lora, "CAUSAL_LM") if lora else None,
                callbacks=[callback],
            )
        trainer.remove_callback(PrinterCallback)
        longest = max(len(row["input_ids"]) for row in rows)
        rows_at_once = trainer.args.per_device_train_batch_size
        logits = rows_at_once * longest * model.get_input_embeddings().num_embeddings
        trainer.fuses_head = logits > PLAIN_LOGITS and _fused_head_is_exact(trainer.model)
        losses: dict[str, float] = {}
        if held_out:
            losses["heldout_loss_before"] = _loss_of(trainer.model, held_out)
        saves.train(trainer, callback)
        trained = trainer.accelerator.unwrap_model(trainer.model)
        if held_out:
            losses["heldout_loss"] = _loss_of(trained, held_out)
    # No result holds a number that is not finite; the curve's would have ended the training.
    losses = {name: loss for name, loss in losses.items() if math.isfinite(loss)}
    return gather_weights(trained), callback.curve, losses


def _router_loss(model: Any) -> dict[str, Any]:
    """Return TRL's options of the routers' auxiliary loss: as the base's configuration asks.

    TRL would add it to every mixture of experts that has a coefficient, and its code fails on a
    model without experts whose configuration has the field.
    """
    asked = getattr(text_config(model), "output_router_logits", False)
    known = "router_aux_loss_coef" in {field.name for field in fields(TRLSFTConfig)}
    return {"router_aux_loss_coef": 0.0} if known and not asked else {}


def _fused_head_is_exact(model: Any) -> bool:
    """Return whether TRL's fused loss is that of the model's own logits.

    TRL computes log-probabilities from the hidden states of the part that `base_model_prefix`
    names, and scales and caps the logits by fields of the configuration whose names it knows.
    Without a fused loss it is the model's own.
    """
    core = core_of(model)
    if not hasattr(trl.trainer.utils, "add_fused_lm_head"):
        return True
    ids = torch.tensor(rows_of(core, [8]), device=next(core.parameters()).device)
    with testing(core):
        expected = call(core, input_ids=ids).logits[:, :-1].float().log_softmax(-1)
        expected = expected.gather(2, ids[:, 1:, None]).squeeze(2)
        try:
            actual: Any = core(input_ids=ids, labels=ids, fused_lm_head=True)
            return agreement(core, [actual.log_probs[0, :, None]], [expected[0, :, None]]).holds
        except Exception:  # whatever the model's code raises
            return False


class _Trainer(CheckpointMixin, MultiProcessMixin, SFTTrainer):
    """SFTTrainer for several processes, and for heads that TRL's fused loss does not suit."""

    fuses_head = True
    """Whether the loss is TRL's, which computes the logits of a chunk of tokens at a time."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:  # fmt: skip
        if self.fuses_head:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.pop("labels")[:, 1:]
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        names = argument_names(self.accelerator.unwrap_model(model))
        outputs = model(**{k: v for k, v in inputs.items() if k in names})
        logits = outputs.logits[:, :-1].flatten(0, 1).float()
        loss = F.cross_entropy(logits, labels.flatten(), reduction="sum")
        tokens = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        loss = loss / torch.as_tensor(tokens).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        if self.aux_loss_enabled and outputs.aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
        return (loss, outputs) if return_outputs else loss
