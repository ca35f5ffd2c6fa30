"""Comparison of a policy with the champion: superiority overall, non-inferiority in every slice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from rlhf.config.gates import ChampionGateConfig
from rlhf.errors import DataError
from rlhf.gates import NOT_JUDGED, Check, Verdict
from rlhf.inference import share_bound

#: Part of a policy's evaluation with the comparison.
PART = "champion"
#: How to get other gate prompts.
NEW_PROMPTS = (
    "raise data.rotation (the generated world needs another seed too, and a source with a held-out "
    "part of its own other rows in it)"
)
#: Win rate of two equal policies.
EVEN = 0.5


@dataclass(frozen=True)
class Compared:
    """Champion and gate prompts that a policy was compared with."""

    champion: str
    """Digest of the champion."""
    prompts: str
    """Digest of the gate prompts."""


def compared_with(evaluation: Mapping[str, Any]) -> Compared | None:
    """Return what an evaluation compares its policy with; None without a champion.

    Raises:
        DataError: The evaluation has a comparison, and not all of it.
    """
    part = evaluation.get(PART)
    if part is None:
        return None
    champion, prompts = part.get("policy"), evaluation.get("prompts_sha256")
    if not isinstance(champion, str) or not isinstance(prompts, str):
        raise DataError("the evaluation names no champion or no gate prompts; run it again")
    return Compared(champion, prompts)


def with_comparison(
    verdict: Verdict, evaluation: Mapping[str, Any], settings: ChampionGateConfig, look: int,
    spent: float | None = None,
) -> Verdict:  # fmt: skip
    """Return a verdict with the checks of the comparison that the evaluation holds.

    Args:
        verdict: That of the rules.
        evaluation: Metrics of the policy, with the part `champion`.
        settings: Confidences, margin, planned looks.
        look: How many policies have been compared on these prompts, with this one.
        spent: Sum of the levels of the looks before; None if all had these settings.
    """
    compared = compared_with(evaluation)
    if compared is None:
        return verdict
    part = cast("Mapping[str, Any]", evaluation[PART])
    name = win_rate_of(evaluation)
    checks = (
        _superiority(part, name, settings),
        *_non_inferiority(part, name, settings),
        _look(look, (look - 1) * settings.look_level if spent is None else spent, settings),
    )
    return replace(
        verdict,
        approved=verdict.approved and all(check.passed for check in checks),
        checks=(*verdict.checks, *checks),
        champion=compared.champion, prompts=compared.prompts, look=look, looks=settings.looks,
    )  # fmt: skip


def describe_verdict(verdict: Verdict, champion: str | None) -> str:
    """Return in one line what a policy's verdict says: of the gate, and of the champion.

    Args:
        verdict: The verdict.
        champion: Digest of the champion whose place the policy takes; None if there is none.
    """
    if not verdict.approved:
        worse = f"it is not better than the champion {str(verdict.champion)[:12]}"
        return worse if verdict.keeps_champion else f"{verdict.gate} said no"
    if champion is None:
        return f"{verdict.approval}; first champion"
    rates = [c for c in verdict.checks if c.kind == "champion" and c.low is not None]
    if verdict.champion != champion or not rates:
        return f"{verdict.approval}; not compared with the champion {champion[:12]}"
    name = rates[0].metric.rpartition(".")[2].replace("_", " ")
    return (
        f"{verdict.approval}; better than the champion {champion[:12]} ({name} "
        f"{rates[0].value:.1%}, lower end {rates[0].low:.1%})"
    )


def win_rate_of(evaluation: Mapping[str, Any]) -> str:
    """Return the name of the win rate that decides: the judge's where it is usable.

    The training reward model is what the policy was trained to please, so it decides only where
    there is no other.
    """
    judge = cast("Mapping[str, Any]", evaluation.get("judge") or {})
    return "judge_win_rate" if judge.get("usable") is True else "win_rate"


def _superiority(part: Mapping[str, Any], name: str, settings: ChampionGateConfig) -> Check:
    confidence = settings.look_confidence
    bound = f"{confidence * 100:g} % lower end ≥ {EVEN}"
    return _bounded(part, f"{PART}.{name}", name, confidence, EVEN, bound)


def _non_inferiority(
    part: Mapping[str, Any], name: str, settings: ChampionGateConfig
) -> list[Check]:
    least = EVEN - settings.margin
    bound = f"{settings.confidence * 100:g} % lower end ≥ {least:g}"
    checks: list[Check] = []
    slices = cast("Mapping[str, Mapping[str, Any]]", part.get("by_group") or {})
    for group, values in slices.items():
        full = f"{PART}.by_group.{group}.{name}"
        check = _bounded(values, full, name, settings.confidence, least, bound)
        prompts = values.get("n")
        if isinstance(prompts, int | float) and prompts < settings.slice_n:
            note = f"{NOT_JUDGED}: {prompts:g} prompts, and slice_n = {settings.slice_n}"
            check = replace(check, passed=True, note=note)
        checks.append(check)
    return checks


def _bounded(
    values: Mapping[str, Any], full: str, name: str, confidence: float, least: float, bound: str
) -> Check:
    """Return the check of a win rate's one-sided lower end; a missing one fails.

    Args:
        values: Metrics beside the win rate.
        full: Name to show.
        name: Name in the metrics.
        confidence: One-sided.
        least: Least lower end.
        bound: That in words.
    """
    found = [values.get(key) for key in (name, f"{name}_size", "n")]
    numbers = [float(x) for x in found if isinstance(x, int | float) and not isinstance(x, bool)]
    if len(numbers) < len(found) or not all(map(math.isfinite, numbers)):
        return Check(full, None, bound, False, kind="champion")
    rate, size, prompts = numbers
    low, high = share_bound(rate, size, int(prompts), confidence)
    return Check(full, rate, bound, low >= least, low, high, prompts, kind="champion")


def _look(look: int, spent: float, settings: ChampionGateConfig) -> Check:
    passed, note = settings.allows_look(spent), ""
    if passed != (look <= settings.looks):
        note = (
            "the comparisons before it, at other settings of gates.champion, have spent "
            f"{spent:.2%} of the chance of error of {1 - settings.confidence:.2%}"
        )
    elif not passed:
        note = "these gate prompts have been used for as many comparisons as planned"
    note += "" if passed else f"; {NEW_PROMPTS}"
    return Check(
        "look", float(look), f"≤ {settings.looks}", passed, note=note, kind="champion"
    )  # fmt: skip
