"""The flow of another machine's part of a stage with `nodes`; the stage starts its runs."""

from __future__ import annotations

from typing import Annotated

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed
from pydantic import Field

from flows.signals import exit_on_sigterm
from rlhf.config.numbers import Seconds, Workers
from rlhf.errors import explained
from rlhf.launch.torchrun import endpoint_of
from tasks.join import join_stage
from tasks.lost_runs import given_up

#: Seconds in which a stage must answer that listens before it starts this run.
ANSWER = 60.0


@flow(name="node", persist_result=False)
def node_flow(
    leader: Annotated[str, Field(min_length=1, max_length=300)],
    node: Annotated[Workers, Field(ge=1)],
    wait: Annotated[Seconds, Field(gt=0)] = ANSWER,
) -> State[None]:
    """Take part in a stage that runs on several machines.

    Args:
        leader: host:port of the stage's first machine.
        node: Number of this machine, from 1.
        wait: Seconds in which the first machine must answer.
    """
    late = given_up()
    if late is not None:
        return late
    with exit_on_sigterm():
        try:
            join_stage(endpoint_of("leader", leader), node, wait)
        except Exception as error:
            raise explained(error) from None
    return Completed(message="The stage's training has ended.")
