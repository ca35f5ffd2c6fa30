"""Faults of network and processes: our store, `aws s3 sync` and MLflow.

Each stores an artifact under one name at one prefix. A trial is a put and a get in child processes,
with one fault in one of them, and then a check of the delivered files.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.storage.methods import MIB, PEERS, RELEASE
from benchmarks.storage.report import Table, verdict
from benchmarks.storage.runs import SideFailed, Site, delivered, random_files
from benchmarks.storage.wire import Change, Direction, Once, cut, during, flip, reset, wire
from tests.store.proxy import fault_proxy

SIDES = ("ours", *PEERS)
#: Shares of the files, as in a model's folder: one large file, sent in parts, and small ones.
SHARES = (0.6, *[0.02] * 20)


def measure(site: Site, mib: float) -> Table:
    """Try every fault on every method."""
    table = Table(f"Faults, artifacts of {mib:g} MiB", ["", *SIDES])
    sizes = [int(share * mib * MIB) for share in SHARES]
    for name, attempt in TRIALS.items():
        row = [name]
        for side in SIDES:
            work = site.new_folder()
            a, b = (random_files(work / which, sizes) for which in "ab")
            trial = Trial(site, side, a, b, sum(sizes))
            row.append(attempt(trial))
            site.forget(trial.place)
            shutil.rmtree(work)
        print(f"{row[0]}: {'; '.join(row[1:])}", flush=True)
        table.rows.append(row)
    return table


@dataclass
class Trial:
    """One method at one prefix, with two contents of equal names and sizes."""

    site: Site
    side: str
    a: Path
    b: Path
    bytes: int

    def __post_init__(self) -> None:
        self.place = self.site.place()

    def put(self, folder: Path, endpoint: str | None = None) -> str | None:
        """Release a folder; return the error, if any."""
        return self._run("put", folder, endpoint)[0]

    def get(self, endpoint: str | None = None) -> tuple[str | None, Path]:
        """Fetch the release into a new folder; return the error, if any, and the folder."""
        target = self.site.new_folder()
        error, folder = self._run("get", target, endpoint)
        # Our store delivers only the folder that `fetch` returns; its cache does not count.
        return error, folder or (target if self.side in PEERS else self.site.new_folder())

    def _run(
        self, operation: str, folder: Path, endpoint: str | None
    ) -> tuple[str | None, Path | None]:
        arguments = (self.side, operation, str(folder), self.place, RELEASE)
        try:
            return None, self.site.run(*arguments, endpoint=endpoint).folder
        except SideFailed as error:
            print(f"    {self.side}, {operation}: {error}", flush=True)
            return str(error), None

    @contextlib.contextmanager
    def fault(self, direction: Direction, change: Change, share: float = 0.4) -> Iterator[str]:
        """Run a proxy that injects one fault after `share` of the artifact's bytes."""
        once = Once(direction, int(self.bytes * share), change)
        with wire(self.site.server.endpoint, once) as endpoint:
            yield endpoint
        if not once.done:
            raise RuntimeError(f"{self.side}: nothing went wrong, so nothing was tried")

    def seen(self, *wanted: Path) -> str:
        """Return the verdict on a fetch of the release."""
        error, folder = self.get()
        return verdict(error, delivered(folder, *wanted))


def upward(change: Change) -> Callable[[Trial], str]:
    """Return an attempt with a fault during a put, followed by a get."""

    def attempt(trial: Trial) -> str:
        with trial.fault("up", change) as endpoint:
            error = trial.put(trial.a, endpoint)
        return _after_put(trial, error)

    return attempt


def _after_put(trial: Trial, error: str | None) -> str:
    read_error, folder = trial.get()
    what = delivered(folder, trial.a)
    if error is None:
        return verdict(read_error, what)
    # The writer got an error, but a reader must not get a part without one.
    if what == "wrong":
        return "the writer's error, but **a reader silently gets a part**"
    return "fails cleanly"


def downward(change: Change) -> Callable[[Trial], str]:
    """Return an attempt with a fault during a get."""

    def attempt(trial: Trial) -> str:
        trial.put(trial.a)
        with trial.fault("down", change) as endpoint:
            error, folder = trial.get(endpoint)
        return verdict(error, delivered(folder, trial.a))

    return attempt


def busy(trial: Trial) -> str:
    """Answer 503 three times to a put, and again to a get."""
    pending: list[tuple[str, int]] = []

    def refuse(method: str, _path: str, _headers: dict[str, str]) -> int | None:
        return pending.pop()[1] if pending and pending[0][0] == method else None

    with fault_proxy(trial.site.server.endpoint) as faults:
        faults.refuse = refuse
        pending += [("PUT", 503)] * 3
        up = _after_put(trial, trial.put(trial.a, faults.endpoint))
        trial.put(trial.a)
        pending[:] = [("GET", 503)] * 3
        error, folder = trial.get(faults.endpoint)
        down = verdict(error, delivered(folder, trial.a))
    return up if up == down else f"up: {up}; down: {down}"


def killed(trial: Trial) -> str:
    """Kill the publisher in mid-upload; fetch, then publish again and fetch."""
    arguments = (trial.side, "put", str(trial.a), trial.place, RELEASE)
    running: list[Callable[[], None]] = []
    with trial.fault("up", during(lambda: [kill() for kill in running])) as endpoint:
        process = trial.site.start(*arguments, endpoint=endpoint)
        running.append(process.kill)
        with contextlib.suppress(SideFailed):
            process.go().result()
    error, folder = trial.get()
    half = delivered(folder, trial.a)
    outcome = "**a reader silently gets a part**" if half == "wrong" else "a reader finds nothing"
    error = trial.put(trial.a)
    return f"{outcome}; again: {verdict(error, 'nothing') if error else trial.seen(trial.a)}"


def overtaken(trial: Trial) -> str:
    """Put `b` while `a` is put under the same name; a get must return one intact."""
    # At 0.8, some of the first writer's files are complete in any order.
    with trial.fault("up", during(lambda: _release_other(trial)), 0.8) as endpoint:
        trial.put(trial.a, endpoint)
    return trial.seen(trial.a, trial.b)


def replaced(trial: Trial) -> str:
    """Release a new version while a reader fetches the old one."""
    trial.put(trial.a)
    with trial.fault("down", during(lambda: _release_other(trial))) as endpoint:
        error, folder = trial.get(endpoint)
    return verdict(error, delivered(folder, trial.a, trial.b))


def _release_other(trial: Trial) -> None:
    """Release the other content with fresh times; S3 keeps times in whole seconds."""
    time.sleep(1.1)
    for path in trial.b.iterdir():
        path.touch()
    trial.put(trial.b)


def copied_back(trial: Trial) -> str:
    """Release a version of equal sizes and older times, as a backup restores them."""
    trial.put(trial.a)
    for path in trial.b.iterdir():
        os.utime(path, (0, 0))
    error = trial.put(trial.b)
    return verdict(error, "nothing") if error else trial.seen(trial.b)


TRIALS: dict[str, Callable[[Trial], str]] = {
    "a bit flips on the way up": upward(flip),
    "a bit flips on the way down": downward(flip),
    "503, three times": busy,
    "connection reset in mid-upload": upward(reset),
    "connection reset in mid-download": downward(reset),
    "download cut short": downward(cut),
    "publisher killed (kill -9) in mid-upload": killed,
    "two writers of one name, one overtakes": overtaken,
    "replaced while a reader downloads": replaced,
    "next version of equal sizes, older times": copied_back,
}
