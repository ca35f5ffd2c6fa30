"""The last stage: promotes a policy after its gate, approval and smoke test.

The champion is read first, and replaced only if it is still the same at the end: a promotion by
another run meanwhile is an error, not overwritten.
"""

from __future__ import annotations

from rlhf import registry
from rlhf.approvals import Approval, approval_of, require_approval
from rlhf.config import PipelineConfig
from rlhf.errors import PromotionLost
from rlhf.files import write_json
from rlhf.gates import read_verdict, require
from rlhf.smoke import SMOKE, smoke_test
from rlhf.stage import StageResult
from rlhf.store import ArtifactRef, Store
from tasks.stage import StageRun

PROMOTION = "promotion.json"
BY_GATES = "it met every gate"


def promote(run: StageRun) -> StageResult:
    """Make a policy the champion of its model line; write what was decided and seen.

    Files: `promotion.json` and `smoke.json`.

    Raises:
        GateRejected: Its gate rejected it.
        PolicyWithdrawn: It was rolled back.
        ApprovalMissing: promotion.approval = manual, and no person has approved it.
        ApprovalRefused: A person refused it.
        SmokeTestFailed: It does not answer.
        PromotionLost: The champion changed meanwhile.
    """
    config, name, ref = run.config.promotion, run.config.promotion.name, run.refs["policy"]
    history = registry.history(run.store, name)
    before = history[-1] if history else None
    is_new = before is None or before.policy != ref.digest
    require(ref, ref.digest, read_verdict(run.folders["verdict"]))
    approval: Approval | None = None
    if is_new:
        registry.require_standing(history, name, ref.digest)
    if config.approval == "manual":
        read_approval = require_approval if is_new else approval_of
        approval = read_approval(run.store, name, ref.digest)
    replies = smoke_test(
        run.folders["policy"], run.folders["data"], seconds=config.smoke_seconds,
        runtime=run.config.runtime,
    )  # fmt: skip
    if is_new:
        _make_champion(run, before, approval)
    # No time: equal work has an equal artifact. The history has it.
    promotion = {
        "model": name,
        "policy": ref.digest,
        "verdict": run.refs["verdict"].digest,
        "approval": approval.model_dump() if approval else None,
    }
    write_json(run.out_dir / PROMOTION, promotion)
    write_json(run.out_dir / SMOKE, replies)
    return StageResult({"model": name})


def is_champion(config: PipelineConfig, policy: ArtifactRef, store: Store) -> bool:
    """Return whether a policy is the last entry of its line's history."""
    latest = store.history.latest(f"champion/{config.promotion.name}")
    return latest is not None and latest["policy"] == policy.digest


def _make_champion(
    run: StageRun, before: registry.Promotion | None, approval: Approval | None
) -> None:
    from prefect.runtime import flow_run  # takes a second where no flow has loaded it

    policy, verdict = run.refs["policy"].digest, run.refs["verdict"].digest
    try:
        registry.promote(
            run.store, run.config.promotion.name, policy, verdict=verdict, expected=before,
            by=approval.by if approval else None, why=approval.why if approval else BY_GATES,
            run=flow_run.get_name(), approval=approval,
        )  # fmt: skip
    except PromotionLost:
        # Another try of this stage may have won, on a machine that was taken for lost.
        if not is_champion(run.config, run.refs["policy"], run.store):
            raise
