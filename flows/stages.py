"""One flow per stage, to run it alone: from the command line, from Python, or deployed."""

from __future__ import annotations

from prefect import Flow, flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows.leaving import before_prefect
from rlhf.config import advice
from rlhf.errors import GateRejected
from tasks.first import check_first
from tasks.parameters import NO_PRESET, NOTHING, Overrides, Preset, resolve
from tasks.prefect_tasks import run_task
from tasks.runner import Outcome, find_inputs, store_of
from tasks.stages import STAGES

NO_INPUTS: dict[str, str] = {}


def _flow(name: str) -> Flow[..., State[Outcome]]:
    @flow(name=name, persist_result=False)
    def stage_flow(
        preset: Preset = NO_PRESET,
        overrides: Overrides = NOTHING,
        inputs: dict[str, str] = NO_INPUTS,
    ) -> State[Outcome]:
        """Run one stage; inputs that are not given are those recorded under this configuration.

        Args:
            preset: Name of a file in `configs/`, such as quickstart; none means all defaults.
            overrides: What differs from it, for example `{"ppo": {"kl_coef": 0.05}}`.
            inputs: Digests of artifacts by role, for example `{"sft": "3f2a91c04d"}`.
        """
        config = resolve(preset, overrides).config.model_copy(update={"placement": {}})
        check_first(config)
        for line in advice(config):
            get_run_logger().warning(line)
        store = store_of(config)
        given = {role: store.resolve(digest) for role, digest in inputs.items()}
        with before_prefect():
            state = run_task(name, config, find_inputs(STAGES[name], config, given))
        result = state.result(raise_on_failure=False)
        if isinstance(result, GateRejected):
            return Failed(name="GateRejected", message=str(result), data=result)
        if isinstance(result, BaseException):
            raise result
        return Completed(name=state.name, message=state.message, data=result)

    return stage_flow


# By name, for the entrypoints of deployments.
prepare_data = _flow("prepare-data")
train_sft = _flow("train-sft")
train_reward_model = _flow("train-reward-model")
evaluate_reward_model = _flow("evaluate-reward-model")
gate_reward_model = _flow("gate-reward-model")
train_policy = _flow("train-policy")
evaluate_policy = _flow("evaluate-policy")
gate_policy = _flow("gate-policy")
promote = _flow("promote")

STAGE_FLOWS: dict[str, Flow[..., State[Outcome]]] = {
    stage.name: stage
    for stage in (
        prepare_data, train_sft, train_reward_model, evaluate_reward_model, gate_reward_model,
        train_policy, evaluate_policy, gate_policy, promote,
    )
}  # fmt: skip
