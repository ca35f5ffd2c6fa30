"""One flow per stage, to run it alone: from the command line, from Python, or deployed."""

from __future__ import annotations

from prefect import Flow, flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows.leaving import before_prefect
from rlhf.config import PipelineConfig, advice
from rlhf.errors import GateRejected
from rlhf.store import ArtifactRef
from tasks.prefect_tasks import run_task
from tasks.preflight import preflight
from tasks.runner import Outcome, find_inputs
from tasks.stages import STAGES


def _flow(name: str) -> Flow[..., State[Outcome]]:
    @flow(name=name, persist_result=False)
    def stage_flow(
        config: PipelineConfig | None = None, inputs: dict[str, ArtifactRef] | None = None
    ) -> State[Outcome]:
        """Run one stage; inputs that are not given are those recorded under this configuration."""
        config = config or PipelineConfig()
        preflight(config)
        for line in advice(config):
            get_run_logger().warning(line)
        with before_prefect():
            state = run_task(name, config, find_inputs(STAGES[name], config, inputs or {}))
        result = state.result(raise_on_failure=False)
        if isinstance(result, GateRejected):
            return Failed(name="GateRejected", message=str(result), data=result)
        if isinstance(result, BaseException):
            raise result
        return Completed(name=state.name, message=state.message, data=result)

    return stage_flow


STAGE_FLOWS: dict[str, Flow[..., State[Outcome]]] = {name: _flow(name) for name in STAGES}
