"""Campaign of bit flips on the wire to S3: `python -m benchmarks.storage.flips`.

Files go to a real S3 server (the tests' Ceph) and come back over a proxy that flips one bit: at a
seeded position of a body on its way down or up, or anywhere in the stream, heads and listings
included. Downloads are compared with the sources, and stored objects are read past the proxy. Wrong
bytes that were delivered or stored, or an error that is no StoreError, give exit code 1.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import random
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import boto3

from rlhf.config.pipeline import StoreConfig
from rlhf.errors import StoreError
from rlhf.store import ArtifactRef, Producer, Store
from rlhf.store.cache import Cache
from rlhf.store.s3 import S3Backend
from tests.ceph import CephServer, ceph_server
from tests.store.wire import Fault, Wire, wire

SMALL = 64 << 10
#: Above 16 MiB: uploaded in two parts, downloaded in three ranges.
LARGE = (16 << 20) + (1 << 16)
COLUMNS = ("flips", "repaired or harmless", "clear error", "delivered wrong", "stored wrong",
           "other error")  # fmt: skip
BAD = COLUMNS[-3:]
#: Trials between two audits of the stored objects.
EVERY = 20
#: The flip, and the operation under it, which returns a column, or an empty text for success.
Trial: TypeAlias = tuple[Fault, Callable[[Path], str]]


def main() -> int:
    """Run all types of flips and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.storage.flips")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of flips")
    parser.add_argument("--seed", type=int, default=0, help="of the places")
    options = parser.parse_args()
    rows: dict[str, Counter[str]] = {}
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="flips-") as folder,
        ceph_server() as server,
        opened(server, Path(folder)) as bench,
    ):
        for name, (_, count) in KINDS.items():
            rows[name] = campaign(bench, name, max(1, round(count * options.scale)), options.seed)
            sys.stdout.write(f"{name}: {dict(rows[name])}\n")
            sys.stdout.flush()
    sys.stdout.write(f"\n{table(rows)}\n{time.monotonic() - began:.0f} s\n")
    return int(any(row[column] for row in rows.values() for column in BAD))


def campaign(bench: Bench, name: str, count: int, seed: int) -> Counter[str]:
    """Run `count` flips of one type; return the outcomes by column."""
    outcomes: Counter[str] = Counter()
    for number in itertools.count():
        if outcomes["flips"] == count:
            break
        rng = random.Random(f"{name} {seed} {number}")
        fault, work = KINDS[name][0](bench, rng)
        with tempfile.TemporaryDirectory(dir=bench.folder) as cache:
            outcome = one(work, Path(cache))
        bench.line.clear()
        if fault.struck:  # not every exchange has the byte that it aims at
            outcomes.update(["flips", outcome or "repaired or harmless"])
        if outcome in BAD:
            sys.stdout.write(f"{name} {number}: {outcome}: {fault}\n")
        if number % EVERY == EVERY - 1:
            outcomes["stored wrong"] += bench.audit()
    outcomes["stored wrong"] += bench.audit()
    return outcomes


def one(work: Callable[[Path], str], cache: Path) -> str:
    """Return the column that the trial counts for; empty for success."""
    try:
        return work(cache)
    except StoreError as error:
        return "clear error" if "\n" not in str(error) else "other error"
    except Exception as error:
        sys.stdout.write(f"{error!r}\n")
        return "other error"


