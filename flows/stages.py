"""One flow per stage, to run it alone: from the command line, from Python, or deployed."""

from __future__ import annotations

from prefect import Flow, flow
from prefect.states import State

from rlhf.config import PipelineConfig
from rlhf.store import ArtifactRef
from tasks.preflight import preflight
from tasks.prefect_tasks import run_task
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
        return run_task(name, config, find_inputs(STAGES[name], config, inputs or {}))

    return stage_flow


STAGE_FLOWS: dict[str, Flow[..., State[Outcome]]] = {name: _flow(name) for name in STAGES}
