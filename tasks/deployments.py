"""Deployments and automations on Prefect's server, made equal to the files in `deployments/`.

A script: `python -m tasks.deployments [--dry] [--wait SECONDS]`, which `make deploy` runs. It
changes what differs, and removes only what bears its mark (`tasks/deployment_files.py`).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas import filters
from prefect.client.schemas.actions import (
    DeploymentScheduleCreate,
    DeploymentUpdate,
    WorkPoolCreate,
)
from prefect.client.schemas.objects import TERMINAL_STATES, DeploymentSchedule, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.sorting import AutomationSort, FlowRunSort
from prefect.events.schemas.automations import Automation, AutomationCore
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from rich.table import Table

from rlhf.errors import ConfigError, explained
from rlhf.plain_text import one_line
from tasks.console import PlainConsole, console, say
from tasks.deployment_files import MARK, SLUG, Entry, Wanted, read_files
from tasks.prefect_server import prefect_server, wait_for_server

#: Seconds that a server gets to start.
WAIT = 60.0
#: The tag of the deployments of older versions, which had no mark.
OLD_TAG = "rlhf"
WHAT = "make deploy"
PAUSED = "paused on the server, and stays so"


@dataclass
class Row:
    """Change of one object on the server: its kind and reason, and the call that makes it."""

    action: str
    kind: str
    name: str
    why: str = ""
    do: Callable[[], object] | None = None


def deploy(*, dry: bool = False, wait: float = WAIT) -> None:
    """Make the server equal to the files, and print what that changes.

    Raises:
        ConfigError: The files or the server refuse; or a difference stays.
    """
    wait_for_server(WHAT, wait)
    wanted = read_files()
    with prefect_server(WHAT) as client:
        # Complete before anything is changed: it refuses what it must not touch.
        rows = list(_rows(client, wanted))
        if not dry:
            try:
                rows = list(_act(client, wanted))
            except ObjectNotFound as error:
                raise ConfigError(
                    f"{WHAT}: somebody else removed something meanwhile; run it again"
                ) from error
            kept = {(row.kind, row.name) for row in rows if row.action == "kept"}
            left = [
                f"{row.kind} {row.name} ({row.why or row.action})" for row in _rows(client, wanted)
                if row.action not in ("unchanged", "kept") and (row.kind, row.name) not in kept
            ]  # fmt: skip
            if left:
                _show(rows, dry=False)
                raise ConfigError(
                    f"{WHAT}: the server still differs from the files: {', '.join(left)}; run it "
                    "again, or correct the files"
                )
    _show(rows, dry)


def _rows(client: SyncPrefectClient, wanted: Wanted) -> Iterator[Row]:
    """Yield what would happen to each object."""
    yield from _pool_rows(client, wanted)
    yield from _deployment_rows(client, wanted)
    yield from _schedule_rows(client, wanted)
    yield from _automation_rows(client, wanted, {})
    yield from _left_rows(client, wanted)


def _act(client: SyncPrefectClient, wanted: Wanted) -> Iterator[Row]:
    """Do it, kind by kind, because each needs what the one before made; yield what was done."""
    before = {found.id: found for found in _automations(client)}
    yield from _done(_pool_rows(client, wanted))
    yield from _done(_deployment_rows(client, wanted))
    yield from _done(_schedule_rows(client, wanted))
    for name, found in _deployments(client, wanted).items():
        if name in wanted.deployments or MARK in found.tags:
            # Triggers that `prefect deploy` made: a second automation for each of ours.
            client.delete_resource_owned_automations(f"prefect.deployment.{found.id}")
    yield from _done(_automation_rows(client, wanted, before))
    # When nothing starts new runs of them any longer.
    yield from _done(_left_rows(client, wanted))


def _done(rows: Iterator[Row]) -> Iterator[Row]:
    for row in list(rows):
        if row.do:
            row.do()
        yield row


def _pool_rows(client: SyncPrefectClient, wanted: Wanted) -> Iterator[Row]:
    """Pools belong to the operator: one that exists may be of another type, and stays as it is."""

    def make(name: str) -> None:
        with suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=name, type="process"))

    for name in wanted.pools:
        try:
            client.read_work_pool(name)
            yield Row("unchanged", "pool", name)
        except ObjectNotFound:
            yield Row("added", "pool", name, "of type process", partial(make, name))


def _deployment_rows(client: SyncPrefectClient, wanted: Wanted) -> Iterator[Row]:
    live = _deployments(client, wanted)
    for name, entry in wanted.deployments.items():
        found = live.get(name)
        if found is None:
            yield Row("added", "deployment", name, do=partial(_create, client, entry))
            continue
        if not {MARK, OLD_TAG} & {*found.tags}:
            raise ConfigError(
                f"{WHAT}: the server has a deployment {name} that this project did not make (its "
                f"tags are {found.tags}); delete or rename it, or give the one in the file "
                "another name"
            )
        have = _fields(found)
        new = {key: value for key, value in entry.fields.items() if value != have[key]}
        if new:
            together = ("work_pool_name", "work_queue_name", "job_variables")
            if any(key in new for key in together):  # the server checks them together
                new |= {key: entry.fields[key] for key in together if key in entry.fields}
            why = ", ".join(key for key in new if entry.fields[key] != have[key])
            change = partial(client.update_deployment, found.id, DeploymentUpdate(**new))
            yield Row("changed", "deployment", name, why, change)
        else:
            yield _same("deployment", name, found.paused and "paused" not in entry.fields)


def _same(kind: str, name: str, paused: bool) -> Row:
    return Row("kept", kind, name, PAUSED) if paused else Row("unchanged", kind, name)


def _create(client: SyncPrefectClient, entry: Entry) -> None:
    flow = client.create_flow_from_name(entry.flow)
    client.create_deployment(flow, entry.name, **entry.fields)


def _fields(found: DeploymentResponse) -> dict[str, Any]:
    """Return a deployment's fields as an `Entry` has them."""
    limit, options = found.global_concurrency_limit, found.concurrency_options
    return {
        **dict(found),
        "tags": sorted(found.tags),
        "parameters": found.parameters or {},
        "job_variables": found.job_variables or {},
        "pull_steps": found.pull_steps or [],
        "concurrency_limit": limit.limit if limit else None,
        "concurrency_options": options.model_dump(mode="json") if options else None,
    }


