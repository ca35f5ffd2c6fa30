"""Writers, promoters, publishers and collectors at once: `python -m benchmarks.storage_races`.

24 writers, threads with a backend of their own and then four processes of six threads, create one
key, round by round, and append to one history: on a local folder, on Ceph, and on Swift, whose
conditional writes let several win. Then eight publishers share a few blobs while one or two
collectors remove whatever nothing refers to. The servers are started by this command. Two winners,
a lost entry or an artifact that is not whole end it with exit code 1. Unix only.
"""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace

from benchmarks.storage_campaign import command, tried
from benchmarks.storage_places import Place, place
from benchmarks.storage_race_trials import Row, appending, collecting, creating

#: Collectors, seconds for which an artifact is fresh, grace, and the part of the publishes.
COLLECTIONS = ((1, 0.0, 0.0, 1), (2, 0.0, 0.0, 1), (2, 2.0, 4.0, 4))


def measure(store: str, options: Namespace) -> list[Row]:
    """All trials in one place."""
    with place(store) as there:
        rows = [row for kind in ((1, 24), (4, 6)) for row in _writers(there, *kind, options.rounds)]
        if there.name != "Swift" and options.publishes:
            rows += [_collected(there, options, *each) for each in COLLECTIONS]
        return rows


def _writers(there: Place, processes: int, threads: int, rounds: int) -> list[Row]:
    kind = "24 threads" if processes == 1 else f"{processes} × {threads} threads"
    few = max(1, rounds // 20)
    return [
        tried(
            Row(f"create, {kind}", there.name),
            lambda row: creating(there, processes, threads, rounds, row),
        ),
        tried(
            Row(f"append, {kind}", there.name),
            lambda row: appending(there, processes, threads, few, row),
        ),
    ]


def _collected(
    there: Place, options: Namespace, collectors: int, fresh: float, grace: float, part: int
) -> Row:
    name = f"collect, {collectors} collectors, grace {grace:.0f} s"
    publishes = options.publishes // part
    return tried(
        Row(name, there.name),
        lambda row: collecting(there, publishes, collectors, fresh, grace, options.seed, row),
    )


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
    return command(parser, measure, report)


if __name__ == "__main__":
    sys.exit(main())
