"""PPO beside TRL 1.12's, on the same work: `python -m benchmarks.ppo --size 15m`.

Both sides run in one process, update by update in turn, so that whatever else the machine does
hits both alike. After every update tokens must be the same, and log-probs, values, advantages and
weights must agree. Peak memory is measured before that in a process of its own for each side.

TRL 1.12.0 has to lie in a folder beside the product (never in its environment):
`pip install --no-deps --target /tmp/trl112 trl==1.12.0`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.machine import matmul_precision, matmul_rates
from benchmarks.ppo import report
from benchmarks.ppo.process import Update, check, differences
from benchmarks.ppo.workload import PROMPT_TOKENS, SIZES, Workload, as_json, write_models
from rlhf.errors import RLHFError, TrainingError
from rlhf.modeling.device import retained_heap

SIDES = ("ours", "trl")


def main() -> None:
    """Measure, compare and print."""
    args = arguments()
    torch.set_num_threads(args.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    work = workload(args)
    memory = (
        retained_heap(torch.device("cpu")) if args.memory == "both" else contextlib.nullcontext()
    )
    # TRL prints to standard output, which is reserved for the result.
    with contextlib.redirect_stdout(sys.stderr), memory:
        result = alone(args, work, Path(args.models)) if args.side else measure(args, work)
    if args.side or args.json == "-":
        print(json.dumps(result))
        return
    report.table(result)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--size", choices=list(SIZES), default="2m")
    add("--model", metavar="DIR", help="a real model of Llama's architecture in place of --size")
    add("--lengths", choices=["full", "varying"], default="full", help="of replies")
    add("--mode", choices=["exact", "fast"], default="exact", help="fast: own sampler and bf16")
    add("--lora", action="store_true", help="adapters on both sides, ours on one base for all four "
        "models: other arithmetic, so nothing is asserted")  # fmt: skip
    add("--matmul", choices=["none", "ours", "both"], default="none", help="who multiplies by "
        "torch.set_float32_matmul_precision('medium')")  # fmt: skip
    add("--memory", choices=["none", "both"], default="none", help="who keeps freed memory, as "
        "our own training loop does; one process can't have it both ways")  # fmt: skip
    add("--threads", type=int, default=2)
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--batch", type=int, help="replies per update; none: the size's")
    add("--new-tokens", type=int, help="longest reply; none: the size's")
    add("--prompt-tokens", type=int, nargs=2, default=list(PROMPT_TOKENS), metavar=("FROM", "TO"))
    add("--updates", type=int, default=4, help="measured ones")
    add("--warmup", type=int, default=1, help="updates before those, compared but not timed")
    add("--micro-batch", type=int, help="ours: ppo.micro_batch_size")
    add("--ppo", action="append", default=[], metavar="NAME=VALUE", help="ours: any ppo option")
    add("--tolerance", type=float, default=1e-4)
    add("--report-only", action="store_true", help="go on when the sides differ")
    add("--no-memory", action="store_true", help="skip the two processes that measure memory")
    add("--seed", type=int, default=0)
    add("--json", metavar="PATH|-", help="write the report here; - for standard output alone")
    add("--trl", metavar="PATH", default=os.environ.get("RLHF_TRL112", "/tmp/trl112"))
    add("--side", choices=SIDES, help=argparse.SUPPRESS)
    add("--models", help=argparse.SUPPRESS)
    return parser.parse_args(given)


def workload(args: argparse.Namespace) -> Workload:
    """Return the workload that the command line describes."""
    pairs = [option.split("=", 1) for option in args.ppo]
    return Workload(
        args.size, args.lengths, args.mode, args.lora, args.updates + args.warmup, args.seed,
        args.micro_batch, ours={name: json.loads(value) for name, value in pairs},
        device=args.device, batch=args.batch, new_tokens=args.new_tokens,
        prompt_tokens=tuple(args.prompt_tokens), model=args.model,
    )  # fmt: skip


def measure(args: argparse.Namespace, work: Workload) -> dict[str, Any]:
    """Measure memory, matmul rates, and the updates of both sides in turn."""
    with tempfile.TemporaryDirectory(prefix="ppo-benchmark-") as name:
        folder = Path(name)
        write_models(work, folder)
        memory = {} if args.no_memory else {side: memory_of(side, folder) for side in SIDES}
        rates = matmul_rates(work.size, torch.device(work.device))
        updates, errors = interleaved(args, work, folder)
    measured = updates[args.warmup :]
    return {
        **report.summary(work.size, measured, rates["peak"]),
        "memory": memory,
        "memory_ratio": report.memory_ratio(memory),
        "differences": report.worst(errors),
        "agree": bool(errors) and report.agree(errors, args.tolerance),
        "matmul": rates,
        "settings": {
            "matmul": args.matmul, "memory": args.memory, "threads": args.threads,
            "torch": torch.__version__, "tolerance": args.tolerance, "workload": as_json(work),
        },
    }  # fmt: skip


def memory_of(side: str, folder: Path) -> dict[str, float]:
    """Run this command for one side alone in a child process; return its memory."""
    command = [sys.executable, "-m", "benchmarks.ppo", *sys.argv[1:], "--side", side]
    command += ["--models", str(folder)]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise TrainingError(f"measuring the memory of {side} failed; its message stands above")
    return json.loads(done.stdout.splitlines()[-1])


def alone(args: argparse.Namespace, work: Workload, folder: Path) -> dict[str, float]:
    """Return this process's memory in MiB at its start, after imports and at its peak.

    The peak is that of two updates of one side. On a GPU it is the GPU's memory in use.
    """
    started = peak_mib(work)
    work = dataclasses.replace(work, updates=2)
    with matmul_precision(precision_of(args.side, args.matmul)):
        if args.side == "ours":
            from benchmarks.ppo.ours import OurSide

            imported = peak_mib(work)
            side, prompts = OurSide(work, folder, False), work.prompts()
            for number in range(work.updates):
                rows = slice(number * work.size.batch, (number + 1) * work.size.batch)
                side.update(number, prompts[rows])
        else:
            from benchmarks.ppo.trl import TRLSide, import_trl

            import_trl(args.trl)
            imported = peak_mib(work)
            TRLSide(work, folder, args.trl).run(None)
    return {"start": started, "imports": imported, "peak": peak_mib(work)}


def peak_mib(work: Workload) -> float:
    """Return peak memory so far: the GPU's in use, or this process's resident."""
    if work.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return report.peak_mib()


def interleaved(
    args: argparse.Namespace, work: Workload, folder: Path
) -> tuple[list[dict[str, Update]], list[dict[str, float]]]:
    """Run every update by TRL and then by us; return updates and differences."""
    from benchmarks.ppo.trl import (
        TRLSide,
    )  # first: puts TRL 1.12 before the environment's trl on sys.path

    theirs = TRLSide(work, folder, args.trl)
    from benchmarks.ppo.ours import OurSide

    ours = OurSide(work, folder, work.comparable)
    updates: list[dict[str, Update]] = []
    errors: list[dict[str, float]] = []

    def after_trl(number: int, update: Update) -> None:
        with matmul_precision(precision_of("ours", args.matmul)):
            our_update = ours.update(number, update.prompts)
        if work.comparable:
            errors.append(differences(our_update, update))
            report.log(f"update {number}: " + report.listed(errors[-1]))
            if not args.report_only:
                check(number, errors[-1], args.tolerance)
        # The tensors have been compared; drop them to save memory.
        updates.append(
            {
                "ours": dataclasses.replace(our_update, tensors={}),
                "trl": dataclasses.replace(update, tensors={}),
            }
        )

    with matmul_precision(precision_of("trl", args.matmul)):
        theirs.run(after_trl)
    return updates, errors


def precision_of(side: str, matmul: str) -> str:
    """Return the float32 precision setting of a side."""
    return "medium" if matmul in ("both", side) else "highest"


if __name__ == "__main__":
    try:
        main()
    except (RLHFError, AssertionError) as error:
        sys.exit(f"benchmarks.ppo: {error}")
