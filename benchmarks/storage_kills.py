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
import random
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

from benchmarks.storage_campaign import command, tried
from benchmarks.storage_kill_trials import Publisher, Row, at_points, at_random, readers
from benchmarks.storage_places import place, write_files


def measure(store: str, options: Namespace) -> list[Row]:
    """All trials in one place."""
    with tempfile.TemporaryDirectory() as folder, place(store) as there:
        work = Path(folder)
        rng = random.Random(f"{options.seed}/{there.name}")
        write_files(work / "files", options.seed, options.mib << 20)
        publisher = Publisher(there, work / "files", work)
        points = publisher.undisturbed()
        print(
            f"{there.name}: {len(points)} points, {publisher.seconds:.2f} s a publish", flush=True
        )
        return [
            tried(Row(name, there.name), run)
            for name, run in (
                ("publish, every point", lambda row: at_points(publisher, points, row)),
                ("publish, at random", lambda row: at_random(publisher, options.kills, rng, row)),
                ("fetch, at random", lambda row: readers(publisher, options.fetches, rng, row)),
            )
        ]


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
    return command(parser, measure, report)


if __name__ == "__main__":
    sys.exit(main())
