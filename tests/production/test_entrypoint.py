"""The image's entrypoint as process 1 of a namespace: the order of SIGTERM."""

import os
import shutil
import signal
import subprocess
import sys
import time

import httpx
import pytest

from tests.production.site import ROOT, descendants
from tests.servers import PATIENCE

ENTRYPOINT = str(ROOT / "deployments" / "entrypoint.sh")
CODE = """
import time
from prefect import flow
from rlhf.signals import deferred_sigterm

@flow
def training():
    with deferred_sigterm() as came:
        print("TRAINING", flush=True)
        while not came():
            time.sleep(0.1)
        time.sleep(1)
        print("SAVED", flush=True)
"""


def test_a_command_runs_as_if_started_by_hand():
    """With its exit code, and with SIGINT, which a shell's background child would ignore."""
    script = "import signal, sys; sys.exit(7 if callable(signal.getsignal(signal.SIGINT)) else 1)"
    done = subprocess.run([ENTRYPOINT, sys.executable, "-c", script], check=False)
    assert done.returncode == 7


@pytest.fixture(scope="module")
def deployment(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    (folder / "training.py").write_text(CODE)
    pull = {"prefect.deployments.steps.set_working_directory": {"directory": str(folder)}}
    flow = place.api("flows/", name="training")["id"]
    there = {"entrypoint": "training.py:training", "pull_steps": [pull]}
    yield place.api("deployments/", name="try", flow_id=flow, **there)["id"]
    httpx.delete(f"{place.environment['PREFECT_API_URL']}/flows/{flow}").raise_for_status()


@pytest.mark.prefect
@pytest.mark.s3
@pytest.mark.parametrize(
    ("behaviour", "saved", "state"),
    [("crash", True, "Crashed"), ("reschedule", False, "AwaitingRetry")],
)
def test_a_training_saves_first_unless_prefect_starts_it_again(
    place, deployment, tmp_path, behaviour, saved, state
):
    own = ["unshare", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if not shutil.which("unshare") or subprocess.run([*own, "true"], check=False).returncode:
        pytest.skip("no namespaces here")
    run = place.api(f"deployments/{deployment}/create_flow_run", name="x")["id"]
    environment = {
        **place.environment,
        "PYTHONPATH": str(ROOT),
        "PREFECT__FLOW_RUN_ID": run,
        "PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR": behaviour,
    }
    command = [*own, ENTRYPOINT, "prefect", "flow-run", "execute"]
    log = tmp_path / "log"
    with log.open("w") as out:
        container = subprocess.Popen(command, env=environment, stdout=out, stderr=out, cwd=tmp_path)
    try:
        give_up = time.monotonic() + PATIENCE
        while "TRAINING" not in log.read_text():
            assert time.monotonic() < give_up, log.read_text()
            time.sleep(0.2)
        os.kill(descendants(container.pid)[-1], signal.SIGTERM)  # process 1, as the kubelet does
        container.wait(PATIENCE)
    finally:
        container.kill()
        container.wait()
    assert ("SAVED" in log.read_text()) is saved, log.read_text()
    found = place.api(f"flow_runs/{run}")["state"]
    assert found["name"] == state, found
