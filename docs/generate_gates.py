"""Generator of the pictures in docs/gates: `python -m docs.generate_gates`.

A picture for each default rule of the gates, computed from the defaults themselves and from the
formulas by which the gates decide. Measured points are of benchmarks/RESULTS.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from docs.charts import COLOURS, Axis, Chart, Line, Mark, Point, render
from rlhf.config import GateRule, GatesConfig, PipelineConfig
from rlhf.config.gates import ChampionGateConfig
from rlhf.gate_sizes import spread_of
from rlhf.inference import power_of_share, share_bound

FOLDER = Path(__file__).parent / "gates"
CONFIG = PipelineConfig()
PROMPTS = CONFIG.evaluation.prompts
SAMPLES = CONFIG.evaluation.samples_per_prompt
PAIRS = CONFIG.data.world.eval_pairs
#: One-sided confidence of the ends of the evaluations' intervals.
USUAL = 0.975
#: Replies of a probe (`rlhf.evaluation.probes.REPLIES`, whose module loads torch).
PROBED = 200
#: Quickstart of 28 November 2026, seed 0.
ACCURACY, OTHER_PROMPT, KL, EOS = 0.813, 0.12, 5.0, 1.0
#: Win rates by reward model and judge of policies in benchmarks/RESULTS.md.
MEASURED = (
    ("quickstart", 0.963, 0.969), ("with a sixth of PPO's episodes", 0.703, 0.729),
    ("the latter against the former", 0.104, 0.100),
)  # fmt: skip
NORMAL = (
    "Computed by rlhf/inference.py (power_of_share), with the spread of prompts that is assumed "
    "before it is measured (rlhf/gate_sizes.py)."
)


def main() -> None:
    """Write all pictures."""
    FOLDER.mkdir(exist_ok=True)
    for name, chart in PICTURES.values():
        (FOLDER / name).write_text(render(chart()), encoding="utf-8")


def rule(gate: str, metric: str) -> GateRule:
    """Return a default rule by its gate and metric."""
    rules = getattr(GatesConfig(), gate) or ()
    return next(rule for rule in rules if rule.metric == metric)


def champion() -> ChampionGateConfig:
    """Return the default settings of the comparison with the champion."""
    settings = GatesConfig().champion
    assert settings is not None
    return settings


def accuracy() -> Chart:
    """Return how accurate a reward model has to be, by the number of held-out pairs."""
    bound = number(rule("reward_model", "accuracy").min)
    sizes = [*range(10, 50, 2), *range(50, 200, 10), *range(200, 2001, 50)]
    least = [(n, needed(n, bound)) for n in sizes]
    return Chart(
        f"accuracy: its lower end ≥ {bound:g}",
        "Computed: Wilson's bound and the binomial distribution, a pair a prompt. A coin passes in "
        f"about {pct(1 - USUAL)} of cases, whatever the number of pairs.",
        log_axis("held-out pairs", 10, 2000, (10, 30, 100, 300, 1000, 2000)),
        shares("accuracy", 0.5, 1.0),
        (
            Line("measured accuracy that passes", [(n, k / n) for n, k in least], COLOURS[0]),
            Line("true accuracy that passes in 90 % of cases",
                 [(n, passing(n, k, 0.9)) for n, k in least], COLOURS[1], "7 4"),
        ),
        (Mark("quickstart, measured", PAIRS, ACCURACY),),
    )  # fmt: skip


def length_controlled() -> Chart:
    """Return what both accuracies say of a model that counts tokens, by the data's bias."""
    bound = number(rule("reward_model", "length_controlled_accuracy").min)
    ends = (0.5, 0.95)
    return Chart(
        f"length_controlled_accuracy: its lower end ≥ {bound:g}",
        "Computed: a model that prefers the longer reply is right wherever that is preferred. The "
        "mean of the accuracies where the longer and where the shorter one is preferred is ½ for "
        "it, and for a model to which length is nothing it is its accuracy.",
        shares("share of pairs whose preferred reply is the longer one", *ends),
        shares("what is measured", 0.4, 1.0),
        (
            Line("counts tokens: accuracy", [(x, x) for x in ends], COLOURS[1], "2 3"),
            Line("counts tokens: length-controlled accuracy", [(x, 0.5) for x in ends], COLOURS[1]),
            Line("right in 75 %, whatever the length: both", [(x, 0.75) for x in ends], COLOURS[0]),
        ),
    )  # fmt: skip


