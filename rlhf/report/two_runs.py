"""Two runs side by side: their configurations, their metrics, their replies to the same prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rlhf.gates import flat_metrics
from rlhf.inference import mean_of
from rlhf.report.metric_words import metric_name
from rlhf.report.render import environment
from rlhf.report.replies import SCORERS, all_replies
from rlhf.report.samples import Card, Reply, SampleGroup
from rlhf.report.stored import SavedReport
from rlhf.report.text import interval, number, number_of, text_of

#: Metrics that are shown if either run has them, by their names in the evaluation.
METRICS = (
    "sampled.win_rate", "sampled.judge_win_rate", "sampled.gold_win_rate", "champion.win_rate",
    "champion.judge_win_rate", "sampled.reward_difference", "sampled.reward_after",
    "sampled.judge_after", "sampled.gold_after", "sampled.kl", "sampled.eos_rate",
    "sampled.tokens_after", "sampled.repetition_after", "sampled.distinct_2_after",
    "sampled.entropy_after", "forgetting.nll_difference", "n",
)  # fmt: skip
#: The same of the reward model's evaluation.
MODEL_METRICS = ("accuracy", "length_controlled_accuracy", "ece", "log_loss")
#: Values of the configuration that say where a run works, not what it does.
_PLACES = ("runtime.", "tracking.", "store_options.")
#: Cards on the page.
MAX_CARDS = 12


@dataclass(frozen=True)
class Difference:
    """A value of the configuration that differs; None where a run has no such field."""

    key: str
    a: str | None
    b: str | None


@dataclass(frozen=True)
class Metric:
    """A metric of both runs, with the ends of its intervals where it has them."""

    name: str
    label: str
    a: float | None
    a_low: float | None
    a_high: float | None
    b: float | None
    b_low: float | None
    b_high: float | None

    def shown(self, side: str) -> tuple[str, str]:
        """Return value and interval of a run as text."""
        value, low, high = (getattr(self, f"{side}{end}") for end in ("", "_low", "_high"))
        return number(value), interval(low, high, number)


@dataclass(frozen=True)
class PairedReplies:
    """The policies' replies to one prompt that both runs evaluated."""

    prompt: Any
    group: str | None
    a: str
    b: str
    scores: Mapping[str, tuple[float | None, float | None]]
    """By scorer: of a's reply and of b's. Of different models they can't be compared."""
    difference: float | None
    """Score of b's reply less that of a's by the scorer they have in common; None without one."""


@dataclass(frozen=True)
class Gain:
    """Mean gain of b's replies over a's on the prompts that both evaluated."""

    scorer: str
    value: float
    low: float | None
    high: float | None
    prompts: int


