"""Measured honesty of the gates: `python -m benchmarks.gates --work .rlhf/gates`.

Parts: `coverage` of intervals, `retrainings` (false promotions, power, false rejections),
`reward-models` that have learnt the wrong thing, `over-optimisation` with the watchdog's stops and
false alarms, and the same on the `rubric` over a pretrained model, which needs --model and
--replies. All models are kept in the work folder; a part that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gates import coverage, over_optimisation, retrainings, reward_models, settings
from benchmarks.gates.plots import plot_runs
from benchmarks.gates.pool import make_once, make_pool
from benchmarks.gates.retrainings import Challenger
from rlhf.config import PipelineConfig, load_config
from rlhf.files import write_json

#: Win rates whose power is measured.
TARGETS = (0.55, 0.60, 0.65)
#: Seeds of runs that over-optimise, and of healthy ones.
WEAK_SEEDS, HEALTHY_SEEDS = range(5), range(100, 110)
#: Pairs of the weak reward models: one that has learnt next to nothing, one that has a little.
WEAK_WORLD, WEAK_RUBRIC = (500, 2000), (80,)
#: Settings in which their runs differ from the shipped ones.
CHANGES = {"kl_coef": 0.01}


def main() -> None:
    """Measure the parts that are asked for, and write `<part>.json` for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help="any of the parts; none measures all")
    parser.add_argument("--work", type=Path, default=Path(".rlhf/gates"))
    parser.add_argument("--model", type=Path, help="pretrained chat model, for `rubric`")
    parser.add_argument("--replies", type=Path, help="replies.json of benchmarks.pretrained")
    parser.add_argument("--runs", type=int, default=400, help="simulated retrainings of each kind")
    parser.add_argument(
        "--pairs", type=int, nargs="+", default=WEAK_WORLD, help="of the weak reward models"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=WEAK_SEEDS, help="of runs that over-optimise"
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    config = load_config(Path("configs/quickstart.yaml"), ()).config
    parts: dict[str, Callable[[], Any]] = {
        "coverage": coverage.table,
        "retrainings": lambda: measure_retrainings(config, args.work, args.runs),
        "reward-models": lambda: measure_reward_models(config, args.work),
        "over-optimisation": lambda: measure_over_optimisation(
            config, args.work, args.pairs, args.seeds
        ),
        "rubric": lambda: measure_rubric(args.work / "rubric", args.model, args.replies),
    }
    for name in args.parts or [name for name in parts if name != "rubric" or args.model]:
        result = parts[name]()
        write_json(args.work / f"{name}.json", result)
        print(json.dumps(result, indent=1, ensure_ascii=False), flush=True)


def measure_retrainings(config: PipelineConfig, work: Path, runs: int) -> dict[str, Any]:
    """Measure challengers that are not better, one that games the proxy, and better ones."""
    scores = make_pool(config, work)
    none_better = [
        Challenger("the champion again", "champion", "champion"),
        Challenger("another seed", "peer", "peer"),
        Challenger("a sixth of the episodes", "weaker", "weaker"),
        Challenger("games the proxy", "gaming", "gaming", proxy="weak-proxy"),
        Challenger("games the proxy, against SFT", "gaming", "gaming", proxy="weak-proxy",
                   champion="sft"),
    ]  # fmt: skip
    better = [retrainings.mixture(scores, t, "champion", "weaker") for t in TARGETS]
    return {
        "challengers": [retrainings.rates(scores, c, config, runs) for c in none_better + better],
        "reward_gate": {
            f"true accuracy {true:g}, {pairs} pairs": retrainings.reward_gate({}, true, pairs, runs)
            for true in (0.5, 0.55, 0.6, 0.65, 0.7, 0.8)
            for pairs in (100, 300, 1000)
        },
    }


def measure_reward_models(config: PipelineConfig, work: Path) -> list[dict[str, Any]]:
    """Judge reward models that have learnt the wrong thing, and one that has not."""
    make_pool(config, work)
    return reward_models.table(config, work)


def measure_over_optimisation(
    config: PipelineConfig, work: Path, pairs: Sequence[int], seeds: Sequence[int]
) -> dict[str, Any]:
    """Measure runs on the world that over-optimise, and healthy ones; plot the former."""
    from rlhf.reward import train_reward_model

    setting = settings.world(config, work)
    weak = {n: _weak_runs(setting, work, n, seeds) for n in pairs}
    reward = work / "reward-model"
    section, runtime = config.reward_model, config.runtime
    make_once(reward, lambda out: train_reward_model(
        section, setting.data, setting.sft, out, seed=config.seed, runtime=runtime
    ))  # fmt: skip
    healthy = [
        over_optimisation.run_once(setting, reward, {}, seed, work / f"healthy-run-{seed}.json")
        for seed in HEALTHY_SEEDS
    ]
    return {
        "healthy": over_optimisation.healthy_summary(healthy),
        **{f"{n} pairs": over_optimisation.summary(runs) for n, runs in weak.items()},
    }


def _weak_runs(
    setting: over_optimisation.Setting, work: Path, pairs: int, seeds: Iterable[int]
) -> list[dict[str, Any]]:
    """Run PPO against reward models of few pairs, and plot the runs."""
    runs = []
    for seed in seeds:
        model = over_optimisation.weak_reward_model(setting, work, seed, pairs)
        path = work / f"weak-run-{pairs}-{seed}.json"
        runs.append(over_optimisation.run_once(setting, model, CHANGES, seed, path))
    plot_runs(runs, work / f"over-optimisation-{pairs}.png")
    return runs


def measure_rubric(
    work: Path, model: Path, replies: Path, seeds: Sequence[int] = (0,)
) -> dict[str, Any]:
    """Measure runs on a pretrained model that over-optimise."""
    setting = settings.rubric(work, model, replies)
    (pairs,) = WEAK_RUBRIC
    return over_optimisation.summary(_weak_runs(setting, work, pairs, seeds))


if __name__ == "__main__":
    main()
