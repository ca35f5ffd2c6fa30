"""Stores for the storage campaigns, inspected without the store's own code."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3

from rlhf.store import Producer, Store, open_store
from tests.ceph import CephServer, ceph_server
from tests.swift import SwiftServer, swift_server

BUCKET = "campaign"
PRODUCER = Producer(stage="campaign", code_version="0", config={}, seed=0, versions={})


class Place:
    """A store at `uri`, with direct access to its objects."""

    name: str
    uri: str

    def open(self, cache: Path) -> Store:
        """Open the store with this cache."""
        return open_store(self.uri, cache_dir=cache)

    def objects(self) -> list[str]:
        """Return all keys."""
        raise NotImplementedError

    def read(self, key: str) -> bytes:
        """Return an object's bytes."""
        raise NotImplementedError

    def unfinished(self) -> int:
        """Return the number of uploads neither completed nor aborted."""
        raise NotImplementedError

    def wipe(self) -> None:
        """Remove all objects, for the next trial."""
        raise NotImplementedError


class FolderPlace(Place):
    """A store in a local folder; files in `tmp/` are unfinished uploads."""

    name = "folder"

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = root.as_uri()

    def objects(self) -> list[str]:
        return [key for key in self._files() if not key.startswith("tmp/")]

    def read(self, key: str) -> bytes:
        return (self.root / key).read_bytes()

    def unfinished(self) -> int:
        return sum(key.startswith("tmp/") for key in self._files())

    def wipe(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)

    def _files(self) -> list[str]:
        paths = (path for path in self.root.rglob("*") if path.is_file())
        return [path.relative_to(self.root).as_posix() for path in paths]


class BucketPlace(Place):
    """A store in a bucket; server and credentials come from the environment."""

    def __init__(self, name: str, prefix: str, conf: Path | None = None) -> None:
        self.name = name
        self.uri = f"s3://{BUCKET}/{prefix}"
        self._prefix = f"{prefix}/"
        self._conf = conf
        self._wiped = 0
        # Not the default session, which caches the first credentials.
        self.client: Any = boto3.Session().client("s3")
        with contextlib.suppress(self.client.exceptions.BucketAlreadyOwnedByYou):
            self.client.create_bucket(Bucket=BUCKET)

    def objects(self) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=BUCKET, Prefix=self._prefix
        )
        return [
            item["Key"].removeprefix(self._prefix)
            for page in pages
            for item in page.get("Contents", ())
        ]

    def read(self, key: str) -> bytes:
        return self.client.get_object(Bucket=BUCKET, Key=self._prefix + key)["Body"].read()

    def unfinished(self) -> int:
        uploads = self.client.list_multipart_uploads(Bucket=BUCKET, Prefix=self._prefix)
        return len(uploads.get("Uploads", ()))

    def wipe(self) -> None:
        """Delete all objects, and have Ceph free its memory every tenth time.

        Ceph keeps deleted bytes for two hours otherwise.
        """
        for key in self.objects():
            self.client.delete_object(Bucket=BUCKET, Key=self._prefix + key)
        self._wiped += 1
        if self._conf and self._wiped % 10 == 0:
            command = ["radosgw-admin", "-c", str(self._conf), "gc", "process", "--include-all"]
            subprocess.run(command, capture_output=True, check=True)


@contextlib.contextmanager
def place(name: str, prefix: str = "trial") -> Iterator[Place]:
    """Open `folder`, `ceph` or `swift`; a server runs for the length of the block."""
    if name == "folder":
        with tempfile.TemporaryDirectory() as folder:
            yield FolderPlace(Path(folder).resolve() / "store")
    elif name == "ceph":
        with ceph_server() as ceph, environment(ceph):
            yield BucketPlace("Ceph", prefix, Path(ceph.ca_bundle).parent / "ceph.conf")
    else:
        with swift_server() as swift, environment(swift):
            yield BucketPlace("Swift", prefix)


@contextlib.contextmanager
def environment(server: CephServer | SwiftServer) -> Iterator[None]:
    """Point boto3 at the server by environment variables."""
    before = dict(os.environ)
    os.environ.update(server.environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def write_files(folder: Path, seed: int, large: int) -> None:
    """Write two equal files, one nested, an empty one, and a large one."""
    rng = random.Random(seed)
    (folder / "model").mkdir(parents=True)
    same = rng.randbytes(50_000)
    (folder / "a.dat").write_bytes(same)
    (folder / "model" / "b.dat").write_bytes(same)
    (folder / "c.json").write_bytes(rng.randbytes(300))
    (folder / "empty").touch()
    (folder / "model" / "weights").write_bytes(rng.randbytes(large))


def contents(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file by path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def examine(place: Place) -> tuple[list[str], int]:
    """Return problems of the stored objects, and the number of manifests.

    Uses no code of the store.
    """
    wrong: list[str] = []
    blobs: dict[str, int] = {}
    manifests: dict[str, bytes] = {}
    for key in place.objects():
        if key.startswith(("blobs/", "manifests/")):
            data = place.read(key)
            name = key.rpartition("/")[2].removesuffix(".json")
            if hashlib.sha256(data).hexdigest() != name:
                wrong.append(f"{key} has other bytes")
            if key.startswith("blobs/"):
                blobs[name] = len(data)
            else:
                manifests[name] = data
    for name, data in manifests.items():
        for entry in json.loads(data)["files"]:
            if blobs.get(entry["sha256"]) != entry["size"]:
                wrong.append(f"manifest {name[:12]}: {entry['path']} is not there")
    return wrong, len(manifests)
