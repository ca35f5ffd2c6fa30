"""Section: a killed and resumed PPO run against an undisturbed one, bit by bit.

Each run is a process: 20 updates in one go; 7 updates and `kill -9`; the rest. Modes: `strict`,
with torch's deterministic algorithms only; `warned`, with a warning for each operation that torch
has none for; and `plain`, as users run it.
"""

from __future__ import annotations

import json
import os
import signal
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.gpu import processes, quickstart
from benchmarks.gpu.section import Context, Results, SectionFailedError
from rlhf.checkpoints.folder import checkpoints_in
from rlhf.config import PPOConfig
from rlhf.ppo.train import train_policy
from tests.library.ppo_runs import EVERYTHING

UPDATES, KILLED_AFTER, EVERY = 20, 7, 4
SMALL = {
    "total_episodes": UPDATES * 32, "chunk_size": 32, "mini_batch_size": 16,
    "max_new_tokens": 32, "checkpoint_every": EVERY,
}  # fmt: skip
# The smoke test goes on for two updates after the kill.
TINY = {**SMALL, "total_episodes": (KILLED_AFTER + 2) * 4, "chunk_size": 4, "mini_batch_size": 4,
        "max_new_tokens": 4}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "bf16, every option with a state": {**EVERYTHING, "precision": "bf16"},
}
#: Variant and mode of the full benchmark's runs; the smoke test has the first alone.
PAIRS = (
    ("bf16, every option with a state", "strict"), ("fp32", "strict"), ("bf16", "strict"),
    ("bf16", "plain"),
)  # fmt: skip
TINY_PAIRS = PAIRS[:1]
AT_A_TIME = 3


def resume(context: Context, results: Results) -> None:
    """Run each variant in its mode.

    Raises:
        SectionFailedError: A resumed run differs, though all algorithms were deterministic.
    """
    # A forked process lacks torch's threads of this process.
    torch.set_num_threads(1)
    pairs = TINY_PAIRS if context.tiny else PAIRS
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        outcomes = pool.map(lambda pair: _variant(context, *pair), pairs)
        for pair, outcome in zip(pairs, outcomes, strict=True):
            results.put(**{f"{pair[0]} / {pair[1]}": outcome})
    wrong = [
        f"{name}: {outcome['finding']}"
        for name, outcome in results.values.items()
        if not outcome["bit_equal"] and not name.endswith("plain")
    ]
    if wrong:
        raise SectionFailedError("; ".join(wrong))


class _Run:
    """A run in its own folder; each start is a process."""

    def __init__(self, context: Context, variant: str, folder: Path) -> None:
        self.context, self.variant, self.folder = context, variant, folder
        self.out, self.checkpoints = folder / "out", folder / "checkpoints"
        self.out.mkdir(parents=True)

    def train(self, mode: str, killed_after: int | None = None) -> dict[str, Any]:
        """Train or resume; return the exit code, with the operations torch warned of."""
        note = self.folder / "note.json"
        note.unlink(missing_ok=True)
        argument = {
            "context": self.context.to_json(), "variant": self.variant, "mode": mode,
            "folder": str(self.folder), "killed_after": killed_after, "note": str(note),
        }  # fmt: skip
        child = processes.start(
            f"{__name__}:train_in_process", json.dumps(argument), self.folder / "log",
            needs_cuda=self.context.device == "cuda", leads_group=False,
        )  # fmt: skip
        code = child.wait()
        return {"code": code, **(json.loads(note.read_text()) if note.is_file() else {})}


