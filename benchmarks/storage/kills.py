"""Campaign of killed publishers and readers: `python -m benchmarks.storage.kills`.

Publishers are killed in forked processes, at every point of a publish and at random moments;
fetches at random moments. Afterwards the store must hold no broken artifact, and the same publish
or fetch must complete with the digest of an undisturbed one. Any failure gives exit code 1.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.storage.backends import PRODUCER, Place, contents, examine, place, write_files
from benchmarks.storage.campaign import Trial, command, run_trial
from rlhf.store import Store

SYSTEM_CALLS = ("link", "fsync", "replace", "unlink", "mkdir")
#: Bytes between two points inside of a large file.
STEP = 4 * 1024 * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="at random moments, in each store")
    parser.add_argument("--fetches", type=int, default=30, help="killed ones, in each store")
    parser.add_argument("--mib", type=int, default=40, help="size of the large file")
    parser.add_argument("--stores", nargs="+", default=["folder", "ceph"])
    return command(parser, measure, report)


def measure(store: str, options: Namespace) -> list[Row]:
    """Run all trials on one store."""
    with tempfile.TemporaryDirectory() as folder, place(store) as target:
        work = Path(folder)
        rng = random.Random(f"{options.seed}/{target.name}")
        write_files(work / "files", options.seed, options.mib << 20)
        publisher = Publisher(target, work / "files", work)
        points = publisher.undisturbed()
        print(
            f"{target.name}: {len(points)} points, {publisher.seconds:.2f} s a publish", flush=True
        )
        return [
            run_trial(Row(name, target.name), run)
            for name, run in (
                ("publish, every point", lambda row: at_points(publisher, points, row)),
                ("publish, at random", lambda row: at_random(publisher, options.kills, rng, row)),
                ("fetch, at random", lambda row: readers(publisher, options.fetches, rng, row)),
            )
        ]


def report(rows: list[Row]) -> str:
    """Return the table for RESULTS.md."""
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


@dataclass
class Row(Trial):
    """Counts of one trial on one store."""

    kills: int = 0
    late: int = 0
    """Processes that ended before the kill."""
    visible: int = 0
    """Kills after which the artifact was readable."""
    unfinished: int = 0
    """Unfinished uploads, or temporary files, before the sweep."""
    completed: int = 0
    """Publishes or fetches that completed when run again."""


def at_points(publisher: Publisher, points: list[str], row: Row) -> None:
    """Kill a publish once at each point."""
    for point in points:
        end = ended(forked(lambda point=point: publisher.publish(at=point)))
        publisher.trial(row, point, end)


def at_random(publisher: Publisher, kills: int, rng: random.Random, row: Row) -> None:
    """Kill publishes at moments spread over the duration of one."""
    for _ in range(kills):
        moment = rng.uniform(0, publisher.seconds)
        end = killed(publisher.publish, moment)
        publisher.trial(row, f"after {moment:.3f} s", end)


def readers(publisher: Publisher, kills: int, rng: random.Random, row: Row) -> None:
    """Kill fetches; the next ones must clear the cache of leftover files."""
    place, cache = publisher.place, publisher.work / "cache"
    wanted = publisher.publish()
    other = publisher.work / "other"
    other.mkdir()
    (other / "small").write_bytes(rng.randbytes(1000))
    another = (
        place.open(cache).publish(other, "data", parents={}, producer=PRODUCER, metrics={}).digest
    )
    begun = time.monotonic()
    ended(forked(lambda: place.open(cache).fetch(wanted)))
    seconds = time.monotonic() - begun
    for number in range(kills):
        shutil.rmtree(cache, ignore_errors=True)
        moment = rng.uniform(0, seconds)
        end = killed(lambda: place.open(cache).fetch(wanted), moment)
        row.kills += end == -signal.SIGKILL
        row.late += end == 0
        row.visible += (cache / "cache" / "artifacts" / wanted).exists()
        leftover_files = leftovers(cache)
        row.unfinished += len(leftover_files)
        # The next fetch, which sweeps the cache, is of another artifact or of the same.
        wrong = [] if end in (0, -signal.SIGKILL) else [f"ended with {end}"]
        for digest in (another, wanted) if number % 2 else (wanted, another):
            fetched = contents(place.open(cache).fetch(digest))
            if fetched != (publisher.expected if digest == wanted else contents(other)):
                wrong.append("fetched other bytes")
            if number % 2 or digest == another:
                wrong += [f"{name} is left over" for name in leftovers(cache)]
        row.completed += not wrong
        row.failures += [f"readers {place.name}, after {moment:.3f} s: {w}" for w in wrong]
    place.wipe()
    shutil.rmtree(other)
    shutil.rmtree(cache, ignore_errors=True)


def leftovers(cache: Path) -> list[str]:
    """Return the files in the cache's working folders."""
    folders = [cache / "cache" / name for name in ("tmp", "locks")]
    return [f"{f.name}/{p.name}" for f in folders if f.is_dir() for p in sorted(f.iterdir())]