def table(rows: dict[str, Counter[str]]) -> str:
    """Return the outcomes as Markdown."""
    lines = ["| place | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(str(row[column]) for column in COLUMNS) + " |")
    return "\n".join(lines) + "\n"


@contextmanager
def opened(server: CephServer, folder: Path) -> Iterator[Bench]:
    """Yield a Bench on a new bucket of this server; delete the bucket afterwards."""
    os.environ.update(server.environment)
    client = boto3.client("s3", endpoint_url=server.endpoint)
    bucket = f"flips-{uuid.uuid4().hex}"
    client.create_bucket(Bucket=bucket)
    with wire(server.endpoint) as line:
        options = StoreConfig(endpoint_url=line.endpoint)
        # Short timeouts, because a flipped length makes both sides wait.
        backend = S3Backend(f"s3://{bucket}/campaign", options, 2, 2, attempts=4)
        bench = Bench(line, folder, client, bucket, backend)
        try:
            for name, size in (("small", SMALL), ("large", LARGE)):
                new_files(folder / name, size)
                bench.digests[name] = digests(folder / name)
                bench.refs[name] = publish(bench.store(folder / "cache"), folder / name)
            bench.store(folder / "cache").history.append("history", {"n": 1})
            bench.initial_keys = frozenset(bench.keys())
            yield bench
        finally:
            bench.initial_keys = frozenset()
            bench.audit()
            client.delete_bucket(Bucket=bucket)
            client.close()


@dataclass
class Bench:
    """A server behind a proxy, with one small and one large intact artifact."""

    line: Wire
    folder: Path
    client: Any
    bucket: str
    backend: S3Backend
    refs: dict[str, ArtifactRef] = field(default_factory=dict)
    digests: dict[str, dict[str, str]] = field(default_factory=dict)
    initial_keys: frozenset[str] = frozenset()

    def store(self, cache: Path) -> Store:
        """Return the store with a cache of its own."""
        return Store(self.backend, Cache(cache))

    def keys(self) -> list[str]:
        """Return all keys of the bucket."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
        return [item["Key"] for page in pages for item in page.get("Contents", ())]

    def audit(self) -> int:
        """Count objects whose content is not that of their name; delete new ones.

        Read past the proxy.
        """
        wrong = 0
        for key in self.keys():
            name = key.rpartition("/")[2].removesuffix(".json")
            if len(name) == 64:
                data = self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
                wrong += hashlib.sha256(data).hexdigest() != name
            if key not in self.initial_keys:
                self.client.delete_object(Bucket=self.bucket, Key=key)
        return wrong


def down(bench: Bench, rng: random.Random) -> Trial:
    """Flip a bit in the body of a blob, a manifest or an entry that is read."""
    what = rng.choice(["small"] * 6 + ["manifest", "entry"] + ["large"] * 2)
    if what == "entry":
        fault = flip(bench, rng, "down", 80, method="GET", path="/refs/")
        return fault, lambda cache: read_entry(bench, cache)
    if what == "manifest":
        fault = flip(bench, rng, "down", 300, method="GET", path="/manifests/")
        return fault, lambda cache: fetch(bench, cache, "small")
    # The last range of a large file holds 64 KiB, the others 8 MiB.
    end = SMALL if what == "small" else 8 << 20
    fault = flip(bench, rng, "down", end, method="GET", path="/blobs/")
    return fault, lambda cache: fetch(bench, cache, what)


def up(bench: Bench, rng: random.Random) -> Trial:
    """Flip a bit in the body of a blob, part, manifest or entry that is written."""
    what = rng.choice(["small"] * 5 + ["manifest", "entry"] + ["large"] * 3)
    if what == "entry":
        fault = flip(bench, rng, "up", 80, method="PUT", path="/refs/")
        return fault, lambda cache: write_entry(bench, cache, rng.random())
    if what == "manifest":
        fault = flip(bench, rng, "up", 300, method="PUT", path="/manifests/")
        return fault, lambda cache: send(bench, cache, SMALL)
    size, path = (SMALL, "/blobs/") if what == "small" else (LARGE, "partNumber")
    fault = flip(bench, rng, "up", SMALL if what == "small" else 16 << 20, method="PUT", path=path)
    return fault, lambda cache: send(bench, cache, size)


def anywhere(bench: Bench, rng: random.Random) -> Trial:
    """Flip a bit in a message's first bytes: status, head, listing or error."""
    direction, end = rng.choice(["up", "down"]), rng.choice([50, 300, 600, 1500])
    method = rng.choice(["", "GET", "HEAD", "PUT"])
    fault = flip(bench, rng, direction, end, where="message", method=method)
    works: list[Callable[[Path], str]] = [
        lambda cache: fetch(bench, cache, "small"),
        lambda cache: send(bench, cache, SMALL),
        lambda cache: send(bench, cache, SMALL),
        lambda cache: read_entry(bench, cache),
        lambda cache: write_entry(bench, cache, rng.random()),
    ]
    return fault, rng.choice(works)


KINDS: dict[str, tuple[Callable[[Bench, random.Random], Trial], int]] = {
    "body, down": (down, 1000),
    "body, up": (up, 200),
    "anywhere": (anywhere, 300),
}


def flip(bench: Bench, rng: random.Random, direction: str, end: int, **match: str) -> Fault:
    """Arm a flip of one bit before byte `end`, in the first long enough message."""
    choice: dict[str, Any] = {"bit": rng.randrange(8), **match}
    return bench.line.arm("flip", direction, rng.randrange(end), **choice)


def fetch(bench: Bench, cache: Path, name: str) -> str:
    """Fetch an artifact; return the column of wrong bytes, or an empty text."""
    folder = bench.store(cache).fetch(bench.refs[name])
    return "" if digests(folder) == bench.digests[name] else "delivered wrong"


def send(bench: Bench, cache: Path, size: int) -> str:
    """Publish new bytes and fetch them by another client past the fault."""
    new_files(cache / "new", size)
    ref = publish(bench.store(cache), cache / "new")
    bench.line.clear()
    folder = bench.store(cache / "other").fetch(ref)
    return "" if digests(folder) == digests(cache / "new") else "stored wrong"


def read_entry(bench: Bench, cache: Path) -> str:
    """Read the history, whose first entry is known."""
    first = bench.store(cache).history.entries("history")[:1]
    return "" if first == [{"n": 1}] else "delivered wrong"


def write_entry(bench: Bench, cache: Path, value: float) -> str:
    """Append to the history; the entry of the returned number must hold the value."""
    number = bench.store(cache).history.append("written", {"value": value})
    key = f"campaign/refs/written/{number:06d}.json"
    data = bench.client.get_object(Bucket=bench.bucket, Key=key)["Body"].read()
    return "" if repr(value).encode() in data else "stored wrong"


def new_files(folder: Path, size: int) -> None:
    """Write a file of random bytes."""
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(os.urandom(size))


def publish(store: Store, folder: Path) -> ArtifactRef:
    """Publish a folder with a constant producer."""
    producer = Producer(stage="flips", code_version="1", config={}, seed=0, versions={})
    return store.publish(folder, "policy", parents={}, producer=producer, metrics={})


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file by name."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


if __name__ == "__main__":
    raise SystemExit(main())
