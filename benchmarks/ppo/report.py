"""Report of `benchmarks.ppo`: seconds, ratios, tokens/s, memory, share of peak."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.machine import needed_gflops
from benchmarks.ppo.process import PHASES, Update
from benchmarks.ppo.workload import Size

ROWS = (*PHASES, "total")


def summary(
    size: Size, updates: Sequence[Mapping[str, Update]], peak_rate: float
) -> dict[str, Any]:
    """Return seconds, ratios (TRL's over ours), tokens/s and share of the matmul peak."""
    result: dict[str, Any] = {"ratio": {}, "ratio_of_minima": {}, "ratio_cpu": {}}
    shapes = [
        ([len(p) for p in u["trl"].prompts], [len(r) for r in u["trl"].replies]) for u in updates
    ]
    tokens = median(sum(replies) for _, replies in shapes)
    needed = _with_total({n: median(needed_gflops(size, *s)[n] for s in shapes) for n in PHASES})
    for side in ("ours", "trl"):
        wall = [_with_total(u[side].wall) for u in updates]
        cpu = [_with_total(u[side].cpu) for u in updates]
        result[side] = {
            row: {
                "median": (seconds := median(u[row] for u in wall)),
                "min": min(u[row] for u in wall),
                "cpu": median(u[row] for u in cpu),
                "reply_tokens_per_second": tokens / seconds,
                "gflops_per_second": needed[row] / seconds,
                "share_of_peak": needed[row] / seconds / peak_rate,
            }
            for row in ROWS
        }
    for row in ROWS:
        ours, theirs = result["ours"][row], result["trl"][row]
        result["ratio"][row] = theirs["median"] / ours["median"]
        result["ratio_of_minima"][row] = theirs["min"] / ours["min"]
        result["ratio_cpu"][row] = theirs["cpu"] / ours["cpu"]
    lengths = [n for _, replies in shapes for n in replies]
    return {
        **result,
        "needed_gflops": needed,
        "updates": len(updates),
        "reply_tokens_per_update": tokens,
        "mean_reply": sum(lengths) / len(lengths),
    }


def _with_total(seconds: Mapping[str, float]) -> dict[str, float]:
    return {**seconds, "total": sum(seconds.values())}


def table(result: Mapping[str, Any]) -> None:
    """Print the report as Markdown."""
    settings = result["settings"]
    work, size = settings["workload"], settings["workload"]["size"]
    print(
        f"\n{size['parameters'] / 1e6:.1f} M parameters, batch {size['batch']}, up to "
        f"{size['new_tokens']} new tokens (mean {result['mean_reply']:.1f}), {size['epochs']} "
        f"epochs, {work['mode']}, {work['lengths']} lengths, lora {work['lora']}, "
        f"{settings['threads']} threads, medium matmul: {settings['matmul']}, memory kept: "
        f"{settings['memory']}, "
        f"{result['updates']} updates timed\n"
    )
    print(
        "| seconds per update | TRL median | min | ours median | min | ratio | of minima | "
        "of CPU time | tokens/s TRL → ours | of matmul peak TRL → ours |"
    )
    print("|---" * 10 + "|")
    for row in ROWS:
        theirs, ours = result["trl"][row], result["ours"][row]
        print(
            f"| {row} | {theirs['median']:.3f} | {theirs['min']:.3f} | {ours['median']:.3f} | "
            f"{ours['min']:.3f} | **{result['ratio'][row]:.2f}** | "
            f"{result['ratio_of_minima'][row]:.2f} | {result['ratio_cpu'][row]:.2f} | "
            f"{theirs['reply_tokens_per_second']:.0f} → {ours['reply_tokens_per_second']:.0f} | "
            f"{theirs['share_of_peak']:.2f} → {ours['share_of_peak']:.2f} |"
        )
    print("\n| matmul, GF/s | body | head | decode | 1024³ | error against float64 |")
    print("|---" * 6 + "|")
    for setting in ("highest", "medium"):
        row = result["matmul"][setting]
        rates = " | ".join(f"{row[n]:.0f}" for n in ("body", "head", "decode", "square"))
        print(f"| {setting} | {rates} | {row['error']:.1e} |")
    if result["memory"]:
        ratio = result["memory_ratio"]
        sides = ", ".join(
            f"{side} {m['peak']:.0f} MiB ({m['imports']:.0f} after imports)"
            for side, m in result["memory"].items()
        )
        print(f"\npeak memory: {sides}; ratio {ratio['peak']:.2f}, above imports "
              f"{ratio['above_imports']:.2f}")  # fmt: skip
    if result["differences"]:
        verdict = "agree" if result["agree"] else "DO NOT AGREE"
        print(f"the two sides {verdict}; largest differences: {listed(result['differences'])}")


def listed(values: Mapping[str, float]) -> str:
    """Return names and numbers in one line."""
    return ", ".join(f"{name} {value:.2g}" for name, value in values.items())


def memory_ratio(memory: Mapping[str, Mapping[str, float]]) -> dict[str, float] | None:
    """Return TRL's peak over ours: of the process, and above the imports."""
    if not memory:
        return None
    ours, theirs = memory["ours"], memory["trl"]
    above = [m["peak"] - m["imports"] for m in (theirs, ours)]
    return {"peak": theirs["peak"] / ours["peak"], "above_imports": above[0] / above[1]}


def worst(differences: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the largest difference of every quantity over all updates."""
    names = {name for row in differences for name in row}
    return {name: max(row.get(name, 0.0) for row in differences) for name in sorted(names)}


def agree(differences: Sequence[Mapping[str, float]], tolerance: float) -> bool:
    """Return whether tokens are equal and the rest within rounding in every update."""
    return all(
        difference <= (0 if name == "tokens" else tolerance)
        for row in differences
        for name, difference in row.items()
    )


def peak_mib() -> float:
    """Return this process's peak resident memory so far, in MiB."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def log(line: str) -> None:
    """Print progress to standard error: standard output may be JSON."""
    print(line, file=sys.stderr, flush=True)
