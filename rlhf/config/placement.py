"""Which stage runs where: in the pipeline's own process, or as a run of a deployment."""

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


def _deployments(placement: dict[StageName, str]) -> dict[StageName, str]:
    """`gpu` for `train-policy` is the deployment `train-policy/gpu`; no other flow runs a stage."""
    return {stage: _deployment(stage, value) for stage, value in placement.items()}


def _deployment(stage: StageName, value: str) -> str:
    if value == INLINE:
        return value
    flow, slash, name = value.rpartition("/")
    if not name or (slash and flow != stage):
        raise ValueError(
            f"{value!r} is no deployment of {stage}; write {stage}/<deployment>, or inline"
        )
    return f"{stage}/{name}"


def _schema() -> dict[str, Any]:
    """A field for each stage, so that a form has one and a wrong name is refused with its path."""
    return {
        "type": "object",
        "title": "Placement",
        "additionalProperties": False,
        "properties": {
            stage: {"type": "string", "title": stage, "pattern": f"^({stage}/)?[^/]+$"}
            for stage in STAGE_NAMES
        },
    }


Placement = Annotated[dict[StageName, str], AfterValidator(_deployments), WithJsonSchema(_schema())]