def _schedule_rows(client: SyncPrefectClient, wanted: Wanted) -> Iterator[Row]:
    live = _deployments(client, wanted)
    for name, entry in wanted.deployments.items():
        if name not in live:
            for slug in entry.schedules:
                yield Row("added", "schedule", f"{name} {slug}")
    for name, found in live.items():
        if entry := wanted.deployments.get(name):
            yield from _schedules_of(client, name, found, entry)
        elif MARK in found.tags:
            for schedule in found.schedules:
                if (schedule.slug or "").startswith(SLUG):
                    yield _remove_schedule(client, name, found.id, schedule)


def _schedules_of(
    client: SyncPrefectClient, name: str, found: DeploymentResponse, entry: Entry
) -> Iterator[Row]:
    live = {schedule.slug: schedule for schedule in found.schedules if schedule.slug}
    others = [s for s in found.schedules if not (s.slug or "").startswith(SLUG)]
    for slug, make in entry.schedules.items():
        # An older version's had another slug, or none.
        have = live.get(slug) or next((s for s in others if not _changes(make, s)), None)
        if have is None:
            do = partial(client.create_deployment_schedules, found.id, [make])
            yield Row("added", "schedule", f"{name} {slug}", do=do)
            continue
        if have in others:
            others.remove(have)
        new = {**_changes(make, have), **({} if have.slug == slug else {"slug": slug})}
        if new:
            do = partial(client.update_deployment_schedule, found.id, have.id, **new)
            yield Row("changed", "schedule", f"{name} {slug}", ", ".join(new), do)
        else:
            paused = not have.active and "active" not in make.model_fields_set
            yield _same("schedule", f"{name} {slug}", paused)
    for slug, schedule in live.items():
        if slug not in entry.schedules and slug.startswith(SLUG):
            yield _remove_schedule(client, name, found.id, schedule)
    for schedule in others:
        timing = schedule.schedule.model_dump(mode="json", exclude_unset=True)
        what = next(
            (str(timing[key]) for key in ("cron", "rrule", "interval") if key in timing), ""
        )
        why = f"its slug does not begin with {SLUG!r}: made by hand, or by an older version"
        yield Row("kept", "schedule", f"{name} {schedule.slug or what}", why)


