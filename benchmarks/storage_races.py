"""Writers, promoters, publishers and collectors at once: `python -m benchmarks.storage_races`.

24 writers, threads with a backend of their own and then four processes of six threads, create one
key, round by round, and append to one history: on a local folder, on Ceph, and on Swift, whose
conditional writes let several win. Then eight publishers share a few blobs while one or two
collectors remove whatever nothing refers to. The servers are started by this command. Two winners,
a lost entry or an artifact that is not whole end it with exit code 1. Unix only.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from benchmarks.storage_places import Place, place
from benchmarks.storage_race_trials import Row, appending, collecting, creating


def measure(there: Place, rounds: int, publishes: int, seed: int) -> list[Row]:
    """All trials in one place."""
    rows: list[Row] = []

    def trial(name: str, run: Callable[[Row], None]) -> None:
        row, begun = Row(name, there.name), time.monotonic()
        run(row)
        row.seconds = time.monotonic() - begun
        rows.append(row)
        for line in row.failures:
            print(line, flush=True)
        print(
            f"{name}, {there.name}: {len(row.failures)} failures, {row.seconds:.0f} s", flush=True
        )

    for kind, processes, threads in (("24 threads", 1, 24), ("4 × 6 threads", 4, 6)):
        trial(f"create, {kind}", lambda row: creating(there, processes, threads, rounds, row))  # noqa: B023
        trial(
            f"append, {kind}",
            lambda row: appending(there, processes, threads, max(1, rounds // 20), row),  # noqa: B023
        )
    if there.name != "Swift" and publishes:
        for collectors, fresh, grace in ((1, 0.0, 0.0), (2, 0.0, 0.0), (2, 2.0, 4.0)):
            name = f"collect, {collectors} collectors, grace {grace:.0f} s"
            few = publishes if grace == 0 else publishes // 4
            trial(name, lambda row: collecting(there, few, collectors, fresh, grace, seed, row))  # noqa: B023
    return rows


def report(rows: list[Row]) -> str:
    """The block for RESULTS.md."""
    lines = [
        "| race | store | rounds | won | nobody won | gave up | slowest round, s | failures | s |",
        "|---" * 9 + "|",
        *(
            f"| {r.trial} | {r.place} | {r.rounds} | {r.won} | {r.none} | {r.errors} "
            f"| {r.slowest:.2f} | {len(r.failures)} | {r.seconds:.0f} |"
            for r in rows
        ),
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--publishes", type=int, default=400)
    parser.add_argument("--stores", nargs="+", default=["folder", "ceph", "swift"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    begun = time.monotonic()
    rows: list[Row] = []
    for name in options.stores:
        with place(name) as there:
            rows += measure(there, options.rounds, options.publishes, options.seed)
    failed = sum(len(row.failures) for row in rows)
    print(f"\n{report(rows)}\n")
    print(f"seed {options.seed}, {time.monotonic() - begun:.0f} s: {failed or 'no'} failures")
    if options.json:
        result = {"options": {**vars(options), "json": None}, "rows": [asdict(r) for r in rows]}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
