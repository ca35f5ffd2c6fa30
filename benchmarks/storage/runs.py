"""The server, the child processes of the methods, and their files."""

from __future__ import annotations

import contextlib
import filecmp
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3

from benchmarks.storage import methods
from benchmarks.storage.methods import MIB, PEERS
from tests.ceph import CephServer, ceph_server

BUCKET = "bench"
LIMIT = 1800
"""Seconds after which an operation counts as hanging."""
ROOT = Path(__file__).parents[2]
PEER_PACKAGES = ("awscli", "mlflow-skinny", "boto3")
#: By default radosgw keeps deleted objects for two hours, here in memory.
COLLECT = "rgw gc obj min wait = 0\nrgw gc processor period = 1\nrgw gc max objs = 4\n"
#: Greatest memory of the server: more would displace the measured files from the page cache.
MOST_MIB = 8 * 1024


@contextlib.contextmanager
def site(work: Path | None) -> Iterator[Site]:
    """A Ceph server and a working folder, removed after the block."""
    with tempfile.TemporaryDirectory(dir=work) as folder, ceph_server(COLLECT) as server:
        yield Site(server, Path(folder))


class Site:
    """A server with a bucket, and a working folder."""

    def __init__(self, server: CephServer, work: Path) -> None:
        self.server, self.work = server, work
        self.client: Any = boto3.client(
            "s3",
            endpoint_url=server.endpoint,
            aws_access_key_id=server.access_key,
            aws_secret_access_key=server.secret_key,
            region_name="us-east-1",
        )
        self.client.create_bucket(Bucket=BUCKET)
        # The server's first object and first multipart upload take seconds: not measured.
        for size in (1, 9 * MIB):
            self.client.upload_fileobj(io.BytesIO(bytes(size)), BUCKET, "first")
        self.client.delete_object(Bucket=BUCKET, Key="first")

    @staticmethod
    def peers_python() -> Path:
        """Return the Python of the peers' own environment, made on first use."""
        folder = Path(tempfile.gettempdir()) / "rlhf-benchmark-peers"
        python = folder / "bin" / "python"
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            install = [python, "-m", "pip", "install", "--quiet", *PEER_PACKAGES]
            subprocess.run(install, check=True, stderr=subprocess.DEVNULL)
            (folder / "complete").touch()
        return python

    def place(self) -> str:
        """Return an unused prefix of the bucket."""
        return f"{BUCKET}/{uuid.uuid4().hex}"

    def new_folder(self) -> Path:
        """Return a new, empty folder."""
        return Path(tempfile.mkdtemp(dir=self.work))

    def start(self, *arguments: str, endpoint: str | None = None) -> Process:
        """Start a method's process: method, operation, folder, place and memo."""
        return Process(self, endpoint or self.server.endpoint, *arguments)

    def run(self, *arguments: str, endpoint: str | None = None) -> Run:
        """Run a method's operation; pending writes are flushed to the disk before it."""
        process = self.start(*arguments, endpoint=endpoint)
        os.sync()
        return process.go().result()

    def forget(self, place: str) -> None:
        """Delete the objects of a prefix, and wait until the server has freed them."""
        before = _server_mib()
        prefix = place.partition("/")[2]
        for upload in self.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", ()):
            target = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
            self.client.abort_multipart_upload(Bucket=BUCKET, **target)
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        items = [item for page in pages for item in page.get("Contents", ())]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: self.client.delete_object(Bucket=BUCKET, Key=i["Key"]), items))
        # Small objects are freed at once; large ones by Ceph's collector, after which the server
        # returns their memory or reuses it.
        large = sum(item["Size"] for item in items if item["Size"] > 4 * MIB) / MIB
        end = time.monotonic() + 15
        while large > 64 and _server_mib() > before - large / 2 and time.monotonic() < end:
            time.sleep(0.2)
        if before > MOST_MIB:
            raise RuntimeError(f"the server's memory does not shrink: {before:.0f} MiB")


def _server_mib() -> float:
    """Return the resident memory of the Ceph daemon that holds the objects.

    It is a child of this process.
    """
    for children in Path("/proc/self/task").glob("*/children"):
        for child in children.read_text().split():
            status = Path(f"/proc/{child}/status").read_text()
            if "ceph-osd" in status.partition("\n")[0]:
                return int(status.partition("VmRSS:")[2].split()[0]) / 1024
    raise RuntimeError("the Ceph server is no child of this process")


class Process:
    """A method's process that has connected and waits for `go`."""

    def __init__(self, site: Site, endpoint: str, *arguments: str) -> None:
        python = site.peers_python() if arguments[0] in PEERS else Path(sys.executable)
        command = [str(python), str(Path(methods.__file__)), *arguments]
        env = {**os.environ, **site.server.environment, "AWS_ENDPOINT_URL": endpoint}
        env["PYTHONPATH"] = str(ROOT) if arguments[0] not in PEERS else ""
        # The user's AWS configuration must not affect the measurement.
        env.update(AWS_CONFIG_FILE=os.devnull, AWS_EC2_METADATA_DISABLED="true")
        pipe = subprocess.PIPE
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            command, env=env, stdin=pipe, stdout=pipe, stderr=self._errors, text=True
        )
        assert self._process.stdin
        assert self._process.stdout
        self._input, self._output = self._process.stdin, self._process.stdout
        self._limit = threading.Timer(LIMIT, self.kill)
        self._limit.daemon = True
        self._limit.start()
        if self._output.readline() != "ready\n":
            self.result()

    def go(self) -> Process:
        """Start the operation."""
        self._input.write("\n")
        self._input.flush()
        return self

    def kill(self) -> None:
        """Kill the process, as a loss of power would."""
        self._process.kill()

    def result(self) -> Run:
        """Wait for the end and return the measurements; SideFailed on an error."""
        with contextlib.suppress(BrokenPipeError):
            self._input.close()
        try:
            lines = self._output.read().splitlines()
        except BaseException:
            # Interrupted: end the child too.
            self.kill()
            raise
        finally:
            status = self._process.wait()
            self._limit.cancel()
            self._output.close()
        with self._errors:
            self._errors.seek(0)
            errors = self._errors.read().strip().splitlines()
        if status or not lines:
            raise SideFailed(errors[-1] if errors else f"ended with {status}")
        return Run(**json.loads(lines[-1]))


@dataclass(frozen=True)
class Run:
    """Measurements of one operation; for a `get`, `memo` is the folder of the files."""

    seconds: float
    cpu: float
    peak: float
    memo: str

    @property
    def folder(self) -> Path:
        return Path(self.memo)


class SideFailed(Exception):
    """A method's process ended with an error; the message is its last line."""


def random_files(folder: Path, sizes: Sequence[int]) -> Path:
    """Write files of random bytes, which can't be compressed or deduplicated."""
    folder.mkdir(parents=True)
    for number, size in enumerate(sizes):
        with (folder / f"{number:04}.safetensors").open("wb") as file:
            for start in range(0, size, MIB):
                file.write(os.urandom(min(MIB, size - start)))
    return folder


def delivered(delivery: Path, *expected: Path) -> str:
    """Compare a folder with the expected ones: `right`, `nothing` or `wrong`."""
    names = _names(delivery)
    if not names:
        return "nothing"
    for folder in expected:
        if names == _names(folder):
            _, different, unread = filecmp.cmpfiles(delivery, folder, names, shallow=False)
            if not different and not unread:
                return "right"
    return "wrong"


def _names(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in files)
