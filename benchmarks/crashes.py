"""Crash campaign on the quickstart: `python -m benchmarks.crashes --seeds 1`.

A real site (Prefect's server on Postgres, an S3 server, and three workers on three pools that share
nothing else) runs the quickstart undisturbed, and once per seed while a process is killed every few
seconds. The struck runs must be promoted with the same bytes, every stage must be recorded once,
and every artifact must be whole. Takes half an hour on 2 cores; prints a line per blow and a JSON
row per seed. `--each 5 --kills 0` strikes the training stages instead, five times each, at moments
of their work that the seed chooses and that a checkpoint precedes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from rlhf.checkpoints.folder import checkpoints_in
from rlhf.store import open_store
from tasks.stages import STAGES
from tests.ceph import ceph_server
from tests.production.blows import (
    kill_server,
    kill_store,
    kill_worker,
    lose_machine,
    running_stages,
    signal_run,
)
from tests.production.site import ROOT, Site, site
from tests.servers import client_of

PLACEMENT = {
    "prepare-data": "cpu", "train-sft": "gpu", "train-reward-model": "reward",
    "evaluate-reward-model": "reward", "gate-reward-model": "cpu", "train-judge": "reward",
    "train-policy": "gpu",
    "evaluate-policy": "gpu", "gate-policy": "cpu", "promote": "cpu",
}  # fmt: skip
TRAININGS = ("train-sft", "train-reward-model", "train-judge", "train-policy")
#: Steps of each training, by size.
STEPS = {
    "quickstart": dict(zip(TRAININGS, (564, 563, 220, 36), strict=True)),
    "tiny": dict(zip(TRAININGS, (80, 80, 30, 200), strict=True)),
}
#: Range of the seconds between two blows.
PAUSE = (8.0, 25.0)
CUT = 30.0
LIMIT = 3600.0


def main() -> None:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--each", type=int, default=0, help="blows to each training stage")
    parser.add_argument("--size", choices=sorted(STEPS), default="quickstart")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(
        f"{options.size}, seeds {options.seeds}, {options.kills} blows, {options.each} to each "
        "training", flush=True,
    )  # fmt: skip
    folder = Path(tempfile.mkdtemp(prefix="crashes-"))
    rows: list[dict[str, Any]] = []
    with ceph_server() as s3, client_of(s3, "crashes"), network_to(s3.endpoint) as network:
        environment = {**s3.environment, "AWS_ENDPOINT_URL": network.address}
        with site(folder, environment) as production:
            production.store_endpoint = s3.endpoint
            production.run("make", "deploy")
            for pool in ("cpu", "reward", "gpu"):
                production.worker(pool, RLHF_THREADS="2", OMP_NUM_THREADS="2")
            plain = undisturbed(production, options.size, folder / "cache")
            for seed in options.seeds:
                trial = Trial(
                    production, network, random.Random(seed), options.each, STEPS[options.size]
                )
                row = struck(trial, f"s3://crashes/struck-{seed}", options, folder / "cache")
                rows.append({"seed": seed, "size": options.size, **row, "undisturbed_s": plain[1]})
                rows[-1]["same_policy"] = row["policy"] == plain[0]["policy"]
                print(json.dumps(rows[-1], indent=1), flush=True)
                if options.json:
                    options.json.write_text(json.dumps(rows))
    sys.exit(0 if all(is_good(row, options.each) for row in rows) else 1)


@dataclass
class Network:
    """A proxy to the store, in a process that can be stopped."""

    address: str
    process: subprocess.Popen[str]


@contextlib.contextmanager
def network_to(endpoint: str) -> Iterator[Network]:
    """Serve the store at another address until the block ends."""
    command = [sys.executable, "-m", "benchmarks.storage.throttle", endpoint, "1000"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        try:
            yield Network(process.stdout.readline().strip(), process)
        finally:
            process.terminate()


def undisturbed(production: Site, size: str, cache: Path) -> tuple[dict[str, Any], int]:
    """Run the pipeline without faults; return its outcome and seconds."""
    begun = time.monotonic()
    store = "s3://crashes/plain"
    run = submit(production, size, overrides(store, size))
    state = production.wait(run, seconds=LIMIT)["state"]
    seconds = round(time.monotonic() - begun)
    print(f"undisturbed: {state['name']} in {seconds} s", flush=True)
    return outcome_of(production, store, cache), seconds


def struck(trial: Trial, store: str, options: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """Run the pipeline under faults, every stage remote; return what became of it."""
    begun = time.monotonic()
    tree = overrides(store, options.size, placement=PLACEMENT)
    trial.run = submit(trial.site, options.size, tree)
    state = trial.go(options.kills)
    seconds = round(time.monotonic() - begun)
    children = [child for each in trial.runs for child in trial.site.children(each)]
    return {
        "state": state["name"], "blows": trial.blows,
        "to_trainings": {stage: dict(blows) for stage, blows in trial.struck.items()},
        "struck_s": seconds, "restarts": trial.retries, "children": len(children),
        **outcome_of(trial.site, store, cache),
    }  # fmt: skip


def submit(production: Site, size: str, tree: dict[str, Any]) -> str:
    """Start the pipeline, and return the run's id."""
    preset = "quickstart" if size == "quickstart" else "none"
    return production.submit("rlhf-pipeline/rlhf-pipeline", preset=preset, overrides=tree)


