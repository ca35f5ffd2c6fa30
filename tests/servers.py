"""Common parts of the tests' S3 servers: installation, fixtures, serving by hand."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import pytest

#: Timeout in seconds, large enough for a loaded machine: only a broken program reaches it.
PATIENCE = 900.0


class UnavailableError(Exception):
    """The server can't be installed here."""


class _Server(Protocol):
    @property
    def endpoint(self) -> str: ...
    @property
    def access_key(self) -> str: ...
    @property
    def secret_key(self) -> str: ...
    @property
    def environment(self) -> Mapping[str, str]: ...


S = TypeVar("S", bound=_Server)


def apt_install(what: str, *packages: str) -> None:
    """Install Debian packages, or raise `UnavailableError` with the reason."""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise UnavailableError(f"{what} is missing; as root: apt-get install {' '.join(packages)}")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    get = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages]
    for command in (["apt-get", "update", "-qq"], get):
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UnavailableError(f"{' '.join(command)} failed: {done.stderr.strip()[-300:]}")


def for_tests(start: Callable[[], AbstractContextManager[S]]) -> Iterator[S]:
    """Yield the server, as a fixture's body; skip where it is unavailable, fail in CI."""
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(start())
        except UnavailableError as error:
            (pytest.fail if os.environ.get("CI") else pytest.skip)(str(error))
        yield server


@contextlib.contextmanager
def client_of(server: _Server, bucket: str, **options: Any) -> Iterator[Any]:
    """Yield a boto3 client independent of the store's code; creates the bucket."""
    import boto3  # not on a bare GPU machine
    from botocore.config import Config

    client = boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name="us-east-1",
        # Swift refuses boto3's default checksums.
        config=Config(request_checksum_calculation="when_required", **options),
    )
    client.create_bucket(Bucket=bucket)
    yield client
    client.close()


def serve(start: Callable[[], AbstractContextManager[_Server]]) -> None:
    """Serve, and print the shell's export lines, until Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), start() as server:
        for name, value in server.environment.items():
            sys.stdout.write(f"export {name}={value}\n")
        sys.stdout.flush()
        signal.pause()
