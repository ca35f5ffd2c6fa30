"""`compat`: the values of each peer, and explicit values that override them."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from rlhf.config import PPOConfig, load_config
from rlhf.config.ppo import COMPAT


def test_where_a_peers_choices_came_from():
    loaded = load_config(None, ["--ppo.compat=trl", "--ppo.missing_eos=none"])
    rows = {key: (value, origin) for key, value, origin in loaded.rows()}
    assert rows["ppo.score_position"] == (COMPAT["trl"]["score_position"], "compat=trl")
    assert rows["ppo.missing_eos"] == ("none", "command line")
    assert rows["ppo.gamma"] == ("0.99", "default")
    assert rows["gates.policy"][0].startswith('[{"metric": "')


@pytest.mark.parametrize("peer", COMPAT)
def test_a_peer_sets_its_options_and_given_ones_win(peer):
    config = PPOConfig(compat=peer)
    for name, value in COMPAT[peer].items():
        assert getattr(config, name) == value
    assert COMPAT[peer].keys() >= {"score_position", "whiten_variance", "missing_eos", "kl_clamp"}
    assert PPOConfig(compat=peer, kl_clamp=3, missing_eos="replace").kl_clamp == 3
    assert PPOConfig.model_validate(config.model_dump()) == config


def test_verl_clamps_its_k3_alone():
    assert PPOConfig(compat="verl", kl_estimator="k3").kl_clamp == 10
    assert PPOConfig(compat="verl", kl_estimator="k2").kl_clamp is None
    assert PPOConfig(compat="verl", kl_estimator="k3", kl_clamp=None).kl_clamp is None


def test_an_adaptive_controller_must_be_able_to_move():
    with pytest.raises(ValidationError, match="kl_coef = 0 stays 0"):
        PPOConfig(kl_controller="adaptive", kl_coef=0)
    with pytest.raises(ValidationError, match="kl_horizon = 20 lets one chunk of 128 replies"):
        PPOConfig(kl_controller="adaptive", kl_horizon=20)
    assert PPOConfig(kl_horizon=20, kl_coef=0).kl_controller == "fixed"
