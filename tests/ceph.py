"""A real S3 server for the tests: one-node Ceph on loopback, installed by apt.

From the shell, `python -m tests.ceph` prints the export lines to paste into another terminal
(AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...) and serves until Ctrl-C. Root and apt are needed only
where Ceph is not installed; all data are in a temporary folder, which is removed at the end.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.servers import PATIENCE, apt_install, for_tests, serve

PACKAGES = ("radosgw", "ceph-mon", "ceph-osd")
DAEMONS = ("ceph-mon", "ceph-osd", "radosgw", "monmaptool", "radosgw-admin", "ceph", "openssl")

# Without the six crc modes RGW hangs for ever; the pool settings let one OSD be a cluster. By
# default RGW keeps deleted objects for two hours, and a full memstore blocks every write, and the
# monitor waits a second before each change of the map, of which RGW's start makes ten.
CONF = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{v2}/0,v1:127.0.0.1:{v1}/0]
ms bind ipv6 = false
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
ms mon client mode = crc
ms mon service mode = crc
ms mon cluster mode = crc
ms client mode = crc
ms service mode = crc
ms cluster mode = crc
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
mon allow pool size one = true
mon max pg per osd = 1000
mon data avail crit = 1
mon data avail warn = 1
paxos propose interval = 0.02
paxos min wait = 0.01
run dir = {dir}
admin socket = {dir}/$name.asok
log file = {dir}/$name.log
mon cluster log file = {dir}/cluster.log
crash dir = {dir}
keyring = {dir}/keyring
mon data = {dir}/mon
osd data = {dir}/osd
rgw data = {dir}/rgw
osd objectstore = memstore
memstore device bytes = 4294967296
osd class load list = *
osd class default list = *
osd crush chooseleaf type = 0
rgw gc obj min wait = 5
rgw gc processor period = 5
rgw gc processor max time = 5
rgw frontends = beast endpoint=127.0.0.1:{http} ssl_endpoint=127.0.0.1:{https} \
ssl_certificate={dir}/cert.pem ssl_private_key={dir}/key.pem
"""


@dataclass(frozen=True)
class CephServer:
    """Endpoints of the server, and two users: one for the tests, one without a bucket.

    The first has a second pair of keys, for changes of keys during a transfer.
    """

    endpoint: str
    tls_endpoint: str
    ca_bundle: str
    access_key: str = "TESTACCESSKEY0000001"
    secret_key: str = "test-secret-key-0000000000000000000000001"
    second_access_key: str = "TESTACCESSKEY0000002"
    second_secret_key: str = "test-secret-key-0000000000000000000000002"
    other_access_key: str = "OTHERACCESSKEY000001"
    other_secret_key: str = "other-secret-key-000000000000000000000001"

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of a client."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
        }


def install() -> None:
    """Install Ceph if it is missing, or raise `UnavailableError` with the reason."""
    if all(shutil.which(name) for name in DAEMONS):
        return
    apt_install("Ceph", *PACKAGES, "openssl")


def free_ports(count: int) -> list[int]:
    """Return ports that are free now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def ceph_server(settings: str = "") -> Iterator[CephServer]:
    """Start the server, yield its address, and end its processes by their ids.

    `settings` are further lines of its configuration; they override `CONF`.
    """
    install()
    folder = Path(tempfile.mkdtemp(prefix="ceph-"))
    started: list[subprocess.Popen[bytes]] = []
    try:
        yield _start(folder, started, settings)
    finally:
        for process in reversed(started):
            process.kill()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _start(folder: Path, started: list[subprocess.Popen[bytes]], settings: str) -> CephServer:
    v2, v1, http, https = free_ports(4)
    fsid, osd = str(uuid.uuid4()), str(uuid.uuid4())
    conf = folder / "ceph.conf"
    lines = CONF.format(fsid=fsid, dir=folder, v2=v2, v1=v1, http=http, https=https)
    conf.write_text(lines + settings)
    for name in ("mon", "osd", "rgw"):
        (folder / name).mkdir()
    (folder / "keyring").touch()

    def call(program: str, *arguments: str) -> None:
        command = [program, "-c", str(conf), *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")

    def start(program: str, *arguments: str) -> None:
        with (folder / f"{program}.out").open("wb") as out:
            command = [program, "-c", str(conf), "-f", *arguments]
            started.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT))

    monmap = str(folder / "monmap")
    addresses = f"[v2:127.0.0.1:{v2},v1:127.0.0.1:{v1}]"
    call("monmaptool", "--create", "--fsid", fsid, "--addv", "a", addresses, monmap)
    call("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap)
    start("ceph-mon", "-i", "a")
    call("ceph", "--connect-timeout", "300", "osd", "new", osd)
    call("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
    start("ceph-osd", "-i", "0")
    self_signed = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30"]
    self_signed += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    self_signed += ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run(self_signed, capture_output=True, check=True)
    start("radosgw", "-n", "client.rgw")
    server = CephServer(
        f"http://127.0.0.1:{http}", f"https://127.0.0.1:{https}", str(folder / "cert.pem")
    )
    _wait(server.endpoint, started)
    for name, key, secret in (
        ("test", server.access_key, server.secret_key),
        ("other", server.other_access_key, server.other_secret_key),
    ):
        user = ("--uid", name, "--display-name", name, "--access-key", key, "--secret", secret)
        call("radosgw-admin", "user", "create", *user)
    second = ("--access-key", server.second_access_key, "--secret", server.second_secret_key)
    call("radosgw-admin", "key", "create", "--uid", "test", "--key-type", "s3", *second)
    return server


def _wait(endpoint: str, started: list[subprocess.Popen[bytes]], seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < end:
        if any(process.poll() is not None for process in started):
            raise RuntimeError(f"a Ceph daemon ended early: {[p.args for p in started]}")
        with contextlib.suppress(OSError), opener.open(endpoint, timeout=30):
            return
        time.sleep(0.2)
    raise RuntimeError(f"Ceph did not answer at {endpoint} within {seconds:.0f} s")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[CephServer]:
    """One server for the whole test session."""
    yield from for_tests(ceph_server)


def main() -> None:
    """Serve until Ctrl-C or SIGTERM."""
    serve(ceph_server)


if __name__ == "__main__":
    main()
