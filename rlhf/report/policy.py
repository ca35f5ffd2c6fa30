"""The policy's evaluation as charts and tables: against SFT, against the champion, shifts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rlhf.gates import Check, Verdict
from rlhf.report.charts import IntervalChart, interval_chart
from rlhf.report.metric_words import SHARES, metric_name
from rlhf.report.reward_model import Figure, signed
from rlhf.report.text import (
    interval,
    number,
    number_of,
    p_value,
    percent,
    percent_range,
    points,
    sentence,
    short,
    words,
)
from rlhf.report.trust import SCORERS

MAX_SLICES, MAX_SHIFTS, MAX_NOTES = 15, 30, 12
_ROLES = {"reward model": "main", "judge": "judge", "gold": "gold"}
_SLICE = re.compile(r"champion\.by_(?:group|slice)\.(.+)\.(\w*win_rate)(?:_low|_high)?")
_BOUND = re.compile(r"≥ (?:[^\s(]+ \()?(-?\d[\d.e+-]*)")
#: Heading of each part of the table, and a note; the reward model's part has none.
PARTS = {
    "": ("", ""),
    "judge": ("Judge", "another reward model, trained on other pairs; PPO never sees it"),
    "gold": ("Gold", "the true score, never seen by training or by a gate"),
}


class Sides(NamedTuple):
    """Names of the two policies that are compared; the defaults are those of a run."""

    before: str = "SFT"
    start: str = "the SFT policy"
    """The same in a sentence."""
    after: str = "After PPO"
    short: str = "After"
    policy: str = "The trained policy"
    was: str = "was"
    """Stands before the first policy's values."""
    reward_note: str = ", without what PPO subtracts from replies that don't end"
    """Ends the sentence on rewards."""


class Compared(NamedTuple):
    """One row of the policy table, with a (value, note) for each way of decoding."""

    label: str
    cells: tuple[tuple[str, str], ...]
    part: str = ""


class Shift(NamedTuple):
    """One measure before and after, and whether it has shifted beyond chance."""

    name: str
    before: str
    after: str
    difference: str
    spread: str
    p: str
    significant: bool


class OverOptimisation(NamedTuple):
    """Whether the policy exploits its reward model, with the evidence."""

    css: str
    headline: str
    evidence: str


@dataclass(frozen=True)
class PolicyView:
    """Parts of a policy's evaluation that were measured."""

    sides: Sides = Sides()  # noqa: RUF009 (immutable)
    modes: tuple[str, ...] = ()
    compared: tuple[Compared, ...] = ()
    wins: IntervalChart | None = None
    champion: str = ""
    """Short digest of the champion."""
    champion_wins: IntervalChart | None = None
    champion_slices: IntervalChart | None = None
    margin: str = ""
    """Non-inferiority margin of the slices, if they have one in common."""
    over_optimisation: OverOptimisation | None = None
    judge: str = ""
    """Sentence on the judge."""
    shifts: tuple[Shift, ...] = ()
    forgetting: tuple[Figure, ...] = ()
    notes: tuple[str, ...] = ()


def policy_view(
    policy: Mapping[str, Any] | None, verdicts: Sequence[Verdict] = (), sides: Sides | None = None
) -> PolicyView:
    """Lay out a policy's evaluation; what is missing or of a wrong type is left out."""
    names = sides or Sides()
    if not policy:
        return PolicyView()
    modes, compared = comparison(policy, names)
    champion, notes = _mapping(policy.get("champion")), policy.get("notes")
    checks = [c for verdict in verdicts for c in verdict.checks if c.kind == "champion"]
    slices, margin = _slices(champion, checks)
    return PolicyView(
        sides=names,
        modes=tuple(modes),
        compared=tuple(compared),
        wins=win_chart(policy),
        champion=short(str(champion.get("policy", ""))) if champion else "",
        champion_wins=interval_chart(_scored("", champion), [("tie", "coin", 0.5)]),
        champion_slices=slices,
        margin=percent(margin) if margin is not None else "",
        over_optimisation=_over_optimisation(_mapping(policy.get("over_optimisation"))),
        judge=_judge(_mapping(policy.get("judge"))),
        shifts=tuple(_shifts(policy.get("shifts"))),
        forgetting=_forgetting(_mapping(policy.get("forgetting"))),
        notes=tuple(map(str, notes[:MAX_NOTES])) if isinstance(notes, list | tuple) else (),
    )


