"""`rlhf approve`: a person's yes or no to a policy that has met every gate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from flows.artifacts import ConfigOption, StoreOption
from flows.registry import ByOption, NameOption, opened_line
from rlhf.approvals import Approval, person, record_approval
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
    if store is None and config is None:
        waiting = _suspended(run)
        _resume(
            waiting, {"decision": "refuse" if refuse else "approve", "by": person(by), "why": why}
        )
        console.print(f"{waiting.name}: {_said(not refuse)}; it goes on", highlight=False)
        return
    loaded, opened = opened_line(name, store, config)
    line = loaded.promotion
    policy = opened.resolve(run)
    if policy.kind != "policy":
        raise ConfigError(f"{run}: {policy.short} is of kind {policy.kind}; give a policy")
    said: Approval = record_approval(
        opened, line.name, policy.digest, approved=not refuse, by=by, why=why
    )
    console.print(
        f"{policy.short} of {line.name}: {_said(said.approved)} by {said.by}; run the same again",
        highlight=False,
    )


def _said(approved: bool) -> str:
    return "approved" if approved else "refused"


def _suspended(run: str) -> FlowRun:
    """The one suspended run of that name or id.

    Raises:
        ConfigError: There is no server to ask, or several runs are meant.
        ArtifactMissing: No suspended run is called that.
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
        found = client.read_flow_runs(flow_run_filter=FlowRunFilter(state=state))
    meant = [each for each in found if each.name == run or str(each.id).startswith(run)]
    if not meant:
        others = ", ".join(each.name for each in found) or "none"
        raise ArtifactMissing(f"{run}: no such run waits for an approval; those that do: {others}")
    if len(meant) > 1:
        ids = ", ".join(str(each.id) for each in meant)
        raise ConfigError(f"{run}: {len(meant)} runs are meant; give the id of one: {ids}")
    return meant[0]


def _resume(run: FlowRun, answer: dict[str, object]) -> None:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        done = client.resume_flow_run(run.id, run_input=answer)
    if done.status.value != "ACCEPT":
        reason = getattr(done.details, "reason", None) or done.status.value
        raise ConfigError(f"{run.name}: can't be resumed: {reason}")
