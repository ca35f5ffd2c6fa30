"""Plot of gold, training reward and judge against √KL, as Gao et al. 2022 draw them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: Colour and name of each curve.
CURVES = {
    "gold": ("#0b6e4f", "gold: the truth"),
    "proxy": ("#c1440e", "training reward"),
    "judge": ("#2b5c8a", "judge, on the watchdog's prompts"),
}


def gains(points: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Return a curve as its change since the start, in deviations of the start's scores."""
    start = points[0]
    deviation = start["deviations"][name] or 1.0
    return [(point[name] - start[name]) / deviation for point in points]


def plot_runs(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw a panel for each run, with its stop and the policy that goes on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(runs), figsize=(3.4 * len(runs) + 0.8, 3.6), sharey=True, squeeze=False
    )
    for seed, (run, axis) in enumerate(zip(runs, axes[0], strict=True)):
        points = run["points"]
        root = [math.sqrt(max(point["kl"], 0.0)) for point in points]
        at = {point["update"]: x for point, x in zip(points, root, strict=True)}
        for name, (colour, label) in CURVES.items():
            axis.plot(root, gains(points, name), "o-", ms=3, color=colour, label=label)
        axis.axvline(at[run["chosen"]], color="#333", lw=1, label="goes on")
        if run["stopped"]:
            stop = at[run["stopped"]["update"]]
            axis.axvline(stop, color="#333", lw=1, ls=":", label="the watchdog stops")
        goes_on, end = (f"{run[name]:.2f}" for name in ("gold_chosen", "gold_end"))
        axis.set_title(f"seed {seed}: gold {goes_on} goes on, at the end {end}", fontsize=8.5)
        axis.set_xlabel("√KL to the SFT policy (√nats)")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("gain, in deviations at the start")
    # Not every run is stopped: a line of the legend may be in a later panel alone.
    lines = {
        label: handle
        for axis in axes[0]
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    columns = min(len(lines), 2 * len(runs))
    rows = math.ceil(len(lines) / columns)
    figure.legend(lines.values(), lines, loc="upper center", ncol=columns, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.08 * rows))
    figure.savefig(path, dpi=110)
    plt.close(figure)
