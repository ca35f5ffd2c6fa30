"""Measured honesty of the gates: `python -m benchmarks.gates --work .rlhf/gates`.

Parts: `coverage` of intervals, `retrainings` (false promotions, power, false rejections),
`reward-models` that have learnt the wrong thing. The pool
of policies that retrainings are drawn from takes some 15 minutes; it is kept in the work folder.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gates import coverage, retrainings, reward_models
from benchmarks.gates.pool import make_pool
from benchmarks.gates.retrainings import Challenger
from rlhf.config import PipelineConfig, load_config
from rlhf.files import write_json

#: Win rates whose power is measured.
TARGETS = (0.55, 0.60, 0.65)


def main() -> None:
    """Measure the parts that are asked for, and write `<part>.json` for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help="any of the parts; none measures all")
    parser.add_argument("--work", type=Path, default=Path(".rlhf/gates"))
    parser.add_argument("--runs", type=int, default=400, help="simulated retrainings of each kind")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    config = load_config(Path("configs/quickstart.yaml"), ()).config
    parts: dict[str, Callable[[], Any]] = {
        "coverage": coverage.table,
        "retrainings": lambda: measure_retrainings(config, args.work, args.runs),
        "reward-models": lambda: measure_reward_models(config, args.work),
    }
    for name in args.parts or parts:
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


if __name__ == "__main__":
    main()