def other_prompt() -> Chart:
    """Return how often the probe approves a model, by how often its score truly rises."""
    bound = number(rule("reward_model", "probes.other_prompt.rises").max)

    def curve(replies: float) -> list[Point]:
        n = int(replies)
        most = max(k for k in range(n + 1) if share_bound(k / n, n, n, USUAL)[1] <= bound)
        return [(p, at_most(most, n, p)) for p in steps(0.0, 0.6)]

    return Chart(
        f"probes.other_prompt.rises: its upper end ≤ {bound:g}",
        "Computed: Wilson's bound and the binomial distribution. A model that does not read the "
        f"prompt is at {bound:g}.",
        shares("true share of good replies to another prompt that score higher", 0.0, 0.6),
        shares("probability that it passes", 0.0, 1.0),
        family("{} replies", (PROBED, 50, 25), curve),
        (
            Mark("blind to the prompt", bound),
            Mark(
                f"quickstart, measured: {pct(OTHER_PROMPT)}", OTHER_PROMPT, place="start",
                is_low=True,
            ),
        ),
    )  # fmt: skip


def win_rate() -> Chart:
    """Return how often a policy is found better than SFT, by its true win rate."""
    bound = number(rule("policy", "sampled.win_rate").min)
    spread = spread_of(SAMPLES)

    def curve(n: float) -> list[Point]:
        return [(p, power_of_share(p, bound, int(n), spread, USUAL)) for p in steps(0.45, 0.75)]

    return Chart(
        f"sampled.win_rate: its lower end ≥ {bound:g}",
        f"{NORMAL} {SAMPLES} samples a prompt. A policy as good as SFT passes in {pct(1 - USUAL)} "
        "of cases.",
        shares("true win rate over the SFT policy", 0.45, 0.75),
        shares("probability that it passes", 0.0, 1.0),
        family("{} prompts", (PROMPTS, 100, 50), curve),
        (Mark("as good as SFT", bound),),
    )  # fmt: skip


def judge_win_rate() -> Chart:
    """Return which win rates by both scorers pass together."""
    spread = spread_of(SAMPLES)
    size = PROMPTS * 0.25 / spread**2
    least = next(p for p in steps(0.5, 0.7) if share_bound(p, size, PROMPTS, USUAL)[0] >= 0.5)
    return Chart(
        "sampled.judge_win_rate: its lower end ≥ 0.5, as that of win_rate",
        f"Shaded: both lower ends reach ½ on {PROMPTS} prompts × {SAMPLES} samples (computed, from "
        f"{pct(least)} on). Bottom right: the reward model is pleased and the judge is not. "
        "Points: benchmarks/RESULTS.md.",
        shares("win rate by the reward model", 0.0, 1.0),
        shares("win rate by the judge", 0.0, 1.0),
        (),
        (
            Mark("over-optimised", 0.88, 0.2, is_text=True),
            *(Mark(label, x, y, "start" if x < 0.5 else "end") for label, x, y in MEASURED),
        ),
        areas=((((least, least), (1, least), (1, 1), (least, 1)), "#dff1ea"),),
    )


def kl() -> Chart:
    """Return how seldom the SFT policy writes a reply of the policy, by the KL."""
    bound = number(rule("policy", "sampled.kl").max)
    ticks = ((1, "1"), (1e3, "10³"), (1e6, "10⁶"), (1e9, "10⁹"), (1e12, "10¹²"))
    return Chart(
        f"sampled.kl ≤ {bound:g}",
        "Computed: KL is the mean of log π − log π_SFT over the policy's replies, so that a "
        "typical one is as many times rarer among the SFT policy's as exp(KL) says: "
        f"{math.exp(bound) / 1e6:,.0f} million at {bound:g} nats. Of replies so far from its data "
        "the reward model knows little.",
        Axis("KL in nats a reply", 0, 30, [(x, f"{x}") for x in range(0, 31, 5)]),
        Axis("how many times rarer under SFT", 1, 1e13, ticks, is_log=True),
        (Line("exp(KL)", [(x, math.exp(x)) for x in (0, 29.9)], COLOURS[0]),),
        (Mark(f"gate: {bound:g}", bound), Mark("quickstart, measured", KL, math.exp(KL), "start")),
        bands=((3, 10, "policies learn here"),),
    )