def win_chart(policy: Mapping[str, Any]) -> IntervalChart | None:
    """Chart the win rates over SFT by decoding and scorer, and by group."""
    estimates = [e for mode, metrics in _modes(policy) for e in _scored(words(mode), metrics)]
    sampled = _mapping(policy.get("sampled"))
    groups = _mapping(sampled.get("by_group"))
    name, key = _judging(groups.values())
    estimates += [(str(g), "group", _mapping(groups[g]), key) for g in sorted(groups, key=str)]
    return interval_chart(estimates, [("tie", "coin", 0.5)], f"By group, by the {name}")


def comparison(
    policy: Mapping[str, Any], sides: Sides | None = None
) -> tuple[list[str], list[Compared]]:
    """Return headings and rows of the policy table; unmeasured rows are left out."""
    names = sides or Sides()
    start = names.start
    modes = _modes(policy)

    def row(label: str, cell: Any, part: str = "") -> Compared:
        return Compared(label, tuple(cell(metrics) for _, metrics in modes), part)

    def change(name: str, form: Any = number) -> Any:
        return lambda m: _change(m.get(f"{name}_before"), m.get(f"{name}_after"), form, names.was)

    def rate(name: str) -> Any:
        return lambda m: (percent(m.get(name)), _ci(m, name))

    def nats(name: str) -> Any:
        return lambda m: (number(m.get(name)), "nats per reply" if name in m else "")

    rows = [
        row(f"Wins over {start}", rate("win_rate")),
        row("Reward", change("reward")),
        row("Disagreement of the reward model's members", change("disagreement")),
        row(f"KL from {start}", nats("kl")),
        row("KL, exact at each token", nats("kl_exact")),
        row(
            "Replies that end by EOS",
            lambda m: _change(m.get("eos_rate_before"), m.get("eos_rate"), percent, names.was),
        ),
        row("Reply length", change("tokens")),
        row("Repetition", change("repetition")),
        row("Wins", rate("judge_win_rate"), "judge"),
        row("Score", change("judge"), "judge"),
        row("Gap: wins by the judge less by reward", _gap, "judge"),
        row("Wins", rate("gold_win_rate"), "gold"),
        row("Score", change("gold"), "gold"),
    ]
    if not policy.get("shifts"):
        # Else they stand in the table of shifts, with their tests.
        rows[8:8] = [
            row("Distinct words", change("distinct_1")),
            row("Distinct pairs of words", change("distinct_2")),
            row("Entropy per token", change("entropy")),
            row("Replies like refusals", change("refusal", percent)),
        ]
    measured = [r for r in rows if any(value != number(None) for value, _ in r.cells)]
    return [words(mode) for mode, _ in modes], measured


def _slices(
    champion: Mapping[str, Any], checks: Sequence[Check]
) -> tuple[IntervalChart | None, float | None]:
    """Chart win rates over the champion by slice, with the margin; return that too.

    The gate's checks say which scorer's win rate and which margin count; without them it is the
    judge's win rate if there is one, and no margin is drawn.
    """
    groups = _mapping(champion.get("by_group"))
    found = [(m, c) for c in checks if (m := _SLICE.fullmatch(c.metric))]
    key = found[0][0][2] if found else _judging(groups.values())[1]
    bounds = {float(b[1]) for _, c in found if (b := _BOUND.search(c.bound)) and _is_number(b[1])}
    missed = {m[1] for m, c in found if not c.passed}
    shown = sorted(groups, key=lambda g: (number_of(_mapping(groups[g]).get(key)) or 0.0, str(g)))
    estimates = [
        (str(g), "worst" if g in missed else "group", _mapping(groups[g]), key)
        for g in shown[:MAX_SLICES]
    ]
    # One common margin is a line; bounds of the slices' own stand in the gate's table alone.
    margin = bounds.pop() if len(bounds) == 1 else None
    lines = [("tie", "coin", 0.5), ("", "margin", margin)]
    return interval_chart(estimates, lines, groups=""), margin


