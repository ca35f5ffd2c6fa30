"""Section: costliest operations of each phase of an update, by torch's profiler.

Also kernel launches and waits of the host for the GPU, by phase and per decoding step. The latter
is the difference of two rollouts of different length, which removes the cost of the prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import measure
from benchmarks.gpu.models import build, rows_of, sample, scale_of, work_of
from benchmarks.gpu.section import Context, Results
from benchmarks.ppo.process import synchronise
from rlhf.ppo.optimisation import optimise

TOP = 10
#: Prefixes of CUDA calls' names in the profile, by category.
CALLS = {
    "kernel_launches": ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch"),
    "synchronisations": (
        "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize",
        "cuStreamSynchronize", "cuCtxSynchronize",
    ),
    "copies_to_host": ("Memcpy DtoH",),
    "copies_to_device": ("Memcpy HtoD",),
}  # fmt: skip


def profiles(context: Context, results: Results) -> None:
    """Profile rollout, scoring and optimisation of the 0.5 B model in bfloat16."""
    scale, device = scale_of(context), torch.device(context.device)
    work = work_of(context, "500m", "full")
    trainer = build(work, Path(context.scratch) / "models")
    rows = rows_of(work, work.size.batch)
    few, many = scale.profiled_tokens
    trainer.sample(rows[:2], seed=0)  # warm-up
    short = _profiled(lambda: sample(trainer, rows, few), device)
    long = _profiled(lambda: sample(trainer, rows, many), device)
    results.put(
        rollout=long,
        new_tokens=many,
        per_decoding_step=_per_step(short, long, many - few),
        rows=len(rows),
    )
    rollouts = sample(trainer, rows, many)
    trainer.score(rollouts)
    buffer, _, _ = trainer.prepare_buffer(rollouts)
    optimise(buffer, trainer.models, 0)  # warm-up; makes the optimisers' state

    def score() -> None:
        trainer.score(rollouts)
        trainer.prepare_buffer(rollouts)

    results.put(scoring=_profiled(score, device))
    results.put(optimisation=_profiled(lambda: optimise(buffer, trainer.models, 1), device))
    measure.release(device)


def _profiled(work: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Profile a function: costliest kernels and host operations, counts of CUDA calls."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        work()
        synchronise(device)
    events: list[Any] = list(profiler.key_averages())
    # Annotations span kernels that are counted separately.
    kernels = [e for e in events if e.device_type != DeviceType.CPU and not e.is_user_annotation]
    hosts = [e for e in events if e.device_type == DeviceType.CPU]
    busy = sum(e.self_device_time_total for e in kernels)
    calls = {
        name: sum(e.count for e in events if e.key.startswith(beginnings))
        for name, beginnings in CALLS.items()
    }
    return {
        "kernels": _top(kernels, "self_device_time_total"),
        "host": _top(hosts, "self_cpu_time_total"),
        "kernel_milliseconds": busy / 1e3,
        "device_operations": sum(e.count for e in kernels),
        # The profiler slows the host down: a phase takes less time without it.
        "host_milliseconds": sum(e.self_cpu_time_total for e in hosts) / 1e3,
        "calls": calls,
    }


def _top(events: list[Any], attribute: str) -> list[dict[str, Any]]:
    ordered = sorted(events, key=lambda e: -getattr(e, attribute))[:TOP]
    return [
        {"name": e.key[:120], "milliseconds": getattr(e, attribute) / 1e3, "count": e.count}
        for e in ordered
    ]


def _per_step(short: dict[str, Any], long: dict[str, Any], steps: int) -> dict[str, float]:
    """Return calls and kernel time of one decoding step (one token of each row)."""
    added = {n: (long["calls"][n] - short["calls"][n]) / steps for n in CALLS}
    for name in ("kernel_milliseconds", "device_operations"):
        added[name] = (long[name] - short[name]) / steps
    return added
