"""Resumed PPO runs against undisturbed ones: `python -m benchmarks.resume`.

PPO on the toy task of the tests, with every option that has a state, in forked processes: once
straight through; once killed (`kill -9`) after 37 updates, and resumed; then killed again and
again, at every point inside of a save and at random moments; and ended by SIGTERM at random
moments. Each run is resumed until it is complete, and compared with the straight run byte by byte:
policy, curve, samples, and the last checkpoint with its optimisers, KL controller, running scales
and environment. Any difference gives exit code 1. Unix only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Before torch is loaded: a forked child has the calling thread alone, and no OpenMP workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch

from benchmarks.resume.runs import (
    EVERY,
    Row,
    Run,
    campaign,
    count_points,
    ended,
    killed_once,
    make_models,
    terminated,
)
from tests.library import toys
from tests.library.ppo_runs import EVERYTHING

#: Every option with a state, and the same with the other types of critic.
VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA, critic an adapter": EVERYTHING,
    "LoRA, critic a head": {**EVERYTHING, "critic": "head"},
    "LoRA, critic of its own": {**EVERYTHING, "critic": "reward_model"},
    "full, critic of its own": {**EVERYTHING, "critic": "reward_model", "lora": None},
}
SIGNALS = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=100, help="more than 37")
    parser.add_argument("--kills", type=int, default=100, help="at least; half are inside a save")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), options.updates, options.kills, options.seed)
    print(
        "\n| trial | variant | signals | resumed | complete runs | files compared | different | s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for r in rows:
        print(f"| {r.trial} | {r.variant} | {r.kills} | {r.resumed} | {r.runs} | {r.files} "
              f"| {len(r.failures)} | {r.seconds:.0f} |")  # fmt: skip
    failed = [failure for row in rows for failure in row.failures]
    print(f"\n{options.updates} updates, seed {options.seed}, {time.monotonic() - begun:.0f} s: "
          f"{f'{len(failed)} differences' if failed else 'all bit-equal'}")  # fmt: skip
    if options.json:
        report = {"options": {**vars(options), "json": None}, "rows": [asdict(r) for r in rows]}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if failed else 0


def measure(folder: Path, updates: int, kills: int, seed: int) -> list[Row]:
    """Run the trials of all variants; only the first variant is killed in campaigns."""
    models = folder / "models"
    make_models(models)
    rows: list[Row] = []
    for number, (variant, options) in enumerate(VARIANTS.items()):
        rng = random.Random(f"{seed}/{number}")

        def make(name: str, number: int = number, options: Any = options, **more: Any) -> Run:
            return Run(models, folder / str(number) / name, {**options, **more}, updates)

        def trial(name: str, work: Callable[[Row], None], variant: str = variant) -> None:
            row, begun = Row(name, variant), time.monotonic()
            work(row)
            row.seconds = time.monotonic() - begun
            rows.append(row)
            print(f"{name}, {variant}: {'; '.join(row.failures) or 'equal'}", flush=True)

        first, begun = make("straight"), time.monotonic()
        if ended(first.start()):
            raise SystemExit(f"{variant}: the straight run failed")
        an_update = (time.monotonic() - begun) / updates
        straight = first.files()
        begun = time.monotonic()
        ended(first.start())  # the run is complete: only loads and writes
        pace = time.monotonic() - begun + 8 * an_update
        trial("kill -9 after 37", lambda row: killed_once(make("killed"), straight, row))  # noqa: B023
        if number == 0:
            few = 4 * EVERY * toys.PPO.chunk_size
            points = range(count_points(make("counted", total_episodes=few)))
            # Half of the kills are inside a save, at every point at least once.
            inside: list[int | None] = [
                *points,
                *rng.choices(points, k=max(0, kills // 2 - len(points))),
            ]
            moments: list[int | None] = [None] * max(0, kills - len(inside))
            print(f"{len(points)} points in a save; {len(inside)} kills there, {len(moments)} "
                  "at random moments", flush=True)  # fmt: skip
            for name, plan in (("kills inside a save", inside), ("kills at random", moments)):
                rng.shuffle(plan)
                trial(name, lambda row: campaign(make, straight, row, plan, rng, pace))  # noqa: B023
        more = {"checkpoint_every": updates}
        trial(
            "SIGTERM at random",
            lambda row: terminated(make("term", **more), straight, row, SIGNALS, rng, pace),  # noqa: B023
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
