"""Defaults that follow the base, and a preset's values for models from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf.config import (
    BaseModelConfig,
    LoraConfig,
    PipelineConfig,
    PPOConfig,
    RewardModelConfig,
    SFTConfig,
    load_config,
    load_preset,
    presets,
)
from rlhf.config.load import FROM_SCRATCH, PRETRAINED
from rlhf.config.pretrained import pretrained_defaults
from rlhf.errors import ConfigError
from tasks.stages import STAGES

BASE = "--base.path=some/model"
TRAINING = ("sft", "reward_model", "ppo", "evaluation")


def values(*overrides: str, preset: str | None = None) -> dict[str, tuple[str, str]]:
    path = f"configs/{preset}.yaml" if preset else None
    return {key: (value, source) for key, value, source in load_config(path, overrides).rows()}


def test_without_a_base_the_fields_own_defaults_hold():
    config = load_config().config
    assert config == PipelineConfig()
    assert (config.sft, config.reward_model, config.ppo) == (
        SFTConfig(), RewardModelConfig(), PPOConfig(),
    )  # fmt: skip
    assert pretrained_defaults({}) == {}


def test_with_a_base_learning_rates_are_those_of_the_literature():
    shown = values(BASE)
    expected = {
        "sft.learning_rate": 2e-5, "reward_model.learning_rate": 1e-5, "ppo.learning_rate": 3e-6,
        "ppo.critic_learning_rate": 1e-5, "ppo.kl_coef": 0.05, "ppo.gamma": 1.0,
        "ppo.top_k": 0, "ppo.num_ppo_epochs": 2, "ppo.mini_batch_size": 64,
        "sft.max_length": 1024, "sft.batch_size": 32, "sft.micro_batch_size": 8,
        "reward_model.max_length": 1024,
        # A tenth of ⌈4608 / 128⌉ = 36 updates, rounded.
        "ppo.lr_warmup_updates": 4,
    }  # fmt: skip
    assert {k: (float(shown[k][0]), shown[k][1]) for k in expected} == {
        key: (value, PRETRAINED) for key, value in expected.items()
    }
    assert shown["reward_model.pooling"] == ("last", "default")
    assert shown["reward_model.lm_loss_coef"] == ("0.0", "default")


@pytest.mark.parametrize("section", ["sft", "reward_model", "ppo"])
def test_adapters_learn_ten_times_as_fast(section):
    full, lora = values(BASE), values(BASE, f"--{section}.lora.r=8")
    key = f"{section}.learning_rate"
    assert float(lora[key][0]) == pytest.approx(10 * float(full[key][0]))
    assert lora[key][1] == PRETRAINED
    others = {k: v for k, v in lora.items() if k != key and ".lora" not in k}
    assert others == {k: v for k, v in full.items() if k != key and ".lora" not in k}


@pytest.mark.parametrize(
    ("overrides", "rate"),
    [
        ((), 1e-5),
        (("--ppo.critic=adapter",), 1e-4),
        (("--ppo.critic=head",), 1e-4),
        (("--ppo.shared_base=true", "--reward_model.lora.r=8"), 1e-4),
        (("--ppo.shared_base=True", "--reward_model.lora.r=8"), 1e-4),
        (("--ppo.shared_base=yes", "--reward_model.lora.r=8"), 1e-4),
        (("--ppo.shared_base=False",), 1e-5),
    ],
)
def test_a_critic_with_all_its_weights_learns_slower_than_an_adapter(overrides, rate):
    config = load_config(None, [BASE, "--ppo.lora.r=8", *overrides]).config
    assert config.ppo.critic_learning_rate == rate


@pytest.mark.parametrize("chunk", ["32", "32.0"])
def test_values_in_any_form_decide_over_defaults(chunk):
    config = load_config(None, [BASE, f"--ppo.chunk_size={chunk}"]).config
    assert (config.ppo.chunk_size, config.ppo.mini_batch_size) == (32, 32)


def test_the_warm_up_fits_behind_the_critics_own_updates():
    config = load_config(None, [BASE, "--ppo.critic_warmup_updates=33"]).config
    assert (config.ppo.updates, config.ppo.lr_warmup_updates) == (36, 0)


def test_values_of_the_users_own_win_whatever_their_form():
    given = ["--sft.learning_rate=1e-3", "--rl-kl-coef=0.1", "--ppo.critic_learning_rate=none"]
    config = load_config(None, [BASE, *given]).config
    assert (config.sft.learning_rate, config.ppo.kl_coef) == (1e-3, 0.1)
    assert config.ppo.critic_learning_rate is None
    # Equal to a default of the other kind, and still the user's.
    assert load_config(None, [BASE, "--rl-top-k=50"]).config.ppo.top_k == 50
    made = PipelineConfig(
        base=BaseModelConfig(path="some/model"),
        sft=SFTConfig(learning_rate=1e-3, lora=LoraConfig(r=4)),
        ppo=PPOConfig(env_type="text_generation", env_config={"stop_sequences": ["x"]}),  # pyright: ignore
    )
    assert (made.sft.learning_rate, made.sft.max_length) == (1e-3, 1024)
    assert (made.ppo.learning_rate, made.reward_model.learning_rate) == (3e-6, 1e-5)
    assert made.ppo.env_config == PPOConfig(
        env_type="text_generation", env_config={"stop_sequences": ["x"]}  # pyright: ignore
    ).env_config  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        # 6 rows a step: 6 at once, for 8 do not divide them; 20: 5, the largest divisor up to 8.
        (("--sft.batch_size=6",), {"sft.micro_batch_size": 6}),
        (("--sft.batch_size=20",), {"sft.micro_batch_size": 5}),
        # 24 rows in 2 processes are 12 each, of which 6 divide.
        (("--sft.batch_size=24", "--sft.processes=2"), {"sft.micro_batch_size": 6}),
        (("--sft.batch_size=13",), {"sft.micro_batch_size": 1}),
        # 16 replies can't be dealt out in steps of 64; 3 processes need steps of 3 · n.
        (("--ppo.chunk_size=16",), {"ppo.mini_batch_size": 16, "ppo.lr_warmup_updates": 10}),
        (
            ("--ppo.chunk_size=99", "--ppo.total_episodes=990", "--ppo.processes=3"),
            {"ppo.mini_batch_size": 63, "ppo.lr_warmup_updates": 1},
        ),
    ],
)
def test_defaults_fit_the_values_beside_them(overrides, expected):
    shown = values(BASE, *overrides)
    assert {key: int(shown[key][0]) for key in expected} == expected


def test_invalid_values_get_the_same_message_with_a_base():
    for override in ("--sft.batch_size=x", "--ppo.chunk_size=0", "--ppo=5", "--sft.processes=-1"):
        messages = []
        for base in ([], [BASE]):
            with pytest.raises(ConfigError) as caught:
                load_config(None, [*base, override])
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def test_a_reward_model_from_another_base_gets_its_defaults_alone():
    shown = values("--reward_model.base=some/model")
    assert float(shown["reward_model.learning_rate"][0]) == 1e-5
    assert shown["sft.learning_rate"] == values()["sft.learning_rate"]


def test_resolved_values_are_in_fingerprints_and_survive_a_round_trip():
    config = load_config(None, ["--base.path=artifact:3f2a91c04d"]).config
    assert PipelineConfig.model_validate_json(config.model_dump_json()) == config
    depends = STAGES["train-sft"].depends_on(config)
    assert depends["sft"]["learning_rate"] == 2e-5  # pyright: ignore
    written = load_config(
        None, ["--base.path=artifact:3f2a91c04d", "--sft.learning_rate=2e-5"]
    ).config
    assert STAGES["train-sft"].depends_on(written) == depends


@pytest.mark.parametrize("name", presets())
def test_no_presets_values_for_scratch_reach_a_pretrained_base(name):
    with_base = values(BASE, preset=name)
    rates = {
        key: float(value)
        for key, (value, _) in with_base.items()
        if key.endswith("learning_rate") and value != "none"
    }
    # Ten times the rate for all weights is the most that literature gives any adapter.
    assert {k: v for k, v in rates.items() if v > 2e-4} == {}
    assert with_base["reward_model.pooling"][0] == "last"
    assert with_base["reward_model.lm_loss_coef"][0] == "0.0"
    assert with_base["ppo.top_k"][0] == "0"
    lora = with_base.get("sft.lora", ("", ""))[0] != "none"
    assert rates["sft.learning_rate"] == (2e-4 if lora else 2e-5)


def test_preferences_needs_the_base_alone():
    """Of the training sections only sizes of the evaluation are the preset's own."""
    chosen = values(BASE, preset="preferences")
    own = {k for k, (_, source) in chosen.items() if source == "preferences.yaml"}
    assert {k for k in own if k.partition(".")[0] in TRAINING} == {
        "evaluation.prompts", "evaluation.batch_size",
    }  # fmt: skip
    scratch = values(preset="preferences")
    assert scratch["sft.learning_rate"] == ("0.003", "preferences.yaml")
    assert scratch["reward_model.pooling"] == ("sum", "preferences.yaml")


