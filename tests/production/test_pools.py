"""The work-pool templates: valid for Prefect, its server, and the target platforms."""

import json
import subprocess
from pathlib import Path

import httpx
import pytest
import yaml
from botocore.session import get_session
from botocore.validate import ParamValidator
from prefect.utilities.schema_tools import is_valid_schema, validate
from prefect.utilities.templating import apply_values, find_placeholders

from rlhf.config.load import MACHINE_FIELDS, environment_variable, load_config
from tasks.prefect_server import IN_FILES, LEASE_SETTING
from tasks.stages import STAGES
from tests.production.site import ROOT

pytestmark = pytest.mark.prefect

POOLS = ROOT / "deployments" / "pools"
TEMPLATES = ("kubernetes-gpu", "kubernetes-cpu", "ecs-gpu")
ROLE = "arn:aws:iam::123456789012:role/rlhf"


def template(name):
    return json.loads((POOLS / f"{name}.json").read_text())


def rendered(pool, /, **variables):
    """The job as a worker of Prefect's writes it: defaults, then what the deployment says."""
    tree = template(pool)
    properties = tree["variables"]["properties"]
    values = {key: field["default"] for key, field in properties.items() if "default" in field}
    return apply_values(tree["job_configuration"], values | variables)


@pytest.mark.parametrize("name", TEMPLATES)
def test_variables_are_a_schema_and_all_are_used(name):
    tree = template(name)
    schema = tree["variables"]
    is_valid_schema(schema, preprocess=False)
    used = {placeholder.name for placeholder in find_placeholders(tree["job_configuration"])}
    assert used == set(schema["properties"])
    for key, field in schema["properties"].items():
        assert {"type", "title", "description"} <= set(field), key
        if "default" in field:
            validate({key: field["default"]}, schema, raise_on_error=True, ignore_required=True)


def test_the_cpu_pool_is_the_gpu_pool_without_gpus():
    """One would drift from the other; what differs on purpose is put back here."""
    gpu, cpu = template("kubernetes-gpu"), template("kubernetes-cpu")
    for tree in (gpu, cpu):
        for key, field in tree["variables"]["properties"].items():
            if key in {"env", "tolerations", "grace_period", "cpu", "memory", "shared_memory",
                       "scratch", "node_selector"}:  # fmt: skip
                del field["description"]
                del field["default"]
    resources = gpu["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    for kind in ("limits", "requests"):
        del resources["containers"][0]["resources"][kind]["nvidia.com/gpu"]
    del gpu["variables"]["properties"]["gpus"]
    assert cpu == gpu


def test_a_pod_has_what_its_deployment_asks_for():
    job = rendered(
        "kubernetes-gpu",
        image="registry.example/rlhf:1", gpus="4", cpu="32", memory="256Gi", namespace="ml",
        service_account="trainer", s3_secret="bucket", scratch="1Ti", shared_memory="16Gi",
        node_selector={"pool": "h100"}, tolerations=[{"key": "spot", "operator": "Exists"}],
        grace_period=900, finished_job_ttl=60, name="train-policy",
    )["job_manifest"]  # fmt: skip
    assert job["metadata"] == {"namespace": "ml", "generateName": "train-policy-"}
    assert (job["spec"]["backoffLimit"], job["spec"]["ttlSecondsAfterFinished"]) == (0, 60)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == "registry.example/rlhf:1"
    sizes = {"memory": "256Gi", "nvidia.com/gpu": "4"}
    assert container["resources"] == {"requests": {"cpu": "32"} | sizes, "limits": sizes}
    assert container["envFrom"] == [{"secretRef": {"name": "bucket", "optional": True}}]
    assert pod["nodeSelector"] == {"pool": "h100"}
    assert pod["tolerations"] == [{"key": "spot", "operator": "Exists"}]
    assert pod["serviceAccountName"] == "trainer"
    assert pod["terminationGracePeriodSeconds"] == 900
    assert {v["name"]: v["emptyDir"] for v in pod["volumes"]} == {
        "shm": {"medium": "Memory", "sizeLimit": "16Gi"},
        "scratch": {"sizeLimit": "1Ti"},
    }


def test_ecs_takes_the_task():
    job = rendered(
        "ecs-gpu", image="registry.example/rlhf:1", execution_role_arn=ROLE, task_role_arn=ROLE,
        family="rlhf", cluster="ml", scratch_path="/mnt/nvme", command="prefect flow-run execute",
        capacity_provider_strategy=[{"capacityProvider": "spot", "weight": 1, "base": 0}],
        placement_constraints=[{"type": "memberOf", "expression": "attribute:x =~ p5.*"}],
    )  # fmt: skip
    service = get_session().get_service_model("ecs")

    def refused(operation, body):
        shape = service.operation_model(operation).input_shape
        return ParamValidator().validate(body, shape).generate_report()

    task = job["task_definition"]
    assert refused("RegisterTaskDefinition", task) == ""
    # So the validator does look at it:
    assert "Invalid type" in refused("RegisterTaskDefinition", task | {"family": 1})
    (container,) = task["containerDefinitions"]
    assert container["resourceRequirements"] == [{"type": "GPU", "value": "1"}]
    assert container["linuxParameters"] == {"sharedMemorySize": 8192}
    assert task["volumes"] == [{"name": "scratch", "host": {"sourcePath": "/mnt/nvme"}}]
    # The worker splits the command, lists the environment and names the task.
    request = job["task_run_request"] | {"taskDefinition": "rlhf:1"}
    (override,) = request["overrides"]["containerOverrides"]
    override["command"] = override["command"].split()
    override["environment"] = [{"name": k, "value": v} for k, v in override["environment"].items()]
    assert refused("RunTask", request) == ""


@pytest.fixture(scope="module")
def flow(place):
    made = place.api("flows/", name="pools")["id"]
    yield made
    httpx.delete(f"{place.environment['PREFECT_API_URL']}/flows/{made}").raise_for_status()


@pytest.mark.s3
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_server_takes_the_pool_and_refuses_bad_variables(place, flow, name):
    kind = name.partition("-")[0]
    file = f"deployments/pools/{name}.json"
    create = ["work-pool", "create", name, "--type", kind, "--base-job-template", file]
    assert "Created work pool" in place.run("prefect", *create)
    assert place.api(f"work_pools/{name}")["base_job_template"] == template(name)

    def deploy(**variables):
        pool = {"work_pool_name": name, "job_variables": variables}
        return place.api("deployments/", name="try", flow_id=flow, **pool)

    fine = deploy(image="registry.example/rlhf:1", env={"A": "1"})
    assert fine["job_variables"]["image"] == "registry.example/rlhf:1"
    bad = {"image": "", "memory": [], "env": {"A": 1}}
    if kind == "kubernetes":
        bad |= {"tolerations": "spot", "grace_period": -1, "node_selector": {"a": 1}}
    if name.endswith("gpu"):
        bad |= {"gpus": "many"}
    for key, value in bad.items():
        with pytest.raises(httpx.HTTPStatusError) as caught:
            deploy(**{"image": "registry.example/rlhf:1", key: value})
        assert caught.value.response.status_code == 422
        assert f"'{key}" in caught.value.response.text


@pytest.mark.s3
def test_an_image_brings_its_own_code(place):
    deploy = ["prefect", "--no-prompt", "deploy", "--prefect-file", "deployments/prefect.yaml"]
    one = [*deploy, "--name", "promote/promote-cpu"]

    def where(**environment):
        place.run(*one, **environment)
        found = place.api("deployments/name/promote/promote-cpu")
        (step,) = found["pull_steps"]
        directory = step["prefect.deployments.steps.set_working_directory"]["directory"]
        return directory, found["job_variables"]["image"]

    try:
        image = "registry.example/rlhf:1"
        assert where(RLHF_IMAGE=image) == ("/opt/rlhf", image)
    finally:
        assert where() == (str(ROOT), "")


def test_the_trainjob_is_of_as_many_machines_as_its_stage(tmp_path):
    (job,) = yaml.safe_load_all((POOLS / "kubeflow-trainjob.yaml").read_text())
    trainer = job["spec"]["trainer"]
    stage, preset, *overrides = trainer["args"]
    section = getattr(load_config(ROOT / preset, overrides).config, STAGES[stage].section)
    assert section.nodes == trainer["numNodes"] == 2
    for kind in ("limits", "requests"):
        assert trainer["resourcesPerNode"][kind]["nvidia.com/gpu"] == str(section.processes)
    # The first pod leads, the others take part; in between `sh` takes the arguments as they are.
    (tmp_path / "rlhf").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "rlhf").chmod(0o755)
    for rank, said in (("0", ["stage", *trainer["args"]]), ("1", ["node"])):
        done = subprocess.run(
            [*trainer["command"], *trainer["args"]], capture_output=True, text=True, check=True,
            env={"PET_NODE_RANK": rank, "PATH": f"{tmp_path}:/bin:/usr/bin"},
        )  # fmt: skip
        assert done.stdout.split() == said


