"""Gates: checks of metrics by rules, their verdicts, and the proof of an approval."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, cast

from pydantic import TypeAdapter

from rlhf.config.gates import GateRule
from rlhf.config.metric_names import SLICES, is_share
from rlhf.errors import GateRejected, NotBetter
from rlhf.inference import mean_bound, share_bound
from rlhf.saved import checked

VERDICT = "verdict.json"
#: Beginnings of the notes of checks that judged nothing: no metric, or too small a slice.
NOT_MEASURED, NOT_JUDGED = "not measured", "not judged"
T = TypeVar("T")
U = TypeVar("U")
#: Private to this module, so that only `require` can construct an Approved.
_seal = object()


@dataclass(frozen=True)
class Check:
    """Result of a rule, of it in a slice, or of a part of the comparison with the champion."""

    metric: str
    value: float | None
    """The metric; None if it is missing or not finite."""
    bound: str
    """What the metric, or an end of its interval, is compared with."""
    passed: bool
    low: float | None = None
    """Lower end of the value's interval: 95 %, or at the rule's confidence."""
    high: float | None = None
    """Upper end of the value's interval."""
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
    def keeps_champion(self) -> bool:
        """True if nothing but the comparison with the champion failed."""
        failed = [c for c in self.checks if not c.passed]
        return bool(failed) and all(c.kind == "champion" for c in failed)

    @property
    def reason(self) -> str:
        """Failed rules in one line; empty if approved."""
        return "; ".join(_in_words(c) for c in self.checks if not c.passed)

    @property
    def approval(self) -> str:
        """Grounds of an approval, in a few words."""
        if not any(c.kind == "rule" for c in self.checks):
            return "not judged: its gate is none in the configuration"
        skipped = sum(c.note.startswith(NOT_MEASURED) for c in self.checks)
        return "it met every gate" + (f" ({skipped} not measured)" if skipped else "")


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
    gate: str, subject: str, metrics: Mapping[str, Any], rules: Sequence[GateRule] | None
) -> Verdict:
    """Check all rules; a missing or non-finite metric or bound fails its rule.

    A missing one is shown as not measured where the rule skips it.

    Args:
        gate: Name of the gate.
        subject: Digest of the judged artifact.
        metrics: Nested metrics of an evaluation.
        rules: Conditions that all have to hold; without any the verdict is an approval.
    """
    checks = tuple(check for rule in rules or () for check in _checks(rule, metrics))
    return Verdict(gate, subject, all(c.passed for c in checks), checks)


def require(subject: T, digest: str, verdict: Verdict) -> Approved[T]:
    """Return the approved subject.

    Raises:
        NotBetter: All that it lacks is to be better than the champion.
        GateRejected: The verdict is another rejection, or on another subject.
    """
    if verdict.subject != digest:
        raise GateRejected(
            f"{verdict.gate}: its verdict is of {verdict.subject[:12]}, not of {digest[:12]}; "
            "run the gate on this model"
        )
    if not verdict.approved and verdict.keeps_champion:
        raise NotBetter(f"keep the champion: {verdict.reason}", verdict)
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


def finite(value: float | None) -> float | None:
    """Return the value, or None for one that is not finite."""
    return value if value is not None and math.isfinite(value) else None


def _checks(rule: GateRule, metrics: Mapping[str, Any]) -> Iterator[Check]:
    """Yield the result of a rule, or for `slices` of each slice."""
    if not rule.slices:
        yield _check(rule, dict(flat_metrics(metrics)), _exists(metrics, rule.metric))
        return
    parent, dot, leaf = rule.metric.rpartition(".")
    part = _at(metrics, parent)
    judged = 0
    shown: set[str] = set()
    for slices in SLICES:
        for name, values in _mapping(part.get(slices)).items():
            if name in shown or leaf not in _mapping(values):
                continue
            shown.add(name)
            numbers = {f"{parent}{dot}{key}": v for key, v in flat_metrics(_mapping(values))}
            check = replace(
                _check(rule, numbers, True), metric=f"{parent}{dot}{slices}.{name}.{leaf}"
            )
            prompts = _prompts_of(rule.metric, numbers)
            if prompts is None or prompts < rule.slice_n:
                size = "unknown" if prompts is None else f"{prompts:g}"
                note = f"{NOT_JUDGED}: {size} prompts, and slice_n = {rule.slice_n}"
                yield replace(check, passed=True, note=note)
                continue
            judged += 1
            yield check
    if not judged:
        note = f"{NOT_MEASURED}: no slice has {rule.slice_n} prompts"
        bound = _bounds(rule, {})[0]
        yield Check(rule.metric, None, bound, rule.if_missing == "skip", note=note)


