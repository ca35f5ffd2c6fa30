"""Report of `benchmarks.learning`: gold against KL, paired by seed, and the plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

Curve = list[dict[str, float]]
Runs = Mapping[tuple[str, int], Mapping[str, Any]]
GRID = 200
COLOURS = {"ours": "#0b6e4f", "trl": "#c1440e"}
LABELS = {"ours": "rlhf-pipeline", "trl": "TRL 1.12"}


def compare(runs: Runs, seeds: Sequence[int], margin: float) -> dict[str, Any]:
    """Return differences ours − TRL's, paired by seed, with intervals and verdicts."""
    paired = [s for s in seeds if ("ours", s) in runs and ("trl", s) in runs]
    rows = [measures(runs["ours", s]["curve"], runs["trl", s]["curve"]) for s in paired]
    result: dict[str, Any] = {"seeds": paired, "margin": margin, "measures": {}}
    for name in rows[0] if rows else ():
        ours, theirs = ([row[name][side] for row in rows] for side in (0, 1))
        differences = [a - b for a, b in zip(ours, theirs, strict=True)]
        low, high = interval(differences)
        result["measures"][name] = {
            "ours": ours, "trl": theirs, "difference": float(np.mean(differences)),
            "low": low if math.isfinite(low) else None,
            "high": high if math.isfinite(high) else None,
            "verdict": verdict(low, high, margin) if name.startswith("gold") else None,
        }  # fmt: skip
    main = result["measures"].get("gold_kl_area")
    result["verdict"] = main["verdict"] if main else "undecided"
    result["seconds"] = {
        side: [runs[side, s]["seconds"] for s in paired] for side in ("ours", "trl")
    }
    return result


def measures(ours: Curve, theirs: Curve) -> dict[str, tuple[float, float]]:
    """Return six measures of both sides for one seed.

    `gold_kl_area` and `gold_at_kl` go up to the KL that both runs reached, the first being the mean
    of the frontier from 0 to there. `gold_updates_area` is the mean over the budget of rollouts.
    """
    limit = min(max(p["kl"] for p in curve) for curve in (ours, theirs))
    kl = np.linspace(0.0, limit, GRID)
    fronts = [frontier(curve, kl) for curve in (ours, theirs)]
    areas = []
    for curve in (ours, theirs):
        updates, gold = [p["update"] for p in curve], [p["gold"] for p in curve]
        areas.append(float(np.trapezoid(gold, updates)) / (updates[-1] - updates[0]))
    return {
        "gold_kl_area": (float(fronts[0].mean()), float(fronts[1].mean())),
        "gold_at_kl": (float(fronts[0][-1]), float(fronts[1][-1])),
        "gold_updates_area": (areas[0], areas[1]),
        "gold_at_end": (ours[-1]["gold"], theirs[-1]["gold"]),
        "kl_at_end": (ours[-1]["kl"], theirs[-1]["kl"]),
        "matched_kl": (limit, limit),
    }


def frontier(curve: Curve, kl: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the best gold reached with at most this KL, linear between points.

    A run's KL may go back and forth, so gold is no function of KL; this frontier is, and it never
    falls.
    """
    points: list[tuple[float, float]] = []
    for point in sorted(curve, key=lambda p: p["kl"]):
        if not points or point["gold"] > points[-1][1]:
            points.append((max(point["kl"], 0.0), point["gold"]))
    return np.interp(kl, [k for k, _ in points], [g for _, g in points])


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % t interval of the mean; infinite for one value."""
    n = len(values)
    if n < 2:
        return -math.inf, math.inf
    half = float(student.ppf(0.975, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    mean = float(np.mean(values))
    return mean - half, mean + half


def verdict(low: float, high: float, margin: float) -> str:
    """Judge a confidence interval against the margin.

    No worse if the whole interval is above −margin, worse if it is below, else undecided.
    """
    if low >= -margin:
        return "better" if low > 0 else "no worse"
    return "worse" if high < -margin else "undecided"


def table(result: Mapping[str, Any]) -> None:
    """Print the comparison as Markdown."""
    print(f"\n{len(result['seeds'])} seeds, margin {result['margin']} gold points\n")
    print("| mean over seeds | ours | TRL | difference, 95 % | verdict |\n|---|---|---|---|---|")
    for name, row in result["measures"].items():
        span = "" if row["low"] is None else f" [{row['low']:+.2f}, {row['high']:+.2f}]"
        print(
            f"| {name} | {np.mean(row['ours']):.2f} | {np.mean(row['trl']):.2f} | "
            f"{row['difference']:+.2f}{span} | {row['verdict'] or ''} |"
        )
    for side, seconds in result["seconds"].items():
        if seconds:
            print(f"{LABELS[side]}: {np.mean(seconds):.0f} s of training a run")
    print(f"\nVerdict: our gold-KL curve is **{result['verdict']}** (area under gold-KL, by seed)")


def draw(runs: Runs, path: Path) -> None:
    """Plot gold against KL and against rollouts.

    Every run is drawn thin, mean and 95 % interval bold.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, constrained_layout=True)
    for side, colour in COLOURS.items():
        curves: list[Curve] = [run["curve"] for (s, _), run in runs.items() if s == side]
        if not curves:
            continue
        limit = min(max(p["kl"] for p in curve) for curve in curves)
        kl = np.linspace(0, limit, GRID)
        rollouts = np.array([p["rollouts"] for p in curves[0]])
        _band(axes[0], kl, np.array([frontier(c, kl) for c in curves]), colour, LABELS[side])
        _band(axes[1], rollouts, np.array([[p["gold"] for p in c] for c in curves]), colour, None)
        for curve in curves:
            axes[0].plot(
                [p["kl"] for p in curve], [p["gold"] for p in curve], ".", color=colour, alpha=0.3
            )
    axes[0].set(
        xlabel="KL to the SFT policy, nats per reply", ylabel="gold score, held-out prompts"
    )
    axes[1].set(xlabel="rollouts")
    axes[0].legend(frameon=False)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _band(
    axis: Any, x: NDArray[np.float64], rows: NDArray[np.float64], colour: str, label: str | None
) -> None:
    axis.plot(x, rows.mean(0), color=colour, label=label, linewidth=2)
    if len(rows) > 1:
        half = student.ppf(0.975, len(rows) - 1) * rows.std(0, ddof=1) / math.sqrt(len(rows))
        axis.fill_between(x, rows.mean(0) - half, rows.mean(0) + half, color=colour, alpha=0.15)
