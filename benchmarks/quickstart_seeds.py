"""Figures of the quickstart by seed: `python -m benchmarks.quickstart_seeds`.

Runs the whole quickstart for each seed (`--seeds 0 1 2`) from an empty store, in a child process,
and prints a table of the promised figures beside their bars. They go into RESULTS.md by hand, good
or bad.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time

from rlhf.config import load_config
from rlhf.files import read_json
from tasks.runner import fingerprint, recorded_ref, store_of
from tasks.stages import STAGES

PRESET = "configs/quickstart.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options, overrides = parser.parse_known_args()
    results = []
    for seed in options.seeds:
        results.append(measure(seed, overrides))
        print(f"seed {seed} done in {results[-1]['seconds, whole command']:.0f} s", flush=True)
    print("\n| | " + " | ".join(f"seed {s}" for s in options.seeds) + " |")
    print("|---|" + "---|" * len(results))
    for name in results[0]:
        print(f"| {name} | " + " | ".join(f"{r[name]:.3f}" for r in results) + " |")


def measure(seed: int, overrides: list[str]) -> dict[str, float]:
    """Run one seed and return the figures of its evaluations."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            f"--seed={seed}", f"--store={folder}/store", f"--runtime.work_dir={folder}/work",
            f"--runtime.report_dir={folder}/reports", "--tracking.trackers=[]", *overrides,
        ]  # fmt: skip
        started = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "flows.cli", "run", PRESET, *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        seconds = time.monotonic() - started
        config = load_config(PRESET, arguments).config
        store, refs = store_of(config), {}
        for stage in STAGES.values():
            inputs = {role: refs[producer] for role, producer in stage.inputs.items()}
            ref = recorded_ref(store, stage, fingerprint(stage, config, inputs))
            assert ref is not None, f"{stage.name} left no record"
            refs[stage.name] = ref
        reward = read_json(store.fetch(refs["evaluate-reward-model"]) / "evaluation.json")
        policy = read_json(store.fetch(refs["evaluate-policy"]) / "evaluation.json")
    groups = {
        f"{name} {group}": part
        for group in ("seen-template", "new-template")
        for name, part in (
            ("reward", reward["by_group"][group]),
            ("sampled", policy["sampled"]["by_group"][group]),
            ("greedy", policy["greedy"]["by_group"][group]),
        )
    }
    sampled, greedy = policy["sampled"], policy["greedy"]
    return {
        "seconds, whole command": seconds,
        "reward model accuracy": reward["accuracy"],
        "ceiling": reward["ceiling"],
        "share of the way (≥ 0.60, aim 0.75)": reward["share_of_ceiling"],
        "  seen templates": groups["reward seen-template"]["share_of_ceiling"],
        "  new templates": groups["reward new-template"]["share_of_ceiling"],
        "gold before, T=1": sampled["gold_before"],
        "gold after, T=1": sampled["gold_after"],
        "strict wins on gold, T=1 (≥ 0.80)": sampled["gold_strict_win_rate"],
        "  seen templates, T=1": groups["sampled seen-template"]["gold_strict_win_rate"],
        "  new templates, T=1": groups["sampled new-template"]["gold_strict_win_rate"],
        "strict wins on gold, greedy (≥ 0.90)": greedy["gold_strict_win_rate"],
        "  seen templates, greedy": groups["greedy seen-template"]["gold_strict_win_rate"],
        "  new templates, greedy": groups["greedy new-template"]["gold_strict_win_rate"],
        "KL per reply in nats, T=1 (≤ 8)": sampled["kl"],
        "ended by EOS, T=1 (≥ 0.97)": sampled["eos_rate"],
        "tokens before → after, before": sampled["tokens_before"],
        "tokens before → after, after": sampled["tokens_after"],
    }


if __name__ == "__main__":
    main()
