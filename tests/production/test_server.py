"""`rlhf server`: Prefect's server on a real Postgres of its own, killed, started again, refused."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import asyncpg
import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, temporary_settings

import tasks.postgres
from rlhf.errors import ConfigError, UnexpectedError
from tasks.postgres import Postgres
from tasks.prefect_server import IN_FILES
from tasks.server import Server, default_folder, exposure
from tests.ceph import free_ports
from tests.examples import examples
from tests.production.postgres import binaries
from tests.production.site import BIN, ROOT
from tests.servers import PATIENCE, UnavailableError

pytestmark = [pytest.mark.prefect, pytest.mark.xdist_group("own-server")]


@pytest.fixture(scope="module")
def programs():
    """Folder of the installed Postgres' programs."""
    try:
        return binaries()
    except UnavailableError as error:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(str(error))


@pytest.fixture
def folder():
    """An empty folder that all users can enter, with a short path."""
    made = Path(tempfile.mkdtemp(prefix="rlhf-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture(scope="module")
def server(programs):
    """A server that was started as a user does; what the command printed is its `said`."""
    made = Path(tempfile.mkdtemp(prefix="rlhf sérver-"))
    made.chmod(0o755)
    # An earlier start was killed while it made the data.
    (made / "postgres" / "data.new" / "base").mkdir(parents=True)
    (made / "postgres" / "data.new" / "PG_VERSION").write_text("15\n")
    port = free_ports(1)[0]
    done = rlhf("start", "--folder", str(made), "--port", str(port))
    started = Server(made)
    try:
        assert done.returncode == 0, done.stderr
        yield started, port, done.stdout
    finally:
        started.stop()
        shutil.rmtree(made)


def rlhf(*arguments):
    """Run `rlhf server …` as from a terminal."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    return subprocess.run(
        [str(BIN / "rlhf"), "server", *arguments], cwd=ROOT, capture_output=True, text=True,
        check=False, timeout=PATIENCE, env={**environment, "DO_NOT_TRACK": "1"},
    )  # fmt: skip


def test_it_answers_and_keeps_everything_on_disk(server):
    made, port, said = server
    api = f"http://127.0.0.1:{port}/api"
    assert said == f"export PREFECT_API_URL={api}\n"
    assert httpx.get(f"{api}/ready").status_code == 200
    shown = httpx.get(f"{api}/admin/settings").json()
    assert shown["server"]["concurrency"]["lease_storage"] == IN_FILES
    assert shown["home"] == str(made.folder / "prefect")
    assert list(made.folder.rglob("*.db")) == []  # of sqlite
    # Nobody else reaches the database, by the network or in the file system.
    assert asyncio.run(ask(made, "SHOW listen_addresses")) == ""
    assert asyncio.run(ask(made, "SHOW fsync")) == "on"
    assert (made.folder / "postgres").stat().st_mode & 0o077 == 0
    refused = asyncpg.InvalidAuthorizationSpecificationError
    with pytest.raises(refused, match=r"no pg_hba.conf entry"):
        asyncio.run(ask(made, "SELECT 1", user="other"))


def test_a_second_start_finds_it(server):
    made, port, _ = server
    before = pid(made), postmaster(made)
    assert made.start("localhost", port) == f"http://127.0.0.1:{port}/api"
    assert (pid(made), postmaster(made)) == before
    with pytest.raises(ConfigError, match=rf"runs already, at http://127.0.0.1:{port}/api; stop"):
        made.start("127.0.0.1", port + 1)
    with pytest.raises(ConfigError, match=r"can't listen there .*stop the program"):
        Server(made.folder.with_name("other")).start("127.0.0.1", port)


def test_data_outlive_the_loss_of_everything(server, monkeypatch):
    made, port, _ = server
    api = f"http://127.0.0.1:{port}/api"
    httpx.post(f"{api}/variables/", json={"name": "kept", "value": 1}).raise_for_status()
    lost = postmaster(made)
    os.kill(pid(made), signal.SIGKILL)
    os.kill(lost, signal.SIGKILL)
    until(lambda: not made._runs())
    # After a reboot, other programs may have their process ids.
    mine = subprocess.Popen(["sleep", "900"], user=made.postgres.owner.pw_uid)
    try:
        (made.folder / "server.pid").write_text(f"{mine.pid}\n")
        file = made.folder / "postgres" / "data" / "postmaster.pid"
        file.write_text(file.read_text().replace(f"{lost}\n", f"{mine.pid}\n", 1))
        # Of two starts at once, one waits for the other.
        with ThreadPoolExecutor(2) as threads:
            asked = [threads.submit(made.start, "127.0.0.1", port) for _ in range(2)]
        assert [each.result() for each in asked] == [api, api]
        assert httpx.get(f"{api}/variables/name/kept").json()["value"] == 1
        # The database alone is lost: the server stays, and finds it again.
        before = pid(made)
        os.kill(postmaster(made), signal.SIGKILL)
        made.start("127.0.0.1", port)
        assert pid(made) == before
        assert httpx.get(f"{api}/variables/name/kept").json()["value"] == 1
        done = rlhf("stop", "--folder", str(made.folder))
        assert (done.returncode, done.stdout) == (0, f"{made.folder}: stopped\n")
        assert not made.stop()
        assert mine.poll() is None
        monkeypatch.setenv("PREFECT_SERVER_LOGGING_LEVEL", "LOUD")
        with pytest.raises(UnexpectedError, match=r"Prefect's server ended: .+; .*server.log has"):
            made.start("127.0.0.1", port)
    finally:
        mine.kill()
        mine.wait()


@pytest.mark.parametrize(
    ("host", "port", "told"),
    [
        ("127.0.0.1", 0, "--port 0: give a number"),
        ("127.0.0.1", 10**30, "give a number from 1 to 65535"),
        ("example", 4200, "--host 'example': give an address of this machine"),
        ("203.0.113.7", 4200, "203.0.113.7:4200: the server can't listen there"),
    ],
)
def test_a_wrong_address_is_refused_before_any_work(folder, host, port, told):
    with pytest.raises(ConfigError, match=told):
        Server(folder).start(host, port)
    assert not (folder / "postgres").exists()


def test_a_taken_port_is_refused(folder):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ConfigError, match="Address already in use"):
            Server(folder).start("127.0.0.1", other.getsockname()[1])


@pytest.mark.parametrize("place", ["/proc/none/server", "file", "file/server", "x" * 300])
def test_an_unusable_folder_is_refused(folder, place):
    (folder / "file").touch()
    with pytest.raises(ConfigError, match=r"RLHF_SERVER_DIR = '.*': .+; choose another folder"):
        Server(folder / place).start("127.0.0.1", 4200)


def test_a_folder_that_postgres_cant_use_is_refused(folder, programs):
    with pytest.raises(ConfigError, match="too long a path for a socket"):
        Postgres(folder / ("x" * 100)).start(1)
    for name in ("a,b", "a%b", "$(x)", "a'b", "a\\b", "a\nb", "a?b", "a:b"):
        with pytest.raises(ConfigError, match="can't stand in the path of the database"):
            Postgres(folder / name).start(1)
    if os.geteuid() == 0:
        folder.chmod(0o700)
        with pytest.raises(ConfigError, match=r"the user 'postgres', .* can't enter it"):
            Postgres(folder / "postgres").start(1)


ORDINARY = """
import asyncio, os, sys
import asyncpg
from pathlib import Path
from tasks.postgres import Postgres
folder, uid = Path(sys.argv[1]), int(sys.argv[2])
os.setgroups([])
os.setgid(uid)
os.setuid(uid)
made = Postgres(folder)
made.start(300)
print(made.owner.pw_name, flush=True)
sys.stdin.read()
made.start(300)
print(made.stop(60), made.stop(60))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests run as an ordinary user anyway")
def test_an_ordinary_user_has_a_database_that_no_other_enters(folder, programs):
    shutil.chown(folder, "nobody")
    command = [sys.executable, "-c", ORDINARY, str(folder / "postgres"), str(folder.stat().st_uid)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as user:
        assert user.stdout
        assert user.stdout.readline() == "nobody\n"
        refused = asyncpg.InvalidAuthorizationSpecificationError
        with pytest.raises(refused, match=r"[Pp]eer authentication failed"):
            asyncio.run(ask(Server(folder), "SELECT 1"))  # root is another user
        told = user.communicate()[0]
    assert (user.returncode, told) == (0, "True False\n")


def test_another_database_of_the_user_is_not_passed_over(folder):
    url = "postgresql+asyncpg://me@db/prefect"
    with (
        temporary_settings({PREFECT_API_DATABASE_CONNECTION_URL: url}),
        pytest.raises(ConfigError, match=r"PREFECT_API_DATABASE_CONNECTION_URL\) is set"),
    ):
        Server(folder).start("127.0.0.1", 4200)


def test_a_missing_postgres_is_told_with_the_cure(folder, monkeypatch):
    monkeypatch.setattr(tasks.postgres, "PLACES", ())
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(ConfigError, match=r"not installed: .*apt-get install postgresql.*compose"):
        Postgres(folder / "postgres").start(1)
    with pytest.raises(ConfigError, match="not installed: "):
        tasks.postgres.install()  # there is no apt-get either


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=examples(12))
@given(version=st.one_of(st.integers(-5, 40).map(lambda n: f"{n}\n".encode()), st.binary()))
def test_data_of_another_version_are_refused(folder, programs, version):
    installed = [version for version, _ in tasks.postgres._found()]
    made = Postgres(folder / "postgres")
    data = folder / "postgres" / "data"
    (data / "global").mkdir(parents=True, exist_ok=True)
    shutil.chown(data, made.owner.pw_uid)
    (data / "PG_VERSION").write_bytes(version)
    with contextlib.suppress(ValueError):
        if int(version) in installed:
            return
    for told in ("restore the folder from a backup", r"made by Postgres -?\d+, but only \d+|resto"):
        with pytest.raises(ConfigError, match=told):
            made.start(1)
        (data / "global" / "pg_control").touch()
    (data / "global" / "pg_control").unlink()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=examples(30))
@given(content=st.one_of(st.binary(), st.just(f"{os.getpid()}\n".encode())))
def test_a_stale_process_id_stops_nobody(folder, content):
    for name in ("server.pid", "server.json"):
        (folder / name).write_bytes(content)
    (folder / "server.lock").touch()
    assert not Server(folder).stop()


def test_a_damaged_process_id_of_a_living_server_is_told(folder):
    made = Server(folder)
    with made._lock.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for content in ("", "x"):
            (folder / "server.pid").write_text(content)
            with pytest.raises(UnexpectedError, match=r"server.pid: is missing or damaged, but"):
                made.stop()


def test_the_folder_is_the_users_or_the_chosen_one(monkeypatch):
    monkeypatch.setenv("RLHF_SERVER_DIR", "~/mine")
    assert default_folder() == Path.home() / "mine"
    monkeypatch.delenv("RLHF_SERVER_DIR")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    user = Path("/data/rlhf-pipeline/server")
    assert default_folder() == (Path("/var/lib/rlhf-pipeline/server") if not os.geteuid() else user)


def test_a_server_open_to_others_without_a_password_is_warned_of(monkeypatch):
    assert exposure("127.0.0.1") is exposure("::1") is exposure("localhost") is None
    assert "can run code on every worker" in (exposure("0.0.0.0") or "")


def pid(made):
    return int((made.folder / "server.pid").read_text())


def postmaster(made):
    return made.postgres._pid()


async def ask(made, question, user="prefect"):
    """Return the database's answer to a question."""
    place = str(made.postgres.folder)
    connection = await asyncpg.connect(host=place, port=5432, user=user, database="prefect")
    try:
        return await connection.fetchval(question)
    finally:
        await connection.close()


def until(done):
    give_up = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < give_up
        time.sleep(0.05)
