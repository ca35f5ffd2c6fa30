"""Concurrent writers and collectors: `python -m benchmarks.storage.races`.

Threads and processes create one key or append to one history at the same time; garbage collectors
run among publishers. Any failure gives exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import random
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.storage.backends import PRODUCER, Place, place
from benchmarks.storage.campaign import Trial, command, run_trial
from benchmarks.storage.kills import ended, forked
from rlhf.errors import StoreError
from rlhf.store import Store, gc, publish
from rlhf.store.coordination import COLLECTIONS, create, is_atomic
from rlhf.store.history import Histories, seal
from rlhf.store.manifest import FileEntry, build_manifest, sha256_bytes

Backend = Any
#: Number of collectors, seconds of FRESH, grace, and divisor of the publishes.
COLLECTIONS_OF_TRIALS = ((1, 0.0, 0.0, 1), (2, 0.0, 0.0, 1), (2, 2.0, 4.0, 4))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--publishes", type=int, default=400)
    parser.add_argument("--stores", nargs="+", default=["folder", "ceph", "swift"])
    return command(parser, measure, report)


def measure(store: str, options: Namespace) -> list[Row]:
    """Run all races on one store."""
    with place(store) as target:
        rows = [
            row for kind in ((1, 24), (4, 6)) for row in _writer_rows(target, *kind, options.rounds)
        ]
        if target.name != "Swift" and options.publishes:
            rows += [_collector_row(target, options, *each) for each in COLLECTIONS_OF_TRIALS]
        return rows


def _writer_rows(target: Place, processes: int, threads: int, rounds: int) -> list[Row]:
    kind = "24 threads" if processes == 1 else f"{processes} × {threads} threads"
    few = max(1, rounds // 20)
    return [
        run_trial(
            Row(f"create, {kind}", target.name),
            lambda row: creating(target, processes, threads, rounds, row),
        ),
        run_trial(
            Row(f"append, {kind}", target.name),
            lambda row: appending(target, processes, threads, few, row),
        ),
    ]


def _collector_row(
    target: Place, options: Namespace, collectors: int, fresh: float, grace: float, part: int
) -> Row:
    name = f"collect, {collectors} collectors, grace {grace:.0f} s"
    publishes = options.publishes // part
    return run_trial(
        Row(name, target.name),
        lambda row: collecting(target, publishes, collectors, fresh, grace, options.seed, row),
    )


def report(rows: list[Row]) -> str:
    """Return the table for RESULTS.md."""
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


@dataclass
class Row(Trial):
    """Counts of one type of race on one store."""

    rounds: int = 0
    won: int = 0
    """Rounds with one winner; entries appended; intact publishes."""
    none: int = 0
    """Rounds without a winner."""
    errors: int = 0
    """Writers that ended with a StoreError."""
    slowest: float = 0.0


def creating(place: Place, processes: int, threads: int, rounds: int, row: Row) -> None:
    """Create one key per round; the only winner's bytes must be stored."""

    def act(backend: Backend, writer: int, number: int) -> bool:
        return create(backend, f"refs/race/{number:06d}.json", _payload(writer, number))

    for number, each in enumerate(together(place, processes, threads, rounds, act)):
        key = f"refs/race/{number:06d}.json"
        winners = [writer for writer, result in each.results.items() if result is True]
        row.rounds += 1
        row.errors += sum(isinstance(result, str) for result in each.results.values())
        row.slowest = max(row.slowest, each.seconds)
        row.won += len(winners) == 1
        row.none += not winners
        if len(winners) > 1:
            row.failures.append(f"{key}: {len(winners)} winners")
        if winners and place.read(key) != _payload(winners[0], number):
            row.failures.append(f"{key} is not what the winner wrote")
    row.failures += [f"{key} is left" for key in place.objects() if key.startswith("claims/")]
    place.wipe()


