"""One flow per stage, to run it alone, by the command or as a deployment."""

from __future__ import annotations

from prefect import Flow, flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows.signals import exit_on_sigterm
from rlhf.budget import Spending
from rlhf.config import apply_machine_settings
from rlhf.errors import BAD_INPUT, GateRejected, NotBetter, explain, explained, is_bad_input
from rlhf.files import expand_home
from rlhf.report.model import RunOutcome, StageState
from tasks.board import board
from tasks.gate_check import check_gates
from tasks.lost_runs import given_up
from tasks.parameters import NO_OVERRIDES, NO_PRESET, Overrides, Preset, resolve
from tasks.prefect_tasks import run_task
from tasks.preflight import preflight_flow
from tasks.remote import is_child_run
from tasks.runner import NOTHING_SPENT, Outcome, find_inputs
from tasks.stage import Stage, store_of
from tasks.stages import (
    EVALUATE_POLICY,
    EVALUATE_REWARD_MODEL,
    GATE_POLICY,
    GATE_REWARD_MODEL,
    PREPARE_DATA,
    PROMOTE,
    TRAIN_JUDGE,
    TRAIN_POLICY,
    TRAIN_REWARD_MODEL,
    TRAIN_SFT,
)

NO_INPUTS: dict[str, str] = {}


def _flow(stage: Stage) -> Flow[..., State[Outcome]]:
    @flow(name=stage.name, persist_result=False)
    def stage_flow(
        preset: Preset = NO_PRESET,
        overrides: Overrides = NO_OVERRIDES,
        inputs: dict[str, str] = NO_INPUTS,
        spent: Spending = NOTHING_SPENT,
    ) -> State[Outcome]:
        """Run one stage; inputs that are not given are those recorded under this configuration.

        Args:
            preset: Name of a file in `configs/` or RLHF_PRESETS; none means all defaults.
            overrides: What differs from it, for example `{"ppo": {"kl_coef": 0.05}}`.
            inputs: Digests of artifacts by role, for example `{"sft": "3f2a91c04d"}`.
            spent: What the pipeline's earlier stages took of its budget; it gives this itself.
        """
        late = given_up()
        if late is not None:
            return late
        loaded = resolve(preset, overrides)
        config = loaded.config.model_copy(update={"placement": {}})
        preflight_flow(config, {stage.name: stage})
        # A parent sends all values without their sources, and has given its advice.
        if not is_child_run():
            for line in loaded.advice():
                get_run_logger().warning(line)
        store = store_of(config)
        given = {role: store.resolve(digest) for role, digest in inputs.items()}
        work_dir = expand_home(apply_machine_settings(config).runtime.work_dir)
        name = flow_run.get_name() or stage.name
        with exit_on_sigterm(), board.running(name, [stage.name], work_dir):
            refs = find_inputs(stage, config, given, optional=not is_child_run())
            if stage.tracks_steps and "data" in refs and not is_child_run():
                for line in check_gates(config, refs["data"], store).lines:
                    get_run_logger().info("gates: %s", line)
            state = run_task(stage, config, refs, spent=spent)
            result = state.result(raise_on_failure=False)
            _tell_end(stage.name, state, result)
        if isinstance(result, NotBetter):
            name = RunOutcome.NOT_BETTER.value
            return Completed(name=name, message=str(result), data=result)
        if isinstance(result, GateRejected):
            return Failed(name=RunOutcome.GATE_REJECTED.value, message=str(result), data=result)
        if isinstance(result, BaseException):
            raise explained(result)
        return Completed(name=state.name, message=state.message, data=result)

    return stage_flow


def _tell_end(name: str, state: State[Outcome], result: object) -> None:
    """Tell the board how the stage ended."""
    if isinstance(result, Outcome):
        board.end_stage(name, state.name or "", result.seconds, result.headline)
        board.end(state.name or StageState.COMPLETED.value)
        return
    kinds = {NotBetter: StageState.NOT_BETTER, GateRejected: StageState.GATE_REJECTED}
    outcome = next((kinds[e] for e in kinds if isinstance(result, e)), StageState.FAILED).value
    reason = explain(result) if isinstance(result, BaseException) else ""
    board.end_stage(name, outcome, None, reason)
    is_bad = isinstance(result, BaseException) and is_bad_input(result)
    board.end(outcome, reason, BAD_INPUT if is_bad else None)


# Named after the stages, for the entrypoints of deployments.
prepare_data = _flow(PREPARE_DATA)
train_sft = _flow(TRAIN_SFT)
train_reward_model = _flow(TRAIN_REWARD_MODEL)
evaluate_reward_model = _flow(EVALUATE_REWARD_MODEL)
gate_reward_model = _flow(GATE_REWARD_MODEL)
train_judge = _flow(TRAIN_JUDGE)
train_policy = _flow(TRAIN_POLICY)
evaluate_policy = _flow(EVALUATE_POLICY)
gate_policy = _flow(GATE_POLICY)
promote = _flow(PROMOTE)

STAGE_FLOWS: dict[str, Flow[..., State[Outcome]]] = {
    stage.name: stage
    for stage in (
        prepare_data, train_sft, train_reward_model, evaluate_reward_model, gate_reward_model,
        train_judge, train_policy, evaluate_policy, gate_policy, promote,
    )
}  # fmt: skip
