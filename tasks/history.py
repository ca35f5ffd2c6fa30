"""Retrainings, promotions and rollbacks of model lines, as the store's histories and reports know.

A retraining is known by the reports of its runs: one that was interrupted, or waited for a person,
has several. Who became champion is known by the line's own history, which stays when reports are
collected.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf import champions
from rlhf.champions import Promotion, model_lines
from rlhf.errors import ArtifactMissing
from rlhf.gates import flat_metrics
from rlhf.plain_text import one_line
from rlhf.report.history import BY_HAND, ROLLED_BACK, Entry, with_changes
from rlhf.report.model import RunOutcome
from rlhf.report.text import number_of
from rlhf.store import Artifact, Store
from tasks.evaluations import StoredReport, read_reports
from tasks.stages import EVALUATE_POLICY, GATE_POLICY, PREPARE_DATA, TRAIN_POLICY

#: Metrics of an entry by their names in the evaluation of a policy.
_FROM_EVALUATION = {
    "win_rate": "sampled.win_rate",
    "judge_win_rate": "sampled.judge_win_rate",
    "gold_win_rate": "sampled.gold_win_rate",
    "champion_win_rate": "champion.win_rate",
    "reward_gain": "sampled.reward_difference",
    "reward": "sampled.reward_after",
    "reward_before": "sampled.reward_before",
    "kl": "sampled.kl",
    "eos_rate": "sampled.eos_rate",
    "eos_rate_before": "sampled.eos_rate_before",
    "tokens": "sampled.tokens_after",
    "n": "n",
}
#: Endings of a metric and of the bounds of its interval.
_ENDS = ("", "_low", "_high")
#: Metrics of an entry that are an evaluation's.
_EVALUATED = {f"{name}{end}" for name in _FROM_EVALUATION for end in _ENDS}
#: Name of the judge's win rate over the champion, which counts where it was measured.
_CHAMPION_BY_JUDGE = "champion.judge_win_rate"
#: Line of a report that names none, which is the default's.
_DEFAULT_LINE = "default"
#: Action of an entry of a champion's history that is no rollback.
_PROMOTED = Promotion.model_fields["action"].default


def read_history(store: Store, line: str | None = None) -> list[Entry]:
    """Return what happened to one model line or to all, line by line, the oldest first.

    Runs that failed are left out: they decided nothing.

    Raises:
        ArtifactMissing: There is nothing to tell, or no such line.
    """
    artifacts = {artifact.ref.digest: artifact for artifact in store.list()}
    retrainings: dict[str, list[Entry]] = {}
    for reports in _grouped(read_reports(store, artifacts.values())):
        entry = _retraining(reports)
        if entry is not None:
            retrainings.setdefault(entry.line, []).append(entry)
    promoted = {name: champions.history(store, name) for name in model_lines(store)}
    lines = sorted({*retrainings, *promoted})
    if line is not None and line not in lines:
        known = ", ".join(lines[:10]) or "none"
        raise ArtifactMissing(
            one_line(f"{line!r}: {store.uri} knows no such model line; those it knows: {known}")
        )
    if not lines:
        raise ArtifactMissing(
            f"{store.uri}: no retraining was decided upon and no policy promoted; run the "
            "pipeline, or name another store by --store or --config"
        )
    return [
        entry
        for name in ([line] if line is not None else lines)
        for entry in with_changes(
            _merged(retrainings.get(name, []), promoted.get(name, []), artifacts)
        )
    ]


def _grouped(reports: Sequence[StoredReport]) -> list[list[StoredReport]]:
    """Return the reports of each retraining: of one evaluation, or policy, or else of one run."""
    groups: dict[tuple[str | None, str], list[StoredReport]] = {}
    for each in reports:
        evaluated = each.parents.get(EVALUATE_POLICY.name) or each.parents.get(TRAIN_POLICY.name)
        same = evaluated or " ".join(sorted(each.parents.values())) or each.report.run_name
        groups.setdefault((each.report.value("promotion.name"), same), []).append(each)
    return [*groups.values()]


def _retraining(reports: Sequence[StoredReport]) -> Entry | None:
    """Return a retraining from the reports of its runs; None if all of them failed."""
    decided = [each for each in reports if each.report.outcome != RunOutcome.FAILED]
    if not decided:
        return None
    # A decision that was waited for is that of the run that went on.
    last = max(
        decided,
        key=lambda each: (
            each.report.outcome != RunOutcome.AWAITING_APPROVAL, each.report.started
        ),
    )  # fmt: skip
    report = last.report
    data = report.data
    metrics = dict(_metrics(dict(flat_metrics(report.policy or {}))))
    model = {f"accuracy{end}": (report.reward_model or {}).get(f"accuracy{end}") for end in _ENDS}
    for name, value in {**model, "pairs": data.get("pairs_train")}.items():
        if (x := number_of(value)) is not None:
            metrics[name] = x
    drift = report.drift or {}
    return Entry(
        line=report.value("promotion.name") or _DEFAULT_LINE,
        when=min(each.report.started for each in decided), outcome=report.outcome,
        policy=last.parents.get(TRAIN_POLICY.name), run=report.run_name, reason=report.reason,
        seconds=_seconds(reports), metrics=metrics, data=last.parents.get(PREPARE_DATA.name),
        source=str(data.get("source") or ""), findings=_texts(data.get("findings")),
        drift=_texts(drift.get("warnings")), report=last.ref.digest,
    )  # fmt: skip


def _metrics(flat: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield an entry's metrics from those of an evaluation by dotted name."""
    names = dict(_FROM_EVALUATION)
    if _CHAMPION_BY_JUDGE in flat:
        names["champion_win_rate"] = _CHAMPION_BY_JUDGE
    for name, source in names.items():
        for end in _ENDS:
            value = number_of(flat.get(f"{source}{end}"))
            if value is not None:
                yield f"{name}{end}", value


