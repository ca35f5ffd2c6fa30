"""The page of `rlhf compare`: two policies or two reward models, by the sections of a run's report.

It is made from `evaluation.json` and `samples.json` of the comparison alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rlhf.report.charts import IntervalChart, interval_chart
from rlhf.report.members import MembersView, members_view
from rlhf.report.policy import PolicyView, Sides, policy_view
from rlhf.report.render import environment
from rlhf.report.reward_model import Figure, RewardModelView, reward_model_view, slice_name
from rlhf.report.samples import (
    SampleGroup,
    SampleWords,
    pair_cards,
    sample_groups,
    shown_samples,
)
from rlhf.report.text import (
    interval,
    number,
    number_of,
    percent,
    percent_range,
    points,
    short,
)
from rlhf.report.trust import Answer, over_optimised, win_rates

#: Cards of each kind, and slices.
MAX_CARDS, MAX_SLICES = 6, 10
SIDES = Sides("a", "a", "b", "b", "Policy b", was="a:", reward_note="")
#: Heading of each part of the table, and a note, as `rlhf.report.policy.PARTS`.
PARTS = {
    "": ("", ""),
    "judge": ("Judge", "the model that decides"),
    "gold": ("Gold", "the true score"),
}
WORDS = SampleWords(
    before="a", after="b", lost="Where b lost most", changed="Where b differs most from a"
)
#: Verdict: class and icon, badge, answer.
VERDICTS = {
    "better": ("promoted", "b is better", "yes"),
    "worse": ("rejected", "b is worse", "no"),
}
UNDECIDED = ("notrun", "No difference found", "not shown")
PAIRS_LEAD = (
    "A margin is a model's score of the preferred reply less that of the other; below 0 it prefers "
    "the other one. The pairs are those whose margins differ most, each in its model's own unit."
)


class NamedView(NamedTuple):
    """A reward model's section of the page."""

    id: str
    heading: str
    view: RewardModelView
    members: MembersView | None


@dataclass(frozen=True)
class ComparisonView:
    """Parts of the page that no run's report has."""

    eyebrow: str
    title: str
    css: str
    label: str
    sentence: str
    facts: tuple[tuple[str, str], ...]
    answers: tuple[Answer, ...]
    models: tuple[NamedView, ...] = ()
    accuracies: IntervalChart | None = None
    figures: tuple[Figure, ...] = ()
    slices: IntervalChart | None = None
    more_slices: int = 0
    notes: tuple[str, ...] = ()


def render_comparison(
    evaluation: Mapping[str, Any], samples: Sequence[dict[str, Any]]
) -> str:  # fmt: skip
    """Render a comparison as HTML with all of its text escaped.

    Args:
        evaluation: What `rlhf compare` writes as `evaluation.json`.
        samples: What it writes as `samples.json`.
    """
    is_policies = "sampled" in evaluation
    view = _policies(evaluation) if is_policies else _reward_models(evaluation)
    policy = PolicyView()
    groups: list[SampleGroup]
    if is_policies:
        policy = policy_view(_with_judge(evaluation), sides=SIDES)
        chosen = [row for row in samples if row.get("kinds")]
        groups = sample_groups(shown_samples(chosen, MAX_CARDS), WORDS)
    else:
        groups = [SampleGroup("", pair_cards(samples[:MAX_CARDS]))] if samples else []
    sections = [
        ("accuracy", "Accuracy", view.accuracies or view.figures),
        *((model.id, model.heading.partition(" · ")[0], True) for model in view.models),
        ("policy", "Policies", is_policies),
        ("samples", "Samples", groups),
    ]
    return (
        environment()
        .get_template("comparison.html")
        .render(
            view=view,
            sections=sections,
            policy=policy,
            policy_heading="Policies",
            policy_shown=is_policies,
            parts=PARTS,
            samples=groups,
            samples_heading="Replies side by side" if is_policies else "Where they disagree most",
            samples_lead="" if is_policies else PAIRS_LEAD,
        )
    )


def _policies(evaluation: Mapping[str, Any]) -> ComparisonView:
    sampled = _mapping(evaluation.get("sampled"))
    css, label, answer = VERDICTS.get(str(evaluation.get("verdict")), UNDECIDED)
    scorers = _mapping(evaluation.get("scorers"))
    plan = _mapping(evaluation.get("sampling"))
    by = str(evaluation.get("decided_by") or "")
    deciding = _mapping(scorers.get(by))
    facts = [
        *_models(evaluation),
        ("Prompts", f"{_count(evaluation.get('n'))}, {evaluation.get('prompts_from', 'as given')}"),
        ("Decided by", f"{'judge' if by == 'judge' else 'reward model'} {_name(deciding)}"),
        ("Replies", f"{_count(plan.get('samples'))} to a prompt, temperature "
         f"{number(plan.get('temperature'))}, at most {_count(plan.get('max_new_tokens'))} tokens, "
         f"seed {_count(plan.get('seed'))}"),
    ]  # fmt: skip
    answers = (
        Answer("is b better than a", answer, win_rates(sampled), css),
        over_optimised(evaluation),
    )
    return ComparisonView(
        eyebrow="Comparison of two policies", title=_title(evaluation), css=css, label=label,
        sentence=_sentence(evaluation), facts=tuple(facts), answers=answers,
    )  # fmt: skip


