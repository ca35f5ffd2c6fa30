"""Clock and result of one PPO update, and the comparison of two results."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

PHASES = ("rollout", "scoring", "optimisation")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Update:
    """Timings and results of one PPO update.

    Tensors are (batch, reply); `mask` is true up to and including the end token.
    """

    wall: Mapping[str, float]
    cpu: Mapping[str, float]
    prompts: list[list[int]]
    replies: list[list[int]]
    mask: Tensor
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Callable[[], Mapping[str, Tensor]] = dict


def differences(first: Update, second: Update) -> dict[str, float]:
    """Return the largest absolute difference by quantity.

    `tokens` counts the replies that differ; if any does, the rest is not compared.
    """
    result = {"tokens": float(sum(a != b for a, b in _pairs(first.replies, second.replies)))}
    if result["tokens"]:
        return result
    for name, values in first.tensors.items():
        result[name] = float((values[first.mask] - second.tensors[name][second.mask]).abs().max())
    ours, theirs = first.weights(), second.weights()
    if ours.keys() != theirs.keys():
        raise AssertionError(f"weights of one side only: {sorted(ours.keys() ^ theirs.keys())}")
    with torch.no_grad():
        result["weights"] = max(float((ours[n] - theirs[n]).abs().max()) for n in ours)
    return result


def _pairs(first: list[list[int]], second: list[list[int]]) -> list[tuple[list[int], list[int]]]:
    return list(zip(first, second, strict=True))


def check(update: int, errors: Mapping[str, float], tolerance: float) -> None:
    """Raise if a difference exceeds rounding.

    Raises:
        AssertionError: Tokens differ, or another quantity by more than `tolerance`.
    """
    wrong = {n: d for n, d in errors.items() if not d <= (0 if n == "tokens" else tolerance)}
    if wrong:
        listed = ", ".join(f"{n} by {d:.2g}" for n, d in wrong.items())
        raise AssertionError(
            f"update {update}: the two sides differ in {listed} (at most {tolerance:g} is "
            "rounding); --report-only goes on"
        )


class Clock:
    """Wall and CPU seconds between marks; each mark synchronises the device."""

    def __init__(self, device: torch.device = CPU) -> None:
        self.device = device
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self.start()

    def _now(self) -> tuple[float, float]:
        synchronise(self.device)
        return time.perf_counter(), time.process_time()

    def start(self) -> None:
        """Start a new update."""
        self.wall, self.cpu = {}, {}
        self._last = self._now()

    def skip(self) -> None:
        """Exclude the time since the last mark."""
        self._last = self._now()

    def mark(self, phase: str) -> None:
        """Attribute the time since the last mark to this phase."""
        now = self._now()
        self.wall[phase] = now[0] - self._last[0]
        self.cpu[phase] = now[1] - self._last[1]
        self._last = now


def synchronise(device: torch.device) -> None:
    """Wait until an accelerator has completed its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
