"""Faults of a running site: each kills real processes.

In production a supervisor (systemd, Kubernetes) restarts servers and workers; here the fault does.
Prefect and the pipeline recover the runs, that of the pipeline itself included.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

from tests.production.site import Site

#: Seconds that a killed server is down.
AWAY = 5.0


def processes_of(run: str) -> list[int]:
    """Return the processes of a flow run; that of Prefect's engine comes first."""
    mark = f"PREFECT__FLOW_RUN_ID={run}".encode()
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return sorted(found)


def running_stages(site: Site, run: str) -> list[str]:
    """Return the ids of a pipeline run's children that are running now."""
    body = {
        "flow_runs": {
            "parent_flow_run_id": {"any_": [run]},
            "state": {"type": {"any_": ["RUNNING"]}},
        }
    }
    return [found["id"] for found in site.api("flow_runs/filter", **body)]


def signal_run(run: str, number: signal.Signals) -> bool:
    """Send a signal to a run's first process; return whether there was one."""
    for pid in processes_of(run)[:1]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            return True
    return False


def kill_worker(site: Site, pool: str) -> None:
    """Kill a worker but not its runs, and start another."""
    site.workers[pool].kill()
    time.sleep(1)
    site.workers[pool].start()


def lose_machine(site: Site, pool: str) -> None:
    """Kill a worker with all its runs, and start another on an empty machine."""
    site.workers[pool].lose()
    subprocess.run(["rm", "-rf", str(site.machine(pool))], check=True)
    site.worker(pool, **site.extras[pool])


def kill_server(site: Site) -> None:
    """Kill Prefect's server, and start it again on the same database."""
    site.server.lose()
    time.sleep(AWAY)
    site.server.start()
    site.wait_for_server()


def kill_store(site: Site) -> None:
    """Kill the S3 server, and start it again with the same data."""
    endpoint = site.store_endpoint
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = path.read_bytes().rstrip(b"\0").decode().split("\0")
            if command[0] != "radosgw" or endpoint.rpartition(":")[2] not in _conf(command):
                continue
            os.kill(int(path.parent.name), signal.SIGKILL)
            time.sleep(AWAY)
            quiet = subprocess.DEVNULL
            site.started.append(subprocess.Popen(command, stdout=quiet, stderr=quiet))
            return
    raise AssertionError(f"no S3 server at {endpoint}")


def _conf(command: list[str]) -> str:
    return Path(command[command.index("-c") + 1]).read_text()
