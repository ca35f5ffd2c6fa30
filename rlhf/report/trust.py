"""The answers of a run's first screen: better than SFT, better than the champion, over-optimised.

The terminal, the Markdown summary and the page show the same answers. This loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf.report.text import exact, number_of, percent, percent_range, short

if TYPE_CHECKING:
    from rlhf.gates import Check, Verdict

#: Scorers by whose win rates a policy is judged, and the prefix of their metrics.
DECIDING = (("reward model", ""), ("judge", "judge_"))
#: Gold is known for generated data alone: it is shown, and decides nothing.
SCORERS = (*DECIDING, ("gold", "gold_"))
MAX_FAILED = 2
_STATES = {"no": "promoted", "suspected": "rejected"}
_TONES = {"yes": "promoted", "no": "rejected"}
#: An evaluation without any of these is from before champions were compared.
_RECENT = ("prompts_from", "over_optimisation", "shifts")


class Answer(NamedTuple):
    """One of the three questions, with its answer and the evidence."""

    question: str
    answer: str
    evidence: str
    tone: str
    """Class and icon on the page."""

    @property
    def line(self) -> str:
        """The answer in one line of plain text."""
        evidence = f" ({self.evidence})" if self.evidence else ""
        return f"{self.question}: {self.answer}{evidence}".replace("\u00a0", " ")


def trust_answers(
    policy: Mapping[str, Any] | None, verdict: Verdict | None = None, compares: bool = True
) -> tuple[Answer, ...]:
    """Return the three answers; empty without a policy's evaluation.

    Args:
        policy: The policy's `evaluation.json`; an old one lacks parts.
        verdict: Verdict of the policy's gate, which decides on the champion.
        compares: Whether the configuration asks for a comparison with the champion.
    """
    if not policy:
        return ()
    champion = _against_champion(policy, verdict, compares)
    return (_against_sft(policy), champion, over_optimised(policy))


def win_rates(metrics: Mapping[str, Any]) -> str:
    """Return the measured win rates with their intervals, as text."""
    parts = []
    for name, prefix in SCORERS:
        key = f"{prefix}win_rate"
        if number_of(metrics.get(key)) is None:
            continue
        label = name if prefix else "win rate"
        spread = percent_range(metrics.get(f"{key}_low"), metrics.get(f"{key}_high"))
        parts.append(f"{label} {percent(metrics[key])}" + (f", {spread}" if spread else ""))
    return "; ".join(parts)


def better(metrics: Mapping[str, Any]) -> str:
    """Return `yes` or `no` if the intervals of all win rates agree on it, else `not shown`.

    `yes` needs every deciding scorer's interval above a half; one below a half is a `no`.
    """
    keys = [f"{prefix}win_rate" for _, prefix in DECIDING]
    known = [key for key in keys if number_of(metrics.get(key)) is not None]
    lows, highs = (
        [number_of(metrics.get(f"{key}_{end}")) for key in known] for end in ("low", "high")
    )
    if not known:
        return "unknown"
    if any(high is not None and high < 0.5 for high in highs):
        return "no"
    return "yes" if all(low is not None and low > 0.5 for low in lows) else "not shown"


def over_optimised(policy: Mapping[str, Any]) -> Answer:
    """Return whether a policy's evaluation finds that it exploits its reward model."""
    found = _mapping(policy.get("over_optimisation"))
    state, evidence = str(found.get("state") or "unknown"), str(found.get("evidence") or "")
    if not evidence:
        evidence = "" if found else "not measured"
    return Answer(
        "over-optimised", state, evidence.strip().rstrip("."), _STATES.get(state, "notrun")
    )


def _against_sft(policy: Mapping[str, Any]) -> Answer:
    sampled = _mapping(policy.get("sampled"))
    answer, evidence = better(sampled), win_rates(sampled)
    if evidence and number_of(sampled.get("judge_win_rate")) is None:
        evidence += "; by the reward model that trained it, without a judge"
    return _answer("better than SFT", answer, evidence or "no win rate was measured")


def _against_champion(policy: Mapping[str, Any], verdict: Verdict | None, compares: bool) -> Answer:
    question, champion = "better than the champion", _mapping(policy.get("champion"))
    digest = (verdict.champion if verdict else None) or champion.get("policy")
    checks = [c for c in verdict.checks if c.kind == "champion"] if verdict else []
    if not digest and not champion:
        if not compares:
            return _answer(question, "not compared", "gates.champion is none")
        if not any(key in policy for key in _RECENT):
            return _answer(question, "unknown", "this evaluation compares with SFT alone")
        return _answer(question, "there was no champion to compare it with", "")
    parts = [f"champion {short(str(digest))}"] if digest else []
    parts += [text] if (text := win_rates(champion)) else []
    if not checks:
        parts.append("the gate compares no champion" if verdict else "no gate has compared them")
        return _answer(question, better(champion), "; ".join(parts))
    failed = [c for c in checks if not c.passed]
    parts += [failure(c) for c in failed[:MAX_FAILED]]
    parts += [f"{len(failed) - MAX_FAILED} more checks not met"] if len(failed) > MAX_FAILED else []
    if verdict and (text := look(verdict)):
        parts.append(text)
    measured = any(c.value is not None for c in checks)
    answer = "no" if failed else "yes" if measured else "unknown"
    if failed and better(champion) == "no":
        return Answer(question, "no, it is worse", "; ".join(parts), "rejected")
    # A challenger that is not better is a normal outcome: the champion stays.
    tone = "kept" if failed else _TONES.get(answer, "notrun")
    return Answer(question, answer, "; ".join(parts), tone)


def failure(check: Check) -> str:
    """Return a check that isn't met, with its number, as text."""
    note = f" ({check.note})" if check.note else ""
    return f"{check.metric} = {exact(check.value)}, needs {check.bound}{note}"


def look(verdict: Verdict) -> str:
    """Return which of the looks at its prompts a comparison is, as text; empty if uncounted."""
    if verdict.look is None:
        return ""
    of = "" if verdict.looks is None else f" of {verdict.looks}"
    return f"look {verdict.look}{of} at these prompts"


def _answer(question: str, answer: str, evidence: str) -> Answer:
    return Answer(question, answer, evidence, _TONES.get(answer, "notrun"))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
