"""The report's data: frozen, plain values that a flow fills in.

Every part may be missing: a rejected run has no policy, a failed run may have only stages.
Metrics stay dictionaries, because a report must show a new metric without knowing its name.
"""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, field_serializer

from rlhf.costs import Cost, Forecast
from rlhf.gates import Verdict
from rlhf.report.overview import Overview
from rlhf.report.trust import Answer


class RunOutcome(StrEnum):
    """Final outcome of a pipeline run."""

    PROMOTED = "Promoted"
    GATE_REJECTED = "GateRejected"
    FAILED = "Failed"
    AWAITING_APPROVAL = "AwaitingApproval"
    REFUSED = "Refused"
    NOT_BETTER = "NotBetter"


#: Outcomes of a run that ended as it should.
GREEN = (RunOutcome.PROMOTED, RunOutcome.NOT_BETTER, RunOutcome.AWAITING_APPROVAL)


class StageState(StrEnum):
    """Final state of a stage; `Cached` took its result from the store."""

    COMPLETED = "Completed"
    CACHED = "Cached"
    FAILED = "Failed"
    GATE_REJECTED = "GateRejected"
    AWAITING_APPROVAL = "AwaitingApproval"
    REFUSED = "Refused"
    NOT_BETTER = "NotBetter"
    NOT_RUN = "NotRun"


class Look(NamedTuple):
    """Presentation of an outcome or a state."""

    css: str
    """Class and icon on the page."""
    label: str
    """Text on the page; the terminal shows the word itself."""
    style: str
    """Colour in the terminal."""


OUTCOMES = {
    RunOutcome.PROMOTED: Look("promoted", "Promoted", "green"),
    RunOutcome.GATE_REJECTED: Look("rejected", "Rejected by a gate", "yellow"),
    RunOutcome.FAILED: Look("failed", "Failed", "red"),
    RunOutcome.AWAITING_APPROVAL: Look("cached", "Waits for a person's approval", "yellow"),
    RunOutcome.REFUSED: Look("rejected", "Refused by a person", "yellow"),
    RunOutcome.NOT_BETTER: Look("kept", "Keeps the champion", "green"),
}
STATES = {
    StageState.COMPLETED: Look("completed", "Completed", "green"),
    StageState.CACHED: Look("cached", "From cache", "cyan"),
    StageState.FAILED: Look("failed", "Failed", "red"),
    StageState.GATE_REJECTED: Look("rejected", "Rejected", "yellow"),
    StageState.AWAITING_APPROVAL: Look("notrun", "Waits", "yellow"),
    StageState.REFUSED: Look("rejected", "Refused", "yellow"),
    StageState.NOT_BETTER: Look("kept", "Not better", "green"),
    StageState.NOT_RUN: Look("notrun", "Not run", "dim"),
}


def outcome_style(outcome: RunOutcome, shown: Overview | None) -> str:
    """Return an outcome's colour in the terminal: what has serious findings is not green."""
    style = OUTCOMES[outcome].style
    return "yellow" if shown and shown.alarm and style == "green" else style


class Plain(BaseModel):
    """Base of the report's parts: immutable, without extra fields.

    NaN is allowed, because a broken metric has to be shown.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class StageRow(Plain):
    """One stage of the pipeline, whether it ran or not."""

    name: str
    """For example `train-policy`; a name that starts with `gate-` is drawn as a gate."""
    state: StageState
    """Final state; `Cached` took its result from the store."""
    seconds: float | None = None
    """Wall-clock time, none if it did not run."""
    metric: str = ""
    """The one figure to show in the picture, as text."""
    artifact: str | None = None
    """Digest of what it published."""
    message: str = ""
    """Reason of a failure, or a remark."""
    cost: Cost | None = None
    """What it took in this run, with earlier attempts; none if it was cached or did not run."""
    made: Cost | None = None
    """What a cached one took when it was made, if that is known."""
    forecast: Forecast | None = None
    """What was expected of it before the run, if anything was known."""


class Sample(Plain):
    """One held-out prompt with the replies of both policies; untrusted text."""

    prompt: str
    """The prompt as text."""
    before: str
    """Reply of the SFT policy."""
    after: str
    """Reply of the policy after PPO."""
    group: str | None = None
    """Group of the prompt."""
    reward_before: float | None = None
    """Reward model's score of `before`."""
    reward_after: float | None = None
    """Reward model's score of `after`."""
    gold_before: float | None = None
    """Gold score of `before`."""
    gold_after: float | None = None
    """Gold score of `after`."""
    judge_before: float | None = None
    """Judge's score of `before`."""
    judge_after: float | None = None
    """Judge's score of `after`."""
    champion: str | None = None
    """Reply of the champion."""
    reward_champion: float | None = None
    """Reward model's score of `champion`."""
    judge_champion: float | None = None
    """Judge's score of `champion`."""
    gold_champion: float | None = None
    """Gold score of `champion`."""
    disagreement: float | None = None
    """How far the reward model's members differ on `after`, in deviations of the scores."""
    characters: int | None = None
    """Characters of `after` before a page cut it; None if it is whole."""
    kinds: tuple[str, ...] = ()
    """Why it was chosen: `disagree`, `lost`, `changed`."""