def is_good(row: dict[str, Any], each: int) -> bool:
    """Return whether a struck run ended as the undisturbed one, with all blows."""
    once = set(row["recorded"].values()) == {1} and row["promotions"] == 1
    enough = all(sum(blows.values()) >= each for blows in row["to_trainings"].values())
    return row["same_policy"] and once and enough and row["state"] in ("Completed", "Promoted")


def overrides(store: str, size: str, **more: Any) -> dict[str, Any]:
    """Return the run's parameters; `tiny` serves to try the program."""
    tree: dict[str, Any] = {"store": store, "retries": {"attempts": 50, "delay_seconds": 1}}
    every_step = {"checkpoint_minutes": 0}
    if size == "tiny":
        from tests.flows.conftest import tiny_tree

        tree = {**tiny_tree(Path("/nowhere")), **tree, "promotion": {"name": "quickstart"}}
        tree.pop("runtime")
        tree["ppo"] = {**tree["ppo"], "total_episodes": 8 * 200, "checkpoint_every": 5}
        every_step["epochs"] = 10
    else:
        tree["ppo"] = {"checkpoint_every": 1}
    for section in ("sft", "reward_model"):
        tree[section] = {**tree.get(section, {}), **every_step}
    return {**tree, **more}


@dataclass
class Trial:
    """One pipeline run under random faults: kills, lost machines, cut network."""

    site: Site
    network: Network
    chance: random.Random
    each: int
    """Blows to each training."""
    steps: dict[str, int]
    """Steps of each training, of which checkpoints are numbered."""
    run: str = ""
    blows: list[str] = field(default_factory=list)
    retries: int = 0
    runs: list[str] = field(default_factory=list)
    """The run as submitted, and those that took its place."""
    struck: dict[str, Counter[str]] = field(
        default_factory=lambda: {s: Counter() for s in TRAININGS}
    )
    """Kinds of blows to each training."""
    _due: dict[str, int] = field(default_factory=dict)
    """Checkpoint of each training after which its next blow falls."""

    def strike_training(self) -> None:
        """Strike a training that has saved since its last blow, and not been struck enough."""
        for child in self.site.children(self.run):
            stage = next((s for s in TRAININGS if child["name"].endswith(s)), None)
            if stage is None or child["state"]["type"] != "RUNNING":
                continue
            pool = PLACEMENT[stage]
            work = self.site.machine(pool) / "home" / "work" / "checkpoints"
            saved = [c.name for f in work.glob(f"{stage}-*") for c in checkpoints_in(f)]
            newest = max((int(name.removeprefix("update-")) for name in saved), default=0)
            if stage not in self._due:
                self._due[stage] = self._pause(stage)
            if self.struck[stage].total() >= self.each or newest < self._due[stage]:
                continue
            kind = self.chance.choice(["kill -9", "kill -9", "SIGTERM", "machine lost"])
            if kind == "machine lost":
                lose_machine(self.site, pool)
            else:
                number = signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL
                if not signal_run(child["id"], number):
                    continue
            self._due[stage] = newest + self._pause(stage)
            self.struck[stage][kind] += 1
            print(f"    {kind} {stage} after update {newest}", flush=True)

    def _pause(self, stage: str) -> int:
        """Return a number of steps such that all blows fall before the training's end."""
        return self.chance.randint(1, max(1, self.steps[stage] // (self.each + 2)))

    def strike(self, name: str) -> None:
        """Inject this fault; it counts only if it hit a running target."""
        hit = self._kinds()[name]() is not False
        if hit:
            self.blows.append(name)
        print(f"{len(self.blows):>3} {name}{'' if hit else ' (nothing there)'}", flush=True)

    def _kinds(self) -> dict[str, Callable[[], Any]]:
        pool = self.chance.choice(["cpu", "reward", "gpu"])
        return {
            "kill -9 stage": lambda: self._signal(signal.SIGKILL),
            "SIGTERM stage": lambda: self._signal(signal.SIGTERM),
            "kill -9 pipeline": lambda: signal_run(self.run, signal.SIGKILL),
            "kill -9 worker": lambda: kill_worker(self.site, pool),
            "machine lost": lambda: lose_machine(self.site, pool),
            "kill -9 Prefect server": lambda: kill_server(self.site),
            "kill -9 S3 server": lambda: kill_store(self.site),
            "network cut": self._cut,
        }

    def _signal(self, number: signal.Signals) -> bool:
        hit = [signal_run(run, number) for run in running_stages(self.site, self.run)]
        return any(hit)

    def _cut(self) -> None:
        """Stop the proxy to the store: packets are lost, connections are not refused."""
        self.network.process.send_signal(signal.SIGSTOP)
        time.sleep(CUT)
        self.network.process.send_signal(signal.SIGCONT)

    def go(self, kills: int) -> dict[str, Any]:
        """Inject `kills` faults, wait for the run's end, and return its final state."""
        give_up = time.monotonic() + LIMIT
        self.runs.append(self.run)
        # Each type of blow at least once, in random order; the rest at random.
        plan = list(self._kinds())
        plan += self.chance.choices(plan, k=max(0, kills - len(plan)))
        self.chance.shuffle(plan)
        due = time.monotonic() + self.chance.uniform(*PAUSE)
        while True:
            with contextlib.suppress(httpx.HTTPError):  # the server is busy, too
                state = self.follow()
                if state["type"] in ("COMPLETED", "FAILED", "CANCELLED"):
                    return state
                self.strike_training()
            if plan and len(self.blows) < kills and time.monotonic() > due:
                self.strike(plan.pop())
                plan = plan or list(self._kinds())
                due = time.monotonic() + self.chance.uniform(*PAUSE)
            if time.monotonic() > give_up:
                raise TimeoutError(f"not over after {LIMIT} s: {self.run}")
            time.sleep(1)

    def follow(self) -> dict[str, Any]:
        """Return the run's state; go on with the run that took its place, if there is one."""
        state = self.site.api(f"flow_runs/{self.run}")["state"]
        # Lost with its process, it is started again by itself.
        following = self.site.successor(self.run) if state["type"] == "CRASHED" else None
        if following is not None:
            self.retries += 1
            self.run = following
            self.runs.append(following)
        return state


def outcome_of(production: Site, store: str, cache: Path) -> dict[str, Any]:
    """Return a run's champion, promotions and records per stage; verify its artifacts."""
    os.environ.update(production.environment)
    history = open_store(store, cache_dir=cache).history
    recorded = {
        stage: sum(map(len, map(history.entries, history.names(f"records/{stage}/"))))
        for stage in STAGES
    }
    production.run("rlhf", "artifacts", "verify", "--deep", "--store", store)
    champions = history.entries("champion/quickstart")
    return {
        "policy": champions[-1]["policy"] if champions else None,
        "promotions": len(champions),
        "recorded": recorded,
    }


if __name__ == "__main__":
    main()
