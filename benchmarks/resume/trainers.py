"""Resumed SFT, reward model and judge: `python -m benchmarks.resume.trainers --seed 1`.

On the toy task of the tests, in forked processes: each training once undisturbed, and once killed
(`kill -9`) or ended (SIGTERM) at random moments, and started again until it is complete. All files
of the result must be the same bytes; any difference gives exit code 1. Unix only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

# Before torch is loaded: a forked child has the calling thread alone, and no OpenMP workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from rlhf.checkpoints.folder import checkpoints_in
from rlhf.config import LoraConfig
from rlhf.reward import train_reward_model
from rlhf.sft import train_sft
from tests.library import toys

#: Adapters with dropout, a last batch that is smaller, and an end in the midst of an epoch.
OPTIONS: dict[str, Any] = {
    "checkpoint_minutes": 0, "epochs": 9.5, "batch_size": 20, "micro_batch_size": 4,
    "lora": LoraConfig(r=4, alpha=16.0, dropout=0.2),
}  # fmt: skip


def main() -> None:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--blows", type=int, default=20, help="to each training")
    options = parser.parse_args()
    chance, equal = random.Random(options.seed), True
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        toys.write_data(root / "data")
        for stage in ("sft", "reward model", "judge"):
            row = campaign(root, stage, chance, options.blows)
            print(json.dumps({"seed": options.seed, **row}), flush=True)
            equal &= row["equal"]
    sys.exit(0 if equal else 1)


def campaign(root: Path, stage: str, chance: random.Random, blows: int) -> dict[str, Any]:
    """Strike a training, again and again from its start, and compare each result."""
    started = time.monotonic()
    wait(start(root, stage, "straight"))
    seconds = time.monotonic() - started
    straight = contents(root / f"{stage}-straight" / "out")
    struck: Counter[str] = Counter()
    after: list[list[int]] = [[]]
    equal = len(straight) > 3
    while struck.total() < blows or after[-1]:
        name = f"struck-{len(after)}"
        child = start(root, stage, name)
        ended = 0
        if struck.total() < blows:
            # Within the start, or some steps after the newest checkpoint.
            time.sleep(chance.uniform(0.1, 1.0) * seconds / 3)
            ended, status = os.waitpid(child, os.WNOHANG)
            equal &= status == 0
            if not ended:
                number = chance.choice([signal.SIGKILL, signal.SIGTERM])
                os.kill(child, number)
                os.waitpid(child, 0)
                struck[number.name] += 1
                saved = checkpoints_in(root / f"{stage}-{name}" / "checkpoints")
                after[-1].append(int(saved[-1].name.removeprefix("update-")) if saved else 0)
                continue
        if not ended:
            wait(child)
        equal &= contents(root / f"{stage}-{name}" / "out") == straight
        after.append([])
    return {
        "training": stage, "undisturbed_s": round(seconds, 1), "blows": dict(struck),
        "newest_checkpoints": after[:-1], "files": len(straight), "equal": equal,
    }  # fmt: skip


def start(root: Path, stage: str, name: str) -> int:
    """Train in a forked process, with checkpoints, and return its id."""
    child = os.fork()
    if child:
        return child
    try:
        folder = root / f"{stage}-{name}"
        out = folder / "out"
        shutil.rmtree(out, ignore_errors=True)  # half of a result
        out.mkdir(parents=True)
        shared: dict[str, Any] = {
            "checkpoints": folder / "checkpoints", "runtime": toys.RUNTIME,
            # Slow enough to be struck.
            "progress": lambda *_: time.sleep(0.02),
        }  # fmt: skip
        if stage == "sft":
            config: Any = toys.changed(toys.SFT, **OPTIONS)
            train_sft(config, toys.BASE, root / "data", out, **shared)
        else:
            config = toys.changed(toys.REWARD, **OPTIONS, members=2)
            sft = root / "sft-straight" / "out"
            seed = 0 if stage == "reward model" else 1
            train_reward_model(config, root / "data", sft, out, seed=seed, **shared)
        os._exit(0)
    except BaseException as error:
        print(repr(error), flush=True)
        os._exit(1)


def wait(child: int) -> None:
    """Wait for a process, which must succeed."""
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise RuntimeError("the training failed")


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a result."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


if __name__ == "__main__":
    main()
