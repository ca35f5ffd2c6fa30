"""Stages in several processes: the result of a single process, and no leftovers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from rlhf.checkpoints.folder import checkpoints_in
from rlhf.checkpoints.store import CheckpointStoreConfig
from rlhf.config import (
    PipelineConfig,
    PPOConfig,
    RewardModelConfig,
    SFTConfig,
    StoreConfig,
)
from rlhf.custom_code import ALLOWED
from rlhf.errors import (
    ConfigError,
    Interrupted,
    WorkerDied,
)
from rlhf.files import read_json
from rlhf.launch import Job, launch, train
from rlhf.launch.job import pids as pids_in
from rlhf.modeling.generate import concatenate, generate
from rlhf.modeling.members import read_members
from rlhf.modeling.sampling import Sampling
from rlhf.ranks import Ranks
from rlhf.store import open_store
from tasks.stages import STAGES
from tests.library import toys
from tests.library.ppo_runs import EVERYTHING
from tests.library.upload_runs import PRODUCER
from tests.servers import PATIENCE

ROOT = Path(__file__).parents[2]
CLOSE = 2e-4  # Adam divides by tiny second moments, so rounding shows


@pytest.fixture(autouse=True)
def _leaves_nothing(tmp_path, monkeypatch):
    """No launch's folder, and none of its processes, outlives the call."""
    place = tmp_path / "t"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield
    assert [*place.iterdir()] == []


def job(field, section, out_dir, inputs, **values) -> Job:
    return Job(
        stage=f"train-{field}", field=field, section=section, inputs=inputs, out_dir=out_dir,
        **{"runtime": toys.RUNTIME, **values},
    )  # fmt: skip


def running(place) -> dict[int, int]:
    """The processes of the launch whose folder is in there."""
    (folder,) = place.glob("rlhf-launch-*")
    return pids_in(folder)


def gone(pids, seconds=PATIENCE) -> bool:
    """Whether all have ended, or do so soon."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(runs(pid) for pid in pids):
        time.sleep(0.05)
    return not any(runs(pid) for pid in pids)


def runs(pid) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def curves(*folders):
    return [read_json(folder / "curve.json") for folder in folders]


def assert_close(one, two):
    assert toys.distance(one, two) < CLOSE
    for a, b in zip(*curves(one, two), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


def test_sft_in_two_sharded_processes(data, sft, tmp_path):
    """Unsharded they are compared in `test_nodes.py`."""
    config = toys.changed(toys.SFT, processes=2, sharding="fsdp")
    result = launch(job("sft", config, tmp_path, {"data": data}, base=toys.BASE))
    assert_close(tmp_path, sft)
    assert (tmp_path / "config.json").read_text() == (sft / "config.json").read_text()
    assert result.metrics["demonstrations"] == 96


def test_a_reward_model_sharded_in_one_process(data, sft, reward_model, tmp_path):
    """FSDP's hooks are on the model there too, and must not meet the whole weights."""
    config = toys.changed(toys.REWARD, processes=1, sharding="fsdp")
    launch(job("reward_model", config, tmp_path, {"data": data, "sft": sft}))
    assert_close(tmp_path, reward_model)


def test_the_reward_model_in_two_processes(data, sft, reward_model, tmp_path):
    config = toys.changed(toys.REWARD, processes=2, members=2)
    launch(job("reward_model", config, tmp_path, {"data": data, "sft": sft}))
    assert_close(tmp_path, reward_model)
    assert len(read_members(tmp_path)) == 2


