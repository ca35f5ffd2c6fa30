"""Gold, training reward and judge while PPO over-optimises, and what the watchdog does about it.

A weak reward model, of few pairs, and a small `kl_coef` let PPO exploit the model's errors. The
watchdog of the product looks at its own prompts with the judge. Gold, which neither of them sees,
is measured at the same updates on other prompts. A run goes on after the watchdog has stopped it,
so that the gold optimum of the whole run is known; looks change no state of the training, and what
the watchdog had chosen at its stop is what a stopped run would have published.

Healthy runs, with the good reward model and the shipped settings, give the false alarms.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.gates.pool import make_once
from rlhf.config import PipelineConfig, PPOConfig
from rlhf.data.rows import PROMPTS_TRAIN, Prompt, PromptRow, read_rows
from rlhf.files import read_json, write_json
from rlhf.gates import judge as judged
from rlhf.gates import require

#: Replies are scored by gold at the sampling of every look: the same random numbers each time.
GOLD_SEED = 70_001
#: Share of the gold optimum that the choice may lose.
TOLERANCE = 0.1


@dataclass(frozen=True)
class Setting:
    """Models, prompts and the truth of the runs on one kind of data."""

    config: PipelineConfig
    data: Path
    sft: Path
    judge: Path
    gold: Callable[[Prompt, str], float]
    gold_rows: Sequence[PromptRow]
    """Prompts that gold is measured on; neither training nor watchdog has them."""


def run_once(
    setting: Setting, reward_model: Path, changes: Mapping[str, Any], seed: int, path: Path
) -> dict[str, Any]:
    """Run PPO, unless its results are there; return them."""
    if not path.is_file():
        ppo = setting.config.ppo.model_copy(update=dict(changes))
        print(f"{path.stem} …", flush=True)
        write_json(path, {"points": train(setting, ppo, reward_model, seed)})
    points = read_json(path)["points"]
    result = {"points": points, **replay(points, setting.config.ppo)}
    kept = {k: v for k, v in result.items() if k != "points"}
    print(path.stem, kept, flush=True)
    return result


def replay(points: Sequence[Mapping[str, Any]], ppo: PPOConfig) -> dict[str, Any]:
    """Return what the watchdog makes of the looks of a whole run: its first stop, its choice."""
    from rlhf.ppo.frontier import Frontier, Look

    config = ppo.watchdog
    if config is None:
        raise SystemExit("ppo.watchdog is off: there is nothing to measure")
    looks = [
        Look(
            **{**p["look"], "judges": (*p["look"]["judges"],), "proxies": (*p["look"]["proxies"],)}
        )
        for p in points
    ]
    frontier = Frontier()
    for look in looks:
        frontier.add(look, config, len(looks) - 1)
        if frontier.stopped:
            break
    chosen, reason = frontier.choose(config)
    stopped = frontier.stopped and vars(frontier.stopped)
    result = {"chosen": chosen, "reason": reason, "stopped": stopped}
    return {**result, **outcome(points, chosen, stopped)}


def train(setting: Setting, ppo: PPOConfig, reward_model: Path, seed: int) -> list[dict[str, Any]]:
    """Train to the end, whatever the watchdog says; return a row for each of its looks."""
    from rlhf.modeling.device import fast_float32, prepare_device, retained_heap
    from rlhf.ppo.checkpoint import TrainState
    from rlhf.ppo.train import build_trainer, prompts_of_update
    from rlhf.ppo.watchdog import make_watchdog

    device = prepare_device(setting.config.runtime)
    rows = read_rows(setting.data / PROMPTS_TRAIN, PromptRow)
    approved = require(reward_model, "benchmark", judged("benchmark", "benchmark", {}, None))
    trainer = build_trainer(ppo, setting.sft, approved, seed, device, rows)
    watchdog = make_watchdog(trainer, setting.data, setting.judge, rows)
    if watchdog is None or watchdog.judge is None:
        raise SystemExit("the judge is not usable: train it on more pairs")
    state, points = TrainState(), list[dict[str, Any]]()

    def look() -> None:
        watchdog.look(state)
        golds = _golds(trainer, setting)
        last = state.frontier.looks[-1]
        points.append({
            **last.row(), "gold": statistics.fmean(golds), "look": asdict(last),
            "deviations": {
                "gold": statistics.pstdev(golds), "proxy": statistics.pstdev(last.proxies),
                "judge": statistics.pstdev(last.judges),
            },
        })  # fmt: skip

    with fast_float32(device), retained_heap(device):
        look()
        while state.update < ppo.updates:
            chunk = prompts_of_update(rows, state.update, ppo, seed)
            result = trainer.update(state.update, chunk)
            state.update += 1
            state.curve.append({"update": state.update, **result.metrics})
            if watchdog.is_due(state.update):
                look()
    return points


def _golds(trainer: Any, setting: Setting) -> list[float]:
    """Return gold of one reply to each of the prompts kept for it."""
    rows = setting.gold_rows
    prompts = [trainer.renderer.encode_prompt(row.prompt, trainer.max_prompt) for row in rows]
    replies = trainer.models.sample(
        prompts, trainer.renderer.tokenizer, trainer.sampling, GOLD_SEED,
        trainer.environment.stop, ends=trainer.renderer.end_ids,
    )  # fmt: skip
    texts = [trainer.environment.text(ids) for ids in replies.rows()]
    return [setting.gold(row.prompt, text) for row, text in zip(rows, texts, strict=True)]


def outcome(
    points: Sequence[Mapping[str, Any]], chosen: int, stopped: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return gold of what goes on beside the optimum of the whole run.

    Args:
        points: Rows by look, of the whole run; the first is the start.
        chosen: Update of the look whose policy goes on.
        stopped: Why the watchdog stopped the run, if it did.
    """
    gold = {point["update"]: point["gold"] for point in points}
    start, end, best = points[0]["gold"], points[-1]["gold"], max(gold.values())
    at = next(update for update, value in gold.items() if value == best)
    gain = best - start
    return {
        "gold_start": start, "gold_best": best, "gold_chosen": gold[chosen], "gold_end": end,
        "best_update": at,
        # Both need an optimum above 0, or above the start, to be a share of anything.
        "share_of_optimum": gold[chosen] / best if best > 0 else None,
        "share_of_gain": (gold[chosen] - start) / gain if gain > 0 else None,
        "within": best - gold[chosen] <= TOLERANCE * abs(best),
        "delay": stopped["update"] - at if stopped else None,
    }  # fmt: skip


