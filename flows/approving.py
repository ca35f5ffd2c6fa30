"""The command `rlhf approve`: a person's decision on a policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from flows.artifacts import ConfigOption, StoreOption
from flows.registry import ByOption, NameOption, open_model_line
from rlhf.approvals import acting_person, record_approval
from rlhf.errors import ArtifactMissing, ConfigError

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

console = Console()


def approve(
    run: str, *, refuse: bool = False, why: str = "", by: ByOption = None, name: NameOption = None,
    store: StoreOption = None, config: ConfigOption = None,
) -> None:  # fmt: skip
    """Approve of a policy, so that its run goes on and promotes it; or refuse it.

    Parameters
    ----------
    run
        A suspended run: its name, its id or the beginning of that. Or, for a run that was started
        without a deployment, the policy's digest, with --store or --config.
    refuse
        Say no: the run ends as Refused, and what was champion stays.
    why
        The reason, for the promotion's record.
    """
    decided = "refused" if refuse else "approved"
    if store is None and config is None:
        suspended = _suspended(run)
        answer = "refuse" if refuse else "approve"
        _resume(suspended, {"decision": answer, "by": acting_person(by), "why": why})
        console.print(f"{suspended.name}: {decided}; it goes on", highlight=False)
        return
    loaded, opened = open_model_line(name, store, config)
    line = loaded.promotion
    policy = opened.resolve(run)
    if policy.kind != "policy":
        raise ConfigError(f"{run}: {policy.short} is of kind {policy.kind}; give a policy")
    approval = record_approval(
        opened, line.name, policy.digest, approved=not refuse, by=by, why=why
    )
    console.print(
        f"{policy.short} of {line.name}: {decided} by {approval.by}; run the same again",
        highlight=False,
    )


def _suspended(run: str) -> FlowRun:
    """Return the one suspended run with this name or beginning of its id.

    Raises:
        ConfigError: No server is configured, or several runs match.
        ArtifactMissing: No suspended run matches.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateName,
    )
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        raise ConfigError(
            f"{run}: needs the Prefect server that the run is on; set PREFECT_API_URL, or give "
            "the policy's digest with --store"
        )
    with get_client(sync_client=True) as client:
        state = FlowRunFilterState(name=FlowRunFilterStateName(any_=["Suspended"]))
        suspended = client.read_flow_runs(flow_run_filter=FlowRunFilter(state=state))
    matches = [each for each in suspended if each.name == run or str(each.id).startswith(run)]
    if not matches:
        others = ", ".join(each.name for each in suspended) or "none"
        raise ArtifactMissing(f"{run}: no such run waits for an approval; those that do: {others}")
    if len(matches) > 1:
        ids = ", ".join(str(each.id) for each in matches)
        raise ConfigError(f"{run}: {len(matches)} runs are meant; give the id of one: {ids}")
    return matches[0]


def _resume(run: FlowRun, answer: dict[str, object]) -> None:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        response = client.resume_flow_run(run.id, run_input=answer)
    if response.status.value != "ACCEPT":
        reason = getattr(response.details, "reason", None) or response.status.value
        raise ConfigError(f"{run.name}: can't be resumed: {reason}")