@dataclass(frozen=True)
class TwoRuns:
    """Differences between two runs."""

    a: SavedReport
    b: SavedReport
    differences: tuple[Difference, ...]
    metrics: tuple[Metric, ...]
    replies: tuple[PairedReplies, ...]
    gain: Gain | None
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Return it for programs, without the reports."""
        runs = {
            side: {
                "run": run.run_name, "started": run.started, "outcome": run.outcome,
                "reason": run.reason,
            }
            for side, run in (("a", self.a), ("b", self.b))
        }  # fmt: skip
        return {
            **runs, "configuration": [asdict(each) for each in self.differences],
            "metrics": [asdict(each) for each in self.metrics],
            "gain": asdict(self.gain) if self.gain else None, "notes": list(self.notes),
            "replies": [asdict(each) for each in self.replies],
        }  # fmt: skip


def side_by_side(
    a: SavedReport,
    b: SavedReport,
    samples: tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]] | None,
    common: Sequence[str],
) -> TwoRuns:
    """Compare two runs by what their reports and evaluations hold; nothing is sampled anew.

    Args:
        a: Report of the first run.
        b: That of the second.
        samples: Their samples.json; None if one was not evaluated.
        common: Scorers that are the same model in both evaluations.
    """
    notes: list[str] = []
    replies: list[PairedReplies] = []
    gain = None
    if samples is None:
        missing = " and ".join(r.run_name for r in (a, b) if not r.policy) or "one"
        notes.append(f"no replies to compare: the policy of {missing} was not evaluated")
    else:
        scorer = next((name for name in ("judge", "gold", "reward") if name in common), None)
        replies = _paired(*samples, scorer)
        if not replies:
            notes.append("no prompt was answered by both; `rlhf compare` lets both policies answer")
        elif scorer is None:
            notes.append(
                "scores are of different reward models and judges, and can't be compared; "
                "`rlhf compare` scores both policies by one"
            )
        else:
            gain = _gain(replies, scorer)
    return TwoRuns(
        a, b, tuple(config_differences(a, b)), tuple(_metrics(a, b)), tuple(replies), gain,
        tuple(notes),
    )  # fmt: skip


def config_differences(a: SavedReport, b: SavedReport) -> list[Difference]:
    """Return the values that differ, in the order of the configuration."""
    values = [{row.key: row.value for row in each.config_rows} for each in (a, b)]
    keys = [*dict.fromkeys((*values[0], *values[1]))]
    return [
        Difference(key, values[0].get(key), values[1].get(key))
        for key in keys
        if values[0].get(key) != values[1].get(key) and not key.startswith(_PLACES)
    ]


def render_two_runs(found: TwoRuns) -> str:
    """Render the comparison as HTML with all of its text escaped."""
    cards = tuple(_card(each) for each in found.replies[:MAX_CARDS])
    shown = (
        f"The {len(cards)} on which b lost most, of {len(found.replies)}"
        if found.gain
        else f"The first {len(cards)} of {len(found.replies)}"
    )
    sections = [
        ("configuration", "Configuration", True), ("metrics", "Metrics", found.metrics),
        ("samples", "Replies", cards),
    ]  # fmt: skip
    return (
        environment()
        .get_template("two_runs.html")
        .render(
            found=found, sections=sections, gain=gain_sentence(found),
            samples=[SampleGroup("", cards)] if cards else [],
            samples_heading="Replies to the same prompts", samples_lead=f"{shown}.",
        )
    )  # fmt: skip


def gain_sentence(found: TwoRuns) -> str:
    """Return what the scorer that both have in common says of b's replies; empty without one."""
    if found.gain is None:
        return ""
    gain = found.gain
    who = {"judge": "the judge", "gold": "the gold score", "reward": "the reward model"}
    spread = interval(gain.low, gain.high, number)
    if gain.low is None or gain.high is None or gain.low <= 0 <= gain.high:
        verdict = "no difference beyond chance"
    else:
        verdict = "b is better" if gain.value > 0 else "b is worse"
    return (
        f"{verdict}: by {who[gain.scorer]} of both runs b's replies score {_signed(gain.value)} "
        f"more{f' ({spread})' if spread else ''} on {gain.prompts:,} prompts"
    )


def _metrics(a: SavedReport, b: SavedReport) -> list[Metric]:
    found: list[Metric] = []
    for names, part in ((METRICS, "policy"), (MODEL_METRICS, "reward_model")):
        flat = [dict(flat_metrics(getattr(each, part) or {})) for each in (a, b)]
        for name in names:
            values = [
                number_of(each.get(f"{name}{end}"))
                for each in flat
                for end in ("", "_low", "_high")
            ]
            if values[0] is not None or values[3] is not None:
                label = metric_name(name)
                found.append(Metric(name, label, *values))
    return found


def _paired(
    a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]], scorer: str | None
) -> list[PairedReplies]:  # fmt: skip
    """Pair the first replies to the same prompts; those first on which b lost most."""
    first = {_key(r.row): r.row for r in reversed(all_replies(a)) if r.sample == 1}
    found: list[PairedReplies] = []
    for row in (r.row for r in all_replies(b) if r.sample == 1):
        other = first.get(_key(row))
        if other is None:
            continue
        scores = {
            name: (number_of(other.get(f"{name}_after")), number_of(row.get(f"{name}_after")))
            for name in SCORERS
        }
        before, after = scores[scorer] if scorer else (None, None)
        found.append(
            PairedReplies(
                row["prompt"], row.get("group"), str(other["after"]), str(row["after"]),
                {name: pair for name, pair in scores.items() if pair != (None, None)},
                None if before is None or after is None else after - before,
            )
        )  # fmt: skip
    return sorted(found, key=lambda r: math.inf if r.difference is None else r.difference)


def _gain(replies: Sequence[PairedReplies], scorer: str) -> Gain | None:
    known = [
        (r.difference, _key({"prompt": r.prompt})) for r in replies if r.difference is not None
    ]
    if not known:
        return None
    estimate = mean_of([value for value, _ in known], [key for _, key in known])
    low, high = (x if math.isfinite(x) else None for x in (estimate.low, estimate.high))
    return Gain(scorer, estimate.value, low, high, estimate.clusters)


def _key(row: Mapping[str, Any]) -> str:
    return json.dumps(row["prompt"], sort_keys=True)


def _card(each: PairedReplies) -> Card:
    sides = (("a", each.a, 0), ("b", each.b, 1))
    return Card(
        text_of(each.prompt),
        each.group,
        tuple(
            Reply(
                label, text,
                tuple((n, x) for n, pair in each.scores.items() if (x := pair[i]) is not None),
                is_marked=label == "b",
            )
            for label, text, i in sides
        ),
    )  # fmt: skip


def _signed(value: float) -> str:
    return f"+{number(value)}" if value > 0 else number(value)
