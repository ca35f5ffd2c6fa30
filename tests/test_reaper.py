"""An interrupted test session's servers are killed, also those of xdist's workers."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests import reaper, swift
from tests.servers import UnavailableError

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
    pytest.mark.skipif(os.geteuid() != 0, reason="servers may have to be installed"),
]

SESSION = """
import importlib
import os
import signal
import time
from pathlib import Path

import pytest

SERVERS = {{
    "Ceph": ("tests.ceph", "ceph_server"),
    "Postgres": ("tests.production.postgres", "postgres"),
    "Prefect": ("prefect.testing.utilities", "prefect_test_harness"),
    "Swift": ("tests.swift", "swift_server"),
}}


@pytest.mark.parametrize("name", {names!r})
def test_one(name):
    module, function = SERVERS[name]
    os.setpgrp()  # as servers in sessions of their own: Ctrl-C does not reach them
    try:
        with getattr(importlib.import_module(module), function)():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # as if it hung: nothing is torn down
            Path({folder!r}, name).write_text(os.environ["PYTEST_SESSION_NAMES"].rpartition(":")[2])
            time.sleep(600)
    except Exception as error:
        Path({folder!r}, "failed").write_text(repr(error))
"""


@pytest.fixture
def scratch():
    """A folder for the servers' files, which nobody else would remove; Postgres' user reads it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        with contextlib.suppress(UnavailableError):
            programs = swift.install()
            (folder / programs.name).symlink_to(programs)
        yield folder


@pytest.mark.parametrize(
    ("servers", "interrupt"),
    [
        # Ctrl-C reaches the whole process group, a supervisor's SIGTERM one process.
        (("Ceph", "Prefect"), lambda pid: os.killpg(pid, signal.SIGINT)),
        (("Swift", "Postgres"), lambda pid: os.kill(pid, signal.SIGTERM)),
    ],
    ids=["Ctrl-C", "SIGTERM"],
)
def test_an_interrupted_session_leaves_no_process(tmp_path, scratch, servers, interrupt):
    path = tmp_path / "test_session.py"
    path.write_text(SESSION.format(names=servers, folder=str(tmp_path)))
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    command += ["-n", "2", "-c", str(ROOT / "pyproject.toml"), str(path)]
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")},
        "PYTHONPATH": str(ROOT), "RLHF_CHECK_SHAPES": "0", "TMPDIR": str(scratch),
    }  # fmt: skip
    log = tmp_path / "log"
    with log.open("w") as out:
        session = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True
        )
    try:
        notes, failed = [tmp_path / name for name in servers], tmp_path / "failed"
        while not all(note.exists() and note.read_text() for note in notes):
            assert session.poll() is None, log.read_text()
            assert not failed.exists(), failed.read_text()
            time.sleep(0.05)
        name = notes[0].read_text()
        assert len(reaper.processes_of(name)) > len(servers) + 2  # the workers, and servers
        interrupt(session.pid)
        session.wait()
    finally:
        if session.poll() is None:
            os.killpg(session.pid, signal.SIGKILL)
            session.wait()
    deadline = time.monotonic() + 60
    while (left := reaper.processes_of(name)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left, [Path(f"/proc/{pid}/cmdline").read_text() for pid in left]
