"""Deployments and automations on Prefect's server, made equal to the files in `deployments/`.

A script: `python -m tasks.deployments [--dry] [--wait SECONDS]`, which `make deploy` runs.
What it makes bears the tag `MARK`; it removes nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import httpx
import yaml
from rich.table import Table

from rlhf.errors import ConfigError, explained
from rlhf.plain_text import one_line
from tasks.console import PlainConsole, console, say
from tasks.prefect_server import prefect_server, server_error

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.responses import DeploymentResponse
    from prefect.events.schemas.automations import Automation

ROOT = Path(__file__).parents[1]
FILE = ROOT / "deployments" / "prefect.yaml"
AUTOMATIONS = ROOT / "deployments" / "automations"
#: The tag of deployments and automations that this script made and may remove.
MARK = "made-by:rlhf-deploy"
#: Seconds that a server gets to start.
WAIT = 60.0
#: Prefect's API returns at most this many rows per request.
PAGE = 200
WHAT = "make deploy"


@dataclass
class Row:
    """What happens to one object on the server, and why."""

    action: str
    kind: str
    name: str
    why: str = ""
    id: UUID | None = None
    make: Any = None


@dataclass
class Wanted:
    """What the files describe: entries by full name, automations by name, pools."""

    entries: dict[str, dict[str, Any]]
    automations: dict[str, Any]
    pools: list[str]


def deploy(*, dry: bool = False, wait: float = WAIT) -> None:
    """Make the server equal to the files, and print what that changes.

    Raises:
        ConfigError: The files, the server or Prefect's command refuse; or a difference stays.
    """
    wait_for_server(wait)
    wanted = read_files()
    with prefect_server(WHAT) as client:
        rows = plan(client, wanted)
        if not dry:
            before = _automations(client)
            _apply(client, rows)
            shown = {row.name for row in rows if row.kind == "automation"}
            for name in sorted(before.keys() - _automations(client).keys() - shown):
                rows.append(Row("removed", "automation", name, "a trigger that left the file"))
            left = [r for r in plan(client, wanted) if r.action in ("added", "changed", "removed")]
            if left:
                what = ", ".join(f"{r.kind} {r.name} ({r.why or r.action})" for r in left)
                raise ConfigError(f"{WHAT}: the server still differs from the files: {what}")
    _show(rows, dry)


def wait_for_server(seconds: float) -> None:
    """Wait until Prefect's server is healthy.

    Raises:
        ConfigError: It is not within this time, or something else answers.
    """
    from prefect.client.orchestration import get_client

    give_up = time.monotonic() + seconds
    with prefect_server(WHAT) as client:
        url = client.api_url
    said = False
    while True:
        try:
            with get_client(sync_client=True) as client:
                # Without the client's own retries, which take minutes.
                answer = httpx.get(
                    f"{str(url).rstrip('/')}/health", timeout=10, headers=client._client.headers
                )
            answer.raise_for_status()
            if answer.headers.get("content-type", "").startswith("application/json"):
                return
            raise ConfigError(
                f"{WHAT}: what answers at {_shown(url)} is not Prefect's server; "
                "set PREFECT_API_URL to its address, which ends in /api"
            )
        except httpx.HTTPError as error:
            broken = isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500
            if broken or time.monotonic() > give_up:
                raise ConfigError(
                    f"{WHAT}: {server_error(error, url)}"
                    + ("" if broken else f" (waited {seconds:.0f} s)")
                ) from error
        except (RuntimeError, ValueError) as error:  # an address that is none; a client's refusal
            raise ConfigError(f"{WHAT}: PREFECT_API_URL: {one_line(error)}") from error
        if not said:
            say(f"{WHAT}: waiting up to {seconds:.0f} s for {_shown(url)}")
            said = True
        time.sleep(0.5)


def _shown(url: httpx.URL) -> str:
    return str(url.copy_with(userinfo=b"", query=None)).rstrip("/")


def read_files() -> Wanted:
    """Return what the files describe, with Prefect's templates filled in.

    Raises:
        ConfigError: An entry has no mark, or a name twice.
    """
    from prefect.deployments.steps.core import run_steps
    from prefect.events.schemas.automations import AutomationCore
    from prefect.flows import load_flow_from_entrypoint
    from prefect.utilities.templating import apply_values

    tree = yaml.safe_load(FILE.read_text())
    outputs = asyncio.run(run_steps(tree["build"], {}))
    entries: dict[str, dict[str, Any]] = {}
    for raw in tree.get("deployments") or []:
        entry = apply_values(raw, outputs, warn_on_notset=False)
        if any(not trigger.get("name") for trigger in entry.get("triggers") or []):
            raise ConfigError(f"{FILE.name}: triggers of {entry['name']}: one has no name; add it")
        name = f"{load_flow_from_entrypoint(entry['entrypoint']).name}/{entry['name']}"
        if MARK not in (entry.get("tags") or []):
            raise ConfigError(
                f"{FILE.name}: tags of {name}: {entry.get('tags')} lack {MARK!r}, without which it "
                "would not be removed later; add it, for example by `<<: *common`"
            )
        nameless = [s for s in entry.get("schedules") or [] if not s.get("slug")]
        if nameless:
            raise ConfigError(
                f"{FILE.name}: schedules of {name}: {nameless[0]} has no slug, by which it is told "
                "from schedules made by hand; add one, such as `slug: weekly`"
            )
        if name in entries:
            raise ConfigError(f"{FILE.name}: {name}: stands there twice; give one another name")
        entries[name] = entry
    automations = {}
    for path in sorted(AUTOMATIONS.glob("*.yaml")):
        for raw in yaml.safe_load(path.read_text())["automations"]:
            made = AutomationCore.model_validate({**raw, "tags": [*raw.get("tags", []), MARK]})
            automations[made.name] = made
    pools = sorted({entry["work_pool"]["name"] for entry in entries.values()})
    return Wanted(entries, automations, pools)


def plan(client: SyncPrefectClient, wanted: Wanted) -> list[Row]:
    """Return what must happen for the server to equal the files."""
    existing = {pool.name for pool in client.read_work_pools(limit=PAGE)}
    # A pool that exists may be of another type, and have its own template: it stays as it is.
    rows = [
        Row("unchanged" if name in existing else "added", "pool", name) for name in wanted.pools
    ]
    automations = _automations(client)
    rows += _deployment_rows(client, wanted, automations)
    rows += _automation_rows(wanted, automations)
    return rows


def _deployment_rows(
    client: SyncPrefectClient, wanted: Wanted, automations: dict[str, Automation]
) -> Iterator[Row]:
    live = _deployments(client)
    for name, entry in wanted.entries.items():
        if name not in live:
            yield Row("added", "deployment", name)
            continue
        why = ", ".join(_differences(entry, live[name], automations))
        yield Row("changed" if why else "unchanged", "deployment", name, why, live[name].id)
    for name, found in live.items():
        if name in wanted.entries or MARK not in found.tags:
            continue
        if active := _active_runs(client, found.id):
            why = f"not in the files, but has {active}; deploy again when they have ended"
            yield Row("kept", "deployment", name, why, found.id)
        else:
            yield Row("removed", "deployment", name, "not in the files", found.id)


def _differences(
    entry: dict[str, Any], live: DeploymentResponse, automations: dict[str, Automation]
) -> Iterator[str]:
    """Yield the names of the fields in which a deployment differs from its entry."""
    pool = entry["work_pool"]
    limit, found = entry.get("concurrency_limit"), live.global_concurrency_limit
    pairs = {
        "version": (entry.get("version"), live.version),
        "description": (entry.get("description", live.description), live.description),
        "tags": (sorted(entry["tags"]), sorted(live.tags)),
        "entrypoint": (entry["entrypoint"], live.entrypoint),
        "parameters": (entry.get("parameters") or {}, live.parameters or {}),
        "work_pool": (pool["name"], live.work_pool_name),
        "job_variables": (pool.get("job_variables") or {}, live.job_variables or {}),
        "concurrency_limit": (
            limit["limit"] if isinstance(limit, dict) else limit, found.limit if found else None
        ),
        "enforce_parameter_schema": (
            entry.get("enforce_parameter_schema", live.enforce_parameter_schema),
            live.enforce_parameter_schema,
        ),
        "schedules": (
            {s["slug"]: _timing(s) for s in entry.get("schedules") or []},
            {s.slug: _timing(s.schedule.model_dump()) for s in live.schedules if s.slug},
        ),
        "triggers": (True, _has_triggers(entry, live, automations)),
    }  # fmt: skip
    yield from (name for name, (want, have) in pairs.items() if want != have)


def _timing(schedule: dict[str, Any]) -> tuple[Any, ...]:
    every = schedule.get("interval")
    seconds = every.total_seconds() if isinstance(every, timedelta) else every
    return schedule.get("cron"), seconds, schedule.get("rrule"), schedule.get("timezone")


def _has_triggers(
    entry: dict[str, Any], live: DeploymentResponse, automations: dict[str, Automation]
) -> bool:
    """Return whether each trigger of an entry is an automation that starts this deployment.

    Prefect's command removes those that left the file; the server does not show which they are.
    """
    for trigger in entry.get("triggers") or []:
        found = automations.get(trigger["name"])
        if found is None:
            return False
        have = found.trigger.model_dump(mode="json")
        same = all(_plain(have.get(k)) == _plain(v) for k, v in trigger.items() if k in have)
        targets = {getattr(action, "deployment_id", None) for action in found.actions}
        if not same or live.id not in targets:
            return False
    return True


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, list | set) else value


def _active_runs(client: SyncPrefectClient, deployment: UUID) -> str:
    """Return how many runs of a deployment go on or were ordered, and the first's name; or ""."""
    from prefect.client.schemas.filters import (
        DeploymentFilter,
        DeploymentFilterId,
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
    )
    from prefect.client.schemas.objects import TERMINAL_STATES

    final = FlowRunFilterStateType(not_any_=list(TERMINAL_STATES))
    runs = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=final)),
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment])),
        limit=PAGE,
    )
    # Those that the scheduler has planned vanish with the deployment.
    ours = [run for run in runs if not (run.auto_scheduled and run.state_type == "SCHEDULED")]
    return f"{len(ours)} unfinished runs ({one_line(ours[0].name)}, …)" if ours else ""


