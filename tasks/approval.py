"""Manual approval before promotion, for which a deployment's run is suspended."""

from __future__ import annotations

from typing import Literal

from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.runtime import deployment
from pydantic import Field

from rlhf.approvals import approval_of, record_approval
from rlhf.config import PipelineConfig
from rlhf.store import ArtifactRef
from tasks.promotion import is_champion
from tasks.stage import store_of


class Decision(RunInput):
    """The decision's form, filled in by Prefect's UI or by `rlhf approve`."""

    decision: Literal["approve", "refuse"] = Field(description="Whether it becomes champion.")
    by: str = Field(min_length=1, description="Who decides.")
    why: str = Field(default="", description="The reason, for the promotion's record.")


def is_waiting(config: PipelineConfig, policy: ArtifactRef) -> bool:
    """Return whether a policy that met every gate still needs a person's decision."""
    promotion = config.promotion
    if promotion.approval != "manual":
        return False
    store = store_of(config)
    decided = approval_of(store, promotion.name, policy.digest) is not None
    return not decided and not is_champion(config, policy, store)


def wait_for_approval(config: PipelineConfig, policy: ArtifactRef, run: str, about: str) -> None:
    """Suspend this flow run until a person has decided; record the decision.

    Suspension ends the process. The resumed run starts again, gets its completed stages from the
    store, and gets the answer here. A run without a deployment can't be resumed: it goes on to the
    promotion, whose error names the missing approval.
    """
    if not deployment.id:
        return
    form = Decision.with_initial_data(description=about)
    answer = suspend_flow_run(wait_for_input=form, key=f"approve-{policy.digest[:12]}")
    record_approval(
        store_of(config), config.promotion.name, policy.digest,
        approved=answer.decision == "approve", by=answer.by, why=answer.why, run=run,
    )  # fmt: skip
