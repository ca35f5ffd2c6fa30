"""Gates: a pure function of metrics and rules, and the proof that one was passed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from rlhf.config.models import GateRule
from rlhf.errors import GateRejected
from rlhf.files import read_json

VERDICT = "verdict.json"
T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Check:
    """One rule's outcome."""

    metric: str
    value: float | None
    bound: str
    passed: bool


@dataclass(frozen=True)
class Verdict:
    """What a gate says of one subject, with every rule's outcome."""

    gate: str
    subject: str
    approved: bool
    checks: tuple[Check, ...]

    @property
    def reason(self) -> str:
        """The failed rules in one line; empty when approved."""
        failed = (
            f"{c.metric} = {'missing' if c.value is None else f'{c.value:.5g}'}, needs {c.bound}"
            for c in self.checks
            if not c.passed
        )
        return "; ".join(failed)


def read_verdict(folder: Path) -> Verdict:
    """A verdict as its gate wrote it."""
    saved: dict[str, Any] = read_json(folder / VERDICT)
    checks = tuple(Check(**check) for check in saved["checks"])
    return Verdict(saved["gate"], saved["subject"], saved["approved"], checks)


_seal = object()


@dataclass(frozen=True)
class Approved(Generic[T]):
    """A subject that passed its gate. Only `require` makes one, so holding it is the proof."""

    subject: T
    verdict: Verdict
    seal: InitVar[object]

    def __post_init__(self, seal: object) -> None:
        if seal is not _seal:
            raise TypeError("an Approved comes from rlhf.gates.require, never from its constructor")

    def map(self, function: Callable[[T], U]) -> Approved[U]:
        """The same approval for the same thing in another form (a reference and its folder)."""
        return Approved(function(self.subject), self.verdict, _seal)


def flat_metrics(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """(dotted name, number) of every number in nested metrics."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from flat_metrics(cast("Mapping[str, Any]", value), f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)


def judge(
    gate: str, subject: str, metrics: Mapping[str, Any], rules: Sequence[GateRule]
) -> Verdict:
    """Check every rule; a metric or bound that is missing or not finite fails its rule.

    Args:
        gate: Name of the gate.
        subject: Digest of what is judged.
        metrics: Nested metrics of an evaluation.
        rules: Conditions, all of which have to hold; none at all approves nothing to be wrong.
    """
    numbers = dict(flat_metrics(metrics))
    checks = tuple(_check(rule, numbers) for rule in rules)
    return Verdict(gate, subject, all(c.passed for c in checks), checks)


def require(subject: T, digest: str, verdict: Verdict) -> Approved[T]:
    """The approved subject.

    Raises:
        GateRejected: The verdict is a rejection, or is of another subject.
    """
    if verdict.subject != digest:
        raise GateRejected(
            f"{verdict.gate}: its verdict is of {verdict.subject[:12]}, not of {digest[:12]}; "
            "run the gate on this model"
        )
    if not verdict.approved:
        raise GateRejected(f"{verdict.gate}: {verdict.reason}", verdict)
    return Approved(subject, verdict, _seal)


def _check(rule: GateRule, numbers: Mapping[str, float]) -> Check:
    value = numbers.get(rule.metric)
    passed = value is not None and math.isfinite(value)
    bounds: list[str] = []
    for sign, bound in (("≥", rule.min), ("≤", rule.max)):
        if bound is None:
            continue
        limit = numbers.get(bound, math.nan) if isinstance(bound, str) else bound
        bounds.append(f"{sign} {bound}" + (f" ({limit:.5g})" if isinstance(bound, str) else ""))
        # NaN compares false, so an unknown bound rejects.
        within = value is not None and (value >= limit if sign == "≥" else value <= limit)
        passed = passed and within
    shown = value if value is not None and math.isfinite(value) else None
    return Check(rule.metric, shown, " and ".join(bounds), passed)
