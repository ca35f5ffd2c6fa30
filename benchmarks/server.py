"""Load test of Prefect's server on a busy machine, by database: one worker, cheap runs.

    .venv/bin/python -m benchmarks.server                      # all three databases
    .venv/bin/python -m benchmarks.server --databases postgres --burners 0

Submits runs of a flow of short tasks at even intervals to one worker, while programs that only take
CPU time run beside it. Everything, these programs too, runs at one lower priority: they compete as
equals, and other users of the machine are not disturbed. Requests are sent once, without retries:
an answer that is no success counts as refused.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
from prefect import flow, get_run_logger, task

from tasks.prefect_server import IN_FILES, LEASE_SETTING
from tasks.server import Server

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
PORT = 4299
API = f"http://127.0.0.1:{PORT}/api"
#: Settings of the server on sqlite; it has a write-ahead log and waits 60 s for a lock by default.
SQLITE: dict[str, dict[str, str]] = {
    "sqlite": {},
    "sqlite-timeouts": {
        "PREFECT_SERVER_DATABASE_TIMEOUT": "60",
        "PREFECT_SERVER_DATABASE_CONNECTION_TIMEOUT": "60",
    },
}
#: Seconds to wait for the server's first answer.
PATIENCE = 300


@task
def step(number: int) -> int:
    get_run_logger().info("step %d", number)
    time.sleep(0.2)
    return number


@flow
def cheap(steps: int = 10) -> int:
    """A flow of short tasks, each of which the server hears of several times."""
    return sum(step(number) for number in range(steps))


@contextlib.contextmanager
def server(database: str, folder: Path) -> Iterator[Path]:
    """Start a server, and yield its log."""
    if database not in SQLITE:
        made = Server(folder)
        try:
            made.start("127.0.0.1", PORT)
            yield made.log
        finally:
            made.stop()
        return
    environment = {**os.environ, **SQLITE[database], "PREFECT_HOME": str(folder / "prefect"),
                   "PREFECT_API_URL": API, "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
                   LEASE_SETTING: IN_FILES}  # fmt: skip
    log = folder / "server.log"
    with running([str(BIN / "prefect"), "server", "start", "--port", str(PORT)], environment, log):
        give_up = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{API}/ready", timeout=60).status_code == 200:
                    break
            if time.monotonic() > give_up:
                raise SystemExit(f"no answer: {log.read_text()[-1000:]}")
            time.sleep(0.2)
        yield log


@contextlib.contextmanager
def running(command: Sequence[str], environment: dict[str, str], log: Path) -> Iterator[None]:
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=file, stderr=file, start_new_session=True
        )
    try:
        yield
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        process.wait()


@contextlib.contextmanager
def load(burners: int) -> Iterator[None]:
    """Keep CPUs busy by programs that do nothing else."""
    started = [subprocess.Popen(["yes"], stdout=subprocess.DEVNULL) for _ in range(burners)]
    try:
        yield
    finally:
        for each in started:
            each.kill()
            each.wait()


def register(client: httpx.Client) -> str:
    """Make pool and deployment, and return the deployment's id."""
    client.post("work_pools/", json={"name": "bench", "type": "process"}).raise_for_status()
    made = client.post("flows/", json={"name": "cheap"}).json()["id"]
    body = {"name": "cheap", "flow_id": made, "work_pool_name": "bench", "path": str(ROOT),
            "entrypoint": "benchmarks/server.py:cheap",
            "job_variables": {"env": {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}}}  # fmt: skip
    return client.post("deployments/", json=body).raise_for_status().json()["id"]


def submit(client: httpx.Client, deployment: str, count: int, seconds: float) -> list[str]:
    """Submit runs at even intervals, and return the reasons of those that were refused."""
    refused: list[str] = []
    began = time.monotonic()
    for number in range(count):
        time.sleep(max(0.0, began + number * seconds / count - time.monotonic()))
        try:
            answer = client.post(f"deployments/{deployment}/create_flow_run", json={})
            if answer.is_error:
                refused.append(f"{answer.status_code}")
        except httpx.HTTPError as error:
            refused.append(type(error).__name__)
    time.sleep(max(0.0, began + seconds - time.monotonic()))
    return refused


def states(client: httpx.Client) -> Counter[str]:
    """Count runs by state, as soon as the server answers."""
    for _ in range(10):
        with contextlib.suppress(httpx.HTTPError):
            answer = client.post("flow_runs/filter", json={"limit": 200}).raise_for_status()
            return Counter(run["state_name"] for run in answer.json())
        time.sleep(2)
    return Counter({"unknown": 1})


def measure(database: str, arguments: argparse.Namespace) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="rlhf-bench-"))
    folder.chmod(0o755)
    try:
        with server(database, folder) as log:
            environment = {
                **os.environ, "PREFECT_API_URL": API, "PREFECT_HOME": str(folder / "worker"),
                "PREFECT_WORKER_QUERY_SECONDS": "2", "PYTHONPATH": str(ROOT),
            }  # fmt: skip
            worker = ["prefect", "worker", "start", "--pool", "bench", "--limit", "6"]
            with httpx.Client(base_url=API, timeout=60) as client:
                deployment = register(client)
                command = [str(BIN / worker[0]), *worker[1:]]
                with running(command, environment, folder / "worker.log"):
                    with load(arguments.burners):
                        refused = submit(
                            client, deployment, arguments.submissions, arguments.seconds
                        )
                        busy = os.getloadavg()[0]
                    left = time.monotonic() + arguments.drain
                    final = {"Completed", "Failed", "Crashed"}
                    while {*(ended := states(client))} - final and time.monotonic() < left:
                        time.sleep(2)
            text = log.read_text(errors="replace")
        errors = Counter(re.findall(r"\b(\w+Error)\b", text))
        return {
            "database": database, "load": round(busy, 1), "submitted": arguments.submissions,
            "refused": len(refused), "reasons": dict(Counter(refused)), "runs": dict(ended),
            "locked": sum("database is locked" in line for line in text.splitlines()),
            "errors": dict(errors.most_common(4)),
        }  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--databases", nargs="+", default=[*SQLITE, "postgres"])
    parser.add_argument("--submissions", type=int, default=49)
    parser.add_argument("--burners", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--drain", type=float, default=300, help="seconds for the runs left over")
    arguments = parser.parse_args()
    os.nice(5)
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        del os.environ[name]
    os.environ["DO_NOT_TRACK"] = "1"
    for database in arguments.databases:
        print(json.dumps(measure(database, arguments)), flush=True)


if __name__ == "__main__":
    main()