def train_in_process(argument: str) -> None:
    """Body of a run's process; writes torch's warnings or an error to the note."""
    settings = json.loads(argument)
    context, mode = Context.from_json(settings["context"]), settings["mode"]
    note = Path(settings["note"])
    if mode != "plain":
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when cuBLAS is first used
        torch.use_deterministic_algorithms(True, warn_only=mode == "warned")

    def progress(step: int, total: int, metrics: Mapping[str, float]) -> None:
        if step == settings["killed_after"]:
            os.kill(os.getpid(), signal.SIGKILL)

    folder = Path(settings["folder"])
    data, sft, reward = (quickstart.folder(context, n) for n in ("data", "sft", "reward-model"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            train_policy(
                _config(context, settings["variant"]), data, sft,
                quickstart.approved_without_gate(reward), folder / "out",
                checkpoints=folder / "checkpoints", runtime=context.runtime, progress=progress,
            )  # fmt: skip
        except RuntimeError as error:
            note.write_text(json.dumps({"error": str(error)}))
            raise
    messages = {str(w.message).split(". ")[0] for w in caught}
    nondeterministic = sorted(m for m in messages if "deterministic" in m)
    note.write_text(json.dumps({"nondeterministic": nondeterministic}))


def _config(context: Context, variant: str) -> PPOConfig:
    base = quickstart.configuration(context.tiny).ppo.model_dump(exclude_unset=True)
    return PPOConfig(**{**base, **(TINY if context.tiny else SMALL), **VARIANTS[variant]})


def _variant(context: Context, variant: str, mode: str) -> dict[str, Any]:
    """Run a variant uninterrupted, and killed and resumed; compare the results."""
    folder = Path(context.scratch) / f"{variant} {mode}".replace(", ", "-").replace(" ", "-")
    outcome: dict[str, Any] = {"mode": mode, "refused": None}
    straight = _Run(context, variant, folder / "straight")
    ended = straight.train(mode)
    if ended["code"] and mode == "strict" and "deterministic" in ended.get("error", ""):
        outcome |= {"refused": ended["error"].split(". ")[0], "mode": (mode := "warned")}
        straight = _Run(context, variant, folder / "warned")
        ended = straight.train(mode)
    outcome["nondeterministic"] = ended.get("nondeterministic", [])
    if ended["code"]:
        return {**outcome, "bit_equal": False, "finding": f"the run ended with {_why(ended)}"}
    killed = _Run(context, variant, folder / "killed")
    first = killed.train(mode, KILLED_AFTER)
    if first["code"] != -signal.SIGKILL:
        return {**outcome, "bit_equal": False, "finding": f"was not killed: {_why(first)}"}
    saved = [p.name for p in checkpoints_in(killed.checkpoints)]
    rest = killed.train(mode)
    if rest["code"]:
        return {**outcome, "bit_equal": False, "finding": f"did not resume: {_why(rest)}"}
    compared = _compared(straight, killed)
    if not compared["bit_equal"]:
        again = _Run(context, variant, folder / "again")
        again.train(mode)
        # If two undisturbed runs differ as well, the resume is not the cause.
        compared["undisturbed_runs_equal"] = _compared(straight, again)["bit_equal"]
    return {**outcome, "resumed_from": saved, **compared}


def _why(ended: dict[str, Any]) -> str:
    return f"{ended['code']} {ended.get('error', '')}".strip()


def _compared(straight: _Run, other: _Run) -> dict[str, Any]:
    """Compare the files of two runs.

    If they differ: the largest difference of a weight, and the first update with one.
    """
    pairs = {}
    for run in (straight, other):
        last = checkpoints_in(run.checkpoints)[-1]
        for path in (*run.out.iterdir(), *last.iterdir()):
            if path.is_file():
                pairs.setdefault(f"{path.parent.name}/{path.name}", []).append(path.read_bytes())
    different = sorted(n for n, both in pairs.items() if len(both) != 2 or both[0] != both[1])
    result: dict[str, Any] = {"files": len(pairs), "bit_equal": not different, "finding": ""}
    if different:
        result |= _differences(straight, other)
        result["different_files"] = different
        result["finding"] = (
            f"{len(different)} of {len(pairs)} files differ from update "
            f"{result['first_different_update']} on; weights by "
            f"{result['largest_weight_difference']:.2g} at most"
        )
    return result


def _differences(straight: _Run, other: _Run) -> dict[str, Any]:
    weights = [load_file(run.out / "model.safetensors") for run in (straight, other)]
    largest = max(float((weights[0][n] - weights[1][n]).abs().max()) for n in weights[0])
    curves = [json.loads((run.out / "curve.json").read_text()) for run in (straight, other)]
    first = next((a["update"] for a, b in zip(*curves, strict=True) if a != b), None)
    return {"largest_weight_difference": largest, "first_different_update": first}