SCRATCH = (
    "sft: {learning_rate: 1.0e-4}\n"
    "from_scratch: {sft: {learning_rate: 5.0e-3, epochs: 3}, rl_gamma: 0.95,"
    " reward_model: {epochs: 9}}\n"
)


@pytest.fixture
def preset(tmp_path):
    def write(text: str) -> Any:
        path = tmp_path / "my.yaml"
        path.write_text(text)
        return path

    return write


def test_from_scratch_wins_in_the_preset_and_loses_to_the_command_line(preset):
    path = preset(SCRATCH)
    sft = load_config(path).config.sft
    assert (sft.learning_rate, sft.epochs) == (5e-3, 3)
    assert load_config(path).config.ppo.gamma == 0.95
    assert load_config(path).sources["ppo.gamma"] == "my.yaml"
    assert load_config(path, ["--sft.epochs=2"]).config.sft.epochs == 2
    based = load_config(path, [BASE])
    assert (based.config.sft.learning_rate, based.config.sft.epochs) == (1e-4, 1)
    assert based.config.ppo.gamma == 1.0
    assert FROM_SCRATCH not in based.config.model_dump()
    # A base of the preset's own, and one that the command line takes away.
    path = preset(f"base: {{path: some/model}}\n{SCRATCH}")
    assert load_config(path).config.sft.learning_rate == 1e-4
    assert load_config(path, ["--base.path=none"]).config.sft.learning_rate == 5e-3