def appending(place: Place, processes: int, threads: int, rounds: int, row: Row) -> None:
    """Append to one history at once; numbers must be unique, entries complete."""

    def payload(writer: int, number: int) -> dict[str, str]:
        return {"digest": sha256_bytes(f"{writer} {number}".encode())}

    def act(backend: Backend, writer: int, number: int) -> int:
        return Histories(backend).append("champion/x", payload(writer, number))

    entries: dict[int, dict[str, str]] = {}
    for number, each in enumerate(together(place, processes, threads, rounds, act)):
        row.rounds += 1
        row.slowest = max(row.slowest, each.seconds)
        for writer, value in each.results.items():
            if isinstance(value, str):
                row.errors += 1
            elif value in entries:
                row.failures.append(f"number {value} was given twice")
            else:
                row.won += 1
                entries[value] = payload(writer, number)
    with tempfile.TemporaryDirectory() as folder:
        history = place.open(Path(folder)).history.entries("champion/x")
    if not row.errors and history != [entries[number] for number in sorted(entries)]:
        row.failures.append("the history is not what the writers were told")
    row.failures += [f"{key} is left" for key in place.objects() if key.startswith("claims/")]
    place.wipe()


def together(
    place: Place, processes: int, threads: int, rounds: int,
    act: Callable[[Backend, int, int], Any],
) -> Iterator[Round]:  # fmt: skip
    """Let all writers act at once, each with its own backend, round by round.

    A result is `act(backend, writer, round)`, or the text of a StoreError.
    """
    line = multiprocessing.get_context("fork").Barrier(processes * threads)
    with tempfile.TemporaryDirectory() as folder:

        def writer(number: int) -> list[tuple[Any, float]]:
            backend = place.open(Path(folder))._backend
            is_atomic(backend)
            results: list[tuple[Any, float]] = []
            for each in range(rounds):
                line.wait()
                begun = time.monotonic()
                try:
                    value = act(backend, number, each)
                except StoreError as error:
                    value = str(error)
                results.append((value, time.monotonic() - begun))
            return results

        def process(first: int) -> None:
            with ThreadPoolExecutor(threads) as pool:
                numbers = range(first, first + threads)
                results = dict(zip(numbers, pool.map(writer, numbers), strict=True))
            Path(folder, f"{first}.json").write_text(json.dumps(results))

        starts = range(0, processes * threads, threads)
        children = [forked(lambda first=first: process(first)) for first in starts]
        if any(list(map(ended, children))):
            raise SystemExit(f"{place.name}: a process of writers failed")
        by_writer: dict[str, Any] = {}
        for first in starts:
            by_writer |= json.loads(Path(folder, f"{first}.json").read_text())
        for each in range(rounds):
            yield Round(
                {int(number): results[each][0] for number, results in by_writer.items()},
                max(results[each][1] for results in by_writer.values()),
            )


@dataclass
class Round:
    """Results of all writers by number, and the slowest one's seconds."""

    results: dict[int, Any]
    seconds: float


def _payload(writer: int, number: int) -> bytes:
    """Return bytes that take a server some time."""
    return f"{writer} in round {number};".encode() * 1000


