"""A killed publisher leaves nothing half: `python -m benchmarks.storage_kills`.

A folder with small files, equal files and one that goes in parts is published by forked processes
to a local folder and to Ceph (started by this command), and each is killed by SIGKILL: at every
point that a publish passes (each call on the backend, each request or call to the file system,
every 4 MiB of the large file) and at random moments. After each kill, what a reader can see must be
whole, byte by byte, as boto3 or the file system see it; the same publish, run again, must give the
same digest as an undisturbed one; and garbage collection must leave exactly that artifact. Fetches
are killed too. Anything else ends it with exit code 1. Unix only.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from benchmarks.storage_kill_trials import Publisher, Row, at_points, at_random, readers
from benchmarks.storage_places import Place, place, write_files

MIB = 1024 * 1024


def measure(there: Place, work: Path, kills: int, fetches: int, large: int, seed: int) -> list[Row]:
    """All trials in one place."""
    rng = random.Random(f"{seed}/{there.name}")
    write_files(work / "files", seed, large)
    publisher = Publisher(there, work / "files", work)
    points = publisher.undisturbed()
    print(f"{there.name}: {len(points)} points, {publisher.seconds:.2f} s a publish", flush=True)
    rows: list[Row] = []

    def trial(name: str, run: Callable[[Row], None]) -> None:
        row, begun = Row(name, there.name), time.monotonic()
        run(row)
        row.seconds = time.monotonic() - begun
        rows.append(row)
        for line in row.failures:
            print(line, flush=True)
        print(f"{name}, {there.name}: {len(row.failures)} failures", flush=True)

    trial("publish, every point", lambda row: at_points(publisher, points, row))
    trial("publish, at random", lambda row: at_random(publisher, kills, rng, row))
    trial("fetch, at random", lambda row: readers(publisher, fetches, rng, row))
    return rows


def report(rows: list[Row]) -> str:
    """The block for RESULTS.md."""
    lines = [
        "| trial | store | kills | ended before | artifact already seen | left unfinished "
        "| complete when run again | failures | s |",
        "|---" * 9 + "|",
        *(
            f"| {r.trial} | {r.place} | {r.kills} | {r.late} | {r.visible} | {r.unfinished} "
            f"| {r.completed} | {len(r.failures)} | {r.seconds:.0f} |"
            for r in rows
        ),
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="at random moments, in each store")
    parser.add_argument("--fetches", type=int, default=30, help="killed ones, in each store")
    parser.add_argument("--mib", type=int, default=40, help="size of the large file")
    parser.add_argument("--stores", nargs="+", default=["folder", "ceph"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    begun = time.monotonic()
    rows: list[Row] = []
    for name in options.stores:
        with tempfile.TemporaryDirectory() as work, place(name) as there:
            rows += measure(
                there, Path(work), options.kills, options.fetches, options.mib * MIB, options.seed
            )
    failed = sum(len(row.failures) for row in rows)
    print(f"\n{report(rows)}\n")
    print(f"{sum(row.kills for row in rows)} kills, {options.mib} MiB, seed {options.seed}, "
          f"{time.monotonic() - begun:.0f} s: {failed or 'no'} failures")  # fmt: skip
    if options.json:
        result = {"options": {**vars(options), "json": None}, "rows": [asdict(r) for r in rows]}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
