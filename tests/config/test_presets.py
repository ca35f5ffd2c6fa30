"""Presets in YAML: merging, sources, `rl_` names and error messages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.config import LoraConfig, PPOConfig, load_config
from rlhf.errors import ConfigError

PRESETS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
Preset = Callable[[str], Path]


@pytest.fixture
def preset(tmp_path: Path) -> Preset:
    def write(text: str | bytes) -> Path:
        path = tmp_path / "my.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def message(path: Path | str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.name)
def test_every_preset_of_the_project_is_valid(path):
    loaded = load_config(path)
    assert set(loaded.sources.values()) == {path.name}


def test_there_is_a_preset():
    assert PRESETS


def test_overrides_win_over_the_preset_and_origins_are_known(preset):
    path = preset("seed: 1\nppo:\n  kl_coef: 0.2\n  gamma: 0.9\n  lora: {r: 4}\n")
    loaded = load_config(path, ["--ppo.gamma=0.8", "--ppo.lora.alpha=2"])
    assert loaded.config.seed == 1
    assert (loaded.config.ppo.kl_coef, loaded.config.ppo.gamma) == (0.2, 0.8)
    assert loaded.config.ppo.lora == LoraConfig(r=4, alpha=2)
    assert loaded.sources == {
        "seed": "my.yaml",
        "ppo.kl_coef": "my.yaml",
        "ppo.gamma": "command line",
        "ppo.lora.r": "my.yaml",
        "ppo.lora.alpha": "command line",
    }


def test_rows_name_every_value_and_its_origin(preset):
    rows = load_config(preset("ppo: {gamma: 0.9}"), ["--base.path=x/y"]).rows()
    found = {key: (value, source) for key, value, source in rows}
    assert found["ppo.gamma"] == ("0.9", "my.yaml")
    assert found["base.path"] == ("x/y", "command line")
    assert found["ppo.lora"] == ("none", "default")
    assert found["sft.epochs"] == ("1.0", "default")
    assert [row[0] for row in rows][:2] == ["name", "seed"]
    assert len(found) == len(rows)


def test_section_switched_off_by_an_override_leaves_no_origins_behind(preset):
    loaded = load_config(preset("ppo: {lora: {r: 4}}"), ["--ppo.lora=none"])
    assert loaded.config.ppo.lora is None
    assert loaded.sources == {"ppo.lora": "command line"}


@pytest.mark.parametrize("text", ["", "# nothing\n", "ppo:\n", "sft:\n", "ppo: {}\n", "null\n"])
def test_empty_presets_and_sections_are_the_defaults(preset, text):
    assert load_config(preset(text)).config == load_config().config


@pytest.mark.parametrize("none", ["none", "None", "null", "~", ""])
def test_none_is_null(preset, none):
    text = f"ppo: {{lora: {none}, value_clip_range: {none}}}\ndata: {{max_pairs: {none}}}\n"
    config = load_config(preset(text)).config
    assert (config.ppo.lora, config.ppo.value_clip_range, config.data.max_pairs) == (None,) * 3


def test_anchors_are_understood(preset):
    text = "sft: &training {epochs: 2, lora: {r: 4}}\nreward_model: {<<: *training, epochs: 3}\n"
    config = load_config(preset(text)).config
    assert (config.sft.epochs, config.reward_model.epochs) == (2, 3)
    assert config.reward_model.lora == LoraConfig(r=4)


def test_byte_order_mark_windows_line_ends_and_exponents(preset):
    config = load_config(preset(b"\xef\xbb\xbfseed: 3\r\nsft:\r\n  learning_rate: 1e-3\r\n")).config
    assert (config.seed, config.sft.learning_rate) == (3, 1e-3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pp: {gamma: 1}", "pp is not a field of the configuration; did you mean ppo?"),
        ("ppo: {gama: 1}", "ppo.gama is not a field of the configuration; did you mean ppo.gamma?"),
        ("gamma: 1", "gamma is not a field of the configuration; did you mean ppo.gamma?"),
        ("xyzzy: 1", "xyzzy is not a field of the configuration; see `rlhf config show`"),
        (
            "ppo: {kl-coef: 1}",
            "ppo.kl-coef is not a field of the configuration; did you mean ppo.",
        ),
        ("1: 2", "1: is no name of a field; names are text"),
        ("ppo: {null: 2}", "ppo.None: is no name of a field"),
        ("name: 123", "name = 123: must be text; put it in quotes"),
        ("name: no", "name: must not be false; write a number or text"),
        ("seed: yes", "seed: must not be true; write a number or text"),
        ("seed: [1]", "seed = [1]: must be a whole number"),
        ("seed: 2024-01-01", "seed = datetime.date(2024, 1, 1): must be a whole number"),
        ("sft: {enabled: maybe}", "sft.enabled = 'maybe': must be true or false"),
        ("sft: {enabled: [1]}", "sft.enabled = [1]: must be true or false"),
        ("ppo: {kl_coef: -1.0e-3}", "ppo.kl_coef = -0.001: must be at least 0"),
        ("ppo: {kl_coef: .nan}", "ppo.kl_coef = nan: must be a finite number"),
        ("ppo: {kl_coef: }", "ppo.kl_coef = None: must be a number"),
        ("ppo: 5", "ppo = 5: is a section; set the fields in it"),
        ("ppo: yes", "ppo: must not be true"),
        ("ppo: [gamma]", "ppo = ['gamma']: is a section"),
        ("gates: {policy: {metric: a}}", "gates.policy = {'metric': 'a'}: must be a list"),
        ("gates: {policy: [a]}", "gates.policy.0 = 'a': is a section"),
        ("gates: {policy: [{metric: a, min: on}]}", "gates.policy.0.min: must not be true"),
        ("ppo: {rl_gamma: 2}", "ppo.gamma = 2: must be at most 1"),
        (
            "rl_chunk_size: 4\nppo: {mini_batch_size: 8}",
            "ppo: mini_batch_size = 8 exceeds chunk_size = 4",
        ),
    ],
)
def test_bad_value_names_field_value_cure_and_origin(preset, text, expected):
    found = message(preset(text))
    assert found.startswith(expected)
    assert found.endswith("(from my.yaml)")


@pytest.mark.parametrize(
    "name", ["base.quantization", "base.load_in_4bit", "sft.qlora", "ppo.bnb_4bit_quant_type"]
)
def test_settings_by_which_other_tools_quantise_a_base_are_refused_with_ours(preset, name):
    section, field = name.split(".")
    texts = [message(preset(f"{section}: {{{field}: nf4}}")), message(preset(""), f"--{name}=nf4")]
    for text in texts:
        assert f"{name} is not a field of the configuration; to hold a frozen base in 4" in text
        assert "set frozen_dtype = nf4 beside lora" in text


def test_rule_on_two_fields_names_the_origins_of_both_and_no_other(preset):
    path = preset("ppo: {mini_batch_size: 64, gamma: 0.9}")
    text = message(path, "--ppo.chunk_size=8")
    assert text.endswith("(from command line and my.yaml)")
    assert message(path, "--ppo.mini_batch_size=200", "--seed=1").endswith("(from command line)")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [", "not valid YAML (line 1: expected the node content, but found '<stream end>')"),
        ("seed: 1\nppo: {gamma: 1\n", "not valid YAML (line 3: "),
        ("seed: 1\n\tname: x", "not valid YAML (line 2: found character"),
        ("seed: 1\nseed: 2", "not valid YAML (line 2: seed stands there twice)"),
        ("ppo: {gamma: 1, gamma: 1}", "not valid YAML (line 1: gamma stands there twice)"),
        ("? [a]\n: 1", "not valid YAML (line 1: found unhashable key)"),
        ("ppo: &a {lora: *a}", "not valid YAML (holds a value that contains itself"),
        ("name: !!python/name:os.system", "not valid YAML (line 1: could not determine"),
        ("name: 2024-13-45", "not valid YAML (month must be in 1..12)"),
        ("[" * 1200, "not valid YAML (is nested more than 64 levels deep"),
        (b"name: \xff", "not valid YAML ('utf-8' codec can't decode"),
        (b"name: \x00", "not valid YAML (unacceptable character"),
        ("- a", "must hold `key: value` lines at the top"),
        ("just text", "must hold `key: value` lines at the top"),
    ],
)
def test_broken_file_says_where(preset, text, expected):
    path = preset(text)
    assert message(path).startswith(f"config = {str(path)!r}: {expected}")


def test_a_parsers_complaint_does_not_repeat_the_file(preset):
    assert "s3cret" not in message(preset("store: 's3://key:s3cret@bucket\n"))
    assert "s3cret" not in message(preset("stor: s3://key:s3cret@bucket\n"))
    assert "s3cret" not in message(preset("store: s3://key:s3cret@bucket\n"))


def test_missing_and_unreadable_files(tmp_path):
    assert "no such file; give the path of a YAML preset" in message(tmp_path / "none.yaml")
    assert "no such file" in message(tmp_path)
    # Reading the start of one's own memory fails for everyone, root included.
    (tmp_path / "bad.yaml").symlink_to("/proc/self/mem")
    assert "can't be read (Input/output error)" in message(tmp_path / "bad.yaml")


def test_rl_names_at_the_top_and_in_the_section(preset):
    path = preset("rl_kl_coef: 0.3\nppo: {rl_gamma: 0.5, top_k: 3}\nseed: 2\n")
    loaded = load_config(path)
    assert loaded.config.ppo == PPOConfig(kl_coef=0.3, gamma=0.5, top_k=3)
    assert set(loaded.sources) == {"seed", "ppo.kl_coef", "ppo.gamma", "ppo.top_k"}


def test_rl_name_on_the_command_line_overrides_the_field_of_the_preset(preset):
    loaded = load_config(preset("ppo: {kl_coef: 0.3}"), ["--rl-kl-coef", "0.05"])
    assert loaded.config.ppo.kl_coef == 0.05
    assert loaded.sources == {"ppo.kl_coef": "command line"}


@pytest.mark.parametrize(
    "text",
    [
        "rl_gamma: 0.5\nppo: {gamma: 0.4}",
        "rl_gamma: 0.5\nppo: {rl_gamma: 0.4}",
        "ppo: {rl_gamma: 0.5, gamma: 0.4}",
    ],
)
def test_two_names_for_one_value_are_an_error(preset, text):
    found = message(preset(text))
    assert found.startswith("ppo.gamma is given twice, as gamma and as rl_gamma: ")
    assert found.endswith("keep one (from my.yaml)")
