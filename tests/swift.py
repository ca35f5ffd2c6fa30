"""A real S3 server with weak conditional writes: OpenStack Swift with s3api.

It checks for the object before it reads the body of a PUT, so that several concurrent writers with
`If-None-Match: *` may succeed. From the shell, `python -m tests.swift` prints the export lines to
paste into another terminal and serves until Ctrl-C. The programs stay in a virtual environment in
the temporary folder, for the next time; the data's folder is removed with the server.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

from tests.ceph import free_ports
from tests.servers import PATIENCE, UnavailableError, for_tests, serve

VERSION = "2.38.3"
# Swift, PyECLib and their dependencies, as pip chose them.
PACKAGES = (
    f"swift=={VERSION}",
    "certifi==2026.10.18",
    "cffi==2.1.1",
    "charset-normalizer==3.5.2",
    "cryptography==50.0.2",
    "dnspython==2.9.2",
    "eventlet==0.41.3",
    "greenlet==3.5.6",
    "idna==3.20",
    "lxml==6.1.3",
    "PasteDeploy==3.1.0",
    "pycparser==3.12",
    "pyeclib==1.8.0",
    "requests==2.34.2",
    "urllib3==2.8.0",
    "xattr==1.3.0",
)
KINDS = ("account", "container", "object", "proxy")

# One process each, without workers: greenlets are enough for the race. With the default timeouts,
# half a second to connect and 3 s to answer, requests to a server that stalls for some seconds get
# 503. Logs go to stderr, and to an unused port instead of the machine's syslog.
CONF = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
swift_dir = {dir}
devices = {dir}
recon_cache_path = {dir}
mount_check = false
fallocate_reserve = 0
conn_timeout = 60
node_timeout = 60
container_update_timeout = 60
log_level = ERROR
log_requests = false
log_udp_host = 127.0.0.1
log_udp_port = 9

[pipeline:main]
pipeline = {pipeline}

[app:{kind}-server]
use = egg:swift#{kind}
account_autocreate = true

[filter:s3api]
use = egg:swift#s3api

[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = {secret} .admin

[filter:slo]
use = egg:swift#slo
"""

# Nine calls of swift-ring-builder do the same in ten times the time.
RINGS = """
import sys
from swift.common.ring import RingBuilder

for kind, port in zip(("account", "container", "object"), sys.argv[2:]):
    builder = RingBuilder(0, 1, 0)
    place = {"ip": "127.0.0.1", "port": int(port), "device": "disk"}
    builder.add_dev({"region": 1, "zone": 1, "weight": 1, **place})
    builder.rebalance()
    builder.get_ring().save(f"{sys.argv[1]}/{kind}.ring.gz")
"""


@dataclass(frozen=True)
class SwiftServer:
    """Endpoint of the server, and its only user."""

    endpoint: str
    access_key: str = "test:tester"
    secret_key: str = "test-secret-key-0000000000000000000000002"

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of a client."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
        }


def install() -> Path:
    """Return Swift's virtual environment; built under a lock if it is missing."""
    if sys.platform != "linux":
        raise UnavailableError("Swift needs Linux")
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    folder = Path(tempfile.gettempdir()) / f"rlhf-swift-{VERSION}-{python}-{os.getuid()}"
    with FileLock(f"{folder}.lock"):
        if not (folder / "bin" / "python").exists():
            shutil.rmtree(folder, ignore_errors=True)  # a cleaner of old files took parts of it
            _build(folder)
    if folder.lstat().st_uid != os.getuid():
        raise UnavailableError(f"{folder} belongs to somebody else")
    return folder


def _build(folder: Path) -> None:
    building = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    pip = [str(building / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    pip += ["--disable-pip-version-check", "--no-deps", "--only-binary", ":all:", *PACKAGES]
    try:
        for command in ([sys.executable, "-m", "venv", str(building)], pip):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                said = (done.stderr or done.stdout).strip()[-300:]
                raise UnavailableError(f"{' '.join(command[:4])} failed: {said}")
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def data_folder() -> Path:
    """Return a new folder that supports extended attributes, for Swift's metadata."""
    for parent in (tempfile.gettempdir(), "/var/tmp", "/dev/shm", "."):
        with contextlib.suppress(OSError):
            folder = Path(tempfile.mkdtemp(prefix="swift-", dir=parent)).resolve()
            try:
                os.setxattr(folder, "user.swift.metadata", bytes(1000))
                return folder
            except OSError:
                folder.rmdir()
    raise UnavailableError("no folder here has user xattrs, which Swift needs")


@contextlib.contextmanager
def swift_server() -> Iterator[SwiftServer]:
    """Start the server, yield its address, and end its processes by their ids."""
    programs = install()
    folder = data_folder()
    started: list[subprocess.Popen[bytes]] = []
    try:
        yield _start(programs, folder, started)
    finally:
        for process in reversed(started):
            process.kill()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _start(programs: Path, folder: Path, started: list[subprocess.Popen[bytes]]) -> SwiftServer:
    # Isolated from PYTHONPATH. By `python`, as the programs' first lines name the build folder.
    python = [str(programs / "bin" / "python"), "-I"]
    ports = free_ports(len(KINDS))
    server = SwiftServer(f"http://127.0.0.1:{ports[-1]}")
    (folder / "disk").mkdir()
    (folder / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = tests\n")
    rings = [*python, "-c", RINGS, str(folder), *map(str, ports[:-1])]
    subprocess.run(rings, capture_output=True, check=True)
    for kind, port in zip(KINDS, ports, strict=True):
        # No memcached: s3api checks signatures without tokens. Swift adds the other filters that it
        # requires by itself.
        pipeline = "s3api tempauth slo proxy-server" if kind == "proxy" else f"{kind}-server"
        conf = folder / f"{kind}.conf"
        conf.write_text(
            CONF.format(
                kind=kind, port=port, dir=folder, pipeline=pipeline, secret=server.secret_key
            )
        )
        command = [*python, str(programs / "bin" / f"swift-{kind}-server"), str(conf), "--verbose"]
        env = {**os.environ, "TMPDIR": str(folder)}
        with (folder / f"{kind}.out").open("wb") as out:
            daemon = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
        started.append(daemon)
    for kind, port, process in zip(KINDS, ports, started, strict=True):
        _wait(port, process, folder / f"{kind}.out")
    return server


def _wait(port: int, process: subprocess.Popen[bytes], out: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5):
            return
        time.sleep(0.1)
    said = out.read_text().strip()[-500:]
    raise RuntimeError(f"Swift's {out.stem} server does not answer at port {port}: {said}")


@pytest.fixture(scope="session")
def s3_weak_server() -> Iterator[SwiftServer]:
    """One server for the whole test session."""
    yield from for_tests(swift_server)


def main() -> None:
    """Serve until Ctrl-C or SIGTERM."""
    serve(swift_server)


if __name__ == "__main__":
    main()
