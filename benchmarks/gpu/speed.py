"""Sections: rollouts, updates, LoRA on one base, and the largest batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.gpu import measure
from benchmarks.gpu.models import build, rows_of, sample, scale_of, work_of
from benchmarks.gpu.section import Context, Results
from benchmarks.machine import needed_gflops
from benchmarks.ppo.ours import run_update
from benchmarks.ppo.process import PHASES, Update
from benchmarks.ppo.workload import Size, Workload
from rlhf.ppo.optimisation import Buffer, optimise
from rlhf.ppo.trainer import PPOTrainer, Rollouts

#: Steps of a rollout's warm-up: its prompts need the same memory as the measured ones'.
WARMUP_TOKENS = 4


def rollouts_500m(context: Context, results: Results) -> None:
    """Measure rollouts of the 0.5 B model."""
    _rollouts(context, results, "500m")


def rollouts_124m(context: Context, results: Results) -> None:
    """Measure rollouts of the 124 M model."""
    _rollouts(context, results, "124m")


def _rollouts(context: Context, results: Results, size: str) -> None:
    """Measure reply tokens per second by rows and lengths, tokenizing included."""
    scale, device = scale_of(context), torch.device(context.device)
    results.put(size=size)
    for lengths in ("full", "varying"):
        work = work_of(context, size, lengths)
        trainer = build(work, Path(context.scratch) / lengths)
        for count in scale.rows:
            rollout = _rollout(trainer, work, count, scale.repeats)
            results.put(**{f"{lengths}, {count} rows": rollout})
        del trainer
        measure.release(device)


def _rollout(trainer: PPOTrainer, work: Workload, count: int, repeats: int) -> dict[str, Any]:
    """Return seconds, reply tokens and operations per second, and peak memory."""
    rows = rows_of(work, count)
    sample(trainer, rows, WARMUP_TOKENS)  # warm-up
    samples, timing = measure.timed(
        lambda number: trainer.sample(rows, seed=work.sampling_seed(number)), trainer.device,
        repeats,
    )  # fmt: skip
    replies = [[len(r) for r in rollouts.replies.rows()] for rollouts in samples]
    tokens = median(sum(lengths) for lengths in replies)
    prompts = [work.prompt_tokens[0]] * count
    needed = median(needed_gflops(work.size, prompts, r)["rollout"] for r in replies)
    return {
        "rows": count,
        "reply_tokens": tokens,
        "reply_tokens_per_second": tokens / timing["seconds"],
        "steps_per_second": max(replies[-1]) / timing["seconds"],
        "gflops_per_second": needed / timing["seconds"],
        **timing,
    }


def update_500m(context: Context, results: Results) -> None:
    """Measure updates of the 0.5 B model in bfloat16 and float32.

    Full lengths; in bfloat16 geometric lengths too.
    """
    _update(context, results, "500m", "full")
    _update(context, results, "500m", "full", precision="fp32")
    _update(context, results, "500m", "varying")


def update_124m(context: Context, results: Results) -> None:
    """Measure updates of the 124 M model in bfloat16."""
    _update(context, results, "124m", "full")
    _update(context, results, "124m", "varying")


def lora(context: Context, results: Results) -> None:
    """Measure updates with LoRA adapters on one base, without and with checkpointing."""
    _update(context, results, "500m", "full", lora=True)
    _update(context, results, "500m", "full", lora=True, gradient_checkpointing=True)


def _update(
    context: Context, results: Results, size: str, lengths: Any, lora: bool = False, **options: Any
) -> None:
    """Measure seconds, tokens and operations per second, and peak memory by phase."""
    scale, device = scale_of(context), torch.device(context.device)
    work = work_of(context, size, lengths, lora=lora)
    trainer = build(work, Path(context.scratch) / f"{lengths}-{len(results.values)}", **options)
    prompts, updates = work.prompts(), []
    clock = measure.PhaseClock(device)
    for number in range(1 + scale.updates):
        if number == 1:
            clock.peaks.clear()
        chunk = prompts[(number % 4) * work.size.batch :][: work.size.batch]
        updates.append(run_update(trainer, work, number, chunk, clock=clock))
    name = " ".join(
        [lengths, trainer.config.precision]
        + (["lora"] if lora else [])
        + (["checkpointing"] if trainer.config.gradient_checkpointing else [])
    )
    results.put(**{name: _phases(work.size, updates[1:], clock.peaks), "size": size})
    del trainer
    measure.release(device)


def _phases(size: Size, updates: list[Update], peaks: dict[str, dict[str, float]]) -> Any:
    lengths = [([len(p) for p in u.prompts], [len(r) for r in u.replies]) for u in updates]
    needed = [needed_gflops(size, *pair) for pair in lengths]
    tokens = median(sum(map(sum, pair)) for pair in lengths)
    phases: dict[str, Any] = {}
    for phase in PHASES:
        seconds = median(u.wall[phase] for u in updates)
        phases[phase] = {
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "gflops_per_second": median(n[phase] for n in needed) / seconds,
            **peaks[phase],
        }
    seconds = median(sum(u.wall.values()) for u in updates)
    total = {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "gflops_per_second": median(sum(n.values()) for n in needed) / seconds,
        **{name: max(p[name] for p in peaks.values()) for name in peaks[PHASES[0]]},
    }
    reply_tokens = median(sum(pair[1]) for pair in lengths)
    return {"phases": {**phases, "total": total}, "tokens": tokens, "reply_tokens": reply_tokens}


def largest(context: Context, results: Results) -> None:
    """Find the most rows that can be decoded, and the largest micro-batch.

    Rows are doubled until memory is exhausted.
    """
    scale, device = scale_of(context), torch.device(context.device)
    work = work_of(context, "500m")
    trainer = build(work, Path(context.scratch) / "largest")

    def decode(count: int) -> dict[str, Any]:
        return _rollout(trainer, work, count, repeats=1)

    results.put(decode=_doubled(decode, scale.decode_from, scale.decode_to, device, results))
    rollouts = trainer.sample(rows_of(work, scale.micro_to), seed=0)
    for checkpointing in (False, True):
        step = _Step(trainer, rollouts, checkpointing)
        search = _doubled(step.take, 2 if context.tiny else 16, scale.micro_to, device, results)
        results.put(**{"micro_batch_checkpointing" if checkpointing else "micro_batch": search})


class _Step:
    """One optimiser step of policy and critic on n replies, in one micro-batch."""

    def __init__(self, trainer: PPOTrainer, rollouts: Rollouts, checkpointing: bool) -> None:
        self.trainer, self.checkpointing = trainer, checkpointing
        replies = rollouts.replies
        mask = replies.mask
        states = torch.ones(len(mask), mask.shape[1] + 1, dtype=torch.bool, device=mask.device)
        zeros = torch.zeros(mask.shape, device=mask.device)
        values = torch.zeros(states.shape, device=mask.device)
        self.buffer = Buffer(replies, states, zeros, torch.ones_like(zeros), values, values)

    def take(self, count: int) -> dict[str, Any]:
        """Return seconds and peak memory of one step.

        The old log-probs are not the policy's, which costs the same.
        """
        models = self.trainer.models
        before = models.config
        models.config = before.model_copy(
            update={
                "mini_batch_size": count, "micro_batch_size": count, "num_ppo_epochs": 1,
                "gradient_checkpointing": self.checkpointing, "max_grad_norm": 1.0,
            }
        )  # fmt: skip
        part = self.buffer.take(torch.arange(count))
        try:
            _, timing = measure.timed(
                lambda number: optimise(part, models, number), self.trainer.device, 1
            )
        finally:
            models.config = before
            for optimizer in models.optimizers.values():
                optimizer.zero_grad()
        return {"rows": count, **timing}


def _doubled(
    run: Callable[[int], dict[str, Any]], first: int, last: int, device: torch.device,
    results: Results,
) -> dict[str, Any]:  # fmt: skip
    """Run with twice the rows until memory is exhausted; return all that fitted."""
    fitted: list[dict[str, Any]] = []
    rows = first
    while rows <= last:
        try:
            fitted.append(run(rows))
        except torch.OutOfMemoryError as error:
            return {"fitted": fitted, "out_of_memory_at": rows, "message": str(error)[:200]}
        finally:
            measure.release(device)
        results.put(progress=f"{rows} rows fit")
        rows *= 2
    return {"fitted": fitted, "out_of_memory_at": None, "searched_to": last}
