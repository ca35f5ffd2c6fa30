"""`rlhf config show` and `rlhf config metrics`: filter, meanings, JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows.configurations import metrics, show
from rlhf.config import load_config
from rlhf.config.fields import first_sentence, meaning_of
from rlhf.config.load import PRESETS
from rlhf.config.metric_meanings import ALIKE, PARTS, metric_meanings
from rlhf.config.metric_names import ENDS, METRICS
from rlhf.errors import ConfigError
from tasks.console import console


@pytest.fixture
def shown(capsys, monkeypatch):
    monkeypatch.setattr(console, "_width", 80)

    def call(command, *words, **options) -> str:
        capsys.readouterr()
        command(*words, **options)
        return capsys.readouterr().out

    return call


def test_every_field_has_a_meaning():
    rows = load_config(None, []).rows()
    assert [key for key, _, _ in rows if not meaning_of(key)] == []
    assert meaning_of("ppo.kl_coef").startswith("Weight of the per-token KL penalty")
    assert meaning_of("no.such.field") == ""
    assert first_sentence("Of 1.5 nats, e.g. of\n  `x`. Then B.") == "Of 1.5 nats, e.g. of `x`."


def test_a_word_filters_by_name_and_else_by_meaning(shown):
    preset = PRESETS / "quickstart.yaml"
    rows = json.loads(shown(show, preset, "ppo", "--ppo.kl_coef=0.07", json=True))
    assert all("ppo" in row["field"] for row in rows)
    kl = next(row for row in rows if row["field"] == "ppo.kl_coef")
    assert (kl["value"], kl["from"]) == (0.07, "command line")
    assert kl["meaning"].startswith("Weight of")
    # Neither a file nor an override: the first word filters too, and all words count.
    assert "ppo.kl_coef" in shown(show, Path("ppo"), "kl_coef")
    assert "sft.lora" not in shown(show, Path("ppo"), filter="lora")
    out = shown(show, filter="KL penalty")
    assert "ppo." in out
    assert "sft." not in out
    with pytest.raises(ConfigError, match=r"'kl_coeff': no field.*did you mean ppo\.kl_coef"):
        show(Path("kl_coeff"))
    with pytest.raises(ConfigError, match="no such file"):
        show(Path("configs/none.yaml"))


def test_meanings_are_below_at_eighty_columns_and_beside_on_wide_ones(shown, monkeypatch):
    assert "Weight of" not in shown(show, filter="kl_coef")
    below = shown(show, filter="kl_coef", explain=True)
    assert below.startswith("ppo.kl_coef = 0.1  (default)\n    Weight of the per-token KL penalty")
    assert max(map(len, below.splitlines())) <= 80
    monkeypatch.setattr(console, "_width", 160)
    assert "Weight of the per-token" in shown(show, filter="kl_coef")


@pytest.mark.parametrize("gate", METRICS)
def test_every_metric_of_a_gate_has_a_meaning(gate):
    found = {each.name: each for each in metric_meanings(gate)}
    names = {
        f"{path}.{leaf}" if path else leaf
        for path, part in METRICS[gate].items()
        for leaf in part.names()
        if not leaf.endswith(ENDS)
    }
    assert found.keys() == names
    assert PARTS[gate].keys() == METRICS[gate].keys()
    for part, like in ALIKE.items():
        if part in METRICS[gate]:
            assert {*METRICS[gate][part].names()} <= {*METRICS[gate][like].names()}
    assert all(each.meaning and len(each.meaning) < 100 for each in found.values())


def test_metrics_are_listed_filtered_and_as_json(shown):
    out = shown(metrics)
    assert max(len(line.rstrip()) for line in out.splitlines()) <= 100
    for text in ("sampled.win_rate ±", "tokens_after/_before", "as sampled", "[judge]"):
        assert text in out, text
    assert "champion.win_rate" not in out
    own = shown(metrics, "champion.win", gate="policy")
    assert "champion.win_rate ±" in own
    assert "gates.reward_model" not in own
    rows = json.loads(shown(metrics, json=True))
    row = next(row for row in rows if row["name"] == "champion.judge_win_rate")
    assert row["needs"] == ["champion", "judge"]
    assert row["has_interval"]
    with pytest.raises(ConfigError, match="'nothing': no metric"):
        metrics("nothing")
