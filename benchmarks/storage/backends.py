"""Stores for the campaigns against storage, each with a way to look at it that is not its own."""

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
    """A store at `uri`, and what lies there as others see it."""

    name: str
    uri: str

    def open(self, cache: Path) -> Store:
        """A store without any memory of what was before."""
        return open_store(self.uri, cache_dir=cache)

    def objects(self) -> list[str]:
        """All keys."""
        raise NotImplementedError

    def read(self, key: str) -> bytes:
        """An object's bytes."""
        raise NotImplementedError

    def unfinished(self) -> int:
        """Uploads that were begun and neither completed nor given up."""
        raise NotImplementedError

    def wipe(self) -> None:
        """Remove everything, for the next trial."""
        raise NotImplementedError


class FolderPlace(Place):
    """A local folder."""

    name = "folder"

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = root.as_uri()

    def objects(self) -> list[str]:
        """Files, but for those that are being written."""
        return [key for key in self._files() if not key.startswith("tmp/")]

    def read(self, key: str) -> bytes:
        """From the file."""
        return (self.root / key).read_bytes()

    def unfinished(self) -> int:
        """Temporary files."""
        return sum(key.startswith("tmp/") for key in self._files())

    def wipe(self) -> None:
        """The folder goes."""
        shutil.rmtree(self.root, ignore_errors=True)

    def _files(self) -> list[str]:
        paths = (path for path in self.root.rglob("*") if path.is_file())
        return [path.relative_to(self.root).as_posix() for path in paths]


class BucketPlace(Place):
    """A bucket of a server; its address and keys are taken from the environment."""

    def __init__(self, name: str, prefix: str, conf: Path | None = None) -> None:
        self.name = name
        self.uri = f"s3://{BUCKET}/{prefix}"
        self._prefix = f"{prefix}/"
        self._conf = conf
        self._wiped = 0
        # Not the default session, which keeps the first credentials.
        self.client: Any = boto3.Session().client("s3")
        with contextlib.suppress(self.client.exceptions.BucketAlreadyOwnedByYou):
            self.client.create_bucket(Bucket=BUCKET)

    def objects(self) -> list[str]:
        """All pages."""
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=BUCKET, Prefix=self._prefix
        )
        return [
            item["Key"].removeprefix(self._prefix)
            for page in pages
            for item in page.get("Contents", ())
        ]

    def read(self, key: str) -> bytes:
        """In one go."""
        return self.client.get_object(Bucket=BUCKET, Key=self._prefix + key)["Body"].read()

    def unfinished(self) -> int:
        """Multipart uploads."""
        found = self.client.list_multipart_uploads(Bucket=BUCKET, Prefix=self._prefix)
        return len(found.get("Uploads", ()))

    def wipe(self) -> None:
        """Ceph would keep the bytes for two hours, in memory."""
        for key in self.objects():
            self.client.delete_object(Bucket=BUCKET, Key=self._prefix + key)
        self._wiped += 1
        if self._conf and self._wiped % 10 == 0:
            command = ["radosgw-admin", "-c", str(self._conf), "gc", "process", "--include-all"]
            subprocess.run(command, capture_output=True, check=True)


@contextlib.contextmanager
def environment(server: CephServer | SwiftServer) -> Iterator[None]:
    """Where boto3 finds the server."""
    before = dict(os.environ)
    os.environ.update(server.environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def place(name: str, prefix: str = "trial") -> Iterator[Place]:
    """`folder`, `ceph` or `swift`, the servers started and ended."""
    if name == "folder":
        with tempfile.TemporaryDirectory() as folder:
            yield FolderPlace(Path(folder).resolve() / "store")
    elif name == "ceph":
        with ceph_server() as ceph, environment(ceph):
            yield BucketPlace("Ceph", prefix, Path(ceph.ca_bundle).parent / "ceph.conf")
    else:
        with swift_server() as swift, environment(swift):
            yield BucketPlace("Swift", prefix)


def write_files(folder: Path, seed: int, large: int) -> None:
    """Two equal files, one nested, an empty one, and a large one."""
    rng = random.Random(seed)
    (folder / "model").mkdir(parents=True)
    same = rng.randbytes(50_000)
    (folder / "a.dat").write_bytes(same)
    (folder / "model" / "b.dat").write_bytes(same)
    (folder / "c.json").write_bytes(rng.randbytes(300))
    (folder / "empty").touch()
    (folder / "model" / "weights").write_bytes(rng.randbytes(large))


def contents(folder: Path) -> dict[str, str]:
    """Path to sha256."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def examine(place: Place) -> tuple[list[str], int]:
    """What is wrong with what lies there, and the number of manifests; no code of the store's."""
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