@pytest.mark.parametrize(("field", "sharding"), [("sft", "ddp"), ("reward_model", "fsdp")])
def test_a_trainer_of_two_processes_goes_on(data, sft, reward_model, tmp_path, field, sharding):
    """And ends where one process ends, which may go on in their place."""
    section, alone = {"sft": (toys.SFT, sft), "reward_model": (toys.REWARD, reward_model)}[field]
    config = toys.changed(section, processes=2, sharding=sharding, checkpoint_minutes=0)
    checkpoints, pids, steps = tmp_path / "c", [], []

    def call(name, section, checkpoints=checkpoints):
        (tmp_path / name).mkdir()
        inputs = {"data": data, "sft": sft}
        return job(field, section, tmp_path / name, inputs, base=toys.BASE, checkpoints=checkpoints)

    def die(step, total, metrics):
        if len(checkpoints_in(checkpoints)) == 2 and not pids:
            pids.extend(running(tmp_path / "t").values())
            os.kill(pids[1], signal.SIGKILL)

    with pytest.raises(WorkerDied, match=r"process 2 of 2 was ended by SIGKILL"):
        launch(call("killed", config), die)
    copy = Path(shutil.copytree(checkpoints, tmp_path / "copy"))
    begun = int(checkpoints_in(checkpoints)[-1].name.removeprefix("update-"))
    launch(call("on", config), lambda step, *_: steps.append(step))
    assert steps[0] == begun + 1
    assert_close(tmp_path / "on", alone)
    one = toys.changed(config, processes=None, sharding="ddp")
    train(call("one", one, copy), lambda step, *_: steps.append(-step))
    assert -begun - 1 in steps
    assert_close(tmp_path / "one", alone)


def test_a_process_that_dies_fails_this_try_alone(
    data, sft, approved, train, tmp_path, monkeypatch
):
    """Then the same call goes on, and ends where one process ends, whatever has a state."""
    code = tmp_path / "code"
    code.mkdir()
    (code / "mine.py").write_text("def reward(batch): return [len(r['response']) for r in batch]")
    monkeypatch.setenv(ALLOWED, str(code))
    components = {
        **EVERYTHING["env_config"]["components"],
        "mine": {"type": "custom", "function": f"{code}/mine.py:reward", "weight": 0.01},
    }
    options = {
        **EVERYTHING, "env_config": {"components": components},
        "sampler": "multinomial", "processes": 2,
    }  # fmt: skip
    config = toys.changed(toys.PPO, **options)
    out, checkpoints, pids, steps = tmp_path / "out", tmp_path / "c", [], []
    out.mkdir()
    place = CheckpointStoreConfig(
        uri=str(tmp_path / "store"), options=StoreConfig(), name="checkpoints/x",
        work_dir=str(tmp_path / "work"), cache_bytes=10**9, producer=PRODUCER,
    )  # fmt: skip

    def progress(step, total, metrics):
        steps.append(step)
        if step == 2 and not pids:
            pids.extend(running(tmp_path / "t").values())
            os.kill(pids[1], signal.SIGKILL)

    inputs = {"data": data, "sft": sft, "reward-model": approved.subject}
    call = job(
        "policy", config, out, inputs, verdict=approved.verdict, checkpoints=checkpoints,
        checkpoint_store=place,
    )  # fmt: skip
    with pytest.raises(WorkerDied, match=r"train-policy: process 2 of 2 was ended by SIGKILL"):
        launch(call, progress)
    assert gone(pids, 0)
    assert checkpoints_in(checkpoints)
    launch(call, progress)
    assert steps[-1] == 4
    assert steps.count(1) == 1  # it went on
    assert open_store(place.uri, cache_dir=tmp_path).child(place.name).digests()
    assert_close(out, train("alone", **{**options, "processes": None}))


def test_sigterm_saves_and_another_number_of_processes_goes_on(
    data, sft, approved, train, tmp_path
):
    out, checkpoints, heard, told = tmp_path / "out", tmp_path / "c", [], []
    out.mkdir()
    long = {"total_episodes": 16 * 40, "checkpoint_every": 100}
    config = toys.changed(toys.PPO, processes=2, **long)

    def progress(step, total, metrics):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    inputs = {"data": data, "sft": sft, "reward-model": approved.subject}
    call = job("policy", config, out, inputs, verdict=approved.verdict, checkpoints=checkpoints)
    before = signal.signal(
        signal.SIGTERM, lambda *_: heard.append([p.name for p in checkpoints_in(checkpoints)])
    )
    try:
        with pytest.raises(Interrupted, match=r"SIGTERM after update \d+ of 40: saved"):
            launch(call, progress)
    finally:
        signal.signal(signal.SIGTERM, before)
    ((saved,),) = heard
    train("on", checkpoints=checkpoints, told=told.append, **long)
    assert f"update-{told[0] - 1:06d}" == saved
    assert told[-1] == 40


