"""The mistakes of docs/mistakes.md, made again: each gives the message that stands there."""

from __future__ import annotations

import csv
import errno
import importlib.util
import json
import logging
import os
import shlex
import shutil
import sys
import tomllib
from contextvars import copy_context
from pathlib import Path

import pytest
import torch
from prefect.settings import PREFECT_API_URL, temporary_settings

from docs.generate_mistakes import MISTAKES, Mistake, page
from flows import cli
from rlhf import gates
from rlhf.checkpoints import folder as checkpoints
from rlhf.config import ArchitectureConfig, GateRule
from rlhf.errors import ConfigError, GateRejected, StoreError
from rlhf.modeling.base import from_scratch
from rlhf.modeling.tokenizer import load_tokenizer
from rlhf.store.local import LocalBackend
from tasks import prefect_server
from tests.flows.conftest import _restored_process

ROOT = Path(__file__).parents[1]
COMMANDS = [m for m in MISTAKES if m.key in ("", "cuda", "credentials", "wandb", "llama_cpp")]
BY_KEY = {m.key: m for m in MISTAKES if m.key}
CONFIG = """
data: {source: pairs.jsonl}
base: {path: base}
sft: {max_length: 128}
reward_model: {max_length: 128}
ppo: {max_new_tokens: 16}
judge: {enabled: false}
gates: {reward_model: none, policy: none}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A user's folder with data, a configuration, and models good and bad."""
    folder = tmp_path_factory.mktemp("project")
    rows = [
        {"prompt": f"What is {i}?", "chosen": f"good {i}", "rejected": f"bad {i * 7}"}
        for i in range(40)
    ]
    prompts = [{"prompt": row["prompt"]} for row in rows]
    for name, lines in {"pairs": rows, "prompts": prompts}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with (folder / "notes.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "text"), *((i, "good quiet") for i in range(40))])
    (folder / "mine.yaml").write_text(CONFIG)
    (folder / "typo.yaml").write_text("ppo: {kl_coeff: 0.1}\n")
    architecture = ArchitectureConfig(
        hidden_size=16, layers=1, heads=2, intermediate_size=32, vocab_size=300, context=256
    )
    model, tokenizer = from_scratch(architecture, ["good bad"], seed=3)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    shutil.copytree(folder / "base", folder / "pickled")
    (folder / "pickled" / "model.safetensors").rename(folder / "pickled" / "pytorch_model.bin")
    (folder / "not-a-model").mkdir()
    shutil.copytree(folder / "base", folder / "plain")
    (folder / "plain" / "chat_template.jinja").unlink()
    return folder


@pytest.fixture
def rlhf(project, monkeypatch, capfd):
    """Function that runs a command in the user's folder, in this process."""
    monkeypatch.chdir(project)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HF_HUB_OFFLINE", "AWS_EC2_METADATA_DISABLED", "RLHF_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["rlhf", *words])
        capfd.readouterr()
        # A test of the flows in this process may have set a server's address.
        no_server = temporary_settings(restore_defaults={PREFECT_API_URL})
        with no_server, _restored_process(), pytest.raises(SystemExit) as end:
            copy_context().run(cli.main)
        shown = capfd.readouterr()
        return end.value.code or 0, (shown.out + shown.err).replace(
            str(project), "/home/me/project"
        )

    return call


@pytest.mark.parametrize("mistake", COMMANDS, ids=lambda mistake: mistake.title)
def test_a_command_says_what_the_page_says(rlhf, mistake: Mistake):
    if mistake.key in ("wandb", "llama_cpp") and importlib.util.find_spec(mistake.key):
        pytest.skip("that package is installed here")
    if mistake.key == "cuda" and torch.cuda.is_available():
        pytest.skip("there is such a device here")
    code, shown = rlhf(*shlex.split(mistake.command.replace('"', '\\"')))
    assert f"error: {mistake.message}\n" in shown, shown
    assert code == 2
    assert "Traceback" not in shown


def test_a_policy_without_a_verdict_is_not_promoted(rlhf):
    code, shown = rlhf("artifacts", "push", "base", "policy", "--store", "other")
    digest = shown.split("artifact ")[1].split()[0]
    code, shown = rlhf("promote", digest, "--store", "other")
    message = BY_KEY["unapproved"].message.partition(": ")[2]
    assert (code, shown.partition(": ")[2]) == (2, f"{digest[:12]}: {message}\n")


def test_debug_shows_the_traceback_wherever_it_stands(rlhf):
    for words in (("--debug", "run", "typo.yaml"), ("run", "typo.yaml", "--debug"),
                  ("artifacts", "--debug", "show", "abcdef")):  # fmt: skip
        code, shown = rlhf(*words)
        assert (code, "Traceback (most recent call last)" in shown) == (2, True)
        assert "\nerror: " in shown
    # It holds for that command alone, and what follows `--` is the old tool's.
    assert "Traceback" not in rlhf("run", "typo.yaml")[1]
    assert "--debug" in rlhf("--help")[1]
    assert "Traceback" not in rlhf("migrate", "--", "x.py", "--debug", "1")[1]


def test_a_server_that_did_not_start_is_no_fault_of_the_program():
    error = RuntimeError("Timed out while attempting to connect to ephemeral Prefect API server.")
    assert "run the same again" in str(prefect_server.not_started(error))
    assert prefect_server.not_started(RuntimeError("other")) is None


def test_what_needs_no_command(project, monkeypatch, caplog, tmp_path):
    monkeypatch.chdir(project)
    monkeypatch.setattr(logging.getLogger("rlhf"), "propagate", True)
    with caplog.at_level(logging.WARNING, "rlhf"):
        load_tokenizer("plain")
    assert BY_KEY["template"].message in caplog.messages

    digest = "ab" * 32
    rules = [GateRule(metric="accuracy", min=0.55)]
    verdict = gates.judge("gate-reward-model", digest, {"accuracy": 0.48}, rules)
    with pytest.raises(GateRejected) as rejected:
        gates.require(None, digest, verdict)
    assert str(rejected.value) == BY_KEY["gate"].message

    monkeypatch.setattr(checkpoints, "LOCK_TIMEOUT", 0.0)
    monkeypatch.chdir(tmp_path)
    with (
        checkpoints.exclusive(Path("work")),
        pytest.raises(ConfigError) as locked,
        checkpoints.exclusive(Path("work")),
    ):
        pass
    assert str(locked.value) == BY_KEY["lock"].message

    # A disk can't be filled here; the error is that of a write to one.
    backend = LocalBackend(Path("/home/me/project/.rlhf/store"))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(StoreError) as told, backend._translated("write", "blobs/3f2a91c04d"):
        raise full
    assert str(told.value) == BY_KEY["disk"].message

    project_file = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert BY_KEY["python"].message.endswith(f"not in {project_file['requires-python']!r}")
    words = (ROOT / "tasks" / "remote.py").read_text()
    for part in BY_KEY["worker"].message.split("train-policy/train-policy-gpu")[1].split("gpu"):
        assert part.strip("`: ,").split("`, ")[0] in words.replace('"\n                "', "")


def test_the_page_is_up_to_date():
    shown = (ROOT / "docs" / "mistakes.md").read_text(encoding="utf-8")
    assert page() == shown, "run: python -m docs.generate_mistakes > docs/mistakes.md"
    assert len(MISTAKES) >= 20
    assert "(docs/mistakes.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
