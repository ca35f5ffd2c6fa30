"""Custom reward code as a part of a stage's fingerprint."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from rlhf.config import PipelineConfig
from rlhf.custom_code import ALLOWED
from rlhf.errors import ConfigError
from tasks.external_inputs import check_services, reward_function_digests
from tasks.runner import fingerprint
from tasks.stages import STAGES

FORMS = [
    {"reward_fn": "custom", "custom": {"function": "mine.py:reward"}},
    {"env_type": "preference_comparison",
     "env_config": {"judge": "custom", "custom": {"function": "mine:reward"}}},
    {"env_type": "multi_objective",
     "env_config": {"components": {"own": {"type": "custom", "function": "mine:reward"}}}},
]  # fmt: skip


@pytest.mark.parametrize("ppo", FORMS)
def test_changed_code_is_other_work(ppo, tmp_path, monkeypatch):
    monkeypatch.setenv(ALLOWED, str(tmp_path))
    config = PipelineConfig.model_validate({"ppo": ppo})
    file = tmp_path / "mine.py"

    def key():
        return fingerprint(STAGES["train-policy"], config, {})

    with pytest.raises(ConfigError, match=r"no such (file|module)"):
        key()
    file.write_text("def reward(batch):\n    return [0.0 for _ in batch]\n")
    first = key()
    assert key() == first
    file.write_text("def reward(batch):\n    return [1.0 for _ in batch]\n")
    assert key() != first
    monkeypatch.delenv(ALLOWED)
    with pytest.raises(ConfigError, match="not allowed here"):
        key()


def test_nothing_of_others():
    assert reward_function_digests(PipelineConfig().ppo) == {}


def test_a_changed_pair_model_is_other_work(tmp_path):
    config = {
        "architectures": ["LlamaForSequenceClassification"],
        "model_type": "llama",
        "num_labels": 1,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = {"judge": "pair_model", "pair_model": str(tmp_path)}
    ppo = {"env_type": "preference_comparison", "env_config": options}
    config = PipelineConfig.model_validate({"ppo": ppo}).ppo
    save_file({"one": torch.zeros(1)}, tmp_path / "model.safetensors")
    before = reward_function_digests(config)
    save_file({"two": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert reward_function_digests(config) != before


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("none/such", "is no folder; give that of"),
        ("~nosuchuser/x", "is no folder; give that of"),
        ("s3://bucket/model", "is no folder; give that of"),
        (".", "no model there"),
    ],
)
def test_a_pair_model_is_looked_at_before_any_work(tmp_path, monkeypatch, folder, reason):
    monkeypatch.chdir(tmp_path)
    options = {"judge": "pair_model", "pair_model": folder}
    ppo = {"env_type": "preference_comparison", "env_config": options}
    with pytest.raises(ConfigError, match=rf"ppo\.env_config\.pair_model = '.*': {reason}"):
        reward_function_digests(PipelineConfig.model_validate({"ppo": ppo}).ppo)


def test_tokens_are_looked_for_before_any_work(monkeypatch):
    monkeypatch.delenv("RLHF_ALLOWED_TOKENS", raising=False)
    remote = {"type": "remote", "url": "https://host/", "token_env": "AWS_SECRET_ACCESS_KEY"}
    ppo = {"env_type": "multi_objective", "env_config": {"components": {"x": remote}}}
    with pytest.raises(ConfigError, match=r"ppo\.env_config\.components\.x: token_env = 'AWS_"):
        check_services(PipelineConfig.model_validate({"ppo": ppo}).ppo)
