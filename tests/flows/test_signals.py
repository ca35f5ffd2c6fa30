"""SIGTERM ends the command soon, with the update saved and the server stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from prefect.server.api.server import SubprocessASGIServer

from flows import signals
from rlhf.checkpoints.folder import checkpoints_in
from tests.flows.conftest import tiny_tree
from tests.flows.test_command_line import ROOT, bare_environment
from tests.library.kills import in_child
from tests.servers import PATIENCE

pytestmark = pytest.mark.prefect


STAGE = "train-policy"


@pytest.fixture
def preset(finished, tmp_path):
    """A configuration whose PPO takes minutes and saves at its end alone; the rest is done."""
    tree = tiny_tree(tmp_path)
    tree["ppo"] |= {"total_episodes": 80_000, "checkpoint_every": 10_000}
    path = tmp_path / "long.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def servers(home):
    """Prefect's ephemeral servers of this test that are still there."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            environment = (process / "environ").read_bytes()
        except OSError:
            continue
        if b"prefect.server.api.server" in command and str(home).encode() in environment:
            yield process.name


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for servers in /proc")
def test_sigterm_to_the_group_while_the_policy_is_trained(preset, tmp_path):
    """The ephemeral server gets it as well, and nobody waits for what it can't answer any more."""
    shown = tmp_path / "shown"
    with shown.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", "stage", STAGE, "--config", str(preset)],
            env=bare_environment(tmp_path), cwd=ROOT, stdout=out, stderr=out,
            start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + PATIENCE
        while STAGE not in shown.read_text() and time.monotonic() < deadline:
            assert process.poll() is None, shown.read_text()
            time.sleep(0.05)
        assert [*servers(tmp_path)]
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(PATIENCE) == 128 + signal.SIGTERM
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    line = "terminated; the same command goes on after the last finished stage or checkpoint"
    assert shown.read_text().splitlines()[-1] == line
    assert "Traceback" not in shown.read_text()
    assert not [*servers(tmp_path)]
    (folder,) = (tmp_path / "work" / "checkpoints").glob(f"{STAGE}-*")
    assert checkpoints_in(folder)  # nothing but SIGTERM makes it save before the end


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(
    "script", ["echo; exec sleep 60", "trap '' TERM; echo; while :; do sleep 0.1; done"]
)
def test_sigterm_to_the_process_alone_ends_the_server_too(script, tmp_path, monkeypatch):
    """Whether it obeys or not. The process is a shell's here, in the place where Prefect has it."""
    monkeypatch.setattr(signals, "PATIENCE", 0.5)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    pid = tmp_path / "pid"

    def work():
        server = subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE)
        server.stdout.readline()  # it is listening
        pid.write_text(str(server.pid))
        SubprocessASGIServer().server_process = server
        signals.exit_on_signals()
        signal.raise_signal(signal.SIGTERM)

    assert in_child(work) == 128 + signal.SIGTERM
    state = Path("/proc", pid.read_text(), "stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"
