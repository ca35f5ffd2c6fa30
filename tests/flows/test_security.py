"""The statements of docs/security.md on Prefect and on the bucket."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from fnmatch import fnmatchcase
from pathlib import Path

import httpx
import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.exceptions import PrefectHTTPStatusError
from prefect.server.api.server import create_api_app
from prefect.settings import PREFECT_SERVER_API_AUTH_STRING, temporary_settings
from prefect.workers.process import ProcessJobConfiguration, ProcessWorker

from rlhf import champions
from rlhf.store import open_store

pytestmark = pytest.mark.prefect
ROOT = Path(__file__).parents[2]
LOCKED = json.loads((ROOT / "deployments" / "pools" / "process-locked.json").read_text())
#: What a run could set, and what would run code.
VARIABLES = [
    {"env": {"PYTHONPATH": "/evil"}}, {"env.PYTHONPATH": "/evil"}, {"command": "sh -c evil"},
    {"working_dir": "/evil"}, {"env": {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30", "PATH": "/evil"}},
]  # fmt: skip


def job(template, values) -> ProcessJobConfiguration:
    """What a worker starts for a run with these variables."""
    made = ProcessJobConfiguration.from_template_and_values(
        json.loads(json.dumps(template)), values
    )
    return asyncio.run(made)


@pytest.mark.parametrize("variables", VARIABLES)
def test_a_run_can_set_nothing_in_a_locked_pool(variables):
    plain = ProcessWorker.get_default_base_job_template()
    assert job(plain, variables) != job(plain, {})  # in any other pool it can
    assert job(LOCKED, variables) == job(LOCKED, {})


def test_an_environment_in_the_template_locks_nothing():
    written = {**LOCKED, "job_configuration": {"env": {}}}
    assert job(written, VARIABLES[0]).env == {"PYTHONPATH": "/evil"}


def test_the_server_refuses_variables_in_a_locked_pool():
    deploy = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())
    own = {**deploy["definitions"]["job"]["job_variables"], "image": ""}
    asyncio.run(_in_a_locked_pool(own))


async def _in_a_locked_pool(own):
    async with get_client() as client:
        pool = WorkPoolCreate(name="locked", type="process", base_job_template=LOCKED)
        await client.create_work_pool(pool)
        flow = await client.create_flow_from_name("locked")
        deployment = await client.create_deployment(
            flow, "locked", work_pool_name="locked", job_variables=own
        )
        await client.create_flow_run_from_deployment(deployment)
        for variables in VARIABLES:
            with pytest.raises(PrefectHTTPStatusError) as caught:
                await client.create_flow_run_from_deployment(deployment, job_variables=variables)
            assert caught.value.response.status_code == 422


def test_the_servers_password_is_one_for_all():
    with temporary_settings({PREFECT_SERVER_API_AUTH_STRING: "all:secret"}):
        app = create_api_app()  # cached by these settings
    token = base64.b64encode(b"all:secret").decode()

    async def status(path, **headers):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return (await client.get(path, headers=headers)).status_code

    assert asyncio.run(status("/version")) == 401
    assert asyncio.run(status("/version", Authorization="Basic eDp5")) == 401
    assert asyncio.run(status("/version", Authorization=f"Basic {token}")) == 200
    assert asyncio.run(status("/health")) == 200


def test_the_buckets_policy_covers_champions_and_approvals_and_no_more(tmp_path):
    text = (ROOT / "docs" / "security.md").read_text()
    block = re.search(r"```json\n(.*?)```", text, re.DOTALL)
    assert block is not None
    patterns = [
        p.removeprefix("arn:aws:s3:::models/rlhf/") for p in json.loads(block[1])["Resource"]
    ]
    store = open_store(str(tmp_path / "store"), cache_dir=tmp_path)

    def new():
        files = {p.relative_to(tmp_path / "store") for p in (tmp_path / "store").rglob("*.json")}
        return {str(file) for file in files} - before

    before: set[str] = set()
    store.history.append("records/train-sft/x", {})
    assert not [key for key in new() for p in patterns if fnmatchcase(key, p)]
    before = new()
    champions.record_approval(store, "ours", "a" * 64, approved=True, by="ann")
    champions.promote(store, "ours", "a" * 64, verdict=None, expected=None, why="", by="ann")
    written = new()
    assert len(written) == 2
    assert all(any(fnmatchcase(key, p) for p in patterns) for key in written)
