"""Reader of `deployments/`: deployments, their schedules and triggers, automations.

Apart from `tasks/deployments.py`, which makes a server equal to it: nothing here asks a server for
more than the blocks and variables that the files name.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import yaml
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyOptions
from prefect.deployments.steps.core import run_steps
from prefect.events import DeploymentTriggerTypes
from prefect.events.schemas.automations import AutomationCore
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema
from prefect.utilities.templating import (
    apply_values,
    resolve_block_document_references,
    resolve_variables,
)
from pydantic import TypeAdapter, ValidationError

from rlhf.errors import ConfigError
from rlhf.plain_text import shortened

ROOT = Path(__file__).parents[1]
FILE = ROOT / "deployments" / "prefect.yaml"
AUTOMATIONS = ROOT / "deployments" / "automations"
#: The tag of deployments and automations that `make deploy` made and may remove.
MARK = "made-by:rlhf-deploy"
#: The beginning of the slugs of its schedules: schedules have no tags.
SLUG = "rlhf-"
_TOP = {"name", "prefect-version", "definitions", "build", "pull", "deployments"}
_KEYS = {
    "name", "description", "version", "tags", "entrypoint", "parameters", "work_pool", "paused",
    "concurrency_limit", "enforce_parameter_schema", "schedules", "triggers", "pull",
}  # fmt: skip
_POOL_KEYS = {"name", "job_variables", "work_queue_name"}
_TRIGGER: TypeAdapter[Any] = TypeAdapter(DeploymentTriggerTypes)


@dataclass
class Entry:
    """A deployment of the file: fields as on the server, schedules by slug, triggers by name."""

    flow: str
    name: str
    fields: dict[str, Any]
    schedules: dict[str, DeploymentScheduleCreate]
    triggers: dict[str, Any]


@dataclass
class Wanted:
    """Contents of the files: deployments by full name, automations by name."""

    deployments: dict[str, Entry]
    automations: dict[str, AutomationCore]

    def automation(self, name: str, ids: dict[str, UUID]) -> AutomationCore:
        """Return an automation; `ids` are those of the deployments that triggers start."""
        if name in self.automations:
            return self.automations[name]
        full, trigger = next(
            (full, entry.triggers[name])
            for full, entry in self.deployments.items() if name in entry.triggers
        )  # fmt: skip
        trigger.set_deployment_id(ids.get(full, UUID(int=0)))
        made = trigger.as_automation()
        # Without an owner, and so not among those that `prefect deploy` removes.
        made.owner_resource, made.tags = None, [MARK]
        if "enabled" not in trigger.model_fields_set:  # an operator may have paused it
            made.model_fields_set.discard("enabled")
        return made

    @property
    def automation_names(self) -> list[str]:
        """Names of all automations, those of triggers too."""
        names = [name for entry in self.deployments.values() for name in entry.triggers]
        return [*names, *self.automations]

    @property
    def pools(self) -> list[str]:
        """Names of the work pools of the deployments."""
        return sorted({entry.fields["work_pool_name"] for entry in self.deployments.values()})


def read_files() -> Wanted:
    """Return what the files describe, with Prefect's templates filled in.

    Raises:
        ConfigError: A file is not valid, or has something that could not be removed later.
    """
    with _about(FILE.name):
        tree = _load(FILE, _TOP)
        deployments = asyncio.run(_entries(tree))
    automations: dict[str, AutomationCore] = {}
    for path in sorted(AUTOMATIONS.glob("*.yaml")):
        with _about(path.name):
            for raw in _load(path, {"automations"})["automations"]:
                tags = [*raw.get("tags", []), MARK]
                made = AutomationCore.model_validate({**raw, "tags": tags})
                if made.name in automations:
                    raise ConfigError(f"{path.name}: {made.name!r} stands there twice; rename one")
                automations[made.name] = made
    wanted = Wanted(deployments, automations)
    names = wanted.automation_names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{FILE.name}: triggers: {twice[0]!r} names two automations; rename one")
    return wanted


def _load(path: Path, keys: set[str]) -> dict[str, Any]:
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    _check_keys(f"{path.name}: the file", tree, keys)
    return tree


def _check_keys(where: str, tree: Any, keys: set[str]) -> None:
    """Refuse a key that would be passed over."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: {shortened(tree)!r} is not a mapping; write `key: value`")
    if unknown := sorted(map(str, tree.keys() - keys)):
        raise ConfigError(
            f"{where}: {unknown[0]!r} is none of {', '.join(sorted(keys))}; take it out"
        )


@contextmanager
def _about(place: str) -> Iterator[None]:
    """Make an error of Prefect, YAML or pydantic one line; every error begins with a place."""
    try:
        yield
    except ConfigError as error:
        if f"{error}".startswith(place.partition(":")[0]):
            raise
        raise ConfigError(f"{place}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{place}: {where}: {shortened(first['msg'])}; correct it") from error
    except Exception as error:  # flows are loaded and shell scripts run: anything can come
        raise ConfigError(
            f"{place}: {type(error).__name__}: {shortened(error)}; correct it"
        ) from error


