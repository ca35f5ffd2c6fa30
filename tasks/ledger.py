"""Ledger of what stages cost: each attempt, each artifact, each run, as histories in the store.

An attempt is written to a small file in the work folder every few seconds, so that one that is
killed is known to the next one on this machine, and now and then to the store, for the next one
anywhere. What a stage cost is the sum of all its attempts since the last that was recorded. No
failure to write here ends a stage: its result is worth more than its price.
"""

from __future__ import annotations

import json
import logging
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rlhf.champions import timestamp
from rlhf.config import PipelineConfig
from rlhf.config.pipeline import place_names
from rlhf.costs import Cost, read_cost, total
from rlhf.errors import ArtifactMissing, StoreError
from rlhf.limits import load_json
from rlhf.meter import CPU, Meter, device_name
from rlhf.plain_text import counted
from rlhf.store import Store
from rlhf.store.objects import in_parallel
from tasks.stage import Stage

log = logging.getLogger("rlhf.tasks")
#: Prefixes of the histories of attempts, artifacts and runs.
ATTEMPTS, ARTIFACTS, RUNS = "costs/attempts/", "costs/artifacts/", "costs/runs/"
#: Folder of the attempts in progress, in the work folder.
FOLDER = "attempts"
#: Seconds between two entries of one attempt in the store.
SEND_EVERY = 600.0
#: Largest file of an attempt that is read, in bytes.
LARGEST = 100_000


class Ledger:
    """Costs of one stage's work; `key` is its fingerprint, `name` that of its local files."""

    def __init__(
        self, stage: Stage, key: str, name: str, config: PipelineConfig, store: Store,
        work_dir: Path,
    ) -> None:  # fmt: skip
        self.config, self.stage, self._store, self._key = config, stage, store, key
        self._history = f"{ATTEMPTS}{stage.name}/{key}"
        self._id = uuid.uuid4().hex[:16]
        self._folder, self._name = work_dir / FOLDER, name
        # Each attempt has its own: one that could not be sent yet is not written over.
        self._file = self._folder / f"{name}.{self._id}.json"
        self._sent, self._is_sent = time.monotonic(), False
        self.machine = _machine(stage, config)
        prices = config.costs
        price = prices.price(_names(self.machine, stage.name)) if prices.price_per_hour else None
        self.machine = self.machine.priced(price, prices.currency).model_copy(
            update={"work": key[:16]}
        )
        self._meter: Meter | None = None

    @property
    def price_per_hour(self) -> float | None:
        """Price of an hour of the stage on all its devices; None without a price."""
        price = self.machine.price
        return None if price is None else price * self.machine.devices

    def earlier(self) -> list[Cost]:
        """Return the attempts so far that had no recorded result, killed ones of here included.

        A file of one stays until the store has it; until then it counts all the same.
        """
        unsent: list[dict[str, Any]] = []
        for path, entry in self._left():
            if self._append(entry, "what an attempt that was killed cost"):
                _remove(path)
            else:
                unsent.append(entry)
        entries: list[dict[str, Any]] = []
        with _harmless("what earlier attempts cost"):
            entries = _entries(self._store, self._history)
        return _open_attempts([*entries, *unsent])

    def settle(self, digest: str, *, whole: bool) -> None:
        """Write down what a recorded artifact cost, if its process was killed before it could.

        Args:
            digest: Digest of the artifact.
            whole: Whether it is the whole result.
        """
        left = self._left()
        if not left:
            return
        with _harmless("what a stage cost whose process was killed"):
            own = [entry for _, entry in left]
            attempts = _open_attempts([*_entries(self._store, self._history), *own])
            summed = total(attempts)
            if summed and read_cost(self._store.history.latest(ARTIFACTS + digest)) is None:
                self._store.history.append(ARTIFACTS + digest, summed.row())
            for entry in own:
                end = {"recorded": True, "id": entry["id"]}
                self._store.history.append(self._history, end if whole else entry)
            for path, _ in left:
                _remove(path)

    @contextmanager
    def attempt(self) -> Iterator[Meter]:
        """Measure an attempt while the block runs; one that fails is added to the history."""
        gpus = 0 if self.machine.device == CPU else self.machine.devices // self.machine.nodes
        with Meter(gpus, self._sampled) as self._meter:
            self._write()
            try:
                yield self._meter
            except BaseException:
                self._write()
                if self._send():
                    _remove(self._file)
                raise

    def conclude(self, digest: str, earlier: Sequence[Cost], *, whole: bool) -> Cost:
        """Record what a recorded artifact cost in all its attempts, and return that.

        Args:
            digest: Digest of the artifact.
            earlier: The attempts before this one.
            whole: Whether it is the whole result; a training that its budget stopped goes on later.
        """
        self._write()
        own = self._cost()
        summed = total([*earlier, own]) or own
        with _harmless("what the stage cost"):
            self._store.history.append(ARTIFACTS + digest, summed.row())
            if not whole:
                self._store.history.append(self._history, self._entry())
            elif earlier or self._is_sent:
                self._store.history.append(self._history, {"recorded": True, "id": self._id})
            _remove(self._file)  # without it the next run settles this
        return summed

    def _cost(self) -> Cost:
        assert self._meter is not None
        measured = self._meter.cost().row()
        cost = self.machine.model_copy(update={**measured, "when": timestamp()})
        return cost.priced(cost.price, cost.currency)

    def _sampled(self) -> None:
        """Write the attempt down, from the meter's thread."""
        self._write()
        if time.monotonic() - self._sent >= SEND_EVERY:
            self._send()

    def _entry(self) -> dict[str, Any]:
        return {"id": self._id, "cost": self._cost().row()}

    def _write(self) -> None:
        scratch = self._file.with_suffix(".tmp")
        with suppress(OSError):  # a full disk is told by what needs it
            self._file.parent.mkdir(exist_ok=True)
            scratch.write_text(json.dumps(self._entry()), encoding="utf-8")
            scratch.replace(self._file)

    def _send(self) -> bool:
        self._sent, self._is_sent = time.monotonic(), True
        return self._append(self._entry(), "what the attempt cost")

    def _append(self, entry: Mapping[str, Any], what: str) -> bool:
        """Add an entry to the attempts; return whether the store has it."""
        with _harmless(what):
            self._store.history.append(self._history, entry)
            return True
        return False

    def _left(self) -> list[tuple[Path, dict[str, Any]]]:
        """Return the files of earlier attempts of this work here; damaged ones are removed."""
        found: list[tuple[Path, dict[str, Any]]] = []
        for path in left_attempts(self._folder.parent, self._name):
            if path == self._file:
                continue
            with suppress(OSError, ValueError):
                entry = load_json(path.read_bytes()) if path.stat().st_size <= LARGEST else None
                if isinstance(entry, dict) and entry.get("id") and read_cost(entry.get("cost")):
                    found.append((path, entry))
                    continue
            log.warning("%s is damaged, and is left out of the costs", path)
            _remove(path)
        return found


