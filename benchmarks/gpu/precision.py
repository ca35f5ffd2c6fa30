"""Section: error of bfloat16 log-probabilities, by computation path.

PPO's ratio compares the log-probs of a reply when it was sampled with those when it is optimised.
Before the first step both come from the same weights, so a ratio other than 1 is rounding. The
reference of all comparisons is float32, packed, as `PPOTrainer.prepare_buffer` computes it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.gpu import measure, quickstart
from benchmarks.gpu.models import build, rows_of, work_of
from benchmarks.gpu.section import Context, Results, SectionFailedError
from rlhf.data.rows import PROMPTS_TRAIN, PromptRow, read_rows
from rlhf.modeling.decoders import decoder_of
from rlhf.modeling.generate import Replies
from rlhf.ppo.train import build_trainer
from rlhf.ppo.trainer import PPOTrainer

#: Largest |ratio − 1| that rounding explains in float32; bfloat16 is reported, not judged.
FLOAT32_LIMIT = 1e-3
SHUFFLE_SEED = 1


def precision(context: Context, results: Results) -> None:
    """Compare on a random model and on the quickstart's trained model.

    Raises:
        SectionFailedError: In float32 two ways of computing differ by more than rounding.
    """
    for name, make, rows in (_random_model(context), _trained_model(context)):
        results.put(**{name: _compared(make, rows)})
        measure.release(torch.device(context.device))
    worst = {
        f"{name} {way}": by_way[f"fp32 {way}"]["against_float32_packed"]["largest_ratio_error"]
        for name, by_way in results.values.items()
        for way in ("padded", "shuffled", "decoded")
    }
    wrong = {name: error for name, error in worst.items() if not error <= FLOAT32_LIMIT}
    if wrong:
        raise SectionFailedError(
            f"float32 log-probs differ by more than rounding: largest |ratio − 1| {wrong}"
        )


def _random_model(context: Context) -> tuple[str, Callable[[str], PPOTrainer], list[PromptRow]]:
    work = work_of(context, "124m", "varying")

    def make(kind: str) -> PPOTrainer:
        return build(work, Path(context.scratch) / "random", precision=kind)

    return "random_124m", make, rows_of(work, work.size.batch)


def _trained_model(context: Context) -> tuple[str, Callable[[str], PPOTrainer], list[PromptRow]]:
    config = quickstart.configuration(context.tiny).ppo
    data, sft, reward = (quickstart.folder(context, n) for n in ("data", "sft", "reward-model"))
    rows = read_rows(data / PROMPTS_TRAIN, PromptRow)

    def make(kind: str) -> PPOTrainer:
        return build_trainer(
            config.model_copy(update={"precision": kind}), sft,
            quickstart.approved_without_gate(reward), 0, torch.device(context.device), rows,
        )  # fmt: skip

    return "quickstart", make, rows[: 8 if context.tiny else 128]


@torch.no_grad()
def _compared(make: Callable[[str], PPOTrainer], rows: list[PromptRow]) -> dict[str, Any]:
    """Return |ratio − 1| by precision and way of computing, against two references."""
    errors: dict[str, Any] = {}
    replies: Replies | None = None
    reference = torch.zeros(0)
    for kind in ("fp32", "bf16"):
        trainer = make(kind)
        prompts = [trainer.renderer.encode_prompt(r.prompt, trainer.max_prompt) for r in rows]
        if replies is None:
            replies = trainer.sample(rows, seed=0).replies.to(trainer.device)
        ways = {
            "packed": trainer.models.log_probs(replies)[0],
            "padded": _padded(trainer, replies),
            "shuffled": _shuffled(trainer, replies),
            "decoded": _decoded(trainer, prompts, replies),
        }
        if kind == "fp32":
            reference = ways["packed"]
        for way, log_probs in ways.items():
            errors[f"{kind} {way}"] = {
                "against_float32_packed": _ratio_error(log_probs, reference, replies.mask),
                "against_same_precision_packed": _ratio_error(
                    log_probs, ways["packed"], replies.mask
                ),
            }
    return errors


def _ratio_error(new: Tensor, old: Tensor, mask: Tensor) -> dict[str, float]:
    """Return the largest and mean |exp(new − old) − 1| of the reply tokens."""
    error = torch.expm1((new.double() - old.double())[mask]).abs()
    return {"largest_ratio_error": float(error.max()), "mean_ratio_error": float(error.mean())}


def _padded(trainer: PPOTrainer, replies: Replies) -> Tensor:
    """Compute the batch as transformers does: rows of one length, with padding."""
    with patch("rlhf.modeling.logprobs.packs", lambda *_: False):
        return trainer.models.log_probs(replies)[0]


def _shuffled(trainer: PPOTrainer, replies: Replies) -> Tensor:
    """Compute in random micro-batches, as `optimise` does in its first step."""
    rows = len(replies.mask)
    generator = torch.Generator().manual_seed(SHUFFLE_SEED)
    log_probs = torch.zeros(replies.mask.shape, device=trainer.device)
    order = torch.randperm(rows, generator=generator)
    for index in order.split(max(1, min(rows // 2, trainer.config.micro_batch_size))):
        part = trainer.models.log_probs(replies.take(index))[0]
        log_probs[index.to(trainer.device), : part.shape[1]] = part
    return log_probs


def _decoded(trainer: PPOTrainer, prompts: list[list[int]], replies: Replies) -> Tensor:
    """Compute the sampled tokens one by one with a cache, as sampling does."""
    models = trainer.models
    policy = models.sampling_copy(models.accelerator.unwrap_model(models.policy))
    width = replies.mask.shape[1]
    decoder = decoder_of(policy, prompts, width)
    logits = decoder.start()
    columns = []
    for step in range(width):
        tokens = replies.reply_ids[:, step]
        log_p = torch.log_softmax(logits.float() / trainer.config.temperature, -1)
        columns.append(log_p.gather(1, tokens[:, None]).squeeze(1))
        if step + 1 < width:
            logits = decoder.step(tokens)
    return torch.stack(columns, 1)
