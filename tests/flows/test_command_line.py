"""The `rlhf` command in a process of its own, as a user starts it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from prefect.settings import PREFECT_API_URL

from flows.pipeline import pipeline
from rlhf.config import load_config
from rlhf.store.manifest import sha256_bytes
from tests.flows.conftest import tiny_tree
from tests.servers import PATIENCE

pytestmark = pytest.mark.prefect
ROOT = Path(__file__).parents[2]


@pytest.fixture
def preset(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_tree(tmp_path)))
    return path


@pytest.fixture
def environment(tmp_path):
    """The session's Prefect server; a server of its own per command would cost 10 s each."""
    keys = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing"}
    url = {"PREFECT_API_URL": str(PREFECT_API_URL.value())}
    return {**bare_environment(tmp_path), **url, **keys}


def bare_environment(tmp_path):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    return {**clean, "PREFECT_HOME": str(tmp_path / "prefect"), "COLUMNS": "160"}


@pytest.fixture
def rlhf(environment):
    def call(*args, env=environment):
        command = [sys.executable, "-m", "flows.cli", *map(str, args)]
        return subprocess.run(
            command,
            env=env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    return call


def test_run_reject_stage_artifacts(rlhf, preset, tmp_path):
    # As on a fresh machine: no server, so the command starts Prefect's ephemeral API.
    ran = rlhf("run", preset, env=bare_environment(tmp_path))
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr
    for part in ("train-policy", "reward", "kl", "ETA", "before (SFT)", "after (PPO)", "report: "):
        assert part in ran.stdout
    report = Path(ran.stdout.split("report: ")[1].strip())
    assert report.read_text().startswith("<!doctype html>")

    rejected = rlhf("run", preset, "--gates.policy", '[{"metric": "sampled.kl", "max": -9}]')
    assert rejected.returncode == 3
    assert "GateRejected" in rejected.stdout
    assert "sampled.kl" in rejected.stderr
    assert "report: " in rejected.stdout

    alone = rlhf("stage", "evaluate-reward-model", "--config", preset, "--evaluation.batch_size=7")
    assert alone.returncode == 0, alone.stderr
    assert "completed" in alone.stdout
    digest = alone.stdout.split("artifact ")[1].strip()

    store = ("--store", tmp_path / "store")
    listed = rlhf("artifacts", "ls", *store)
    assert digest[:12] in listed.stdout
    shown = json.loads(rlhf("artifacts", "show", digest[:12], *store).stdout)
    assert shown["kind"] == "evaluation"
    assert str(tmp_path) not in json.dumps(shown)
    tree = rlhf("artifacts", "lineage", digest[:12], *store)
    assert "sft:" in tree.stdout
    assert "data:" in tree.stdout

    assert rlhf("artifacts", "pull", digest[:12], tmp_path / "copy", *store).returncode == 0
    copied = {p.name: sha256_bytes(p.read_bytes()) for p in (tmp_path / "copy").iterdir()}
    assert copied == {entry["path"]: entry["sha256"] for entry in shown["files"]}
    again = rlhf("artifacts", "pull", digest[:12], tmp_path / "copy", *store)
    assert (again.returncode, "is there already" in again.stderr) == (2, True)

    model = shown["parents"]["reward-model"]
    given = ("--input", f"reward-model={model[:12]}")
    with_input = rlhf("stage", "evaluate-reward-model", "--config", preset, *given)
    assert "cached" in with_input.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--ppo.kl_coef=-1"], 2, ["ppo.kl_coef", "-1"]),
        (["--ppo.klcoef=1"], 2, ["ppo.klcoef", "ppo.kl_coef"]),
        (
            ["--data.source=/no/such.jsonl", "--evaluation.judge=none"],
            2,
            ["data.source", "/no/such.jsonl"],
        ),
        (["--runtime.work_dir=/proc/nope"], 2, ["runtime.work_dir", "/proc/nope"]),
        (["--store=/proc/nope"], 2, ["/proc/nope"]),
        (
            ["--store=s3://bucket/x", "--store_options.endpoint_url=http://127.0.0.1:9"],
            2,
            ["s3://bucket/x", "127.0.0.1:9"],
        ),
        (["--base.path=/no/model"], 2, ["base.path", "/no/model"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_any_work(rlhf, preset, tmp_path, arguments, code, words):
    result = rlhf("run", preset, *arguments)
    assert result.returncode == code
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr
    assert not list((tmp_path / "work").glob("checkpoints/*"))


def test_empty_data_is_bad_input(rlhf, preset, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    result = rlhf("run", preset, f"--data.source={empty}", "--evaluation.judge=none")
    assert result.returncode == 2
    assert "data.source" in result.stderr


def test_config_show_tells_where_each_value_came_from(rlhf, preset):
    result = rlhf("config", "show", preset, "--ppo.kl-coef=0.2")
    rows = {line.split("│")[1].strip(): line for line in result.stdout.splitlines() if "│" in line}
    assert "command line" in rows["ppo.kl_coef"]
    assert "0.2" in rows["ppo.kl_coef"]
    assert "tiny.yaml" in rows["ppo.chunk_size"]
    assert "default" in rows["ppo.gamma"]


def test_values_outside_their_advised_range_are_named_once_before_work(rlhf, preset):
    line = "warning: ppo.gamma = 1 is outside the advised 0.9–0.99; keep it only if you mean it\n"
    for command in (
        ["config", "show", preset], ["run", preset, "--data.source=/no/such.jsonl"],
        ["stage", "prepare-data", "--config", preset, "--data.source=/no/such.jsonl"],
    ):  # fmt: skip
        result = rlhf(*command, "--rl-gamma", "1", "--evaluation.judge=none")
        assert result.stderr.startswith(line)
        assert result.stderr.count("advised") == 1
    assert "advised" not in rlhf("config", "show", preset).stderr


def test_flags_and_rl_names_reach_the_configuration(rlhf, preset):
    options = ["--no-rl-optimize-device-cache", "--rl-kl-coef", "0.25", "--rl_gamma=0.9"]
    result = rlhf("config", "show", preset, *options, "--ppo.kl-audit", "--rl-top-k", "3")
    rows = {line.split("│")[1].strip(): line for line in result.stdout.splitlines() if "│" in line}
    shown = {name: row.split("│")[2].strip() for name, row in rows.items()}
    assert shown["ppo.optimize_device_cache"] == "false"
    assert (shown["ppo.kl_coef"], shown["ppo.gamma"]) == ("0.25", "0.9")
    assert (shown["ppo.kl_audit"], shown["ppo.top_k"]) == ("true", "3")


def test_warnings_of_the_library_are_shown_beside_prefects_own_log(environment):
    """A damaged checkpoint, say; Prefect's log handlers are silent but with --verbose."""
    script = (
        "import logging; from flows.cli import prepare_prefect; prepare_prefect(False); "
        "import flows.pipeline; logging.getLogger('rlhf.ppo').warning('is %s', 'damaged')"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stderr == "warning: is damaged\n"


def test_unknown_stage_missing_input_and_bad_role(rlhf, preset):
    assert "choose one of" in rlhf("stage", "nope", "--config", preset).stderr
    missing = rlhf("stage", "train-policy", "--config", preset)
    assert missing.returncode == 2
    assert "rlhf stage prepare-data" in missing.stderr
    bad = rlhf("stage", "train-sft", preset, "--input", "sft")
    assert "role=artifact" in bad.stderr


def test_killed_in_ppo_goes_on_from_the_last_checkpoint(
    rlhf, preset, environment, finished, tmp_path
):
    """kill -9 in mid-PPO, then the same command: earlier stages are cached, PPO resumes, and the
    policy has the very bytes of an undisturbed run.
    """
    slow = ["--ppo.total_episodes=160", "--ppo.checkpoint_every=2"]
    command = [sys.executable, "-m", "flows.cli", "run", str(preset), *slow]
    process = subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    pattern = "work/checkpoints/train-policy-*/update-*"
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and not list(tmp_path.glob(pattern)):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    saved = sorted(p.name for p in tmp_path.glob(pattern))
    assert saved
    assert saved[-1] < "update-000020"

    resumed = rlhf("run", preset, *slow, "--runtime.report_dir", tmp_path / "reports")
    assert resumed.returncode == 0, resumed.stderr
    rows = [line for line in resumed.stdout.splitlines() if line.startswith("│")]
    state = {row.split("│")[1].strip(): row.split("│")[2].strip() for row in rows if "│" in row}
    assert state["train-sft"] == state["train-reward-model"] == "Cached"
    assert state["train-policy"] == "Completed"
    first_step = next(x for x in resumed.stdout.splitlines() if x.startswith("train-policy "))
    assert int(first_step.split()[1].split("/")[0]) > int(saved[-1][-6:])

    # The undisturbed run, in this process: its libraries are loaded already.
    other_store = shutil.copytree(finished, tmp_path / "other")
    other = [f"--store={other_store}", f"--runtime.work_dir={tmp_path / 'other-work'}"]
    undisturbed = pipeline(overrides=load_config(preset, [*slow, *other]).config)
    assert undisturbed.refs["train-policy"].digest[:10] == policy_digest(resumed.stdout)


def policy_digest(stdout):
    row = next(x for x in stdout.splitlines() if x.startswith("│ train-policy"))
    return row.split("│")[5].strip()
