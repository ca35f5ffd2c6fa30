"""Placement of stages: inline in the pipeline's process, or on a deployment."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, WithJsonSchema

StageName = Literal[
    "prepare-data",
    "train-sft",
    "train-reward-model",
    "evaluate-reward-model",
    "gate-reward-model",
    "train-policy",
    "evaluate-policy",
    "gate-policy",
    "promote",
]
STAGE_NAMES: tuple[StageName, ...] = get_args(StageName)
INLINE = "inline"


def _full_names(placement: dict[StageName, str]) -> dict[StageName, str]:
    return {stage: _deployment(stage, value) for stage, value in placement.items()}


def _deployment(stage: StageName, value: str) -> str:
    """Full name of a stage's deployment, such as `train-policy/gpu` for `gpu`.

    Raises:
        ValueError: It is a deployment of another flow.
    """
    if value == INLINE:
        return value
    flow, slash, name = value.rpartition("/")
    if not name or (slash and flow != stage):
        raise ValueError(
            f"{value!r} is no deployment of {stage}; write {stage}/<deployment>, or inline"
        )
    return f"{stage}/{name}"


def _placement_schema() -> dict[str, Any]:
    """JSON schema with a field for each stage, which forms and errors name."""
    return {
        "type": "object",
        "title": "Placement",
        "additionalProperties": False,
        "properties": {
            stage: {"type": "string", "title": stage, "pattern": f"^({stage}/)?[^/]+$"}
            for stage in STAGE_NAMES
        },
    }


Placement = Annotated[
    dict[StageName, str], AfterValidator(_full_names), WithJsonSchema(_placement_schema())
]