def weak_reward_model(setting: Setting, work: Path, seed: int, pairs: int) -> Path:
    """Train a reward model on few pairs of its own: the seed says which; return its folder."""
    import shutil

    from rlhf.data.rows import PAIRS_TRAIN, Pair, write_rows
    from rlhf.reward import train_reward_model

    def write(out: Path) -> None:
        shutil.copytree(setting.data, out, dirs_exist_ok=True)
        rows = read_rows(setting.data / PAIRS_TRAIN, Pair)
        first = seed * pairs % (len(rows) - pairs + 1)
        write_rows(out / PAIRS_TRAIN, rows[first : first + pairs])

    data, model = work / f"weak-data-{pairs}-{seed}", work / f"weak-model-{pairs}-{seed}"
    make_once(data, write)
    config = setting.config
    make_once(model, lambda out: train_reward_model(
        config.reward_model, data, setting.sft, out, seed=seed, runtime=config.runtime
    ))  # fmt: skip
    return model


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return how many over-optimised runs ended near their gold optimum, and each one's figures."""
    left_out = ("points", "stopped", "reason")
    rows = [
        {**{k: v for k, v in run.items() if k not in left_out},
         "detector": (run["stopped"] or {}).get("detector"),
         "stopped_at": (run["stopped"] or {}).get("update")}
        for run in runs
    ]  # fmt: skip
    return {"within": f"{sum(run['within'] for run in runs)} of {len(runs)}", "runs": rows}


def healthy_summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the false alarms of healthy runs, and what their choice of an update cost."""
    alarms = [run["stopped"]["detector"] for run in runs if run["stopped"]]
    return {
        "false_alarms": f"{len(alarms)} of {len(runs)}", "alarms": alarms,
        "within": f"{sum(run['within'] for run in runs)} of {len(runs)}",
        "share_of_optimum": [run["share_of_optimum"] for run in runs],
        "chosen": [run["chosen"] for run in runs],
    }  # fmt: skip