def _seconds(reports: Sequence[StoredReport]) -> float | None:
    """Return the time of all stages; a stage's is the longest, as the others found it cached."""
    longest: dict[str, float] = {}
    for each in reports:
        for stage in each.report.stages:
            seconds = number_of(stage.seconds)
            if seconds is not None:
                longest[stage.name] = max(seconds, longest.get(stage.name, 0.0))
    return sum(longest.values()) if longest else None


def _merged(
    retrainings: Sequence[Entry], promotions: Sequence[Promotion], artifacts: Mapping[str, Artifact]
) -> list[Entry]:
    """Return the entries of a line by time, with the promotions that runs have made in theirs."""
    left = [*retrainings]
    found: list[Entry] = []
    for promotion in promotions:
        is_current = promotion is promotions[-1]
        own = next(
            (
                e for e in left
                if promotion.action == _PROMOTED and e.policy == promotion.policy
                and e.outcome == RunOutcome.PROMOTED
            ),
            None,
        )  # fmt: skip
        known = next((e for e in (*retrainings, *found) if e.policy == promotion.policy), None)
        if own is not None:
            left.remove(own)
        found.append(_promoted(own or known, promotion, own is not None, is_current, artifacts))
    return sorted([*found, *left], key=lambda entry: entry.when)


def _promoted(
    known: Entry | None, promotion: Promotion, is_own: bool, is_current: bool,
    artifacts: Mapping[str, Artifact],
) -> Entry:  # fmt: skip
    """Return a promotion or rollback with what is known of its policy.

    Args:
        known: The policy's retraining, or an earlier entry; None if there is none.
        promotion: The entry of the line's history.
        is_own: Whether the retraining ended with this promotion.
        is_current: Whether the policy is the champion by it.
        artifacts: Of the store, by digest.
    """
    outcome = str(RunOutcome.PROMOTED)
    if promotion.action != _PROMOTED:
        outcome = ROLLED_BACK
    elif promotion.run is None:
        outcome = BY_HAND
    # A policy may have been evaluated again: the promotion rests on its verdict's evaluation.
    metrics = _of_verdict(promotion, artifacts)
    values: dict[str, Any] = vars(known) if known else {}
    if metrics:
        others = {k: v for k, v in values.get("metrics", {}).items() if k not in _EVALUATED}
        values = {**values, "metrics": {**others, **metrics}}
    if not is_own:
        # What was trained, and for how long, stands at the retraining.
        values = {**values, "data": None, "findings": (), "drift": (), "seconds": None}
    return Entry(
        **{
            **values, "line": promotion.model or values.get("line", ""),
            "when": promotion.when or values.get("when", ""), "outcome": outcome,
            "policy": promotion.policy, "by": promotion.by or "",
            "run": promotion.run or (values.get("run", "") if is_own else ""),
            "reason": promotion.why or values.get("reason", ""), "is_champion": is_current,
        }
    )  # fmt: skip


def _of_verdict(promotion: Promotion, artifacts: Mapping[str, Artifact]) -> dict[str, float]:
    """Return the metrics of the evaluation that a promotion's verdict judged, if it is stored."""
    verdict = artifacts.get(promotion.verdict or "")
    role = next((r for r, maker in GATE_POLICY.inputs.items() if maker == EVALUATE_POLICY.name), "")
    evaluation = artifacts.get(verdict.manifest.parents.get(role, "")) if verdict else None
    return dict(_metrics(evaluation.manifest.metrics)) if evaluation else {}


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(str(each) for each in value) if isinstance(value, list) else ()
