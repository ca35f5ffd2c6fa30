"""PPO runs on the toy task in forked processes that are killed and resumed."""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.checkpoints.folder import checkpoints_in
from rlhf.ppo import train as train_module
from rlhf.ppo.checkpoint import save_checkpoint
from rlhf.reward import train_reward_model
from rlhf.sft import train_sft
from tests.library import toys
from tests.library.kills import in_child, kill_points

KILLED_AFTER, EVERY = 37, 2


class Run:
    """A run of PPO in its own folder, started again until it is complete."""

    def __init__(self, models: Path, folder: Path, options: dict[str, Any], updates: int) -> None:
        self.models, self.folder = models, folder
        settings = {"total_episodes": updates * toys.PPO.chunk_size, "checkpoint_every": EVERY}
        self.config: Any = toys.changed(toys.PPO, **{**settings, **options})

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def saved(self) -> int:
        """Return the update of the newest checkpoint, 0 if there is none."""
        checkpoints = checkpoints_in(self.checkpoints)
        return int(checkpoints[-1].name.removeprefix("update-")) if checkpoints else 0

    def train(self, progress: Callable[..., None] = lambda *_: None) -> None:
        """Train or resume in this process; a damaged checkpoint is an error."""
        logging.getLogger("rlhf").addHandler(_Strict())
        out = self.folder / "out"
        out.mkdir(parents=True, exist_ok=True)
        m = self.models
        train_module.train_policy(
            self.config, m / "data", m / "sft", toys.approve(m / "reward"), out,
            checkpoints=self.checkpoints, runtime=toys.RUNTIME, progress=progress,
        )  # fmt: skip

    def start(self, *, before: Callable[[], None] | None = None, **options: Any) -> int:
        """Run `train` in a forked process and return its id."""
        child = os.fork()
        if child:
            return child
        try:
            if before:
                before()
            self.train(**options)
            os._exit(0)
        except BaseException as error:
            print(f"\n{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)

    def files(self) -> dict[str, bytes]:
        """Return the files to compare: policy, curve, samples, last checkpoint."""
        last = checkpoints_in(self.checkpoints)[-1]
        paths = [*(self.folder / "out").iterdir(), *last.iterdir()]
        return {f"{p.parent.name}/{p.name}": p.read_bytes() for p in paths}


class _Strict(logging.Handler):
    """Handler that turns a record into an error: kills must not damage a checkpoint."""

    def emit(self, record: logging.LogRecord) -> None:
        raise RuntimeError(record.getMessage())


@dataclass
class Row:
    """Counts and failures of one trial on one variant."""

    trial: str
    variant: str
    kills: int = 0
    resumed: int = 0
    runs: int = 0
    files: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def complete(self, run: Run, straight: dict[str, bytes]) -> None:
        """Complete a run and compare its files with the straight run's."""
        if end := ended(run.start()):
            self.failures.append(f"{run.folder.name}: could not be completed, ended with {end}")
            return
        files = run.files()
        self.runs += 1
        self.files += len(straight)
        self.failures += [
            f"{run.folder.name}: {name} differs"
            for name in sorted({*files, *straight})
            if files.get(name) != straight.get(name)
        ]


def killed_once(run: Run, straight: dict[str, bytes], row: Row) -> None:
    """`kill -9` after 37 updates, before they are saved; then resume."""

    def progress(step: int, *_: Any) -> None:
        if step == KILLED_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)

    if ended(run.start(progress=progress)) != -signal.SIGKILL:
        row.failures.append("was not killed")
    row.kills, row.resumed = 1, 1
    row.complete(run, straight)


def campaign(
    make: Callable[[str], Run], straight: dict[str, bytes], row: Row, plan: list[int | None],
    rng: random.Random, pace: float,
) -> None:  # fmt: skip
    """Kill at each point of the plan, or at a random moment where it is None.

    `pace` is the seconds that a child takes for its start and a few updates. The next child loads
    what the last one left; a checkpoint that is damaged is a failure there.
    """
    run = make(f"lap-{row.runs}")
    while plan and not row.failures:
        before, at = run.saved(), plan[-1]
        if at is None:
            child = run.start()
            time.sleep(rng.uniform(0, pace))
            os.kill(child, signal.SIGKILL)
        else:
            child = run.start(before=armed(at, rng.randint(0, 2)))
        end = ended(child)
        row.resumed += before > 0
        if end == -signal.SIGKILL:
            plan.pop()
            row.kills += 1
        if end not in (0, -signal.SIGKILL) or run.saved() < before:
            row.failures.append(f"{run.folder.name}: ended with {end}, {before}, {run.saved()}")
        if end == 0 or not plan:
            row.complete(run, straight)
            shutil.rmtree(run.folder)
            run = make(f"lap-{row.runs}")


def armed(at: int, skip: int) -> Callable[[], None]:
    """Return a function that makes the process die at point `at` of a save.

    Of the save `skip` saves from now, or the first later one that has the point.
    """

    def arm() -> None:
        left = skip

        def save(*args: Any) -> Path:
            nonlocal left
            left -= 1
            if left >= 0:
                return save_checkpoint(*args)
            with kill_points(at):
                return save_checkpoint(*args)

        train_module.save_checkpoint = save

    return arm


def count_points(run: Run) -> int:
    """Count the points of a save, once old checkpoints are removed too."""
    counts = run.folder / "points"

    def work() -> None:
        def save(*args: Any) -> Path:
            with kill_points() as points:
                final = save_checkpoint(*args)
            counts.write_text(str(len(points)))
            return final

        train_module.save_checkpoint = save
        run.train()

    run.folder.mkdir(parents=True)
    in_child(work)
    return int(counts.read_text())


def terminated(
    run: Run, straight: dict[str, bytes], row: Row, signals: int, rng: random.Random, pace: float
) -> None:
    """Send SIGTERM at random moments, with no other save before the last update."""
    steps = run.folder.with_suffix(".step")

    def progress(step: int, *_: Any) -> None:
        steps.write_text(str(step))

    end = -signal.SIGTERM
    while end and row.kills < signals and not row.failures:
        steps.write_text("0")
        before = run.saved()
        child = run.start(progress=progress)
        time.sleep(rng.uniform(0, pace))
        os.kill(child, signal.SIGTERM)
        end = ended(child)
        row.kills += end == -signal.SIGTERM
        row.resumed += before > 0
        done = int(steps.read_text())
        if end not in (0, -signal.SIGTERM) or run.saved() < max(before, done):
            row.failures.append(f"ended with {end}, {done} updates done and {run.saved()} saved")
    row.complete(run, straight)


def ended(child: int) -> int:
    """Wait for a process; return its exit code, −n if signal n ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def make_models(folder: Path) -> None:
    """Make data, SFT policy and reward model in a forked process.

    This process must run no torch: a fork takes only one thread along.
    """

    def work() -> None:
        toys.write_data(folder / "data")
        for name in ("sft", "reward"):
            (folder / name).mkdir()
        train_sft(toys.SFT, toys.BASE, folder / "data", folder / "sft", runtime=toys.RUNTIME)
        train_reward_model(
            toys.REWARD, folder / "data", folder / "sft", folder / "reward", runtime=toys.RUNTIME
        )

    if in_child(work):
        raise SystemExit("the toy models could not be made")
