"""Figures of `benchmarks.pretrained`: what a run made, judged by gold, as tables and samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from benchmarks.pretrained.rubric import BEST, WEIGHTS, gold, preference, virtues
from rlhf.config import PipelineConfig
from rlhf.data.rows import PAIRS_EVAL, Pair, messages_of, read_rows
from rlhf.evaluation import EVALUATION, SAMPLES
from rlhf.files import read_json
from rlhf.statistics import share
from rlhf.store import Store
from tasks.stage import store_of

#: Samples printed per seed.
SHOWN = 10


def made(place: Path) -> dict[str, Any]:
    """Return evaluations, samples, held-out pairs and times of the artifacts of a run's store."""
    store = store_of(PipelineConfig(store=str(place)))
    artifacts = sorted(store.list(), key=lambda each: -each.age)
    stages = [each.manifest.producer.stage for each in artifacts]
    refs = {stage: each.ref for stage, each in zip(stages, artifacts, strict=True)}
    result: dict[str, Any] = {
        "metrics": {s: each.manifest.metrics for s, each in zip(stages, artifacts, strict=True)},
        # From one artifact to the next, in the order of the stages.
        "stage_seconds": {
            stage: before.age - after.age
            for (before, after), stage in zip(pairwise(artifacts), stages[1:], strict=True)
        },
        "reward": read_json(store.fetch(refs["evaluate-reward-model"]) / EVALUATION),
        "pairs": _pairs(store, refs["prepare-data"]),
    }
    if "evaluate-policy" in refs:
        folder = store.fetch(refs["evaluate-policy"])
        result |= {"policy": read_json(folder / EVALUATION), "samples": read_json(folder / SAMPLES)}
    return result


def _pairs(store: Store, data: Any) -> list[list[str]]:
    pairs = read_rows(store.fetch(data) / PAIRS_EVAL, Pair)
    return [[question_of(p.prompt), p.chosen, p.rejected] for p in pairs]


def question_of(prompt: Any) -> str:
    """Return the last message of a prompt."""
    return messages_of(prompt)[-1]["content"]


def show(work: Path, seeds: Sequence[int], temperature: float) -> None:
    """Print the tables of all seeds, the real pairs' figures, and samples."""
    replies = read_json(work / "replies.json")
    texts = [(prompt, text) for prompt, several in replies["replies"] for text in several]
    scores = [gold(*each) for each in texts]
    print(
        f"\n{len(replies['replies'])} prompts, {len(texts)} replies of "
        f"{replies['tokens'] / len(texts):.1f} tokens sampled in {replies['seconds']:.0f} s "
        f"({replies['tokens_per_second']:.0f} tokens/s); gold {fmean(scores):.2f} of {BEST:.0f}, "
        f"standard deviation {pstdev(scores):.2f}\n"
    )
    runs = {seed: read_json(work / f"seed{seed}.json") for seed in seeds}
    columns = [figures(run, temperature) for run in runs.values()]
    print("| | " + " | ".join(f"seed {seed}" for seed in seeds) + " |")
    print("|---" * (len(seeds) + 1) + "|")
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(column.get(name, "–") for column in columns) + " |")
    if (work / "real.json").is_file():
        real = read_json(work / "real.json")
        print(
            f"\nreal pairs: accuracy {interval(real['reward'], 'accuracy')} beside "
            f"{interval(real['reward'], 'baseline_longer')} by choosing the longer; "
            f"{real['reward']['n']} held-out pairs, {real['seconds']:.0f} s"
        )
    for seed, run in runs.items():
        for sample in run.get("samples", [])[:SHOWN]:
            print(f"\nseed {seed}: {question_of(sample['prompt'])}")
            for name in ("before", "after"):
                points = gold(question_of(sample["prompt"]), sample[name])
                print(f"  {name:6} {points:4.1f}  {sample[name]!r}")


def figures(run: Mapping[str, Any], temperature: float) -> dict[str, str]:
    """Return the figures of one run as text, by name."""
    reward = run["reward"]
    best = [_certainty(q, good, bad, temperature) for q, good, bad in run["pairs"]]
    right = sum(gold(q, chosen) > gold(q, rejected) for q, chosen, rejected in run["pairs"])
    ceiling = fmean(best)
    result = {
        "reward model: accuracy": interval(reward, "accuracy"),
        "  best that the labels allow": f"{ceiling:.3f}",
        "  gold itself on these labels": f"{right / len(run['pairs']):.3f}",
        "  share of the way from chance": f"{(reward['accuracy'] - 0.5) / (ceiling - 0.5):.2f}",
        "  choosing the longer": interval(reward, "baseline_longer"),
        "  held-out pairs": str(reward["n"]),
    }
    if "samples" in run:
        result |= _policy_figures(run["policy"]["sampled"], run["samples"])
    seconds = "; ".join(f"{k} {v:.0f}" for k, v in run["stage_seconds"].items() if v >= 1)
    return result | {
        "seconds, whole command": f"{run['seconds']:.0f}",
        "  from artifact to artifact": seconds,
        "peak memory, GiB": f"{run['peak_gib']:.2f}",
        "exit code": str(run["exit_code"]),
    }


def _policy_figures(sampled: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> Any:
    before, after = (
        [(question_of(s["prompt"]), s[name]) for s in samples] for name in ("before", "after")
    )
    points = [[gold(*each) for each in side] for side in (before, after)]
    gains = [new - old for old, new in zip(*points, strict=True)]
    wins = sum((gain > 0) + 0.5 * (gain == 0) for gain in gains)
    error = pstdev(gains) / math.sqrt(len(gains))
    result = {
        "gold win rate over SFT (≥ 0.70)": interval(share("wins", wins, len(gains)), "wins"),
        "  strictly better / equal / worse": " / ".join(
            str(sum(map(test, gains))) for test in _SIGNS
        ),
        "gold, SFT → policy": f"{fmean(points[0]):.2f} → {fmean(points[1]):.2f} "
        f"(+{fmean(gains):.2f} ± {1.96 * error:.2f})",
        "win rate by the reward model": interval(sampled, "win_rate"),
        "KL in nats a reply (≤ 10)": f"{sampled['kl']:.2f}",
        "ended by themselves": f"{sampled['eos_rate']:.2f}",
        "tokens, SFT → policy": f"{sampled['tokens_before']:.0f} → {sampled['tokens_after']:.0f}",
    }
    for name in WEIGHTS:
        old, new = (fmean(virtues(*each)[name] for each in side) for side in (before, after))
        result[f"  {name}"] = f"{old:.2f} → {new:.2f}"
    return result


_SIGNS: tuple[Callable[[float], bool], ...] = (
    lambda gain: gain > 0, lambda gain: gain == 0, lambda gain: gain < 0,
)  # fmt: skip


def _certainty(question: str, chosen: str, rejected: str, temperature: float) -> float:
    """Return the probability that the label of a pair is the likelier one."""
    odds = preference(gold(question, chosen), gold(question, rejected), temperature)
    return max(odds, 1 - odds)


def interval(values: Mapping[str, Any], name: str) -> str:
    """Return a share with its 95 % interval."""
    return f"{values[name]:.3f} ({values[f'{name}_low']:.3f}–{values[f'{name}_high']:.3f})"
