"""Learning curves of our PPO and TRL 1.12's: `python -m benchmarks.learning`.

On the quickstart's generated world, where the true ("gold") quality of a reply is known: one SFT
policy and one reward model, then PPO by both trainers with the same settings and the same budget of
rollouts, several seeds each. Every few updates the policy answers held-out prompts; gold score and
KL to the SFT policy make a curve per run. Each run is a process whose result is a file, so an
interrupted benchmark resumes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from rlhf.config import PipelineConfig, load_config
from rlhf.errors import RLHFError, TrainingError
from rlhf.files import read_json, write_json

PRESET = "configs/quickstart.yaml"
SIDES = ("ours", "trl")


def main() -> None:
    """Make the missing results, then report."""
    args, overrides = arguments()
    config, work = settings(args, overrides), Path(args.work)
    if args.only:
        run_part(args, config, work)
        return
    check_identity(work, identity(config, args.every))
    (work / "runs").mkdir(exist_ok=True)
    if not args.report:
        if not (work / "evaluation").is_dir():
            in_process("inputs", work / "inputs.log")
        for seed in args.seeds:
            for side in SIDES:
                if not result_path(work, side, seed).is_file():
                    in_process(f"{side}:{seed}", work / f"{side}-seed{seed}.log")
    from benchmarks.learning import report

    runs = {
        (side, seed): read_json(result_path(work, side, seed))
        for seed in args.seeds
        for side in SIDES
        if result_path(work, side, seed).is_file()
    }
    result = report.compare(runs, args.seeds, args.margin)
    write_json(work / "verdict.json", result)
    report.table(result)
    plot = Path(args.plot or work / "learning.svg")
    report.draw(runs, plot)
    print(f"\nplot: {plot}; figures: {work / 'verdict.json'}")


def arguments(given: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Parse options, and overrides of the preset (`--ppo.kl_coef=0.1`)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    add("--every", type=int, default=3, help="updates between two evaluations")
    add("--prompts", type=int, default=300, help="held-out prompts of an evaluation")
    add("--threads", type=int, default=1)
    add("--margin", type=float, default=0.25, help="gold points that count as no worse")
    add("--work", default=".rlhf/learning", help="folder of inputs and results; kept")
    add("--plot", metavar="PATH", help="png or svg; default: learning.svg in --work")
    add("--trl", metavar="PATH", default=os.environ.get("RLHF_TRL112", "/tmp/trl112"))
    add("--report", action="store_true", help="train nothing: report on the runs there are")
    add("--only", metavar="inputs|SIDE:SEED", help=argparse.SUPPRESS)
    return parser.parse_known_args(given)


def settings(args: argparse.Namespace, overrides: Sequence[str]) -> PipelineConfig:
    """Return the quickstart's configuration with the benchmark's threads and prompts."""
    return load_config(
        PRESET,
        [
            "--runtime.device=cpu",
            f"--runtime.threads={args.threads}",
            f"--evaluation.prompts={args.prompts}",
            *overrides,
        ],
    ).config


def identity(config: PipelineConfig, every: int) -> dict[str, Any]:
    """Return the settings that results depend on, stored beside them."""
    sections = ("data", "base", "sft", "reward_model", "ppo", "evaluation")
    chosen = {name: getattr(config, name).model_dump(mode="json") for name in sections}
    return {**chosen, "seed": config.seed, "every": every}


def check_identity(work: Path, wanted: dict[str, Any]) -> None:
    """Refuse a folder that holds results of other settings.

    Raises:
        TrainingError: They differ.
    """
    path = work / "settings.json"
    if path.is_file():
        existing = read_json(path)
        differ = [name for name in wanted if existing.get(name) != wanted[name]]
        if differ:
            raise TrainingError(
                f"--work {work} holds results of another {', '.join(differ)}; give another folder"
            )
    else:
        work.mkdir(parents=True, exist_ok=True)
        write_json(path, wanted)


def in_process(only: str, log: Path) -> None:
    """Run this command for one part of the work in a child process.

    Raises:
        TrainingError: It failed.
    """
    print(f"{only} …", flush=True)
    command = [sys.executable, "-m", "benchmarks.learning", *sys.argv[1:], "--only", only]
    with log.open("w") as handle:
        done = subprocess.run(command, check=False, stdout=handle, stderr=subprocess.STDOUT)
    if done.returncode:
        last = (log.read_text().strip().splitlines() or ["no output"])[-1]
        raise TrainingError(f"{only} failed: {last}; its output is in {log}")


def run_part(args: argparse.Namespace, config: PipelineConfig, work: Path) -> None:
    """Make the inputs, or run one training, as `--only` of a child process names it."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if args.only == "inputs":
        make_inputs(config, work)
        return
    side, seed = args.only.split(":")
    from benchmarks.learning.runs import Run

    run = Run(config, work, int(seed), args.every)
    if side == "ours":
        run.ours()
    else:
        from benchmarks.learning.trl import train_by_trl

        train_by_trl(run, args.trl)
    write_json(result_path(work, side, int(seed)), run.result())


def make_inputs(config: PipelineConfig, work: Path) -> None:
    """Make data, SFT policy and reward model; a folder appears when complete."""
    from rlhf.data.prepare import prepare_data
    from rlhf.evaluation import evaluate_reward_model
    from rlhf.reward import train_reward_model
    from rlhf.sft import train_sft

    data, sft, reward = (work / name for name in ("data", "sft", "reward-model"))
    seed, runtime = config.seed, config.runtime
    _once(data, lambda out: prepare_data(config.data, out, seed=seed))
    _once(
        sft, lambda out: train_sft(config.sft, config.base, data, out, seed=seed, runtime=runtime)
    )
    _once(
        reward,
        lambda out: train_reward_model(
            config.reward_model, data, sft, out, seed=seed, runtime=runtime
        ),
    )
    _once(
        work / "evaluation",
        lambda out: evaluate_reward_model(
            config.evaluation, config.data, data, reward, out,
            limits=config.reward_model.max_length, runtime=runtime,
        ),
    )  # fmt: skip


def _once(folder: Path, make: Callable[[Path], Any]) -> None:
    if folder.is_dir():
        return
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    make(partial)
    partial.rename(folder)


def result_path(work: Path, side: str, seed: int) -> Path:
    """Return the path of a run's result, which exists once the run is complete."""
    return work / "runs" / f"{side}-seed{seed}.json"


if __name__ == "__main__":
    try:
        main()
    except RLHFError as error:
        sys.exit(f"benchmarks.learning: {error}")
