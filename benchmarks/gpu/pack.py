"""Make `.gpu/carried.tar.gz`, trained models for the GPU machine.

`python -m benchmarks.gpu.pack` runs the quickstart's data, SFT and reward-model stages (TRL trains
the latter two, and is not on that machine), and those of the tests' toy task.
"""

from __future__ import annotations

import argparse
import gzip
import io
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from benchmarks.gpu import quickstart
from rlhf.config import RuntimeConfig
from rlhf.data.prepare import prepare_data
from rlhf.reward import train_reward_model
from rlhf.sft import train_sft
from tests.library.toy_models import write_toy_models

LIMIT = 15 * 10**6


def main() -> None:
    """Train, pack, and check the archive's size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=".gpu/carried.tar.gz")
    parser.add_argument("--tiny", action="store_true", help="a few steps, for a smoke test")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    started, archive = time.monotonic(), Path(args.out)
    with tempfile.TemporaryDirectory(prefix="rlhf-gpu-pack-") as name:
        folder = Path(name)
        train_quickstart(folder / "quickstart", args.tiny, args.threads)
        if not args.tiny:  # the smoke test runs no test that needs them
            write_toy_models(folder / "toys")
        archive.parent.mkdir(parents=True, exist_ok=True)
        archive.write_bytes(packed(folder))
    size = archive.stat().st_size
    print(f"{archive}: {size / 1e6:.1f} MB in {time.monotonic() - started:.0f} s")
    if size > LIMIT:
        sys.exit(f"that is more than {LIMIT / 1e6:.0f} MB, which the GPU machine takes")


def train_quickstart(folder: Path, tiny: bool, threads: int) -> None:
    """Run the stages before PPO, with the arguments of tasks/stages.py."""
    config = quickstart.configuration(tiny)
    runtime = RuntimeConfig(device="cpu", threads=threads)
    data, sft, reward = (folder / name for name in ("data", "sft", "reward-model"))
    for path in (data, sft, reward):
        path.mkdir(parents=True)
    prepare_data(config.data, data, seed=config.seed)
    train_sft(config.sft, config.base, data, sft, seed=config.seed, runtime=runtime)
    train_reward_model(config.reward_model, data, sft, reward, seed=config.seed, runtime=runtime)


def packed(folder: Path) -> bytes:
    """Return a reproducible tar.gz of all files: sorted, without times and owners."""
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w") as tar,
    ):
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            entry = tarfile.TarInfo(path.relative_to(folder).as_posix())
            entry.size = path.stat().st_size
            with path.open("rb") as file:
                tar.addfile(entry, file)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