def _check(rule: GateRule, numbers: Mapping[str, float], exists: bool) -> Check:
    """Return the result of a rule.

    Args:
        rule: The rule.
        numbers: All numbers of the evaluation, or of a slice, by the name of the metric.
        exists: Whether the evaluation names the metric; its value may be no number all the same.
    """
    value = numbers.get(rule.metric)
    low, high = _interval(rule, numbers)
    compared = {"estimate": value, "low": low, "high": high}[rule.on]
    bound, limits = _bounds(rule, numbers)
    is_missing = not exists or any(limit is None for _, limit in limits)
    if is_missing and rule.if_missing == "skip":
        return Check(rule.metric, finite(value), bound, True, note=NOT_MEASURED)
    passed = value is not None and math.isfinite(value)
    passed = passed and compared is not None and not math.isnan(compared)
    for sign, limit in limits:
        # Comparisons with NaN are false, so an unknown bound rejects.
        edge = math.nan if limit is None else limit
        within = compared is not None and (compared >= edge if sign == "≥" else compared <= edge)
        passed = passed and within
    return Check(
        rule.metric, finite(value), bound, passed, finite(low), finite(high),
        n=numbers.get(f"{_parent(rule.metric)}n"),
    )  # fmt: skip


def _interval(rule: GateRule, numbers: Mapping[str, float]) -> tuple[float | None, float | None]:
    """Return the ends of a metric's interval, at the rule's confidence if it has one."""
    name = rule.metric
    if rule.confidence is None:
        return numbers.get(f"{name}_low"), numbers.get(f"{name}_high")
    value, prompts = numbers.get(name), _prompts_of(name, numbers)
    spread = numbers.get(f"{name}_size" if is_share(name) else f"{name}_error")
    if value is None or prompts is None or spread is None:
        return None, None
    if is_share(name):
        return share_bound(value, spread, int(prompts), rule.confidence)
    return mean_bound(value, spread, int(prompts), rule.confidence)


def _bounds(
    rule: GateRule, numbers: Mapping[str, float]
) -> tuple[str, list[tuple[str, float | None]]]:
    """Return the bounds in words, and each with its sign; None for a metric that is missing."""
    level = f"{rule.confidence * 100:g} % " if rule.confidence else ""
    end = {"estimate": "", "low": f"{level}lower end ", "high": f"{level}upper end "}[rule.on]
    words: list[str] = []
    limits: list[tuple[str, float | None]] = []
    for sign, bound in (("≥", rule.min), ("≤", rule.max)):
        if bound is None:
            continue
        limit, text = bound, bound if isinstance(bound, str) else f"{bound:.10g}"
        if isinstance(bound, str):
            found = numbers.get(bound)
            limit = None if found is None else found * rule.factor + rule.margin
            text = f"{rule.factor:g} × {bound}" if rule.factor != 1 else bound
            margin = f" {'+' if rule.margin > 0 else '−'} {abs(rule.margin):g}" * bool(rule.margin)
            text += f"{margin} ({math.nan if limit is None else limit:.5g})"
        words.append(f"{sign} {text}")
        limits.append((sign, cast("float | None", limit)))
    return end + " and ".join(words), limits


def _in_words(check: Check) -> str:
    """Return what a failed check measured, and what it needs."""
    if check.value is None:
        value = "missing" if not check.note else check.note
        return f"{check.metric} = {value}, needs {check.bound}"
    interval = "" if check.low is None or check.high is None else (
        f" [{check.low:.3g}, {check.high:.3g}]"
    )  # fmt: skip
    note = f" ({check.note})" if check.note else ""
    return f"{check.metric} = {check.value:.5g}{interval}, needs {check.bound}{note}"


def _prompts_of(name: str, numbers: Mapping[str, float]) -> float | None:
    """Return the number of prompts behind a metric: `prompts` beside it, or else `n`."""
    parent = _parent(name)
    return numbers.get(f"{parent}prompts", numbers.get(f"{parent}n"))


def _parent(name: str) -> str:
    parent, dot, _ = name.rpartition(".")
    return parent + dot


def _exists(metrics: Mapping[str, Any], name: str) -> bool:
    """Return whether an evaluation names a metric, be its value a number or not.

    A slice's name may hold dots.
    """
    if name in metrics:
        return True
    for key, value in metrics.items():
        if name.startswith(f"{key}.") and isinstance(value, Mapping):
            inner = cast("Mapping[str, Any]", value)
            if _exists(inner, name.removeprefix(f"{key}.")):
                return True
    return False


def _at(metrics: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """Return the part of an evaluation at a dotted path; empty if there is none."""
    for name in filter(None, path.split(".")):
        metrics = _mapping(metrics.get(name))
    return metrics


def _mapping(value: Any) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}
