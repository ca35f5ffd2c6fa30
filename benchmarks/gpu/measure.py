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


def timed(
    work: Callable[[int], Any], device: torch.device, repeats: int
) -> tuple[list[Any], dict[str, Any]]:
    """Run `work(number)` repeatedly and time it; the caller warms up.

    Returns the results, and the median seconds, the seconds of each run and peak memory.
    """
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
    """A clock that also records each phase's peak memory."""

    def __init__(self, device: torch.device) -> None:
        self.peaks: dict[str, dict[str, float]] = {}
        super().__init__(device)

    def start(self) -> None:
        """Start the clock and peak memory for a new update."""
        reset_peak(self.device)
        super().start()

    def mark(self, phase: str) -> None:
        """Attribute time and peak memory since the last mark to this phase."""
        super().mark(phase)
        highest = self.peaks.setdefault(phase, {})
        for name, value in peak(self.device).items():
            highest[name] = max(value, highest.get(name, 0.0))
        reset_peak(self.device)


def reset_peak(device: torch.device) -> None:
    """Reset the GPU's peak memory; a CPU's resident peak can't be reset."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> dict[str, float]:
    """Return peak memory since `reset_peak`.

    In use by tensors, and held by torch's allocator.
    """
    if device.type != "cuda":
        return {"peak_resident_mib": peak_mib()}
    return {
        "peak_allocated_mib": torch.cuda.max_memory_allocated(device) / 2**20,
        "peak_reserved_mib": torch.cuda.max_memory_reserved(device) / 2**20,
    }


def release(device: torch.device) -> None:
    """Free unreferenced memory before the next measurement."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
