"""Promotion of a policy after its gate, a person's approval and a smoke test.

The champion is read first, and replaced only if it is still the same at the end: a promotion by
another run meanwhile is an error, not overwritten. With manual approval a person has decided before
(`tasks.approvals`).
"""

from __future__ import annotations

from prefect.runtime import flow_run

from rlhf import champions
from rlhf.challenge import describe_verdict
from rlhf.champions import (
    Approval,
    approval_of,
    latest_entry,
    record_approval,
    require_approval,
)
from rlhf.config import PipelineConfig
from rlhf.config.pipeline import StoreConfig
from rlhf.errors import PromotionLost
from rlhf.files import write_json
from rlhf.gates import Verdict, read_verdict, require
from rlhf.smoke import SMOKE, smoke_test
from rlhf.stage import StageResult
from rlhf.store import ArtifactRef, Store
from tasks import approvals
from tasks.ledger import cost_of_making
from tasks.stage import StageRun, store_of

PROMOTION = "promotion.json"


def promote(run: StageRun) -> StageResult:
    """Make a policy the champion of its model line; write the decision and replies.

    Files: `promotion.json` and `smoke.json`.

    Raises:
        GateRejected: Its gate rejected it.
        PolicyWithdrawn: It was rolled back.
        ApprovalMissing: promotion.approval = manual, and no person has approved it.
        ApprovalRefused: A person refused it.
        SmokeTestFailed: It does not answer.
        PromotionLost: The champion changed meanwhile, or is not the one it was compared with.
    """
    config, name, ref = run.config.promotion, run.config.promotion.name, run.refs["policy"]
    history = champions.history(run.store, name)
    before = history[-1] if history else None
    is_new = before is None or before.policy != ref.digest
    verdict = require(ref, ref.digest, read_verdict(run.folders["verdict"])).verdict
    approval: Approval | None = None
    if is_new:
        champions.require_standing(history, name, ref.digest)
        _require_compared(run, verdict, before)
    if config.approval == "manual":
        has_options = run.config.store_options != StoreConfig()
        approval = (
            require_approval(run.store, name, ref.digest, has_options)
            if is_new
            else approval_of(run.store, name, ref.digest)
        )
    replies = smoke_test(
        run.folders["policy"], run.folders["data"], seconds=config.smoke_seconds,
        runtime=run.config.runtime,
    )  # fmt: skip
    if is_new:
        _make_champion(run, before, approval, describe_verdict(verdict, before and before.policy))
    # No time, so that equal work has an equal artifact; the history has it.
    promotion = {
        "model": name,
        "policy": ref.digest,
        "verdict": run.refs["verdict"].digest,
        "champion": verdict.champion,
        "approval": approval.model_dump() if approval else None,
    }
    write_json(run.out_dir / PROMOTION, promotion)
    write_json(run.out_dir / SMOKE, replies)
    return StageResult({"model": name})


def is_champion(config: PipelineConfig, policy: ArtifactRef, store: Store) -> bool:
    """Return whether a policy is the last entry of its line's history."""
    latest = latest_entry(store, config.promotion.name)
    return latest is not None and latest["policy"] == policy.digest


def is_waiting(config: PipelineConfig, policy: ArtifactRef, run: str) -> bool:
    """Return whether a policy that met every gate still needs a person's decision.

    A decision that this flow run was resumed with is recorded first. Can be repeated.
    """
    promotion = config.promotion
    if promotion.approval != "manual":
        return False
    store = store_of(config)
    asked = approvals.answer(policy.digest)
    if asked is not None and asked.decision is not None:
        decision = asked.decision
        record_approval(
            store, promotion.name, policy.digest, approved=decision.decision == "approve",
            by=decision.by, why=decision.why, run=run, request=asked.request,
        )  # fmt: skip
    decided = approval_of(store, promotion.name, policy.digest) is not None
    return not decided and not is_champion(config, policy, store)


def _require_compared(run: StageRun, verdict: Verdict, before: champions.Promotion | None) -> None:
    """Raise if the policy was not compared with the champion that it would replace.

    Raises:
        PromotionLost: The champion is another one, or there was none then.
    """
    present = before.policy if before else None
    if run.config.gates.champion is None or verdict.champion == present:
        return
    was, now = (digest[:12] if digest else "no champion" for digest in (verdict.champion, present))
    raise PromotionLost(
        f"policy {verdict.subject[:12]} was compared with {was}, and the champion of "
        f"{run.config.promotion.name} is {now} now; run the same again: the policy is compared "
        "with that one, and no training is repeated"
    )


def _make_champion(
    run: StageRun, before: champions.Promotion | None, approval: Approval | None, reason: str
) -> None:
    policy, verdict = run.refs["policy"].digest, run.refs["verdict"].digest
    try:
        champions.promote(
            run.store, run.config.promotion.name, policy, verdict=verdict, expected=before,
            by=approval.by if approval else None, why=approval.why if approval else reason,
            run=flow_run.get_name(), approval=approval, cost=cost_of_making(run.store, verdict),
        )  # fmt: skip
    except PromotionLost:
        # Another try of this stage may have won, on a machine that was taken for lost.
        if not is_champion(run.config, run.refs["policy"], run.store):
            raise
