"""Gates: checks of metrics by rules, their verdicts, and the proof of an approval."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, cast

from pydantic import TypeAdapter

from rlhf.config.training import GateRule
from rlhf.errors import GateRejected
from rlhf.saved import checked

VERDICT = "verdict.json"
T = TypeVar("T")
U = TypeVar("U")
#: Private to this module, so that only `require` can construct an Approved.
_seal = object()


@dataclass(frozen=True)
class Check:
    """Result of one rule."""

    metric: str
    value: float | None
    bound: str
    passed: bool
    low: float | None = None
    """Lower end of the value's 95 % interval."""
    high: float | None = None
    """Upper end of the value's 95 % interval."""
    n: float | None = None
    """Number of observations behind the value."""
    note: str = ""
    """Remark, for example why the metric was not measured."""
    kind: Literal["rule", "champion"] = "rule"
    """Whether a rule of the gate asks for it, or the comparison with the champion."""


@dataclass(frozen=True)
class Verdict:
    """Decision of a gate on one subject, with the result of every rule."""

    gate: str
    subject: str
    approved: bool
    checks: tuple[Check, ...]
    champion: str | None = None
    """Digest of the champion that the subject was compared with."""
    prompts: str | None = None
    """Digest of the gate prompts of that comparison."""
    look: int | None = None
    """How many comparisons those prompts have been used for, with this one."""
    looks: int | None = None
    """How many comparisons they may be used for."""

    @property
    def reason(self) -> str:
        """Failed rules in one line; empty if approved."""
        failed = (
            f"{c.metric} = {'missing' if c.value is None else f'{c.value:.5g}'}, needs {c.bound}"
            for c in self.checks
            if not c.passed
        )
        return "; ".join(failed)


_VERDICTS = TypeAdapter(Verdict)


@dataclass(frozen=True)
class Approved(Generic[T]):
    """A subject with the proof that it passed its gate: only `require` constructs one."""

    subject: T
    verdict: Verdict
    seal: InitVar[object]

    def __post_init__(self, seal: object) -> None:
        if seal is not _seal:
            raise TypeError("an Approved comes from rlhf.gates.require, never from its constructor")

    def map(self, function: Callable[[T], U]) -> Approved[U]:
        """Apply a function to the subject, for example to get a reference's folder."""
        return Approved(function(self.subject), self.verdict, _seal)


def judge(
    gate: str, subject: str, metrics: Mapping[str, Any], rules: Sequence[GateRule]
) -> Verdict:
    """Check all rules; a missing or non-finite metric or bound fails its rule.

    Args:
        gate: Name of the gate.
        subject: Digest of the judged artifact.
        metrics: Nested metrics of an evaluation.
        rules: Conditions that all have to hold; without any the verdict is an approval.
    """
    numbers = dict(flat_metrics(metrics))
    checks = tuple(_check(rule, numbers) for rule in rules)
    return Verdict(gate, subject, all(c.passed for c in checks), checks)


def require(subject: T, digest: str, verdict: Verdict) -> Approved[T]:
    """Return the approved subject.

    Raises:
        GateRejected: The verdict is a rejection, or on another subject.
    """
    if verdict.subject != digest:
        raise GateRejected(
            f"{verdict.gate}: its verdict is of {verdict.subject[:12]}, not of {digest[:12]}; "
            "run the gate on this model"
        )
    if not verdict.approved:
        raise GateRejected(f"{verdict.gate}: {verdict.reason}", verdict)
    return Approved(subject, verdict, _seal)


def read_verdict(folder: Path) -> Verdict:
    """Read the verdict that a gate has published.

    Raises:
        DataError: It is missing or damaged.
    """
    path = folder / VERDICT
    return checked(path, lambda: _VERDICTS.validate_json(path.read_bytes(), strict=True))


def flat_metrics(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the dotted name and value of every number in nested metrics."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from flat_metrics(cast("Mapping[str, Any]", value), f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)


def _check(rule: GateRule, numbers: Mapping[str, float]) -> Check:
    value = numbers.get(rule.metric)
    passed = value is not None and math.isfinite(value)
    bounds: list[str] = []
    for sign, bound in (("≥", rule.min), ("≤", rule.max)):
        if bound is None:
            continue
        limit = numbers.get(bound, math.nan) if isinstance(bound, str) else bound
        bounds.append(f"{sign} {bound}" + (f" ({limit:.5g})" if isinstance(bound, str) else ""))
        # Comparisons with NaN are false, so an unknown bound rejects.
        within = value is not None and (value >= limit if sign == "≥" else value <= limit)
        passed = passed and within
    finite_value = value if value is not None and math.isfinite(value) else None
    return Check(rule.metric, finite_value, " and ".join(bounds), passed)
