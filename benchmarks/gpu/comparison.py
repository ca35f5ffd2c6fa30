"""Section: TRL 1.12's PPO on the same work, by `benchmarks.ppo`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.models import scale_of
from benchmarks.gpu.packages import missing
from benchmarks.gpu.section import Context, Results, SectionFailedError, SectionSkippedError

UPDATES = 2


def comparison(context: Context, results: Results) -> None:
    """Compare with TRL on the 124 M model (tiny: 2 M), update by update in turn.

    Float32, replies of geometric lengths.

    Raises:
        SectionSkippedError: TRL's wheel was not carried, or can't be installed.
        SectionFailedError: The comparison did not complete.
    """
    wheels = sorted(Path(context.carried, "trl").glob("*.whl"))
    if not any(wheel.name.startswith("trl-") for wheel in wheels):
        raise SectionSkippedError(f"no wheel of TRL in {context.carried}/trl")
    site, report = Path(context.scratch) / "site", Path(context.scratch) / "report.json"
    _install(wheels, site)
    scale = scale_of(context)
    prompt = str(scale.prompt_tokens)
    command = [
        sys.executable, "-m", "benchmarks.ppo", "--device", context.device,
        "--size", "2m" if context.tiny else "124m", "--lengths", "varying", "--report-only",
        "--batch", str(scale.batch), "--new-tokens", str(scale.new_tokens),
        "--prompt-tokens", prompt, prompt, "--micro-batch", str(scale.batch),
        "--updates", "1" if context.tiny else str(UPDATES), "--trl", str(site),
        "--json", str(report), "--no-memory", "--threads", str(context.threads),
    ]  # fmt: skip
    # TRL's dependencies are in its folder alone: the product must not import them.
    path = os.pathsep.join([*os.environ.get("PYTHONPATH", "").split(os.pathsep), str(site)])
    done = subprocess.run(
        command, check=False, env={**os.environ, "PYTHONPATH": path.lstrip(os.pathsep)}
    )
    if done.returncode or not report.is_file():
        raise SectionFailedError(f"benchmarks.ppo ended with {done.returncode}; see gpu.log")
    results.put(**json.loads(report.read_text()))


def _install(wheels: list[Path], site: Path) -> None:
    """Install TRL's wheels, and those of missing dependencies, into a folder.

    Raises:
        SectionSkippedError: A wheel is for another Python, or a package is missing.
    """
    if absent := missing({"machine-trl"}):
        raise SectionSkippedError(f"TRL needs {', '.join(absent)}, which is not installed here")
    needed = {"trl", *missing({"trl"})}
    chosen = [str(w) for w in wheels if w.name.split("-")[0] in needed]
    install = ["install", "-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *install, "--disable-pip-version-check", "--target",
         str(site), *chosen], check=False, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["pip failed"]
        raise SectionSkippedError(f"TRL's wheels can't be installed here: {reason[0]}")