def test_image_templates_and_compose_agree():
    dockerfile = (ROOT / "deployments" / "Dockerfile").read_text()
    assert "USER 1000:1000" in dockerfile
    entrypoint = ROOT / "deployments" / "entrypoint.sh"
    assert f'ENTRYPOINT ["/opt/rlhf/{entrypoint.relative_to(ROOT)}"]' in dockerfile
    assert entrypoint.stat().st_mode & 0o111 == 0o111
    for field in ("work_dir", "report_dir", "log_dir"):
        assert any(field in fields for fields in MACHINE_FIELDS.values())
        assert f"{environment_variable(field)}=/scratch/" in dockerfile
    for name in TEMPLATES[:2]:
        pod = template(name)["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsUser"] == 1000
        (container,) = pod["containers"]
        assert "/scratch" in [mount["mountPath"] for mount in container["volumeMounts"]]
        assert "command" not in container, "it would take the place of the image's entrypoint"
    # What the image is built from is let through, and only that.
    ignored = (ROOT / ".dockerignore").read_text().split("\n")
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    assert {name for name in allowed if not (ROOT / name).exists()} == set()
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "configs"} <= allowed
    services = yaml.safe_load((ROOT / "deployments" / "compose.yaml").read_text())["services"]
    pools = {Path(s["command"][-1]).name for n, s in services.items() if n.startswith("worker-")}
    assert pools == {"cpu", "reward", "gpu"}
    assert services["postgres"]["environment"]["POSTGRES_PASSWORD"].startswith("${")
    # Leases outlive a restart of the server, and its container.
    server = services["prefect"]
    assert server["environment"][LEASE_SETTING] == IN_FILES
    home = server["environment"]["PREFECT_HOME"]
    assert [volume.partition(":")[2] for volume in server["volumes"]] == [home]
    assert home in next(line for line in dockerfile.split("\n") if "install --directory" in line)
