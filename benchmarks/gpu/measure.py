"""Seconds and peak memory of a piece of work on the GPU, or on a CPU in its place."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks.ppo.process import Clock, synchronise
from benchmarks.ppo.report import peak_mib


def reset_peak(device: torch.device) -> None:
    """Begin a new measurement of peak memory; a CPU's resident set has no such beginning."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> dict[str, float]:
    """Peak memory since `reset_peak`: in use by tensors, and held by torch's allocator."""
    if device.type != "cuda":
        return {"peak_resident_mib": peak_mib()}
    return {
        "peak_allocated_mib": torch.cuda.max_memory_allocated(device) / 2**20,
        "peak_reserved_mib": torch.cuda.max_memory_reserved(device) / 2**20,
    }


def release(device: torch.device) -> None:
    """Free what is no longer referenced, so that the next measurement starts from little."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def timed(
    work: Callable[[int], Any], device: torch.device, repeats: int
) -> tuple[list[Any], dict[str, Any]]:
    """Run `work(number)`, warmed up before; its results, the seconds of each run, peak memory."""
    reset_peak(device)
    results, seconds = [], []
    for number in range(repeats):
        synchronise(device)
        started = time.perf_counter()
        results.append(work(number))
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    return results, {"seconds": median(seconds), "seconds_of_each": seconds, **peak(device)}


class PhaseClock(Clock):
    """A clock that also notes each phase's peak memory."""

    def __init__(self, device: torch.device) -> None:
        self.peaks: dict[str, dict[str, float]] = {}
        super().__init__(device)

    def start(self) -> None:
        """Begin a new update."""
        reset_peak(self.device)
        super().start()

    def mark(self, phase: str) -> None:
        """Count time and peak memory since the last mark as this phase's."""
        super().mark(phase)
        highest = self.peaks.setdefault(phase, {})
        for name, value in peak(self.device).items():
            highest[name] = max(value, highest.get(name, 0.0))
        reset_peak(self.device)