def collecting(
    place: Place, publishes: int, collectors: int, fresh: float, grace: float, seed: int, row: Row
) -> None:
    """Publish in eight threads during repeated gc; check all recorded artifacts."""
    with tempfile.TemporaryDirectory() as folder, aged(fresh):
        work = Path(folder)
        collection = Collection(place, work / "cache", grace, seed, row)
        pool = Pool(work, seed)
        begun = time.monotonic()
        with ThreadPoolExecutor(8 + collectors) as threads:
            cleaners = [threads.submit(collection.collect) for _ in range(collectors)]
            try:
                publishers = [
                    threads.submit(collection.publish, number, pool, publishes // 8)
                    for number in range(8)
                ]
                for each in publishers:
                    each.result()
            finally:
                collection.over.set()
            for each in cleaners:
                each.result()
        row.seconds = time.monotonic() - begun
        row.failures += _problems(place.open(work / "cache"))
    print(f"{collection.removed} objects were removed in {row.rounds} collections", file=sys.stderr)
    place.wipe()


@contextlib.contextmanager
def aged(fresh: float) -> Iterator[None]:
    """Set publish.FRESH to `fresh` seconds within the block, and patch gc.TRACES.

    TRACES lose COLLECTIONS: at such ages a collection would remove its own announcement as an old
    one, and with it the protection of publishers. Real ages rule that out.
    """
    traces = tuple(name for name in gc.TRACES if name != COLLECTIONS)
    with mock.patch.object(publish, "FRESH", fresh), mock.patch.object(gc, "TRACES", traces):
        yield


class Collection:
    """Publishers and collectors of one store, with their counts."""

    def __init__(self, place: Place, cache: Path, grace: float, seed: int, row: Row) -> None:
        self._open = lambda: place.open(cache)
        self._grace, self._seed, self._row = grace, seed, row
        self._lock = threading.Lock()
        self.over = threading.Event()
        self.removed = 0

    def collect(self) -> None:
        """Collect garbage until the publishers are done."""
        rng = random.Random(self._seed)
        store = self._open()
        # A sweep without grace would remove the uploads in progress.
        store._backend.sweep = lambda age: 0
        while not self.over.is_set():
            garbage = store.collect(grace=self._grace, dry_run=False)
            with self._lock:
                self.removed += len(garbage.keys)
                self._row.rounds += 1
            # Publishers wait for a collection, and poll once a second.
            time.sleep(rng.uniform(0, 0.6))

    def publish(self, number: int, pool: Pool, times: int) -> None:
        """Publish artifacts under records and check that they stay whole.

        The record precedes the artifact, which would be garbage at once without it. It is removed
        after the check, so that the next collection has something to remove.
        """
        rng = random.Random(f"{self._seed} {number}")
        store = self._open()
        for each in range(times):
            source, digest = rng.choice(pool.artifacts)
            name = f"records/{number}-{each}"
            store.history.append(name, {"digest": digest})
            ref = store.publish(source, "data", parents={}, producer=PRODUCER, metrics={})
            wrong = [] if ref.digest == digest else ["another digest"]
            wrong += store.problems(digest, deep=True)
            # Again, after publishes and collections of the other threads.
            time.sleep(rng.uniform(0, 0.2 + self._grace))
            wrong += store.problems(digest, deep=True)
            with self._lock:
                self._row.won += not wrong
                self._row.failures += [f"publisher {number}, {each}: {line}" for line in wrong]
            if each < times - 1:
                store._backend.put(f"refs/{name}/000001.json", seal(name, {}))


class Pool:
    """All artifacts of three out of six files, so that artifacts share blobs."""

    def __init__(self, work: Path, seed: int) -> None:
        rng = random.Random(seed)
        files = {f"{number}.dat": rng.randbytes(20_000) for number in range(6)}
        self.artifacts: list[tuple[Path, str]] = []
        for at, names in enumerate(itertools.combinations(files, 3)):
            folder = work / f"artifact-{at}"
            folder.mkdir(parents=True)
            for name in names:
                (folder / name).write_bytes(files[name])
            entries = [
                FileEntry(path=name, sha256=sha256_bytes(files[name]), size=len(files[name]))
                for name in names
            ]
            manifest = build_manifest("data", entries, {}, PRODUCER, {})
            self.artifacts.append((folder, sha256_bytes(manifest.encode())))


def _problems(store: Store) -> list[str]:
    entries = [store.history.entries(name)[0] for name in store.history.names("records/")]
    digests = {entry["digest"] for entry in entries if entry}
    return [line for digest in digests for line in store.problems(digest, deep=True)]


if __name__ == "__main__":
    sys.exit(main())
