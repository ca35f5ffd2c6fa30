"""Data preparation beside `datasets`: `python -m benchmarks.data_prep --pairs 1000000`.

Synthetic preference pairs are written as JSON lines. Each side reads them in a process of its own,
in turn: the whole stage `prepare-data` without and with the search for near duplicates, and
`datasets`, which loads the file and maps each row to the same three fields (no split, no votes, no
check). Times are those after the imports; peak memory is that of the process and its children.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SIDES = ("prepare-data", "prepare-data with search", "datasets load + map")
WORDS = 5_000
#: Words of a prompt and of each reply.
LENGTHS = (20, 40, 40)


def main() -> None:
    """Measure each side in turn, and print."""
    args = arguments()
    if args.side:
        print(json.dumps(run(args.side, Path(args.file))))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pairs.jsonl")
        pairs = write_pairs(path, args.pairs, args.gigabytes, args.words)
        size = path.stat().st_size
        results: dict[str, list[dict[str, float]]] = {}
        for _ in range(args.repeats):
            for side in args.sides:
                results.setdefault(side, []).append(alone(side, path))
    table(results, pairs, size)
    if args.json:
        figures = {"pairs": pairs, "bytes": size, "sides": results}
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--gigabytes", type=float, help="write a file of this size instead")
    parser.add_argument("--words", type=int, nargs=3, default=LENGTHS, help="prompt and replies")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    return parser.parse_args(given)


def write_pairs(path: Path, pairs: int, gigabytes: float | None, words: Sequence[int]) -> int:
    """Write random pairs, each of a prompt of its own; return their number."""
    count = 0
    with path.open("w") as file:
        for row in _rows(words):
            if (file.tell() >= gigabytes * 1e9) if gigabytes else (count >= pairs):
                break
            file.write(json.dumps(row) + "\n")
            count += 1
    return count


def _rows(words: Sequence[int]) -> Iterator[dict[str, str]]:
    draw = random.Random(0)
    vocabulary = [f"w{number}" for number in range(WORDS)]
    number = 0
    while True:
        prompt, chosen, rejected = (" ".join(draw.choices(vocabulary, k=k)) for k in words)
        yield {"prompt": f"{prompt} {number}", "chosen": chosen, "rejected": rejected}
        number += 1


def alone(side: str, path: Path) -> dict[str, float]:
    """Run one side in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.data_prep", "--side", side, "--file", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{side} ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run(side: str, path: Path) -> dict[str, float]:
    """Return seconds and MiB of peak memory of one side."""
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        seconds, pairs = _datasets(path, folder) if side == SIDES[2] else _ours(side, path, folder)
    cpu = time.process_time() - started
    own, children = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    peak = (own.ru_maxrss + children.ru_maxrss) / 1024
    cpu += children.ru_utime + children.ru_stime
    return {"seconds": seconds, "cpu": cpu, "peak_mib": peak, "pairs": pairs}


def _ours(side: str, path: Path, folder: str) -> tuple[float, int]:
    from rlhf.config import DataConfig
    from rlhf.data.prepare import prepare_data

    settings: dict[str, Any] = {}
    if "near_duplicates" in DataConfig.model_fields and side == SIDES[0]:
        settings["near_duplicates"] = None
    config = DataConfig(source=str(path), **settings)
    started = time.perf_counter()
    metrics: Any = prepare_data(config, Path(folder)).metrics
    seconds = time.perf_counter() - started
    return seconds, metrics["pairs_train"] + metrics["pairs_eval"]


def _datasets(path: Path, folder: str) -> tuple[float, int]:
    import datasets

    datasets.disable_progress_bars()
    started = time.perf_counter()
    loaded = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=folder)
    mapped = loaded.map(_fields, remove_columns=loaded.column_names)
    mapped.to_parquet(str(Path(folder, "pairs.parquet")))
    return time.perf_counter() - started, len(mapped)


def _fields(row: dict[str, str]) -> dict[str, str]:
    return {name: row[name].strip() for name in ("prompt", "chosen", "rejected")}


def table(results: dict[str, list[dict[str, float]]], pairs: int, size: int) -> None:
    """Print pairs/s and memory of each side, and the time beside that of `datasets`."""
    shown = Table(title=f"{pairs:,} pairs, {size / 1e9:.2f} GB of JSON lines")
    for column in ("side", "pairs/s", "all runs", "CPU s", "peak MiB", "time beside datasets"):
        shown.add_column(column, justify="left" if column == "side" else "right")
    other = [run["seconds"] for run in results.get(SIDES[2], [])]
    for side, runs in results.items():
        seconds = [run["seconds"] for run in runs]
        rates = [f"{pairs / value:,.0f}" for value in seconds]
        ratio = f"{statistics.median(seconds) / statistics.median(other):.2f}" if other else ""
        peak = max(run["peak_mib"] for run in runs)
        rate = f"{pairs / statistics.median(seconds):,.0f}"
        cpu = f"{statistics.median(run['cpu'] for run in runs):,.0f}"
        shown.add_row(side, rate, ", ".join(rates), cpu, f"{peak:,.0f}", ratio)
    Console(width=110).print(shown)


if __name__ == "__main__":
    main()