def _reward_models(evaluation: Mapping[str, Any]) -> ComparisonView:
    css, label, answer = VERDICTS.get(str(evaluation.get("verdict")), UNDECIDED)
    reports = _mapping(evaluation.get("reports"))
    sides = (("a", "before"), ("b", "after"))
    models = tuple(
        NamedView(f"model-{side}", f"Reward model {side} · {_name(evaluation.get(side))}",
                  reward_model_view(_mapping(reports.get(key))),
                  members_view(_mapping(reports.get(key))))
        for side, key in sides
        if reports.get(key)
    )  # fmt: skip
    spread = _difference(evaluation)
    difference = f"{points(evaluation.get('accuracy_difference'))} points"
    evidence = "; ".join(
        f"{side} {percent(evaluation.get(f'accuracy_{key}'))}" for side, key in sides
    )
    slices, more = _slices(_mapping(evaluation.get("by_slice")))
    notes = evaluation.get("notes")
    facts = [
        *_models(evaluation),
        ("Pairs", f"{_count(evaluation.get('n'))}, {evaluation.get('pairs_from', 'as given')}"),
    ]
    return ComparisonView(
        eyebrow="Comparison of two reward models", title=_title(evaluation), css=css, label=label,
        sentence=_sentence(evaluation), facts=tuple(facts),
        answers=(
            Answer("is b more accurate than a", answer,
                   f"{evidence}; difference {difference}{f', {spread}' if spread else ''}", css),
        ),
        models=models, accuracies=_accuracies(evaluation, reports),
        figures=_figures(evaluation, difference, spread), slices=slices, more_slices=more,
        notes=tuple(map(str, notes)) if isinstance(notes, list) else (),
    )  # fmt: skip


def _accuracies(
    evaluation: Mapping[str, Any], reports: Mapping[str, Any]
) -> IntervalChart | None:  # fmt: skip
    # The baselines are of the pairs, so that both models have the same.
    after = _mapping(reports.get("after"))
    estimates = [
        (f"a · {_name(evaluation.get('a'))}", "main", evaluation, "accuracy_before"),
        (f"b · {_name(evaluation.get('b'))}", "main", evaluation, "accuracy_after"),
        ("Choose the longer reply", "baseline", after, "baseline_longer"),
        ("Choose by format", "baseline", after, "baseline_format"),
    ]
    return interval_chart(estimates, [("coin", "coin", 0.5)])


def _figures(
    evaluation: Mapping[str, Any], difference: str, spread: str
) -> tuple[Figure, ...]:  # fmt: skip
    same = percent_range(evaluation.get("agreement_low"), evaluation.get("agreement_high"))
    figures = [
        Figure("Difference, b less a", difference, f"95 % interval {spread}" if spread else ""),
        Figure("Same choice", percent(evaluation.get("agreement")), same),
        *(
            Figure(name, _count(evaluation.get(key)), "pairs")
            for name, key in (
                ("Both right", "both_right"), ("Only a right", "only_before_right"),
                ("Only b right", "only_after_right"), ("Neither right", "neither_right"),
            )
        ),
    ]  # fmt: skip
    return tuple(figure for figure in figures if figure.value != number(None))


def _slices(slices: Mapping[str, Any]) -> tuple[IntervalChart | None, int]:
    """Chart both accuracies by slice, that of b the lowest first; return how many are left out."""
    known = {
        str(name): (rate, part)
        for name, part in ((name, _mapping(part)) for name, part in slices.items())
        if (rate := number_of(part.get("accuracy_after"))) is not None
    }
    shown = sorted(known, key=lambda name: (known[name][0], name))[:MAX_SLICES]
    estimates = [
        (f"{slice_name(name)} · {side}", role, known[name][1], key)
        for name in shown
        for side, role, key in (
            ("a", "baseline", "accuracy_before"), ("b", "group", "accuracy_after")
        )
    ]  # fmt: skip
    chart = interval_chart(estimates, [("coin", "coin", 0.5)], groups="")
    return chart, max(0, len(known) - MAX_SLICES)


def _difference(evaluation: Mapping[str, Any]) -> str:
    low, high = (evaluation.get(f"accuracy_difference_{end}") for end in ("low", "high"))
    return interval(low, high, points)


def _sentence(evaluation: Mapping[str, Any]) -> str:
    return f"{evaluation.get('sentence') or 'nothing was decided'}."


def _models(evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return how the models were named, and their digests."""
    rows = []
    for side in ("a", "b"):
        facts = _mapping(evaluation.get(side))
        name, digest = str(facts.get("name") or ""), facts.get("digest")
        known = f" ({short(str(digest))})" if digest and short(str(digest)) != name else ""
        rows.append((side, f"{name}{known}"))
    return rows


def _title(evaluation: Mapping[str, Any]) -> str:
    b, a = (_given(evaluation.get(side)) for side in ("b", "a"))
    return f"{b} against {a}"


def _name(facts: Any) -> str:
    """Return a model's short digest, or the name of a folder."""
    known = _mapping(facts)
    digest = known.get("digest")
    return short(str(digest)) if digest else str(known.get("name") or "?")


def _given(facts: Any) -> str:
    """Return what a user called a model, or its short digest if that was a part of it."""
    known = _mapping(facts)
    name, digest = str(known.get("name") or ""), str(known.get("digest") or "").rpartition(":")[2]
    return _name(facts) if not name or digest.startswith(name) else name


def _with_judge(evaluation: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the evaluation with what is known of its judge where a run's has it."""
    judge = _mapping(_mapping(evaluation.get("scorers")).get("judge"))
    return {**evaluation, "judge": judge} if "usable" in judge else evaluation


def _count(value: Any) -> str:
    x = number_of(value)
    return number(None if x is None else int(x))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