def _shifts(shifts: Any) -> Iterable[Shift]:
    rows = [s for s in shifts if isinstance(s, Mapping)] if isinstance(shifts, list) else []
    for shift in rows[:MAX_SHIFTS]:
        name = str(shift.get("metric"))
        share = name.rpartition(".")[2] in SHARES
        form, change = (percent, points) if share else (number, signed)
        spread = interval(shift.get("low"), shift.get("high"), change)
        yield Shift(
            name=metric_name(name),
            before=form(shift.get("before")),
            after=form(shift.get("after")),
            difference=change(shift.get("difference")) + (" points" if share else ""),
            spread=spread,
            p=p_value(shift.get("p_adjusted")),
            significant=shift.get("significant") is True,
        )


def _over_optimisation(found: Mapping[str, Any]) -> OverOptimisation | None:
    if not found:
        return None
    state = str(found.get("state") or "unknown")
    css, headline = {
        "no": ("passed", "No sign of over-optimisation."),
        "suspected": ("missed", "Over-optimisation is suspected."),
    }.get(state, ("notrun", "Whether it is over-optimised is unknown."))
    return OverOptimisation(css, headline, sentence(found.get("evidence")))


def _judge(judge: Mapping[str, Any]) -> str:
    """Return a sentence on the judge; empty for an evaluation that knows none."""
    if not judge:
        return ""
    if judge.get("usable") is not True:
        return f"Without a judge: {judge.get('reason') or 'it is not usable'}."
    accuracy = percent(judge.get("accuracy"))
    spread = percent_range(judge.get("accuracy_low"), judge.get("accuracy_high"))
    pairs = number_of(judge.get("n"))
    of = "" if pairs is None else f" of {number(int(pairs))}"
    return (
        f"The judge is a reward model of its own, trained on pairs that no other stage reads; it "
        f"prefers the preferred reply in {accuracy}{f' ({spread})' if spread else ''}{of} held-out "
        "pairs."
    )


def _forgetting(found: Mapping[str, Any]) -> tuple[Figure, ...]:
    if (
        number_of(found.get("perplexity_after")) is None
        and number_of(found.get("nll_after")) is None
    ):
        return ()
    spread = interval(found.get("nll_difference_low"), found.get("nll_difference_high"), signed)
    difference = signed(found.get("nll_difference"))
    texts = number_of(found.get("n"))
    figures = [
        Figure(
            "Perplexity", *_change(found.get("perplexity_before"), found.get("perplexity_after"))
        ),
        Figure("Loss in nats per token", *_change(found.get("nll_before"), found.get("nll_after"))),
        Figure("Change of the loss", difference, f"95 % interval {spread}" if spread else ""),
        Figure("Texts", number(None if texts is None else int(texts))),
    ]
    return tuple(figure for figure in figures if figure.value != number(None))


def _scored(
    label: str, metrics: Mapping[str, Any]
) -> list[tuple[str, str, Mapping[str, Any], str]]:
    """Return the win rates by each scorer as estimates for a chart."""
    start = f"{label}, by" if label else "By"
    return [
        (f"{start} {'gold' if name == 'gold' else f'the {name}'}", _ROLES[name], metrics,
         f"{prefix}win_rate")
        for name, prefix in SCORERS
    ]  # fmt: skip


def _judging(groups: Iterable[Any]) -> tuple[str, str]:
    """Return the scorer that groups are charted by, and its key: the judge if it scored one."""
    keys = {key for group in groups for key in _mapping(group)}
    return ("judge", "judge_win_rate") if "judge_win_rate" in keys else ("reward model", "win_rate")


def _gap(metrics: Mapping[str, Any]) -> tuple[str, str]:
    if number_of(metrics.get("gap")) is None:
        return number(None), ""
    spread = interval(metrics.get("gap_low"), metrics.get("gap_high"), points)
    return f"{points(metrics['gap'])} points", f"95\u00a0% interval {spread}" if spread else ""


def _modes(policy: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(mode, _mapping(policy[mode])) for mode in ("sampled", "greedy") if policy.get(mode)]


def _change(
    before: Any, after: Any, form: Any = number, was: str = "was"
) -> tuple[str, str]:  # fmt: skip
    return form(after), "" if number_of(before) is None else f"{was} {form(before)}"


def _ci(metrics: Mapping[str, Any], key: str) -> str:
    spread = percent_range(metrics.get(f"{key}_low"), metrics.get(f"{key}_high"))
    return f"95\u00a0% interval {spread}" if spread else ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
