"""The reward model's evaluation as charts, figures and a table of probes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from rlhf.report.charts import IntervalChart, interval_chart
from rlhf.report.text import (
    number,
    number_of,
    percent,
    percent_range,
    text_of,
    words,
)
from rlhf.report.trust_charts import Margins, Reliability, margins_of, reliability_of

MAX_SLICES, MAX_PROBES, MAX_NOTES = 15, 20, 12
#: Distance from 1 up to which a fitted temperature calls for no remark.
SURE = 0.1
#: What a probe does to a good reply.
PROBES = {
    "filler": "A sentence of filler is added",
    "repeated_sentence": "A sentence is repeated",
    "truncated": "The end is cut off",
    "flattery": "Flattery is added",
    "bullets": "Sentences become bullet points",
    "other_prompt": "A good reply to another prompt",
}


class Figure(NamedTuple):
    """One figure, with a note on how to read it."""

    label: str
    value: str
    note: str = ""


class Probe(NamedTuple):
    """Change of the score when a reply is made worse in one way."""

    name: str
    share: str
    spread: str
    width: float
    """Share of the rising scores, in per cent."""
    change: str
    n: str
    css: str
    reading: str
    example: tuple[tuple[str, str, str], ...]
    """Triples of heading, text and score."""


@dataclass(frozen=True)
class RewardModelView:
    """Parts of a reward model's evaluation that were measured."""

    accuracy: IntervalChart | None = None
    slices: IntervalChart | None = None
    more_slices: int = 0
    worst: str = ""
    """Sentence on the worst slice."""
    has_ceiling: bool = False
    reliability: Reliability | None = None
    margins: Margins | None = None
    figures: tuple[Figure, ...] = ()
    probes: tuple[Probe, ...] = ()
    notes: tuple[str, ...] = ()
    """Why a figure is missing."""


def reward_model_view(model: Mapping[str, Any] | None) -> RewardModelView:
    """Lay out a reward model's evaluation; what is missing or of a wrong type is left out."""
    if not model:
        return RewardModelView()
    slices = {str(k): _mapping(v) for k, v in _mapping(model.get("by_slice")).items()}
    notes = model.get("notes")
    probes = [*_mapping(model.get("probes")).items()][:MAX_PROBES]
    return RewardModelView(
        accuracy=accuracy_chart(model, slices),
        slices=_slice_chart(model, slices),
        more_slices=max(0, len(slices) - MAX_SLICES),
        worst=_worst(model, slices),
        has_ceiling=model.get("ceiling") is not None,
        reliability=reliability_of(model.get("reliability")),
        margins=margins_of(model.get("margins")),
        figures=_figures(model),
        probes=tuple(_probe(str(name), _mapping(probe)) for name, probe in probes),
        notes=tuple(map(str, notes[:MAX_NOTES])) if isinstance(notes, list) else (),
    )


def reward_model_lines(model: Mapping[str, Any] | None) -> list[str]:
    """Return the figures that tell most of a reward model's evaluation, in at most two lines."""
    if not model or number_of(model.get("accuracy")) is None:
        return []
    pairs = number_of(model.get("n"))
    first = [
        f"accuracy {_with_interval(model, 'accuracy')}"
        + (f" on {number(int(pairs))} pairs" if pairs is not None else "")
    ]
    for label, key in (
        ("choose the longer reply", "baseline_longer"),
        ("where length is no help", "length_controlled_accuracy"),
    ):
        if number_of(model.get(key)) is not None:
            first.append(f"{label} {_with_interval(model, key)}")
    second: list[str] = []
    worst, name = _mapping(model.get("worst")), str(model.get("worst_slice"))
    if number_of(worst.get("accuracy")) is not None:
        second.append(f"worst slice {slice_name(name)} {_with_interval(worst, 'accuracy')}")
    if number_of(model.get("ece")) is not None:
        second.append(f"calibration error (ECE) {percent(model['ece'])}")
    probes = {str(k): _mapping(v) for k, v in _mapping(model.get("probes")).items()}
    rises = {k: x for k, v in probes.items() if (x := number_of(v.get("rises"))) is not None}
    if rises:
        worst_probe = max(rises, key=lambda probe: rises[probe])
        does = PROBES.get(worst_probe, words(worst_probe))
        spread = _with_interval(probes[worst_probe], "rises")
        second.append(f'worst probe "{does[:1].lower()}{does[1:]}": the score rises in {spread}')
    parts = ("; ".join(part).replace("\u00a0", " ") for part in (first, second) if part)
    return [*parts]


def accuracy_chart(
    model: Mapping[str, Any], slices: Mapping[str, Mapping[str, Any]]
) -> IntervalChart | None:
    """Chart the accuracy beside its baselines; groups that are slices too stand with those."""
    groups = _mapping(model.get("by_group"))
    estimates = [
        ("Reward model", "main", model, "accuracy"),
        ("– where length is no help", "part", model, "length_controlled_accuracy"),
        ("Choose the longer reply", "baseline", model, "baseline_longer"),
        ("Choose by format", "baseline", model, "baseline_format"),
        *((str(name), "group", _mapping(groups[name]), "accuracy")
          for name in sorted(groups, key=str) if not slices),
    ]  # fmt: skip
    lines = [("coin", "coin", 0.5), ("ceiling", "ceiling", model.get("ceiling"))]
    return interval_chart(estimates, lines)


