"""One machine against two: `python -m benchmarks.nodes`, as root, on Linux with `ip`.

Two network namespaces, joined by a pair of virtual interfaces, are the machines: each has its own
home, temporary files and loopback; the store is a folder. Each stage trains in one process, in two
processes of one machine, and in one process on each of two, all at the same batch sizes. Prints the
seconds of a step (the start-up is not in them) and compares the results: two processes must make
the same bytes wherever they are. `--sharding fsdp` deals out the weights of SFT and reward model
(PPO refuses it: `--stages sft reward_model`). `--cut` also takes the link away in the midst of a
training, and prints what ends, when and why.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.config import ArchitectureConfig, BaseModelConfig, PipelineConfig
from rlhf.files import folder_sha256
from rlhf.gates import Verdict
from rlhf.launch import Job, launch
from rlhf.launch.nodes import nodes_of_environment
from rlhf.store import Producer, open_store
from rlhf.store.manifest import ArtifactRef
from tasks.join import join_stage, own_place
from tasks.runner import code_version, library_versions
from tasks.stages import TRAIN_POLICY, TRAIN_REWARD_MODEL, TRAIN_SFT

SPACES = ("rlhf-bench-0", "rlhf-bench-1")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29400
#: Processes on each machine, and machines.
ARRANGEMENTS = ((1, 1), (2, 1), (1, 2))
BASE = BaseModelConfig(
    architecture=ArchitectureConfig(hidden_size=128, layers=4, heads=4, intermediate_size=256)
)
STAGES = {"sft": TRAIN_SFT, "reward_model": TRAIN_REWARD_MODEL, "ppo": TRAIN_POLICY}


def main() -> None:
    """Run the benchmark, or one machine's part of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", nargs="+", default=[*STAGES], choices=STAGES)
    parser.add_argument("--sharding", default="ddp", choices=("ddp", "fsdp"))
    parser.add_argument("--cut", action="store_true", help="take the link away in an SFT")
    parser.add_argument("--lead", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--join", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.join:
        join_stage(*own_place(), 300)
    elif options.lead:
        lead(Path(options.lead[0]), options.lead[1], int(options.lead[2]), int(options.lead[3]))
    else:
        campaign(options.stages, options.sharding, options.cut)


def campaign(stages: list[str], sharding: str, cut: bool) -> None:
    """Measure all stages in all arrangements, in a temporary folder."""
    equal = True
    with tempfile.TemporaryDirectory(prefix="rlhf-nodes-") as name, namespaces():
        root = Path(name)
        make_inputs(root, sharding)
        for stage in stages:
            rows = [measure(root, stage, *arrangement) for arrangement in ARRANGEMENTS]
            same = rows[1]["digest"] == rows[2]["digest"]
            equal &= same
            seconds = [row["seconds_per_step"] for row in rows]
            say(
                stage=stage, **dict(zip(("1x1", "1x2", "2x1"), seconds, strict=True)),
                two_machines_over_one=round(seconds[2] / seconds[1], 2), same_bytes=same,
            )  # fmt: skip
        if cut:
            measure(root, "sft", 1, 2, cut=True)
    sys.exit(0 if equal else 1)


def measure(
    root: Path, stage: str, processes: int, nodes: int, cut: bool = False
) -> dict[str, Any]:
    """Train a stage in one arrangement; return its figures."""
    out = root / f"{stage}-{nodes}x{processes}"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    module = [sys.executable, "-m", "benchmarks.nodes"]
    lead = [*module, "--lead", str(root), stage, str(processes), str(nodes)]
    commands = [lead] + [[*module, "--join"]] * (nodes - 1)
    running = [
        subprocess.Popen(
            ["ip", "netns", "exec", SPACES[node], *command], stderr=subprocess.PIPE,
            env=environment(root, node, nodes),
        )
        for node, command in enumerate(commands)
    ]  # fmt: skip
    if cut:
        while not (out / "trains").exists():
            time.sleep(0.2)
        subprocess.run(["ip", "-n", SPACES[0], "link", "set", "rlhf-b0", "down"], check=True)
    since = time.monotonic()
    for node, process in enumerate(running):
        said = process.communicate()[1].decode().strip().splitlines()
        if cut:
            after = round(time.monotonic() - since)
            say(cut=True, node=node + 1, status=process.returncode, after=after, said=said[-1])
        elif process.returncode:
            raise SystemExit("\n".join(said))
    return {} if cut else json.loads((out / "figures.json").read_text())


def lead(root: Path, field: str, processes: int, nodes: int) -> None:
    """Be the first machine of a stage: train, and write down figures."""
    out = root / f"{field}-{nodes}x{processes}"
    inputs = json.loads((root / "inputs.json").read_text())
    config = PipelineConfig.model_validate(json.loads((root / "config.json").read_text()))
    section = getattr(config, field)
    section = type(section)(**{**section.model_dump(), "processes": processes, "nodes": nodes})
    store = open_store(config.store, cache_dir=out / "cache")
    refs = {role: ArtifactRef.model_validate(ref) for role, ref in inputs[field].items()}
    (out / "out").mkdir()
    verdict = None
    if field == "ppo":
        digest = refs["reward-model"].digest
        verdict = Verdict(gate="benchmark", subject=digest, approved=True, checks=())
    job = Job(
        stage=STAGES[field].name, field=field, section=section, base=config.base, verdict=verdict,
        inputs={role: store.fetch(ref) for role, ref in refs.items()}, out_dir=out / "out",
        runtime=config.runtime, checkpoints=out / "checkpoints",
    )  # fmt: skip
    context = {
        "stage": job.stage, "config": config.model_dump(mode="json"), "digests": {},
        "refs": {role: ref.digest for role, ref in refs.items()},
    }  # fmt: skip
    shared: Any = {"context": context, "versions": {"rlhf": code_version(), **library_versions()}}
    times: dict[int, float] = {}

    def progress(step: int, total: int, metrics: Any) -> None:
        times.setdefault(step, time.monotonic())
        (out / "trains").touch()

    started = time.monotonic()
    launch(job, progress, nodes_of_environment(field, nodes, **shared) if nodes > 1 else None)
    whole = time.monotonic() - started
    first, last = min(times), max(times)
    figures = {
        "seconds_per_step": round((times[last] - times[first]) / (last - first), 4),
        "seconds": round(whole, 1), "digest": folder_sha256(out / "out"),
    }  # fmt: skip
    (out / "figures.json").write_text(json.dumps(figures))


def make_inputs(root: Path, sharding: str) -> None:
    """Publish data and small models to a store, for all arrangements."""
    from rlhf.reward import train_reward_model
    from rlhf.sft import train_sft
    from tests.library import toys

    changed: Any = toys.changed
    runtime: Any = {"device": "cpu", "threads": 1, "work_dir": str(root / "work")}
    shared = {
        "epochs": 40, "batch_size": 32, "checkpoint_minutes": None, "sharding": sharding,
        "processes": 1,
    }  # fmt: skip
    config = PipelineConfig(
        store=str(root / "store"), runtime=runtime, base=BASE,
        sft=changed(toys.SFT, **shared),
        reward_model=changed(toys.REWARD, **shared),
        ppo=changed(
            toys.PPO, total_episodes=64 * 12, chunk_size=64, mini_batch_size=16, checkpoint_every=99
        ),
    )  # fmt: skip
    (root / "config.json").write_text(config.model_dump_json())
    folders = {name: root / "made" / name for name in ("data", "sft", "reward-model")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    toys.write_data(folders["data"], pairs=192)
    short = {"epochs": 1, "batch_size": 32}
    train_sft(
        changed(toys.SFT, **short), BASE, folders["data"], folders["sft"], runtime=toys.RUNTIME
    )
    train_reward_model(
        changed(toys.REWARD, **short), folders["data"], folders["sft"],
        folders["reward-model"], runtime=toys.RUNTIME,
    )  # fmt: skip
    store = open_store(config.store, cache_dir=root / "cache")
    producer = Producer(
        stage="benchmark", code_version=code_version(), dirty=None, config={}, lock_digest=None,
        seed=0, versions={},
    )  # fmt: skip
    kinds = {"data": "dataset", "sft": "policy", "reward-model": "reward-model"}
    refs = {
        name: store.publish(folder, kinds[name], parents={}, producer=producer, metrics={})
        for name, folder in folders.items()
    }
    roles = {"sft": ["data"], "reward_model": ["data", "sft"], "ppo": [*refs]}
    inputs = {
        stage: {role: refs[role].model_dump(mode="json") for role in needed}
        for stage, needed in roles.items()
    }
    (root / "inputs.json").write_text(json.dumps(inputs))


def environment(root: Path, node: int, nodes: int) -> dict[str, str]:
    """Return the environment of one machine: folders of its own, and torchrun's variables."""
    own = root / f"machine-{node}"
    for name in ("home", "tmp", "work"):
        (own / name).mkdir(parents=True, exist_ok=True)
    told = {"NNODES": nodes, "NODE_RANK": node, "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": PORT}
    return {
        **os.environ, "HOME": str(own / "home"), "TMPDIR": str(own / "tmp"),
        "RLHF_WORK_DIR": str(own / "work"), "RLHF_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        **({f"PET_{name}": str(value) for name, value in told.items()} if nodes > 1 else {}),
    }  # fmt: skip


@contextmanager
def namespaces() -> Iterator[None]:
    """Make two network namespaces that reach each other, and nothing else."""

    def ip(*arguments: str, check: bool = True) -> None:
        subprocess.run(["ip", *arguments], check=check, capture_output=not check)

    try:
        for node, space in enumerate(SPACES):
            ip("netns", "add", space)
            ip("-n", space, "link", "set", "lo", "up")
            if node == 0:
                ip("link", "add", "rlhf-b0", "netns", space, "type", "veth",
                   "peer", "name", "rlhf-b1")  # fmt: skip
            else:
                ip("link", "set", "rlhf-b1", "netns", space)
            ip("-n", space, "address", "add", f"{ADDRESSES[node]}/24", "dev", f"rlhf-b{node}")
            ip("-n", space, "link", "set", f"rlhf-b{node}", "up")
        yield
    finally:
        for space in SPACES:
            ip("netns", "delete", space, check=False)


def say(**row: Any) -> None:
    """Print a row."""
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