PARENT = """
import sys
from pathlib import Path
from rlhf.launch import Job, launch, train
job = Job.model_validate_json(Path(sys.argv[1]).read_text())
launch(job, lambda *_: (job.out_dir / "trains").touch())
"""


def test_killed_with_the_parent(data, sft, approved, tmp_path):
    endless = toys.changed(toys.PPO, processes=2, total_episodes=16 * 10**4)
    inputs = {"data": data, "sft": sft, "reward-model": approved.subject}
    sent = job("policy", endless, tmp_path, inputs, verdict=approved.verdict)
    (tmp_path / "job.json").write_text(sent.model_dump_json())
    script = [sys.executable, "-c", PARENT, str(tmp_path / "job.json")]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "t")}
    with subprocess.Popen(script, cwd=ROOT, env=environment) as parent:
        while not (tmp_path / "trains").exists():
            assert parent.poll() is None
            time.sleep(0.1)
        pids = [*running(tmp_path / "t").values()]
        parent.kill()
    assert len(pids) == 2
    assert gone(pids)
    end = time.monotonic() + PATIENCE
    while [*(tmp_path / "t").iterdir()] and time.monotonic() < end:
        time.sleep(0.05)


@pytest.mark.parametrize(
    "section", [toys.SFT, toys.REWARD, toys.PPO, toys.changed(toys.PPO, **EVERYTHING)]
)
def test_a_job_is_the_same_in_another_process(section, approved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sent = job("x", section, Path("out"), {"data": Path("data")}, verdict=approved.verdict)
    received = Job.model_validate_json(sent.model_dump_json())
    assert type(received.section) is type(section)
    here = {"inputs": {"data": tmp_path / "data"}, "out_dir": tmp_path / "out"}
    assert received == sent.model_copy(update=here)


# --- shares ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["inverse_cdf", "multinomial"])
def test_shares_of_a_chunk_are_the_chunk(policy, renderer, sampler):
    prompts = [renderer.encode_prompt(p, 40) for p in ("tea?", "cup or jar?", "pot", "a mug?", "b")]
    sampling = Sampling(8, sampler=sampler)
    whole = generate(policy, prompts, renderer.tokenizer, sampling, 3)
    shares = [Ranks(rank, 3).share(5) for rank in range(3)]
    parts = [generate(policy, prompts, renderer.tokenizer, sampling, 3, own=own) for own in shares]
    both = concatenate(parts, renderer.tokenizer.pad_token_id)
    for name in ("ids", "attention", "mask", "finished"):
        assert torch.equal(getattr(both, name), getattr(whole, name)), name


@pytest.mark.parametrize(
    ("section", "values", "text"),
    [
        (SFTConfig, {"batch_size": 16, "processes": 3}, r"batch_size = 16 can't be shared evenly"),
        (
            SFTConfig, {"batch_size": 16, "processes": 4, "micro_batch_size": 8},
            None,
        ),
        (
            SFTConfig, {"batch_size": 24, "processes": 2, "micro_batch_size": 8},
            r"micro_batch_size = 8 must divide 12",
        ),
        (SFTConfig, {"sharding": "fsdp"}, r"set processes too"),
        (
            RewardModelConfig, {"sharding": "fsdp", "processes": 2, "lm_loss_coef": 0.1},
            r"lm_loss_coef = 0.1.*set sharding to ddp",
        ),
        (PPOConfig, {"sharding": "fsdp", "processes": 2}, r"sharding = 'fsdp' is not for PPO"),
        (PPOConfig, {"mini_batch_size": 5, "processes": 2}, r"mini_batch_size = 5 can't be shared"),
    ],
)  # fmt: skip
def test_what_can_not_be_shared_is_refused(section, values, text):
    if text is None:
        section(**values)
        return
    with pytest.raises((ConfigError, ValueError), match=text):
        section(**values)


def test_where_it_runs_is_no_part_of_what_is_learnt():
    here = PipelineConfig()
    there = PipelineConfig(
        sft={"processes": 2, "sharding": "fsdp"}, reward_model={"processes": 2},
        ppo={"processes": 2},
    )  # fmt: skip
    for stage in STAGES.values():
        assert stage.depends_on(there) == stage.depends_on(here), stage.name