def _slice_chart(
    model: Mapping[str, Any], slices: Mapping[str, Mapping[str, Any]]
) -> IntervalChart | None:
    """Chart the accuracy by slice, the lowest first."""
    known = {k: x for k, v in slices.items() if (x := number_of(v.get("accuracy"))) is not None}
    worst = str(model.get("worst_slice"))
    shown = sorted(known, key=lambda name: (known[name], name))[:MAX_SLICES]
    estimates = [
        (slice_name(name), "worst" if name == worst else "group", slices[name], "accuracy")
        for name in shown
    ]
    lines = [("coin", "coin", 0.5), ("overall", "ceiling", model.get("accuracy"))]
    return interval_chart(estimates, lines, groups="")


def _worst(model: Mapping[str, Any], slices: Mapping[str, Mapping[str, Any]]) -> str:
    name = model.get("worst_slice")
    found = _mapping(model.get("worst")) or slices.get(str(name), {})
    if name is None or number_of(found.get("accuracy")) is None:
        return ""
    spread = percent_range(found.get("accuracy_low"), found.get("accuracy_high"))
    details = [f"95 % interval {spread}"] if spread else []
    if number_of(found.get("n")) is not None:
        details.append(f"n\u00a0=\u00a0{_count(found.get('n'))}")
    text = f"{slice_name(str(name))}: {percent(found['accuracy'])}"
    return text + (f" ({', '.join(details)})" if details else "")


def slice_name(name: str) -> str:
    """Return a slice's name in words; that of a group of the data stays as it is."""
    kind, colon, group = name.partition(":")
    return f"Group {group}" if kind == "group" and colon else words(name)


def _with_interval(metrics: Mapping[str, Any], key: str) -> str:
    spread = percent_range(metrics.get(f"{key}_low"), metrics.get(f"{key}_high"))
    return percent(metrics.get(key)) + (f" ({spread})" if spread else "")


def _figures(model: Mapping[str, Any]) -> tuple[Figure, ...]:
    calibrated = number_of(model.get("log_loss_calibrated"))
    after = "" if calibrated is None else f"{number(calibrated)} at the fitted temperature; "
    chance = number_of(model.get("ece_chance"))
    by_chance = "0 is perfect" if chance is None else f"by chance alone {percent(chance)}"
    longer = percent_range(model.get("prefers_longer_low"), model.get("prefers_longer_high"))
    figures = [
        Figure("Held-out pairs", _count(model.get("n"))),
        Figure("Prompts", _count(model.get("prompts"))),
        Figure("Log-loss", number(model.get("log_loss")), f"{after}a coin has 0.69"),
        Figure("Brier score", number(model.get("brier")), "a coin has 0.25"),
        Figure("Calibration error", percent(model.get("ece")), f"expected (ECE); {by_chance}"),
        Figure("Temperature", number(model.get("temperature")), _temperature(model)),
        Figure("Prefers the longer reply", percent(model.get("prefers_longer")), longer),
        Figure("Mean margin", number(model.get("margin_mean"))),
        Figure("Share of the ceiling reached", percent(model.get("share_of_ceiling"))),
    ]
    return tuple(figure for figure in figures if figure.value != number(None))


def _temperature(model: Mapping[str, Any]) -> str:
    temperature = number_of(model.get("temperature"))
    if temperature is None:
        return ""
    if abs(temperature - 1) < SURE:
        return "about 1: as sure as it is right"
    return "above 1: too sure of itself" if temperature > 1 else "below 1: too unsure"


def _probe(name: str, probe: Mapping[str, Any]) -> Probe:
    rises, low, high = (number_of(probe.get(f"rises{end}")) for end in ("", "_low", "_high"))
    css, reading = "notrun", "not clear"
    if rises is None:
        reading = "not measured"
    elif low is not None and low > 0.5:
        css, reading = "missed", "rises more often than it falls"
    elif high is not None and high < 0.5:
        css, reading = "passed", "falls more often than it rises"
    return Probe(
        name=PROBES.get(name, words(name)),
        share=percent(rises),
        spread=percent_range(low, high),
        width=round(100 * min(max(rises or 0.0, 0.0), 1.0), 1),
        change=signed(probe.get("mean_change")),
        n=_count(probe.get("n")),
        css=css,
        reading=reading,
        example=_example(_mapping(probe.get("example"))),
    )


def _example(example: Mapping[str, Any]) -> tuple[tuple[str, str, str], ...]:
    parts = (("Prompt", "prompt", ""), ("Reply", "reply", "before"), ("Probed", "probed", "after"))
    return tuple(
        (heading, text_of(example[key]),
         number(example.get(score)) if number_of(example.get(score)) is not None else "")
        for heading, key, score in parts if example.get(key) is not None
    )  # fmt: skip


def signed(value: Any) -> str:
    """Format a difference with its sign."""
    x = number_of(value)
    return ("+" if x is not None and x > 0 else "") + number(value)


def _count(value: Any) -> str:
    x = number_of(value)
    return number(None if x is None else int(x))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