def eos_rate() -> Chart:
    """Return how often a policy passes, by the true share of replies that end."""
    bound = number(rule("policy", "sampled.eos_rate").min)

    def curve(prompts: float) -> list[Point]:
        n = int(prompts) * SAMPLES
        most = math.ceil(bound * n - 1e-9) - 1
        return [(p, 1 - at_most(most, n, p)) for p in steps(0.7, 0.9)]

    return Chart(
        f"sampled.eos_rate ≥ {bound:g}",
        f"Computed: binomial distribution, {SAMPLES} samples a prompt as if independent. The rule "
        "is on the estimate, which is within some 2 points of the truth: nobody wants a policy "
        f"near it. Quickstart, measured: {pct(EOS)}.",
        shares("true share of replies that end", 0.7, 0.9),
        shares("probability that it passes", 0.0, 1.0),
        family("{} prompts", (PROMPTS, 100, 50), curve),
        (Mark(f"gate: {bound:g}", bound),),
    )  # fmt: skip


def superiority() -> Chart:
    """Return the power against the champion, by the number of gate prompts."""
    confidence, spread = champion().look_confidence, spread_of(SAMPLES)
    sizes = [round(20 * 1.1**i) for i in range(43)]

    def curve(true: float) -> list[Point]:
        return [(n, power_of_share(true, 0.5, n, spread, confidence)) for n in sizes]

    return Chart(
        f"Better than the champion: lower end ≥ 0.5 at {pct(confidence)}",
        f"{NORMAL} {SAMPLES} samples a prompt. A policy as good as the champion passes in "
        f"{pct(1 - confidence)} of cases.",
        log_axis("gate prompts", 20, 1100, (20, 50, 100, 200, 300, 500, 1000)),
        shares("probability that it is found better", 0.0, 1.0),
        family("true win rate {}", (0.65, 0.6, 0.55), curve, pct),
        (Mark(f"default: {PROMPTS}", PROMPTS, place="start", is_low=True), Mark("80 %", None, 0.8)),
    )  # fmt: skip


def looks() -> Chart:
    """Return the chance of any false promotion, by the number of looks."""
    settings = champion()
    error = 1 - settings.confidence

    def curve(each: float) -> list[Point]:
        return [(n, 1 - (1 - each) ** n) for n in range(1, 21)]

    return Chart(
        f"{settings.looks} looks at the same prompts share {pct(error)}",
        "Computed for policies that are all as good as the champion, and independent of each "
        f"other; by Bonferroni's inequality {settings.looks} looks stay at or below {pct(error)} "
        "whatever the dependence.",
        Axis("policies that are compared on the same prompts", 1, 20,
             [(n, f"{n}") for n in (1, 5, 10, 15, 20)]),
        shares("some false promotion among them", 0.0, 0.7),
        (
            Line(f"each at {pct(settings.confidence)}", curve(error), COLOURS[1], "7 4"),
            Line(f"each at {pct(settings.look_confidence)}", curve(error / settings.looks),
                 COLOURS[0]),
        ),
        (Mark(f"last look: {settings.looks}", settings.looks), Mark(f"{pct(error)}", None, error)),
    )  # fmt: skip


