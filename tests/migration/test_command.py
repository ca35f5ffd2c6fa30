"""The command `rlhf migrate`, in this process."""

from __future__ import annotations

import json
import sys
from subprocess import CompletedProcess

import pytest

from flows import cli
from tasks.console import console
from tests.migration.test_migrate import AITRAINING_PPO, TRL_PPO


@pytest.fixture
def rlhf(monkeypatch, capsys, tmp_path):
    """Function that runs the command in an empty folder, on a terminal of 80 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "_width", 80)

    def call(*arguments: str) -> CompletedProcess[str]:
        command = ["rlhf", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        shown = capsys.readouterr()
        return CompletedProcess(command, end.value.code or 0, shown.out, shown.err)

    return call


def test_a_file_is_migrated_and_shown(rlhf, tmp_path):
    (tmp_path / "ppo.sh").write_text(f"{TRL_PPO.strip()} --cliprang 0.3\n")
    done = rlhf("migrate", "ppo.sh")
    assert done.returncode == 0, done.stderr
    for heading in ("became", "changed in meaning", "never worked there", "no equal here",
                    "warning: not understood", "before a run"):  # fmt: skip
        assert f"\n{heading}\n" in f"\n{done.stdout}", heading
    assert "learning_rate = 3e-6 → ppo.learning_rate = 3e-06\n" in done.stdout
    assert "cliprang = 0.3: did you mean cliprange?" in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    assert done.stdout.endswith("next:    rlhf config show migrated.yaml\n")
    shown = rlhf("config", "show", "migrated.yaml")
    assert shown.returncode == 0, shown.stderr
    assert "ppo.total_episodes" in shown.stdout


def test_nothing_is_overwritten(rlhf, tmp_path):
    (tmp_path / "ppo.yaml").write_text("kl_coef: 0.2\n")
    (tmp_path / "mine.yaml").symlink_to("nowhere")
    done = rlhf("migrate", "ppo.yaml", "-o", "mine.yaml")
    assert done.returncode == 2
    assert "mine.yaml': is there already; nothing is overwritten" in done.stderr
    assert rlhf("migrate", "ppo.yaml", "--out=no/such/ours.yaml").returncode == 2
    assert rlhf("migrate", "ppo.yaml", "--out", "ours.yaml").returncode == 0
    written = (tmp_path / "ours.yaml").read_text()
    assert rlhf("migrate", "ppo.yaml", "--out", "ours.yaml").returncode == 2
    assert (tmp_path / "ours.yaml").read_text() == written
    assert {path.name for path in tmp_path.iterdir()} == {"ppo.yaml", "mine.yaml", "ours.yaml"}


def test_a_command_line_and_json(rlhf, tmp_path):
    done = rlhf("migrate", "--json", "--", *AITRAINING_PPO.split(), "--wandb-token", "secret123")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    fates = {argument["name"]: argument["fate"] for argument in told["arguments"]}
    assert (fates["rl_temperature"], fates["lr"]) == ("broken", "same")
    assert "secret123" not in done.stdout + (tmp_path / "migrated.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ((), "no arguments to migrate"),
        (("nothing.yaml",), "no such file"),
        (("--kl_coef", "0.1"), "a command line stands behind `--`"),
        (("x.yaml", "--trainer", "dpo"), "dpo"),
        (("--", "python", "train.py", "--seed", "1"), "--trainer sft, reward or ppo"),
        (("--", "aitraining", "llm", "--trainer", "grpo"), "trainer = 'grpo' has no equal here"),
        (("--", "trl", "dpo", "--beta", "0.1"), "dpo has no equal here"),
    ],
)
def test_a_wrong_call_is_one_line(rlhf, tmp_path, words, error):
    (tmp_path / "x.yaml").write_text("kl_coef: 0.2\n")
    done = rlhf("migrate", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert error in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "migrated.yaml").exists()
