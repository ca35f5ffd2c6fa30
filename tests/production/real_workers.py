"""Check of the pool templates by the real workers, which the product does not need.

    python3.11 -m venv /tmp/pools && /tmp/pools/bin/pip install -c constraints.txt prefect \
        prefect-kubernetes prefect-aws kubernetes-validate
    PYTHONPATH=. /tmp/pools/bin/python -m tests.production.real_workers

Each worker renders a job from its template, as for a flow run. Kubernetes' schemas then validate
the manifest strictly, and AWS' service model validates the requests to ECS. Prints their results.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import uuid
from pathlib import Path
from typing import Any

import kubernetes_validate
from botocore.session import get_session
from botocore.validate import ParamValidator
from prefect.client.schemas.objects import FlowRun
from prefect_aws.workers.ecs_worker import ECSJobConfiguration, ECSWorker
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

POOLS = Path(__file__).parents[2] / "deployments" / "pools"
VERSIONS = ("1.29", "1.32", "1.35")
IMAGE = "registry.example/rlhf:1"
ROLE = "arn:aws:iam::123456789012:role/rlhf"
#: Prefect demands these in a pod's spec, where Kubernetes has no such fields and drops them.
PREFECTS_OWN = ("parallelism", "completions")


def prepared(kind: Any, pool: str, **variables: Any) -> Any:
    """Return a worker's configuration for a run with these job variables, and the run."""
    template = json.loads((POOLS / f"{pool}.json").read_text())
    job = asyncio.run(kind.from_template_and_values(template, {"image": IMAGE, **variables}))
    run = FlowRun(id=uuid.uuid4(), name="witty-otter", flow_id=uuid.uuid4())
    job.prepare_for_flow_run(run)
    return job, run


def kubernetes(pool: str) -> None:
    """Check the job for a cluster."""
    job, _ = prepared(KubernetesWorkerJobConfiguration, pool, env={"AWS_REGION": "eu-west-1"})
    manifest = job.job_manifest
    pod = manifest["spec"]["template"]["spec"]
    assert all(pod.pop(field) == 1 for field in PREFECTS_OWN)
    for version in VERSIONS:
        kubernetes_validate.validate(manifest, version, strict=True)
    try:
        pod["restarts"] = "Never"
        kubernetes_validate.validate(manifest, VERSIONS[-1], strict=True)
    except kubernetes_validate.ValidationError:
        del pod["restarts"]
    else:
        raise AssertionError("the validator takes anything")
    (container,) = pod["containers"]
    names = {entry["name"]: entry["value"] for entry in container["env"]}
    assert names["AWS_REGION"] == "eu-west-1"
    assert names["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
    assert names["PREFECT_HOME"] == "/home/rlhf/.prefect", "the worker's own came through"
    behaviour = names["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"]
    assert behaviour == ("crash" if pool.endswith("gpu") else "reschedule")
    sys.stdout.write(
        f"{pool}: valid for Kubernetes {', '.join(VERSIONS)}\n{json.dumps(manifest)}\n"
    )


def ecs() -> None:
    """Check the task definition and the request to run it."""
    roles = {"execution_role_arn": ROLE, "task_role_arn": ROLE}
    spot = [{"capacityProvider": "gpu-spot", "weight": 1, "base": 0}]
    service = get_session().get_service_model("ecs")
    for more in ({}, {"capacity_provider_strategy": spot, "scratch_path": "/mnt/nvme"}):
        job, run = prepared(ECSJobConfiguration, "ecs-gpu", **roles, **more)
        worker = ECSWorker.__new__(ECSWorker)
        worker._work_pool_name, worker._logger = "gpu", logging.getLogger("ecs")
        task = worker._prepare_task_definition(job, "eu-west-1", run)
        worker._validate_task_definition(task, job)
        request = worker._prepare_task_run_request(job, task, "arn:aws:ecs:eu-west-1:1:x:1")
        for operation, body in (("RegisterTaskDefinition", task), ("RunTask", request)):
            shape = service.operation_model(operation).input_shape
            said = ParamValidator().validate(body, shape).generate_report()
            assert not said, said
            sys.stdout.write(f"ecs-gpu: {operation} is valid\n{json.dumps(body)}\n")


if __name__ == "__main__":
    kubernetes("kubernetes-gpu")
    kubernetes("kubernetes-cpu")
    ecs()
