"""Section: results and peak memory with `optimize_device_cache` on and off."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import measure
from benchmarks.gpu.models import build, work_of
from benchmarks.gpu.section import Context, Results, SectionFailedError
from benchmarks.ppo.ours import run_update, weights_of

UPDATES = 2


def cache(context: Context, results: Results) -> None:
    """Run two updates with the option and two without.

    Raises:
        SectionFailedError: Replies or weights differ.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when cuBLAS is first used
    # By default some operations add in no fixed order, by which two runs may differ.
    torch.use_deterministic_algorithms(True, warn_only=True)
    runs = {}
    for name, option in (("on", True), ("off", False)):
        runs[name] = _run(context, option)
        results.put(**{name: {k: runs[name][k] for k in ("peaks", "seconds")}})
    same_replies = runs["on"]["replies"] == runs["off"]["replies"]
    both = runs["on"]["weights"], runs["off"]["weights"]
    largest = max(float((both[0][n] - both[1][n]).abs().max()) for n in both[0])
    results.put(same_replies=same_replies, largest_weight_difference=largest)
    if not same_replies or largest:
        raise SectionFailedError(
            f"replies are {'the same' if same_replies else 'different'}, and weights differ by "
            f"{largest:.2g} at most"
        )


def _run(context: Context, option: bool) -> dict[str, Any]:
    """Run the updates on a new trainer; peaks are the last update's, by phase."""
    device = torch.device(context.device)
    work = work_of(context, "124m", "varying")
    trainer = build(work, Path(context.scratch) / str(option), optimize_device_cache=option)
    prompts, replies = work.prompts(), []
    clock = measure.PhaseClock(device)
    for number in range(UPDATES):
        clock.peaks.clear()
        chunk = prompts[number * work.size.batch :][: work.size.batch]
        replies += run_update(trainer, work, number, chunk, clock=clock).replies
    weights = {name: w.cpu().clone() for name, w in weights_of(trainer).items()}
    peaks, seconds = clock.peaks, dict(clock.wall)
    del trainer
    measure.release(device)
    return {"replies": replies, "weights": weights, "peaks": peaks, "seconds": seconds}
