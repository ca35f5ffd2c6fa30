"""A site as in production: Prefect's server on Postgres, workers that share a store.

Every worker has its own home and folder for temporary files, both empty at first. Its processes are
one process group, so that a test can kill them together, as the loss of a machine does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx

from tasks.lost_runs import RESTART_OF
from tasks.prefect_server import IN_FILES, LEASE_SETTING
from tests.ceph import free_ports
from tests.production.postgres import postgres
from tests.servers import PATIENCE, UnavailableError

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@dataclass
class Process:
    """A program in a process group of its own, that can be killed and started again."""

    name: str
    command: list[str]
    environment: Mapping[str, str]
    folder: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the program, with its output in a log."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=dict(self.environment), cwd=ROOT, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    @property
    def log(self) -> Path:
        """File with the output of the program and its children."""
        return self.folder / f"{self.name}.log"

    @property
    def pid(self) -> int:
        """Process id of the program."""
        assert self.process is not None
        return self.process.pid

    def kill(self) -> None:
        """Kill the program alone, as an out-of-memory killer does; its children live on."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def lose(self) -> None:
        """Kill the program and all its descendants, as the loss of its machine does."""
        if self.process is None:
            return
        for pid in [*descendants(self.pid), self.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def end(self) -> None:
        """End the program by SIGTERM, and kill it if it does not end."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            self.process.terminate()
            self.process.wait(10)
        self.lose()


def descendants(pid: int) -> list[int]:
    """Return the ids of a process's descendants, the youngest first."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            head, _, rest = path.read_text().rpartition(") ")
            parents.setdefault(int(rest.split()[1]), []).append(int(head.split()[0]))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        children = parents.get(waiting.pop(), [])
        found += children
        waiting += children
    return found[::-1]


@dataclass
class Site:
    """Server and workers, and the environment of a user's commands."""

    folder: Path
    environment: dict[str, str]
    server: Process
    workers: dict[str, Process] = field(default_factory=dict)
    extras: dict[str, dict[str, str]] = field(default_factory=dict)
    """Additional environment variables of each worker."""
    store_endpoint: str = ""
    """Address of the S3 server itself, without a proxy."""
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)
    """Processes that replaced killed ones."""
    said: str = ""
    """Output of `make deploy`."""

    def worker(
        self, pool: str, called: str | None = None, limit: int | None = None, **extra: str
    ) -> Process:
        """Start a worker of this pool, on a machine of its own; it is called as its pool is.

        With a limit it takes no more runs than that at once.
        """
        called = called or pool
        machine = self.machine(called)
        self.extras[called] = extra
        for name in ("home", "tmp"):
            (machine / name).mkdir(parents=True, exist_ok=True)
        environment = {
            **self.environment,
            "HOME": str(machine / "home"),
            "TMPDIR": str(machine / "tmp"),
            "PREFECT_HOME": str(machine / "home" / ".prefect"),
            "RLHF_WORK_DIR": str(machine / "home" / "work"),
            "RLHF_REPORT_DIR": str(machine / "home" / "reports"),
            "RLHF_LOG_DIR": str(machine / "home" / "logs"),
            **extra,
        }
        command = [str(BIN / "prefect"), "worker", "start", "--pool", pool, "--name", called]
        command += [] if limit is None else ["--limit", str(limit)]
        self.workers[called] = Process(f"worker-{called}", command, environment, self.folder)
        self.workers[called].start()
        return self.workers[called]

    def machine(self, pool: str) -> Path:
        """Return the folder with a worker's home and temporary files."""
        return self.folder / f"machine-{pool}"

    def submit(self, deployment: str, **parameters: Any) -> str:
        """Run a deployment, named as in Prefect's command, and return the run's id."""
        flow, _, name = deployment.partition("/")
        made = self.api(f"deployments/name/{flow}/{name or flow}")["id"]
        return self.api(f"deployments/{made}/create_flow_run", parameters=parameters)["id"]

    def logs(self, run: str) -> str:
        """Return the log of a run."""
        asked = {"logs": {"flow_run_id": {"any_": [run]}}, "sort": "TIMESTAMP_ASC", "limit": 200}
        return "\n".join(line["message"] for line in self.api("logs/filter", **asked))

    def cancel(self, run: str) -> None:
        """Cancel a run, as the UI does."""
        self.api(f"flow_runs/{run}/set_state", state={"type": "CANCELLING", "name": "Cancelling"})

    def children(self, run: str) -> list[Any]:
        """Return the child runs of a run's stages, the oldest first."""
        asked = {"flow_runs": {"parent_flow_run_id": {"any_": [run]}}, "sort": "START_TIME_ASC"}
        return self.api("flow_runs/filter", **asked)

    def successor(self, run: str) -> str | None:
        """Return the run that took a lost run's place, or None."""
        tags = {"all_": [f"{RESTART_OF}{run}"]}
        found = self.api("flow_runs/filter", flow_runs={"tags": tags})
        return found[0]["id"] if found else None

    def run(self, *command: str, check: bool = True, **extra: str) -> str:
        """Run a command in the checkout's root as a user, and return its output."""
        done = subprocess.run(
            [*command], cwd=ROOT, env={**self.environment, **extra},
            capture_output=True, text=True, check=False, timeout=PATIENCE,
        )  # fmt: skip
        output = done.stdout + done.stderr
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)} → {done.returncode}\n{output[-3000:]}")
        return output

    def api(self, path: str, **body: Any) -> Any:
        """Return the server's answer to a POST, or to a GET without a body."""
        answer = self.client.request("POST" if body else "GET", path, json=body or None)
        if answer.is_error:
            raise httpx.HTTPStatusError(answer.text, request=answer.request, response=answer)
        return answer.json()

    @cached_property
    def client(self) -> httpx.Client:
        """One client for all requests: to make one takes longer than a request."""
        return httpx.Client(base_url=self.environment["PREFECT_API_URL"], timeout=PATIENCE)

    def wait(self, run: str, *until: str, seconds: float = PATIENCE) -> Any:
        """Wait until a flow run is in a final state, or in one of these; return the run."""
        give_up = time.monotonic() + seconds
        while True:
            with contextlib.suppress(httpx.HTTPError):
                found = self.api(f"flow_runs/{run}")
                state = found["state"]
                final = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
                if state["name"] in until or (not until and state["type"] in final):
                    return found
            if time.monotonic() > give_up:
                raise AssertionError(f"{run} is not {until or 'final'}: {state}")
            time.sleep(0.5)

    def wait_for_server(self) -> None:
        """Wait until the server answers."""
        give_up = time.monotonic() + PATIENCE
        url = f"{self.environment['PREFECT_API_URL']}/health"
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(url, timeout=30).status_code == 200:
                    return
            if time.monotonic() > give_up:
                raise UnavailableError("Prefect's server does not answer")
            time.sleep(0.3)

    def end(self) -> None:
        """Stop all processes of the site."""
        self.client.close()
        for process in (*self.workers.values(), self.server):
            process.end()
        for started in self.started:
            started.kill()
            started.wait()


@contextlib.contextmanager
def site(folder: Path, store: Mapping[str, str]) -> Iterator[Site]:
    """Start a server without workers; `store` is the object store's environment."""
    (port,) = free_ports(1)
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "RLHF_"))},
        **store,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_HOME": str(folder / "user"),
        # Poll every second instead of every 10 s, so that tests do not wait.
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "OMP_NUM_THREADS": "1",
        "RLHF_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    with postgres() as database:
        command = [str(BIN / "prefect"), "server", "start", "--port", str(port)]
        own = {
            **environment,
            "PREFECT_HOME": str(folder / "server"),
            "PREFECT_API_DATABASE_CONNECTION_URL": database,
            LEASE_SETTING: IN_FILES,
        }
        server = Process("server", command, own, folder)
        made = Site(folder, environment, server, store_endpoint=store["AWS_ENDPOINT_URL"])
        server.start()
        try:
            made.wait_for_server()
            yield made
        finally:
            made.end()