def margin() -> Chart:
    """Return how often a policy is rejected for a slice, by its size and the true win rate."""
    settings = champion()
    spread, confidence = spread_of(SAMPLES), settings.confidence
    sizes = [round(10 * 1.1**i) for i in range(37)]

    def rejected(true: float, distance: float) -> list[Point]:
        return [(n, 1 - power_of_share(true, 0.5 - distance, n, spread, confidence)) for n in sizes]

    narrow = settings.margin / 2
    return Chart(
        f"No slice gets worse: lower end ≥ {0.5 - settings.margin:g} at {pct(confidence)}",
        f"{NORMAL} {SAMPLES} samples a prompt. A policy that is worse there by the margin passes "
        f"in {pct(1 - confidence)} of cases. Smaller slices than slice_n are shown and not judged.",
        log_axis("prompts in the slice", 10, 310, (10, 20, 30, 50, 100, 200, 300)),
        shares("probability that it is rejected for it", 0.0, 1.0),
        [
            *family(
                f"true win rate {{}} there, margin {settings.margin:g}", (0.6, 0.55, 0.5),
                lambda true: rejected(true, settings.margin), pct,
            ),
            Line(f"{pct(0.5)}, margin {narrow:g}", rejected(0.5, narrow), COLOURS[3], "12 3"),
        ],
        (Mark(f"slice_n: {settings.slice_n}", settings.slice_n),),
    )  # fmt: skip


#: File and chart of each default rule, by gate and metric or field.
PICTURES: dict[tuple[str, str], tuple[str, Callable[[], Chart]]] = {
    ("reward_model", "accuracy"): ("accuracy.svg", accuracy),
    ("reward_model", "length_controlled_accuracy"): ("length.svg", length_controlled),
    ("reward_model", "probes.other_prompt.rises"): ("other_prompt.svg", other_prompt),
    ("policy", "sampled.win_rate"): ("win_rate.svg", win_rate),
    ("policy", "sampled.judge_win_rate"): ("judge_win_rate.svg", judge_win_rate),
    ("policy", "sampled.kl"): ("kl.svg", kl),
    ("policy", "sampled.eos_rate"): ("eos_rate.svg", eos_rate),
    ("champion", "confidence"): ("superiority.svg", superiority),
    ("champion", "looks"): ("looks.svg", looks),
    ("champion", "margin"): ("margin.svg", margin),
    ("champion", "slice_n"): ("margin.svg", margin),
}


def number(bound: float | str | None) -> float:
    """Return a bound that is a number.

    Raises:
        TypeError: The default has become another metric, and its picture is wrong.
    """
    if not isinstance(bound, int | float):
        raise TypeError(f"{bound!r} is no number; draw another picture")
    return float(bound)


def needed(n: int, bound: float) -> int:
    """Return the fewest right pairs of n whose lower end reaches a bound; n if none does."""
    return next((k for k in range(n) if share_bound(k / n, n, n, USUAL)[0] >= bound), n)


def passing(n: int, least: int, power: float) -> float:
    """Return the true share of which at least so many of n are right with a probability."""
    low, high = 0.0, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if 1 - at_most(least - 1, n, middle) >= power else (middle, high)
    return high


def at_most(most: int, n: int, p: float) -> float:
    """Return the probability of at most so many successes in n."""
    from scipy import stats

    return float(stats.binom.cdf(most, n, p))


def pct(share: float) -> str:
    """Return a share in per cent."""
    return f"{100 * share:.3g} %"


def family(
    label: str, values: Sequence[float], curve: Callable[[float], list[Point]],
    form: Callable[[float], str] = str,
) -> list[Line]:  # fmt: skip
    """Return a curve for each value, the first one drawn through."""
    styles = zip(values, COLOURS, ("", "7 4", "2 3"), strict=False)
    return [
        Line(label.format(form(value)), curve(value), colour, dash)
        for value, colour, dash in styles
    ]


def steps(low: float, high: float, count: int = 120) -> Iterator[float]:
    """Yield evenly spaced numbers, both ends included."""
    yield from (low + (high - low) * i / count for i in range(count + 1))


def shares(label: str, low: float, high: float) -> Axis:
    """Return an axis of percentages."""
    step = 0.05 if high - low <= 0.45 else 0.1 if high - low <= 0.8 else 0.2
    marks = [round(i * step, 2) for i in range(21) if low - 1e-9 <= i * step <= high + 1e-9]
    return Axis(label, low, high, [(x, f"{100 * x:g} %") for x in marks])


def log_axis(label: str, low: float, high: float, marks: tuple[int, ...]) -> Axis:
    """Return a logarithmic axis of counts."""
    return Axis(label, low, high, [(x, f"{x:,}") for x in marks], is_log=True)


if __name__ == "__main__":
    main()