class ConfigRow(NamedTuple):
    """One effective configuration value; a tuple of three texts is accepted too."""

    key: str
    """Dotted key."""
    value: str
    """Value as text."""
    source: str
    """`default`, or where it was set: `preset file`, `command line`."""


class LineageNode(Plain):
    """An artifact of the run, made or used by a stage."""

    digest: str
    """Content digest."""
    kind: str
    """Kind of artifact, for example `policy`."""
    stage: str = ""
    """Stage that made it, or its role in the run."""


class Lineage(Plain):
    """The run's artifacts and their parents."""

    nodes: tuple[LineageNode, ...] = ()
    """Artifacts, oldest first."""
    edges: tuple[tuple[str, str], ...] = ()
    """Pairs of (parent digest, child digest)."""


class RunReport(Plain):
    """Content of one report page."""

    title: str
    """Heading, for example the pipeline's name."""
    run_name: str
    """Name of the flow run."""
    started: str
    """Start time in ISO 8601."""
    outcome: RunOutcome
    """Final outcome."""
    reason: str
    """Reason of the outcome, in one sentence."""
    seed: int
    """Seed of the run."""
    stages: tuple[StageRow, ...] = ()
    """Stages in the order they run."""
    data: dict[str, Any] = {}
    """Data summary: `source`, `pairs_train`, `pairs_eval`, `prompts_train`, `prompts_eval`,
    `demonstrations`, `left_out` ({reason: n}), `chosen_longer`, `notes` (sentences); other keys are
    shown too."""
    card: dict[str, Any] | None = None
    """Data card (`card.json`): `findings`, `longer`, `formats`, `position`, `annotators`,
    `repeats`, `slices`, `languages`, `lengths`, `left_out`."""
    drift: dict[str, Any] | None = None
    """Drift against the champion's data: `champion_data`, `warnings`, `notes`, and `shifts`, each
    with `measure`, `of`, `value`, `noise`, `before`, `after`; `lengths` by kind of text, shares
    `before` and `after` by class of length."""
    power: tuple[str, ...] = ()
    """What the comparison with the champion can find with the gate prompts, and their state, a
    sentence each; known before training."""
    reward_model: dict[str, Any] | None = None
    """Reward-model metrics: `accuracy`, `baseline_longer`, `baseline_format` and
    `length_controlled_accuracy` (each with `_low`, `_high`), `n`, `prompts`, `log_loss`, `brier`,
    `ece`, `temperature`, `reliability`, `margins`, `by_slice`, `worst_slice`, `probes`,
    `members`, `margin_mean`, `ceiling`, `share_of_ceiling`, `by_group`."""
    policy: dict[str, Any] | None = None
    """Policy metrics: `sampled` and `greedy`, each with `win_rate` (`_low`, `_high`), `reward_*`,
    `judge_*`, `gold_*`, `disagreement_*`, `tokens_*`, `repetition_*` (before, after), `kl`,
    `eos_rate`, `gap`, `by_group`; `champion`, `judge`, `shifts`, `forgetting`,
    `over_optimisation`, `notes`."""
    watchdog: dict[str, Any] | None = None
    """Checkpoints that PPO's watchdog scored: `frontier` (rows of `update`, `kl`, `proxy`, `judge`,
    `gold`), `chosen` (an update), and `stopped` (`detector`, `update`, `evidence`)."""
    budget: str = ""
    """Budget of the run as text, such as `2 h, 10 EUR`; empty without one."""
    stopped: str = ""
    """Where the budget stopped PPO, as a sentence; empty if it did not."""
    curves: tuple[dict[str, Any], ...] = ()
    """One row per PPO update: `update`, `reward`, `kl`, `entropy`, `tokens`, `value_loss`, …"""
    samples: tuple[Sample, ...] = ()
    """Replies before and after PPO."""
    overview: Overview | None = None
    """Figures before and after PPO, and what stands out (`rlhf.report.overview`)."""
    replies: tuple[Sample, ...] = ()
    """Held-out replies to sort, the worst first: all of them, or the worst and some others."""
    replies_of: int = 0
    """How many the evaluation has."""
    trust: tuple[Answer, ...] = ()
    """Answers of the first screen (`rlhf.report.trust`)."""
    verdicts: tuple[Verdict, ...] = ()
    """The gates' decisions, with their rules."""
    config_rows: tuple[ConfigRow, ...] = ()
    """Effective configuration."""
    advice: tuple[str, ...] = ()
    """Values outside their advised range, a line each."""
    lineage: Lineage = Lineage()
    """Artifacts of the run."""
    versions: dict[str, str] = {}
    """Versions of code and libraries."""

    @field_serializer("verdicts")
    def _serialize_verdicts(self, verdicts: tuple[Verdict, ...]) -> list[dict[str, Any]]:
        # In report.json a gate's checks are called `rules`.
        return [
            {
                "gate": v.gate,
                "approved": v.approved,
                "rules": [asdict(c) for c in v.checks],
                "champion": v.champion,
                "prompts": v.prompts,
                "look": v.look,
                "looks": v.looks,
            }
            for v in verdicts
        ]
