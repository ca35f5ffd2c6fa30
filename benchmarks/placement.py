"""Cost of a stage's placement in seconds: `python -m benchmarks.placement`.

One tiny pipeline on a real site (server on Postgres, S3, three workers), with every stage inline
and with every stage on a deployment of its own, in turn. The table has the seconds that the
pipeline waited for each stage, the stage's own work included; the difference is the overhead.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.crashes import PLACEMENT
from tests.ceph import ceph_server
from tests.flows.conftest import tiny_tree
from tests.production.site import Site, site
from tests.servers import client_of


def main() -> None:
    """Measure, print a table, and write the rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--query", type=int, default=10, help="PREFECT_WORKER_QUERY_SECONDS")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="placement-"))
    rows: dict[str, list[dict[str, Any]]] = {"inline": [], "remote": []}
    with (
        ceph_server() as s3,
        client_of(s3, "placement"),
        site(folder, s3.environment) as production,
    ):
        production.run("make", "deploy")
        for pool in ("cpu", "reward", "gpu"):
            production.worker(pool, PREFECT_WORKER_QUERY_SECONDS=str(options.query))
        run_pipeline(production, "warm-up", {})
        for number in range(options.rounds):
            rows["inline"].append(run_pipeline(production, f"inline-{number}", {}))
            rows["remote"].append(run_pipeline(production, f"remote-{number}", PLACEMENT))
    for stage in PLACEMENT:
        inline, remote = (
            statistics.median(row["stages"][stage] for row in rows[kind]) for kind in rows
        )
        print(f"{stage:24}{inline:8.1f} s{remote:8.1f} s{remote - inline:+8.1f} s")
    for name in ("to_start", "run"):
        values = [statistics.median(row[name] for row in rows[kind]) for kind in rows]
        print(f"{name:24}{values[0]:8.1f} s{values[1]:8.1f} s{values[1] - values[0]:+8.1f} s")
    (folder / "rows.json").write_text(json.dumps(rows))


def run_pipeline(production: Site, name: str, placement: dict[str, str]) -> dict[str, Any]:
    """Run the pipeline once; return seconds to start, of the run and of each stage."""
    tree: dict[str, Any] = tiny_tree(Path("/nowhere"))
    del tree["runtime"]
    tree |= {"name": name, "store": f"s3://placement/{name}", "placement": placement}
    begun = time.time()
    run = production.submit("rlhf-pipeline/rlhf-pipeline", overrides=tree)
    ended = production.wait(run, seconds=600)
    assert ended["state"]["name"] == "Completed", ended["state"]
    started = datetime.fromisoformat(ended["start_time"]).timestamp()
    return {
        "to_start": started - begun,
        "run": ended["total_run_time"],
        "stages": overheads(production, run),
    }


def overheads(production: Site, run: str) -> dict[str, float]:
    """Return the seconds of each stage's task in the pipeline's run."""
    query = {"flow_runs": {"id": {"any_": [run]}}, "sort": "EXPECTED_START_TIME_ASC"}
    return {
        task["name"]: task["total_run_time"] for task in production.api("task_runs/filter", **query)
    }


if __name__ == "__main__":
    main()