def _changes(make: DeploymentScheduleCreate, have: DeploymentSchedule) -> dict[str, Any]:
    """Return what a schedule must get to be the one of the file."""
    # What the file does not say has its default again; that of an anchor is the time of making.
    given = make.schedule.model_dump(exclude={"anchor_date"} - make.schedule.model_fields_set)
    live = have.schedule.model_dump()
    pairs: dict[str, tuple[Any, Any]] = {"parameters": (make.parameters, have.parameters or {})}
    if "active" in make.model_fields_set:
        pairs["active"] = (make.active, have.active)
    new = {key: want for key, (want, found) in pairs.items() if want != found}
    if any(value != live.get(key) for key, value in given.items()):
        new["schedule"] = make.schedule
    return new


def _remove_schedule(
    client: SyncPrefectClient, name: str, deployment: UUID, schedule: DeploymentSchedule
) -> Row:
    do = partial(client.delete_deployment_schedule, deployment, schedule.id)
    return Row("removed", "schedule", f"{name} {schedule.slug}", "not in the files", do)


def _automation_rows(
    client: SyncPrefectClient, wanted: Wanted, before: dict[UUID, Automation]
) -> Iterator[Row]:
    """Yield what happens to automations; `before` are those of before the deployments' turn."""
    live = _automations(client)
    ids = {name: found.id for name, found in _deployments(client, wanted).items()}
    names = {found.name for found in live}
    gone = {found.name: found for found in before.values() if found.name not in names}
    ours, others = [], []
    for found in live:
        (ours if MARK in found.tags else others).append(found)
    for name in wanted.automation_names:
        make = wanted.automation(name, ids)
        mine = [found for found in ours if found.name == name]
        twins = [
            found for found in others if found.name == name and _differs(make, found) == ["tags"]
        ]
        if not mine and twins:  # an older version's
            mine.append(twins[0])
            others.remove(twins[0])
        if not mine:
            action, why = ("changed", "tags") if name in gone else ("added", "")
            _stay_paused(make, gone.get(name, make))
            yield Row(action, "automation", name, why, partial(client.create_automation, make))
            continue
        found = mine[0]
        if why := ", ".join(_differs(make, found)):
            _stay_paused(make, found)
            yield Row("changed", "automation", name, why, partial(_update, client, found, make))
        else:
            yield _same("automation", name, make.enabled and not found.enabled)
        ours = [found for found in ours if found.id != mine[0].id]
    for found in ours:
        why = "there twice" if found.name in wanted.automation_names else "not in the files"
        yield Row(
            "removed", "automation", found.name, why, partial(client.delete_automation, found.id)
        )
    for name in sorted(gone.keys() - {*wanted.automation_names}):
        yield Row("removed", "automation", name, "a trigger that left the file")
    for found in others:
        if found.name in wanted.automation_names or found.name.startswith("rlhf-"):
            why = f"lacks the tag {MARK}: made by hand, or by an older version"
            yield Row("kept", "automation", found.name, why)


def _stay_paused(make: AutomationCore, found: AutomationCore) -> None:
    """Leave it to the operator whether an automation is paused, unless the file says so."""
    if "enabled" not in make.model_fields_set:
        make.enabled = found.enabled


def _update(client: SyncPrefectClient, found: Automation, make: AutomationCore) -> None:
    # All fields: the client leaves out those that were never set, such as tags that were added. The
    # server refuses the owner, whom it knows.
    fields = {key: value for key, value in dict(make).items() if key != "owner_resource"}
    client.update_automation(found.id, AutomationCore(**fields))


def _differs(make: AutomationCore, found: Automation) -> list[str]:
    """Return the names of fields in which an automation differs from the file's."""
    want, have = _bare(make.model_dump()), _bare(found.model_dump())
    if "enabled" not in make.model_fields_set:  # an operator may have paused it
        want.pop("enabled")
    want.pop("owner_resource")  # the server does not show it
    return [key for key, value in want.items() if value != have[key]]


