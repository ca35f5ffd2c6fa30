"""Methods that `benchmarks.storage` compares: one operation in its own process.

    python benchmarks/storage/methods.py METHOD put FOLDER PLACE      PLACE is bucket/prefix
    python benchmarks/storage/methods.py METHOD get FOLDER PLACE [MEMO]

It imports and connects, prints `ready`, waits for a line, works, and prints its measurements as
JSON, with the `memo` that a later `get` needs. It runs as a script: the store needs this repository
on the path, the peers (the AWS command line, MLflow) an environment of their own, and so every
import is in its function. AWS_ENDPOINT_URL is the server's address.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

MIB = 1 << 20
RELEASE = "release"
"""Memo that selects access by name: `put` sets the name, `get` resolves it."""
PEERS = ("aws s3 sync", "MLflow")
Work = Callable[[], str]


def main() -> int:
    side, operation, folder, place, memo = (*sys.argv[1:], "")[:5]
    bucket, _, prefix = place.partition("/")
    work = SIDES[side](operation, Job(Path(folder), bucket, prefix, memo))
    print("ready", flush=True)
    sys.stdin.readline()
    before = cpu_seconds()
    started = time.perf_counter()
    try:
        memo = work()
    except Exception as error:
        print(f"{type(error).__name__}: {error}".splitlines()[0], file=sys.stderr)
        return 1
    seconds = time.perf_counter() - started
    took = {"seconds": seconds, "cpu": cpu_seconds() - before, "peak": peak_mib(), "memo": memo}
    print(json.dumps(took), flush=True)
    return 0


class Job(NamedTuple):
    """Parameters of an operation.

    A method returns its memo (put) or the folder that it filled (get).
    """

    folder: Path
    bucket: str
    prefix: str
    memo: str

    @property
    def files(self) -> list[str]:
        """Return relative paths of the files to put."""
        paths = (path for path in self.folder.rglob("*") if path.is_file())
        return sorted(path.relative_to(self.folder).as_posix() for path in paths)


def ours(operation: str, job: Job) -> Work:
    """The artifact store, as a stage uses it.

    `RELEASE` is a name in its history.
    """
    from rlhf.config.pipeline import StoreConfig
    from rlhf.store import ArtifactRef, Producer, open_store

    options = StoreConfig(endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    place = f"s3://{job.bucket}/{job.prefix}"
    # An unused cache, so that every byte comes from the server.
    cache = job.folder if operation == "get" else job.folder.parent / "no-cache"
    store = open_store(place, options=options, cache_dir=cache)
    producer = Producer(stage="bench", code_version="1", config={}, seed=0, versions={})

    def put() -> str:
        ref = store.publish(job.folder, "policy", parents={}, producer=producer, metrics={})
        if job.memo == RELEASE:
            store.history.append(RELEASE, ref.model_dump(mode="json"))
        return ref.model_dump_json()

    def get() -> str:
        if job.memo == RELEASE:
            released = store.history.latest(RELEASE)
            if released is None:
                raise OSError("nothing has been released")
            ref = ArtifactRef.model_validate(released)
        else:
            ref = ArtifactRef.model_validate_json(job.memo)
        return str(store.fetch(ref))

    return put if operation == "put" else get


def s3transfer(operation: str, job: Job, *, lean: bool, threads: int) -> Work:
    """`upload_file` and `download_file`, sequentially or several at once.

    Lean is what the store's own settings are; else everything is boto3's default.
    """
    from boto3.s3.transfer import TransferConfig

    client = _client(lean)
    large = {"multipart_threshold": 32 * MIB, "multipart_chunksize": 32 * MIB}
    config = TransferConfig(**large, max_concurrency=4) if lean else TransferConfig()

    def move(file: str) -> None:
        path, key = job.folder / file, f"{job.prefix}/{file}"
        if operation == "put":
            client.upload_file(str(path), job.bucket, key, Config=config)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            client.download_file(job.bucket, key, str(path), Config=config)

    return _each(operation, job, move, threads)


def requests(operation: str, job: Job, *, threads: int) -> Work:
    """`put_object` and `get_object` from and to memory, with plain file access."""
    client = _client(lean=True)

    def move(file: str) -> None:
        path, location = job.folder / file, {"Bucket": job.bucket, "Key": f"{job.prefix}/{file}"}
        if operation == "put":
            client.put_object(**location, Body=path.read_bytes())
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(client.get_object(**location)["Body"].read())

    return _each(operation, job, move, threads)


def _client(lean: bool) -> Any:
    import boto3
    from botocore.config import Config

    config = Config(max_pool_connections=40)
    if lean:
        when = "when_required"
        checksums = Config(request_checksum_calculation=when, response_checksum_validation=when)
        config = config.merge(checksums)
    return boto3.client("s3", config=config)


def _each(operation: str, job: Job, move: Callable[[str], None], threads: int) -> Work:
    files: list[str] = job.files if operation == "put" else json.loads(job.memo)

    def work() -> str:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(move, files))
        return json.dumps(files) if operation == "put" else str(job.folder)

    return work


def sync(operation: str, job: Job) -> Work:
    """`aws s3 sync`, which lists, compares sizes and times, then copies."""
    from awscli.clidriver import create_clidriver  # pyright: ignore[reportMissingImports]

    place = f"s3://{job.bucket}/{job.prefix}"
    ends = (str(job.folder), place) if operation == "put" else (place, str(job.folder))
    driver = create_clidriver()

    def work() -> str:
        status = driver.main(["s3", "sync", *ends, "--only-show-errors"])
        if status:
            raise OSError(f"aws s3 sync ended with {status}")
        return RELEASE if operation == "put" else str(job.folder)

    return work


def mlflow(operation: str, job: Job) -> Work:
    """MLflow's artifact client on the bucket, as for a run's artifacts."""
    os.environ["MLFLOW_S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]
    from mlflow.store.artifact.artifact_repository_registry import (  # pyright: ignore[reportMissingImports]
        get_artifact_repository,
    )

    repository = get_artifact_repository(f"s3://{job.bucket}/{job.prefix}")

    def work() -> str:
        if operation == "put":
            repository.log_artifacts(str(job.folder))
            return RELEASE
        return str(repository.download_artifacts("", dst_path=str(job.folder)))

    return work


SIDES: dict[str, Callable[[str, Job], Work]] = {
    "ours": ours,
    "s3transfer, a loop": partial(s3transfer, lean=False, threads=1),
    "s3transfer, files at once": partial(s3transfer, lean=False, threads=4),
    "s3transfer 32 MiB, a loop": partial(s3transfer, lean=True, threads=1),
    "s3transfer 32 MiB, files at once": partial(s3transfer, lean=True, threads=4),
    "boto3, 8 threads": partial(requests, threads=8),
    "boto3, 16 threads": partial(requests, threads=16),
    "aws s3 sync": sync,
    "MLflow": mlflow,
}


def cpu_seconds() -> float:
    """Return CPU seconds of this process and of children that have ended."""
    used = [resource.getrusage(scope) for scope in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def peak_mib() -> float:
    """Return this process's peak resident memory in MiB.

    getrusage's value is inherited from the parent process.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError("no VmHWM in /proc/self/status")


if __name__ == "__main__":
    sys.exit(main())