def test_from_scratch_leaves_a_reward_model_from_another_base_alone(preset):
    config = load_config(preset(SCRATCH), ["--reward_model.base=some/model"]).config
    assert (config.reward_model.epochs, config.sft.epochs) == (1, 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from_scratch: {sft: {epoch: 1}}", "from_scratch.sft.epoch is not a field of the config"),
        ("from_scratch: 5", "from_scratch: is a section; set fields in it"),
        ("from_scratch: {base: {path: a/b}}", "from_scratch.base.path: the section is for models"),
        ("from_scratch: {rl_gamma: 1, ppo: {gamma: 1}}", "from_scratch.ppo.gamma is given twice"),
        ("from_scratch: {1: 2}", "from_scratch.1 is not a field"),
    ],
)
def test_a_broken_section_is_an_error_with_and_without_a_base(preset, text, expected):
    for overrides in ([], [BASE]):
        with pytest.raises(ConfigError) as caught:
            load_config(preset(text), overrides)
        assert str(caught.value).startswith(expected)
        assert str(caught.value).endswith("(from my.yaml)")
        assert "\n" not in str(caught.value)


def test_from_scratch_is_a_presets_section_and_no_field():
    with pytest.raises(ConfigError, match="from_scratch"):
        load_config(None, ["--from_scratch.sft.epochs=1"])
    with pytest.raises(ConfigError, match="from_scratch is not a field"):
        load_preset(None, {"from_scratch": {}})


def test_the_table_of_the_documentation_is_right():
    """Its columns are from scratch, all weights, and adapters in every section."""
    page = Path("docs/models.md").read_text(encoding="utf-8")
    section = page.partition("## Defaults for a pretrained base")[2].partition("\n### ")[0]
    loras = [f"--{section}.lora.r=8" for section in ("sft", "reward_model", "ppo")]
    columns = [values(), values(BASE), values(BASE, *loras)]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| `")]
    table = {
        name.strip("| `"): [cell.strip("` ") for cell in cells[:3]]
        for names, *cells in rows
        for name in names.split(", ")
    }
    defaults = pretrained_defaults({"base": {"path": "some/model"}})
    assert {f"{s}.{f}" for s, fields in defaults.items() for f in fields} == set(table)
    for name, cells in table.items():
        assert cells == [column[name][0] for column in columns], name
