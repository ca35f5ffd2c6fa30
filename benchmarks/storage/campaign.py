"""Base of the campaigns on the store: a trial's row, and the command line."""

from __future__ import annotations

import json
import signal
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

_PRINTED = ("kills", "fetches", "mib", "rounds", "publishes", "seed")


@dataclass
class Trial:
    """Failures and duration of one trial on one store."""

    trial: str
    place: str
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


R = TypeVar("R", bound=Trial)


def command(
    parser: ArgumentParser,
    measure: Callable[[str, Namespace], list[R]],
    report: Callable[[list[R]], str],
) -> int:
    """Measure each of the given stores, print the report, return the exit code.

    1 if any trial failed.
    """
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # On SIGTERM too, the servers are stopped by their with blocks.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    begun = time.monotonic()
    rows = [row for store in options.stores for row in measure(store, options)]
    failed = sum(len(row.failures) for row in rows)
    settings = ", ".join(
        f"{key} {value}" for key, value in vars(options).items() if key in _PRINTED
    )
    print(f"\n{report(rows)}\n")
    print(f"{settings}, {time.monotonic() - begun:.0f} s: {failed or 'no'} failures")
    if options.json:
        result = {"options": {**vars(options), "json": None}, "rows": [asdict(r) for r in rows]}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if failed else 0


def run_trial(row: R, run: Callable[[R], None]) -> R:
    """Run a trial and print its failures and duration."""
    begun = time.monotonic()
    run(row)
    row.seconds = row.seconds or time.monotonic() - begun
    for line in row.failures:
        print(line, flush=True)
    print(
        f"{row.trial}, {row.place}: {len(row.failures)} failures, {row.seconds:.0f} s", flush=True
    )
    return row
