"""A stage on several machines, whose workers take up what the stage starts."""

from __future__ import annotations

import pytest

from tests.production.test_runs import until
from tests.servers import PATIENCE

pytestmark = [pytest.mark.prefect, pytest.mark.s3, pytest.mark.slow]


@pytest.fixture(scope="module")
def machines(place):
    """The site with two workers of one pool that take one run each, and one for the data."""
    place.worker("cpu")
    for called in ("gpu", "gpu-2"):
        place.worker("gpu", called, limit=1)
    return place


def test_workers_are_the_machines_of_a_stage(machines, overrides):
    tree = overrides("nodes", sft={"batch_size": 8, "max_length": 128, "processes": 1, "nodes": 2})
    data = machines.submit("prepare-data/prepare-data-cpu", overrides=tree)
    assert machines.wait(data)["state"]["name"] == "Completed", machines.logs(data)
    run = machines.submit("train-sft/train-sft-gpu", overrides=tree)
    ended = machines.wait(run)
    assert ended["state"]["name"] == "Completed", machines.logs(run)
    asked = {"flow_runs": {"name": {"any_": [f"{ended['name']}-node-2"]}}}
    (other,) = machines.api("flow_runs/filter", **asked)
    until(lambda: machines.wait(other["id"], seconds=PATIENCE)["state"]["name"] == "Completed")
    # Each on its own machine: the stage's cache is in one home, the other's in the other.
    caches = [[*(machines.machine(name) / "home" / "work").glob("*")] for name in ("gpu", "gpu-2")]
    assert all(caches)


def test_a_stage_without_a_deployment_for_its_other_machines_is_refused(machines, overrides):
    tree = overrides("nowhere", sft={"batch_size": 8, "processes": 1, "nodes": 2})
    run = machines.submit("rlhf-pipeline", overrides=tree)
    state = machines.wait(run)["state"]
    assert state["name"] == "Failed"
    assert "sft.nodes = 2: needs the deployment 'node/train-node-rlhf-pipeline'" in state["message"]