class Publisher:
    """A publisher of one folder to one store."""

    def __init__(self, place: Place, folder: Path, work: Path) -> None:
        self.place, self.folder, self.work = place, folder, work
        self.expected = contents(folder)
        self.digest = ""
        self.seconds = 0.0

    def publish(
        self, at: str | None = None, passed: Path | None = None, store: Store | None = None
    ) -> str:
        """Publish in this process and return the digest.

        `at` is a point to die at; `passed` a file for the names of the points.
        """
        store = store or self.place.open(self.work / "cache")
        points = Points(at)
        if at or passed:
            backend: Any = Deadly(store._backend, points)
            store = Store(backend, store._cache)
        ref = store.publish(self.folder, "data", parents={}, producer=PRODUCER, metrics={})
        if passed:
            passed.write_text("\n".join(points.passed))
        return ref.digest

    def undisturbed(self, times: int = 3) -> list[str]:
        """Measure digest and duration of publishes; return the names of the points.

        Each publish goes to an empty store.
        """
        seconds = []
        for _ in range(times):
            begun = time.monotonic()
            if ended(forked(self.publish)):
                raise SystemExit(f"{self.place.name}: an undisturbed publish failed")
            seconds.append(time.monotonic() - begun)
            manifests = [key for key in self.place.objects() if key.startswith("manifests/")]
            self.digest = manifests[0].removeprefix("manifests/").removesuffix(".json")
            self.place.wipe()
        self.seconds = sorted(seconds)[len(seconds) // 2]
        names = self.work / "points"
        if ended(forked(lambda: self.publish(passed=names))):
            raise SystemExit(f"{self.place.name}: counting the points failed")
        self.place.wipe()
        return names.read_text().splitlines()

    def trial(self, row: Row, name: str, end: int) -> None:
        """Check the store after a kill, complete the publish, check again, wipe."""
        row.kills += end == -signal.SIGKILL
        row.late += end == 0
        wrong = [f"ended with {end}"] if end not in (0, -signal.SIGKILL) else []
        broken, manifests = examine(self.place)
        row.visible += manifests
        row.unfinished += self.place.unfinished()
        store = self.place.open(self.work / "cache")
        listed = [artifact.ref for artifact in store.list()]
        wrong += broken
        wrong += [line for ref in listed for line in store.problems(ref, deep=True)]
        if len(listed) != manifests:
            wrong.append(f"{manifests} manifests, {len(listed)} listed")
        if end == 0 and manifests != 1:
            wrong.append("published, but not there")
        wrong += self._complete(store)
        row.completed += not wrong
        row.failures += [f"{row.trial} {self.place.name}, {name}: {line}" for line in wrong]
        shutil.rmtree(self.work / "cache", ignore_errors=True)
        self.place.wipe()

    def _complete(self, store: Store) -> list[str]:
        """Publish again, fetch and collect; return differences to an undisturbed run."""
        if self.publish(store=store) != self.digest:
            return ["published again, the digest differs"]
        wrong = (
            [] if contents(store.fetch(self.digest)) == self.expected else ["fetched other bytes"]
        )
        store.history.append("kept", {"digest": self.digest})
        # Negative: S3 timestamps have a resolution of 1 s.
        store.collect(grace=-2, dry_run=False)
        blobs = {f"blobs/sha256/{sha[:2]}/{sha}" for sha in self.expected.values()}
        keys = {*self.place.objects()}
        whole = {*blobs, f"manifests/{self.digest}.json", "refs/kept/000001.json"}
        wrong += [f"{key} is left over" for key in keys - whole if not key.endswith(".ended")]
        wrong += [f"{key} is gone" for key in whole - keys]
        if unfinished := self.place.unfinished():
            wrong.append(f"{unfinished} unfinished uploads are left over")
        return wrong


class Points:
    """Numbered points of a publish; the process dies at the given one."""

    def __init__(self, at: str | None = None) -> None:
        self.passed: list[str] = []
        self._at = at
        self._lock = threading.Lock()

    def __call__(self, name: str) -> None:
        with self._lock:
            numbered = f"{name} {1 + sum(p.startswith(name + ' ') for p in self.passed)}"
            if numbered == self._at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.passed.append(numbered)

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a call, with a point before and a point after it."""

        def wrapped(*args: Any, **options: Any) -> Any:
            self(f"before {name}")
            result = call(*args, **options)
            self(f"after {name}")
            return result

        return wrapped


class Deadly:
    """A backend with points around its calls and their requests or system calls."""

    def __init__(self, backend: Any, points: Points) -> None:
        self._backend, self._points = backend, points
        if hasattr(backend, "_client"):
            events = backend._client.meta.events
            for when in ("before", "after"):
                events.register(
                    f"{when}-call.s3",
                    lambda model, when=when, **_: points(f"{when} request {model.name}"),
                )
        else:
            for name in SYSTEM_CALLS:
                setattr(os, name, points.around(name, getattr(os, name)))

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._backend, name)
        return self._points.around(name, value) if callable(value) else value

    def put_file(self, key: str, source: Any) -> None:
        """Send a file, with a point every STEP bytes."""
        send, done = source.sent, 0

        def sent(count: int) -> None:
            nonlocal done
            steps, done = done // STEP, done + count
            if done // STEP > steps:
                self._points("inside put_file")
            send(count)

        source.sent = sent
        self._points.around("put_file", self._backend.put_file)(key, source)


def forked(work: Callable[[], object]) -> int:
    """Run a function in a forked process and return its id."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def killed(work: Callable[[], object], after: float) -> int:
    """Run a function in a forked process and kill it after these seconds."""
    child = forked(work)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    return ended(child)


def ended(child: int) -> int:
    """Wait for a process; return its exit code, −n if signal n ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    sys.exit(main())
