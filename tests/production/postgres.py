"""A real Postgres on loopback for Prefect's server, installed by apt if missing."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.ceph import free_ports
from tests.servers import PATIENCE, UnavailableError, apt_install

PACKAGE = "postgresql"


def binaries() -> Path:
    """Return the folder of Postgres' programs, installed if they are missing."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not found:
        apt_install("Postgres", PACKAGE)
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    return found[-1].parent


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """Start a server with an empty database `prefect`, and yield its URL for Prefect."""
    programs = binaries()
    # Postgres refuses to run as root.
    demoted = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    prefix = demoted if os.geteuid() == 0 else []
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory(prefix="postgres-") as folder:
        if prefix:
            shutil.chown(folder, "postgres", "postgres")
        data = f"{folder}/data"

        def program(name: str, *arguments: str) -> list[str]:
            return [*prefix, str(programs / name), *arguments]

        subprocess.run(
            program("initdb", "-D", data, "-A", "trust", "-U", "prefect", "--no-sync"),
            check=True, capture_output=True, cwd=folder,
        )  # fmt: skip
        options = [
            "-D", data, "-p", str(port), "-k", folder, "-h", "127.0.0.1", "-c", "fsync=off",
            "-c", "max_connections=200",
        ]  # fmt: skip
        with Path(folder, "log").open("w") as log:
            server = subprocess.Popen(
                program("postgres", *options), stdout=log, stderr=log, cwd=folder
            )
        try:
            create = program("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "prefect")
            _until(lambda: _works([*create, "prefect"], folder), "Postgres")
            yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/prefect"
        finally:
            server.send_signal(signal.SIGINT)  # does not wait for open connections
            server.wait(PATIENCE)


def _works(command: list[str], folder: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False, cwd=folder).returncode == 0


def _until(done: Callable[[], bool], what: str) -> None:
    give_up = time.monotonic() + PATIENCE
    while not done():
        if time.monotonic() > give_up:
            raise UnavailableError(f"{what} does not answer")
        time.sleep(0.1)
