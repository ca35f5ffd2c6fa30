"""The `rlhf` command as a user starts it; in a process of its own where that is the point."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from prefect.settings import PREFECT_API_URL

from rlhf.config import presets
from rlhf.store.manifest import sha256_bytes
from tests.flows.conftest import tiny_tree
from tests.servers import PATIENCE

pytestmark = pytest.mark.prefect
ROOT = Path(__file__).parents[2]
#: PPO of 20 updates, with enough time between its first checkpoint and its end for a kill.
SLOW = ["--ppo.total_episodes=160", "--ppo.checkpoint_every=2"]


def write_preset(folder: Path) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_tree(folder)))
    return path


@pytest.fixture
def preset(tmp_path):
    return write_preset(tmp_path)


def bare_environment(folder):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    return {**clean, "PREFECT_HOME": str(folder / "prefect"), "COLUMNS": "160"}


def environment(folder):
    """The session's Prefect server; a server of its own per command would cost 10 s each."""
    keys = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing"}
    url = {"PREFECT_API_URL": str(PREFECT_API_URL.value())}
    return {**bare_environment(folder), **url, **keys}


def rlhf_process(*arguments, env):
    """The command in a process of its own, until its end."""
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *map(str, arguments)],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@dataclass(frozen=True)
class Resumed:
    """A run from nothing that was killed in mid-PPO, and the same command again."""

    killed: str
    checkpoints: list[str]
    done: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def resumed(prefect_api, tmp_path_factory) -> Resumed:
    """The module's two whole runs in processes: one is killed, the other goes on to the end."""
    folder = tmp_path_factory.mktemp("killed")
    preset = write_preset(folder)
    shown = folder / "shown"
    with shown.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", "run", str(preset), *SLOW],
            env=environment(folder), cwd=ROOT, stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
    pattern = "work/checkpoints/train-policy-*/update-*"
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and not list(folder.glob(pattern)):
        assert process.poll() is None, shown.read_text()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    checkpoints = sorted(path.name for path in folder.glob(pattern))
    # As on a fresh machine: no server, so the command starts Prefect's ephemeral API.
    done = rlhf_process("run", preset, *SLOW, env=bare_environment(folder))
    return Resumed(shown.read_text(), checkpoints, done)


def test_run_shows_progress_stages_replies_and_report(resumed):
    done = resumed.done
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in resumed.killed + done.stderr
    for part in ("train-sft", "loss", "train-reward-model", "accuracy", "ETA"):
        assert part in resumed.killed
    for part in ("train-policy", "reward", "kl", "ETA", "before (SFT)", "after (PPO)", "report: "):
        assert part in done.stdout
    report = Path(done.stdout.split("report: ")[1].strip())
    assert report.read_text().startswith("<!doctype html>")


def test_killed_in_ppo_goes_on_from_the_last_checkpoint(rlhf, preset, resumed, finished):
    """kill -9 in mid-PPO, then the same command: earlier stages are cached, PPO resumes, and the
    policy has the very bytes of an undisturbed run.
    """
    saved = resumed.checkpoints
    assert saved
    assert saved[-1] < "update-000020"
    stdout = resumed.done.stdout
    # A stage's line: name, state, time, artifact. Progress lines have a colon after the name.
    rows = {line.split()[0]: line.split() for line in stdout.splitlines() if line[:1].isalpha()}
    state = {name: row[1] for name, row in rows.items() if len(row) > 1}
    assert state["train-sft"] == state["train-reward-model"] == "Cached"
    assert state["train-policy"] == "Completed"
    first_step = re.search(r"^train-policy: (\d+)/", stdout, re.MULTILINE)
    assert first_step
    assert int(first_step[1]) > int(saved[-1][-6:])

    # The undisturbed training, in this process: its libraries are loaded already.
    alone = rlhf("stage", "train-policy", "--config", preset, *SLOW)
    assert "completed" in alone.stdout, alone.stderr
    assert alone.stdout.split("artifact ")[1][:10] == rows["train-policy"][-1]


def test_reject_stage_artifacts(rlhf, preset, finished, tmp_path):
    rejected = rlhf("run", preset, "--gates.policy", '[{"metric": "sampled.kl", "max": -9}]')
    assert rejected.returncode == 3
    assert "GateRejected" in rejected.stdout
    error = rejected.stderr.splitlines()[-1]
    assert error.startswith("error: ")
    assert "sampled.kl" in error
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
    assert "\nreward model: accuracy " in with_input.stdout


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


def test_bad_input_ends_a_process_with_one_line(preset, tmp_path):
    """With boto3 in it, which has warnings and a log of its own."""
    away = ["--store=s3://bucket/x", "--store_options.endpoint_url=http://127.0.0.1:9"]
    result = rlhf_process("run", preset, *away, env=environment(tmp_path))
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for word in ("s3://bucket/x", "127.0.0.1:9"):
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


@pytest.mark.parametrize("name", presets())
def test_no_command_warns_of_a_shipped_presets_own_values(rlhf, name):
    path = ROOT / "configs" / f"{name}.yaml"
    missing = ["--data.source=/no/such.jsonl", "--evaluation.judge=none"]
    for command in (["run", path], ["stage", "prepare-data", "--config", path]):
        result = rlhf(*command, *missing)
        assert result.stderr.startswith("error: data.source = '/no/such.jsonl'"), result.stderr
        assert result.stderr.count("\n") == 1
    assert rlhf("config", "show", path).stderr == ""


def test_flags_and_rl_names_reach_the_configuration(rlhf, preset):
    options = ["--no-rl-optimize-device-cache", "--rl-kl-coef", "0.25", "--rl_gamma=0.9"]
    result = rlhf("config", "show", preset, *options, "--ppo.kl-audit", "--rl-top-k", "3")
    rows = {line.split("│")[1].strip(): line for line in result.stdout.splitlines() if "│" in line}
    shown = {name: row.split("│")[2].strip() for name, row in rows.items()}
    assert shown["ppo.optimize_device_cache"] == "false"
    assert (shown["ppo.kl_coef"], shown["ppo.gamma"]) == ("0.25", "0.9")
    assert (shown["ppo.kl_audit"], shown["ppo.top_k"]) == ("true", "3")


def test_warnings_of_the_library_are_shown_beside_prefects_own_log(tmp_path):
    """A damaged checkpoint, say; Prefect's log handlers are silent but with --verbose."""
    script = (
        "import logging; from flows.cli import prepare_prefect; prepare_prefect(False); "
        "import flows.pipeline; logging.getLogger('rlhf.ppo').warning('is %s', 'damaged')"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, env=environment(tmp_path), cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stderr == "warning: is damaged\n"


def test_unknown_stage_missing_input_and_bad_role(rlhf, preset):
    assert "choose one of" in rlhf("stage", "nope", "--config", preset).stderr
    missing = rlhf("stage", "train-policy", "--config", preset)
    assert missing.returncode == 2
    assert "rlhf stage prepare-data" in missing.stderr
    bad = rlhf("stage", "train-sft", preset, "--input", "sft")
    assert "role=artifact" in bad.stderr
