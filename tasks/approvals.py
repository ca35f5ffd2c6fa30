"""A person's decision that a run of a deployment is suspended for, and resumed with.

Every question has a name of its own, `approve-<policy>-<number>`, because Prefect keeps the answer
to an earlier one. An answer counts if the run went on with it: after a cancellation, or if it is
not one that can be recorded, a person is asked again. Other interruptions, such as the loss of the
machine before the decision was recorded, do not void it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State, StateType
from prefect.exceptions import ObjectNotFound
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput, read_flow_run_input
from prefect.input.run_input import keyset_from_paused_state
from prefect.runtime import deployment, flow_run
from pydantic import AfterValidator, Field, ValidationError

from rlhf.champions import LONGEST, printable_line
from rlhf.markdown import Markdown, bold, paragraphs
from rlhf.store.manifest import first_problem
from tasks.lost_runs import has_cancellation, predecessor, states_of
from tasks.retries import asked_server

#: A character that is seen: neither blank, nor of no width, nor one that directs others. Python,
#: Rust and JavaScript read this pattern alike; their classes of letters differ.
_VISIBLE = (
    r"[^\s\u0000-\u001f\u007f-\u009f\u00ad\u061c\u115f\u1160\u180e\u200b-\u200f\u2028-\u202e"
    r"\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0]"
)


def _printable(name: str) -> str:
    if not printable_line(name):
        raise ValueError("is blank")
    return name


class Decision(RunInput):
    """The decision's form, filled in by Prefect's UI or by `rlhf approve`.

    Prefect's server checks an answer against the JSON schema, before the run goes on: the limits
    are those of `rlhf.champions.record_approval`.
    """

    decision: Literal["approve", "refuse"] = Field(description="Whether it becomes champion.")
    by: Annotated[str, AfterValidator(_printable)] = Field(
        min_length=1, max_length=LONGEST, pattern=_VISIBLE,
        description="Who decides; recorded as claimed, for Prefect's server knows no users.",
    )  # fmt: skip
    why: str = Field(
        default="", max_length=LONGEST, description="The reason, for the promotion's record."
    )


class Answer(NamedTuple):
    """Answer to the last question on a policy.

    `decision` is None if nothing did, or nothing that can be recorded, for which `problem` says
    why.
    """

    request: str
    decision: Decision | None = None
    problem: str = ""


def answer(policy: str) -> Answer | None:
    """Return the answer that this flow run was resumed with; None if it was not asked.

    A run that took a lost one's place has that one's answer, unless it was asked itself.

    Args:
        policy: Digest of the policy.
    """
    for run in _lineage():
        states = states_of(run)
        questions = _questions(states, policy)
        if questions:
            break
    else:
        return None
    last = questions[-1]
    request = f"{run}/{last.state_details.pause_key}"
    later = states[states.index(last) + 1 :]
    # Resumed, a run is Pending once more; lost there, it is given up, and its answer still counts.
    if has_cancellation(later):
        return Answer(request, problem="the run was cancelled after the question")
    key = keyset_from_paused_state(last)["response"]
    value = asked_server(lambda: read_flow_run_input(key, flow_run_id=UUID(run)))
    if value is None:
        return Answer(request)
    try:
        return Answer(request, Decision.model_validate(value))
    except ValidationError as error:
        return Answer(request, problem=first_problem(error))


def ask(policy: str, about: Markdown) -> None:
    """Suspend this flow run until a person has decided, which ends the process.

    The resumed run starts again, gets its completed stages from the store and the decision by
    `answer`. A run without a deployment can't be resumed: it goes on to the promotion, whose error
    names the missing approval.

    Args:
        policy: Digest of the policy.
        about: Markdown above the form.

    Raises:
        prefect.exceptions.Pause: To end the process; must reach Prefect.
    """
    if not deployment.id:
        return
    before = answer(policy)
    if before is not None and before.problem:
        about = paragraphs(bold(f"Asked again: {before.problem}."), about)
    form = Decision.with_initial_data(description=about)
    key = f"{_key(policy)}-{len(_questions(states_of(str(flow_run.id)), policy)) + 1}"
    suspend_flow_run(wait_for_input=form, key=key)


def _questions(states: list[State], policy: str) -> list[State]:
    """Return the states in which a flow run waited for a decision on a policy, in order."""
    key = f"{_key(policy)}-"
    return [
        state
        for state in states
        if state.type == StateType.PAUSED and (state.state_details.pause_key or "").startswith(key)
    ]


def _lineage() -> Iterator[str]:
    """Yield the ids of this flow run of a deployment and of the lost ones before it."""
    if not deployment.id:
        return
    run, before = str(flow_run.id), predecessor(flow_run.get_tags())
    yield run
    with get_client(sync_client=True) as client:
        while before is not None:
            run = before
            try:
                tags = asked_server(lambda run=run: client.read_flow_run(UUID(run))).tags
            except ObjectNotFound:
                return
            yield run
            before = predecessor(tags)


def _key(policy: str) -> str:
    return f"approve-{policy[:12]}"