def left_attempts(work_dir: Path, name: str) -> list[Path]:
    """Return the files of attempts of a work that are in progress here, or were killed."""
    folder = work_dir / FOLDER
    # The first name is that of an older version.
    return [*folder.glob(f"{name}.json"), *sorted(folder.glob(f"{name}.*.json"))]


def attempts_of(store: Store, stage: str, key: str) -> list[Cost]:
    """Return the attempts of a stage's work since its last recorded result.

    Raises:
        StoreError: The store does not answer.
    """
    return _open_attempts(_entries(store, f"{ATTEMPTS}{stage}/{key}"))


def _entries(store: Store, history: str) -> list[dict[str, Any]]:
    """Return a history's entries, and warn once of those that are left out as damaged."""
    entries, problems = store.history.sound(history)
    warn_of_damage(history, problems)
    return entries


def warn_of_damage(history: str, problems: Sequence[str]) -> None:
    """Warn once that entries of a history of costs are left out."""
    if problems:
        count = counted(len(problems), "damaged entry is", "damaged entries are")
        log.warning("%s: %s left out of the costs (%s)", history, count, problems[0])


def _open_attempts(entries: Sequence[Mapping[str, Any]]) -> list[Cost]:
    """Return the attempts that are in no recorded cost yet; one that was sent often counts once."""
    attempts: dict[str, Cost] = {}
    closed: set[str] = set()
    for entry in entries:
        name = str(entry.get("id"))
        if entry.get("recorded"):
            closed |= {*attempts, name}
            attempts.clear()
        elif name not in closed and (cost := read_cost(entry.get("cost"))) is not None:
            attempts[name] = cost  # the last entry
    return [*attempts.values()]


def costs_of(store: Store, digests: Sequence[str]) -> dict[str, Cost]:
    """Return what artifacts cost when they were made, as far as that is known."""

    def read(digest: str) -> Cost | None:
        with _harmless("what an artifact cost"):
            return read_cost(store.history.latest(ARTIFACTS + digest))
        return None

    found = zip(digests, in_parallel(read, digests), strict=True)
    return {digest: cost for digest, cost in found if cost is not None}


def cost_of_making(store: Store, digest: str) -> Cost | None:
    """Return what an artifact and all that this project made for it cost, as far as it is known.

    A model that a training starts from, and the champion that it is compared with, had runs of
    their own.
    """
    seen: set[str] = set()
    frontier = {digest}
    while frontier:
        seen |= frontier
        parents: set[str] = set()
        for each in sorted(frontier):
            with suppress(ArtifactMissing), _harmless("what a parent cost"):
                roles = store.manifest(each).parents
                parents |= {d for role, d in roles.items() if role not in OTHERS}
        frontier = parents - seen
    return total([*costs_of(store, sorted(seen)).values()])


#: Roles of parents that were made by other runs.
OTHERS = ("base", "champion", "champion-evaluation")


def record_run(store: Store, line: str, entry: Mapping[str, Any]) -> None:
    """Add a run's costs to the history of its model line."""
    with _harmless("what the run cost"):
        store.history.append(RUNS + line, entry)


def _machine(stage: Stage, config: PipelineConfig) -> Cost:
    """Return where a stage runs, as a cost of nothing."""
    section = getattr(config, stage.section or "", None)
    trains = stage.trains(config)
    per_node = (getattr(section, "processes", None) or 1) if trains else 1
    nodes = getattr(section, "nodes", 1) if trains else 1
    device = device_name(config.runtime.device)
    return Cost(
        device=device, processes=per_node * nodes, nodes=nodes, host=socket.gethostname(),
        devices=nodes if device == CPU else per_node * nodes,
    )  # fmt: skip


def _names(machine: Cost, stage: str) -> list[str]:
    """Return the names that a price may have: of the deployment, the device and its type."""
    names = [machine.device, CPU if machine.device == CPU else "cuda"]
    runtime = sys.modules.get("prefect.runtime")
    deployment = runtime.deployment.name if runtime else None  # asks Prefect's server
    return [*place_names(stage, str(deployment)), *names] if deployment else names


def _remove(file: Path) -> None:
    with suppress(OSError):
        file.unlink(missing_ok=True)
        file.parent.rmdir()  # if there is no other


@contextmanager
def _harmless(what: str) -> Iterator[None]:
    """Log an error of the ledger, and go on."""
    try:
        yield
    except (StoreError, OSError, ValueError) as error:
        log.warning("%s is not in the ledger (%s)", what, error)