async def _entries(tree: dict[str, Any]) -> dict[str, Entry]:
    with contextlib.redirect_stdout(io.StringIO()):  # scripts repeat their output there
        outputs = await run_steps(tree.get("build") or [], {})
    entries: dict[str, Entry] = {}
    for raw in tree.get("deployments") or []:
        _check_keys(f"{FILE.name}: deployments", raw, _KEYS)
        with _about(f"{FILE.name}: {raw.get('name')}"):
            known: Any = await resolve_variables(await resolve_block_document_references(raw))
            known = apply_values(known, dict(os.environ), remove_notset=False)
            entry = _entry(known, raw.get("pull", tree.get("pull")), outputs)
        name = f"{entry.flow}/{entry.name}"
        if name in entries:
            raise ConfigError(f"{FILE.name}: {name}: stands there twice; give one another name")
        entries[name] = entry
    return entries


def _entry(raw: dict[str, Any], pull: Any, outputs: dict[str, Any]) -> Entry:
    plain = {key: value for key, value in raw.items() if key != "triggers"}
    given: Any = apply_values(plain, outputs, warn_on_notset=False)
    flow = load_flow_from_entrypoint(given["entrypoint"])
    pool = given["work_pool"]
    _check_keys("work_pool", pool, _POOL_KEYS)
    limit = given.get("concurrency_limit")
    options = None
    if isinstance(limit, dict):
        config = ConcurrencyLimitConfig.model_validate(limit)
        limit = config.limit
        options = ConcurrencyOptions(**config.model_dump(exclude={"limit"})).model_dump(mode="json")
    fields = {
        "description": given.get("description") or flow.description,
        "tags": sorted(given.get("tags") or []),
        "entrypoint": given["entrypoint"],
        "parameters": given.get("parameters") or {},
        "work_pool_name": pool["name"],
        "job_variables": pool.get("job_variables") or {},
        "pull_steps": apply_values(pull or [], outputs, remove_notset=False),
        "concurrency_limit": limit,
        "concurrency_options": options,
        "enforce_parameter_schema": given.get("enforce_parameter_schema", True),
        # Else the server takes a parameter that the flow has not, and its process ends at once.
        "parameter_openapi_schema": {
            **parameter_schema(flow).model_dump(exclude_unset=True), "additionalProperties": False,
        },
    }  # fmt: skip
    if "work_queue_name" in pool:
        fields["work_queue_name"] = pool["work_queue_name"]
    # An operator may pause what the file does not speak of.
    fields |= {key: given[key] for key in ("version", "paused") if key in given}
    if MARK not in fields["tags"]:
        raise ConfigError(
            f"tags: {fields['tags']} lack {MARK!r}, without which it would not be removed later; "
            "add it, for example by `<<: *common`"
        )
    schedules = dict(map(_schedule, given.get("schedules") or []))
    if len(schedules) < len(given.get("schedules") or []):
        raise ConfigError("schedules: two have the same slug; change one")
    triggers = {t["name"]: t for t in (_trigger(t, outputs) for t in raw.get("triggers") or [])}
    if len(triggers) < len(raw.get("triggers") or []):
        raise ConfigError("triggers: two have the same name; change one")
    made = {name: _TRIGGER.validate_python(trigger) for name, trigger in triggers.items()}
    return Entry(flow.name, given["name"], fields, schedules, made)


def _schedule(raw: dict[str, Any]) -> tuple[str, DeploymentScheduleCreate]:
    slug = str(raw.get("slug"))
    if not slug.startswith(SLUG):
        raise ConfigError(
            f"schedules: {slug!r} is not the slug of a schedule that `make deploy` would know "
            f"again; write one that begins with {SLUG!r}, such as `slug: {SLUG}weekly`"
        )
    if "rrule" in raw and "DTSTART" not in raw["rrule"]:
        raise ConfigError(
            f"schedules: {slug}: its rrule has no DTSTART, and would begin anew whenever it is "
            "deployed; add one"
        )
    own = ("slug", "active", "parameters")
    kept = {key: raw[key] for key in own if key in raw}
    timing = {key: value for key, value in raw.items() if key not in own}
    return slug, DeploymentScheduleCreate.model_validate({"schedule": timing, **kept})


def _trigger(raw: dict[str, Any], outputs: dict[str, Any]) -> dict[str, Any]:
    if not raw.get("name"):
        raise ConfigError(f"triggers: {shortened(raw)} has no name, by which it is known; add one")
    # Their parameters are templates that the server fills in from the event.
    plain = {key: value for key, value in raw.items() if key != "parameters"}
    kept = {"parameters": raw["parameters"]} if "parameters" in raw else {}
    return {**apply_values(plain, outputs, warn_on_notset=False), **kept}
