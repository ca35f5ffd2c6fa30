"""The last stage: what passed its gate, a person if one is asked, and the smoke test, is champion.

The champion is read first and written last, so that whoever changed it meanwhile is not overruled
without having been seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rlhf import registry
from rlhf.approvals import Approval, approval_of, require_approval
from rlhf.config import PipelineConfig
from rlhf.errors import PromotionLost
from rlhf.gates import read_verdict, require
from rlhf.smoke import SMOKE, smoke_test
from rlhf.stage import StageResult, write_json
from rlhf.store import ArtifactRef, Store

if TYPE_CHECKING:
    from tasks.stages import StageRun

PROMOTION = "promotion.json"
BY_GATES = "it met every gate"


def promote(run: StageRun) -> StageResult:
    """Make the approved policy the champion of its model line; `promotion.json` and `smoke.json`.

    Raises:
        GateRejected: Its gate said no.
        PolicyWithdrawn: A person rolled it back.
        ApprovalMissing: promotion.approval = manual, and nobody has approved of it.
        ApprovalRefused: Somebody refused it.
        SmokeTestFailed: It can't answer.
        PromotionLost: Somebody else changed the champion meanwhile.
    """
    config, name, ref = run.config.promotion, run.config.promotion.name, run.refs["policy"]
    history = registry.history(run.store, name)
    before = history[-1] if history else None
    is_new = before is None or before.policy != ref.digest
    require(ref, ref.digest, read_verdict(run.folders["verdict"]))
    said: Approval | None = None
    if is_new:
        registry.require_standing(history, name, ref.digest)
    if config.approval == "manual":
        say = require_approval if is_new else approval_of
        said = say(run.store, name, ref.digest)
    replies = smoke_test(
        run.folders["policy"], run.folders["data"], seconds=config.smoke_seconds,
        runtime=run.config.runtime,
    )  # fmt: skip
    if is_new:
        _make_champion(run, before, said)
    # When it became champion is in the history alone: equal work has an equal artifact.
    promotion = {
        "model": name,
        "policy": ref.digest,
        "verdict": run.refs["verdict"].digest,
        "approval": said.model_dump() if said else None,
    }
    write_json(run.out_dir / PROMOTION, promotion)
    write_json(run.out_dir / SMOKE, replies)
    return StageResult({"model": name})


def _make_champion(run: StageRun, before: registry.Promotion | None, said: Approval | None) -> None:
    policy, verdict = run.refs["policy"].digest, run.refs["verdict"].digest
    try:
        registry.promote(
            run.store, run.config.promotion.name, policy, verdict=verdict, expected=before,
            by=said.by if said else None, why=said.why if said else BY_GATES, run=run_name(),
            approval=said,
        )  # fmt: skip
    except PromotionLost:
        # To another try of this very stage, say, on a machine that was given up too early.
        if not is_champion(run.config, run.refs, run.store):
            raise


def is_champion(config: PipelineConfig, refs: Mapping[str, ArtifactRef], store: Store) -> bool:
    """Whether the policy is what the line's history names last."""
    latest = store.history.latest(f"champion/{config.promotion.name}")
    return latest is not None and latest["policy"] == refs["policy"].digest


def run_name() -> str | None:
    """The name of the flow run that this happens in, if it does in one."""
    from prefect.runtime import flow_run  # takes a second where no flow has loaded it

    return flow_run.get_name()