def _bare(value: Any) -> Any:
    """Return a dumped automation without the ids that the server gives it and its triggers."""
    if isinstance(value, dict):
        return {key: _bare(part) for key, part in value.items() if key != "id"}
    return [_bare(part) for part in value] if isinstance(value, list) else value


def _left_rows(client: SyncPrefectClient, wanted: Wanted) -> Iterator[Row]:
    """Deployments that are not in the files."""
    for name, found in _deployments(client, wanted).items():
        if name in wanted.deployments:
            continue
        if MARK not in found.tags:
            why = (
                f"not in the files, and lacks the tag {MARK}: made by hand, or by an older version"
            )
            yield Row("kept", "deployment", name, why)
        elif runs := _unfinished(client, found.id):
            why = f"not in the files; deploy again when its unfinished runs have ended: {runs}"
            yield Row("kept", "deployment", name, why)
        else:
            do = partial(client.delete_deployment, found.id)
            yield Row("removed", "deployment", name, "not in the files", do)


def _unfinished(client: SyncPrefectClient, deployment: UUID) -> str:
    """Return how many runs of a deployment were ordered or have begun, and one's name; or ""."""
    going = [kind for kind in StateType if kind not in TERMINAL_STATES]
    state = filters.FlowRunFilterState(type=filters.FlowRunFilterStateType(any_=going))
    read = partial(
        client.read_flow_runs,
        flow_run_filter=filters.FlowRunFilter(state=state),
        deployment_filter=filters.DeploymentFilter(
            id=filters.DeploymentFilterId(any_=[deployment])
        ),
        sort=FlowRunSort.ID_DESC,
    )
    # What a schedule has planned and no worker has begun vanishes with the deployment.
    found = [
        run for run in _pages(read)
        if not (run.auto_scheduled and run.state_type == StateType.SCHEDULED and not run.run_count)
    ]  # fmt: skip
    return f"{len(found)}, such as {one_line(found[0].name)}" if found else ""


def _deployments(client: SyncPrefectClient, wanted: Wanted) -> dict[str, DeploymentResponse]:
    """Return by full name those that the files name, and those with a tag of this project."""
    tags = filters.DeploymentFilterTags(any_=[MARK, OLD_TAG])
    read = partial(client.read_deployments, deployment_filter=filters.DeploymentFilter(tags=tags))
    tagged = list(_pages(read))
    flows = {flow: client.read_flow(flow).name for flow in {found.flow_id for found in tagged}}
    found = {f"{flows[each.flow_id]}/{each.name}": each for each in tagged}
    for name in wanted.deployments.keys() - found.keys():
        with suppress(ObjectNotFound):
            found[name] = client.read_deployment_by_name(name)
    return dict(sorted(found.items()))


def _automations(client: SyncPrefectClient) -> list[Automation]:
    return list(_pages(partial(client.read_automations, sort=AutomationSort.CREATED_DESC)))[::-1]


def _pages(read: Callable[..., list[Any]]) -> Iterator[Any]:
    """Yield all rows; the server limits how many it returns at once."""
    offset = 0
    while page := read(offset=offset):
        yield from page
        offset += len(page)


def _show(rows: list[Row], dry: bool) -> None:
    table = Table("would be" if dry else "", "what", "name", "why")
    for row in rows:
        if row.action != "unchanged":
            table.add_row(row.action, row.kind, one_line(row.name), one_line(row.why))
    if table.row_count:
        console.print(table)
    counts = Counter(row.action for row in rows)
    words = ", ".join(f"{counts[word]} {word}" for word in sorted(counts))
    say(f"{words}{'; a dry run: nothing was done' if dry else ''}")


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError
    return value


def _main() -> int:
    parser = argparse.ArgumentParser(description="Make Prefect's server equal to deployments/.")
    parser.add_argument("--dry", action="store_true", help="only say what would change")
    parser.add_argument("--wait", type=_seconds, default=WAIT, help="for the server to start")
    given = parser.parse_args()
    try:
        deploy(dry=given.dry, wait=given.wait)
    except Exception as error:
        say(explained(error), on=PlainConsole(stderr=True))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(_main())