def _automation_rows(wanted: Wanted, live: dict[str, Automation]) -> Iterator[Row]:
    ids = {"id": True, "owner_resource": True, "trigger": {"id"}}
    for name, make in wanted.automations.items():
        found = live.get(name)
        if found is None:
            yield Row("added", "automation", name, make=make)
            continue
        want, have = make.model_dump(exclude=ids), found.model_dump(exclude=ids)
        why = ", ".join(key for key in want if want[key] != have[key])
        yield Row("changed" if why else "unchanged", "automation", name, why, found.id, make)
    for name, found in live.items():
        if name not in wanted.automations and MARK in found.tags:
            yield Row("removed", "automation", name, "not in the files", found.id)


def _apply(client: SyncPrefectClient, rows: list[Row]) -> None:
    from prefect.client.schemas.actions import WorkPoolCreate

    for row in rows:
        if row.kind == "pool" and row.action == "added":
            client.create_work_pool(WorkPoolCreate(name=row.name, type="process"))
    _let_go(client, rows)
    # Unchanged ones too: it is the one command that knows all fields.
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(
        [*command, "--prefect-file", str(FILE)], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise ConfigError(f"{WHAT}: `prefect deploy` failed: {one_line(lines[-1:])}")
    for row in rows:
        if row.kind == "automation" and row.action == "added":
            client.create_automation(row.make)
        elif row.kind == "automation" and row.action == "changed":
            assert row.id
            client.update_automation(row.id, row.make)
        elif row.kind == "automation" and row.action == "removed":
            assert row.id
            client.delete_automation(row.id)


def _let_go(client: SyncPrefectClient, rows: list[Row]) -> None:
    """Take from deployments what Prefect's command leaves when it is no longer in the file."""
    for row in rows:
        if row.kind != "deployment" or row.id is None:
            continue
        if row.action in ("removed", "kept"):
            client.delete_resource_owned_automations(f"prefect.deployment.{row.id}")
        if row.action == "removed":
            client.delete_deployment(row.id)
        elif row.action == "kept" or "schedules" in row.why:
            # A schedule without a slug was made by hand.
            for schedule in client.read_deployment_schedules(row.id):
                if schedule.slug:
                    client.delete_deployment_schedule(row.id, schedule.id)
        if row.action == "changed":
            cleared = {"parameters": {}, "concurrency_limit": None}
            body = {key: value for key, value in cleared.items() if key in row.why.split(", ")}
            if body:
                client.request("PATCH", "/deployments/{id}", path_params={"id": row.id}, json=body)


def _deployments(client: SyncPrefectClient) -> dict[str, DeploymentResponse]:
    flows = {f.id: f.name for f in _pages(client.read_flows)}
    return {f"{flows.get(d.flow_id)}/{d.name}": d for d in _pages(client.read_deployments)}


def _automations(client: SyncPrefectClient) -> dict[str, Automation]:
    return {automation.name: automation for automation in _pages(client.read_automations)}


def _pages(read: Callable[..., list[Any]]) -> Iterator[Any]:
    offset = 0
    while page := read(limit=PAGE, offset=offset):
        yield from page
        offset += len(page)


def _show(rows: list[Row], dry: bool) -> None:
    table = Table("would be" if dry else "", "what", "name", "why")
    for row in rows:
        if row.action != "unchanged":
            table.add_row(row.action, row.kind, one_line(row.name), one_line(row.why))
    if table.row_count:
        console.print(table)
    same = sum(row.action == "unchanged" for row in rows)
    say(f"{same} unchanged{'; nothing was done: a dry run' if dry else ''}")


def _main() -> int:
    parser = argparse.ArgumentParser(description="Make Prefect's server equal to deployments/.")
    parser.add_argument("--dry", action="store_true", help="only say what would change")
    parser.add_argument("--wait", type=float, default=WAIT, help="seconds for the server to start")
    given = parser.parse_args()
    try:
        deploy(dry=given.dry, wait=given.wait)
    except Exception as error:
        say(explained(error), on=PlainConsole(stderr=True))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(_main())
