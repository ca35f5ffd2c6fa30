"""A person's yes before promotion: until it comes the run is suspended, and its process gone."""

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
from tasks.runner import store_of


class Decision(RunInput):
    """The form that Prefect's UI shows, and what `rlhf approve` fills in."""

    decision: Literal["approve", "refuse"] = Field(description="Whether it becomes champion.")
    by: str = Field(min_length=1, description="Who decides.")
    why: str = Field(default="", description="The reason, for the promotion's record.")


def is_waiting(config: PipelineConfig, refs: dict[str, ArtifactRef]) -> bool:
    """Whether a person has still to say something of the policy that met every gate."""
    promotion, policy = config.promotion, refs["train-policy"]
    if promotion.approval != "manual":
        return False
    store = store_of(config)
    said = approval_of(store, promotion.name, policy.digest)
    return said is None and not is_champion(config, {"policy": policy}, store)


def wait_for_approval(
    config: PipelineConfig, refs: dict[str, ArtifactRef], run: str, about: str
) -> None:
    """Suspend this flow run until a person has decided, and keep what was said in the store.

    Suspending ends the process. Resumed, the run comes here again from its start, every stage done
    before found in the store, and gets the answer. A run without a deployment can't be resumed, so
    it goes on to the promotion, which says what is missing.
    """
    if not deployment.id:
        return
    policy = refs["train-policy"].digest
    form = Decision.with_initial_data(description=about)
    said = suspend_flow_run(wait_for_input=form, key=f"approve-{policy[:12]}")
    record_approval(
        store_of(config), config.promotion.name, policy, approved=said.decision == "approve",
        by=said.by, why=said.why, run=run,
    )  # fmt: skip
