"""Overrides on the command line: parsing and error messages."""

from __future__ import annotations

import pytest

from rlhf.config import PipelineConfig, PPOConfig, load_config
from rlhf.config.overrides import parse_overrides
from rlhf.config.pipeline import place_names
from rlhf.config.ppo import SEED_NAMES
from rlhf.errors import ConfigError

UNKNOWN = "is not a field of the configuration"


def message(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("overrides", "tree"),
    [
        (["--ppo.kl_coef=0.05"], {"ppo": {"kl_coef": 0.05}}),
        (["--ppo.kl_coef", "0.05"], {"ppo": {"kl_coef": 0.05}}),
        (["--ppo.kl-coef=0.05"], {"ppo": {"kl_coef": 0.05}}),
        (["--ppo.kl_coef", "-1"], {"ppo": {"kl_coef": -1}}),
        (["--ppo.learning_rate=1e-5"], {"ppo": {"learning_rate": 1e-5}}),
        (["--seed", "3", "--name=x"], {"seed": 3, "name": "x"}),
        (["--data.source=a folder/ü=1.jsonl"], {"data": {"source": "a folder/ü=1.jsonl"}}),
        (["--data.source", "two words"], {"data": {"source": "two words"}}),
        (["--name=12"], {"name": "12"}),
        (["--name=null"], {"name": "null"}),
        (["--data.source=[x]"], {"data": {"source": "[x]"}}),
        (["--evaluation.judge=none"], {"evaluation": {"judge": "none"}}),
        (["--ppo={rl_kl_coef: 0.3, gamma: 1}"], {"ppo": {"kl_coef": 0.3, "gamma": 1}}),
        (["--sft.enabled=false"], {"sft": {"enabled": False}}),
        (["--ppo.lora.r=4"], {"ppo": {"lora": {"r": 4}}}),
        (["--ppo={kl_coef: 0.3, lora: {r: 2}}"], {"ppo": {"kl_coef": 0.3, "lora": {"r": 2}}}),
        (
            ['--gates.policy=[{"metric": "a", "min": 1}]'],
            {"gates": {"policy": [{"metric": "a", "min": 1}]}},
        ),
        ([], {}),
    ],
)
def test_parses(overrides, tree):
    assert parse_overrides(overrides) == tree


@pytest.mark.parametrize("none", ["none", "None", "null"])
def test_none_is_null_where_a_field_may_be_null(none):
    overrides = [f"--ppo.value-clip-range={none}", f"--base.path={none}", f"--ppo.lora={none}"]
    config = load_config(None, overrides).config
    assert (config.ppo.value_clip_range, config.base.path, config.ppo.lora) == (None, None, None)


def test_none_is_a_text_where_it_is_a_choice():
    assert load_config(None, ["--evaluation.judge", "none"]).config.evaluation.judge == "none"


def test_nested_optional_section_takes_its_other_values_from_the_defaults():
    lora = load_config(None, ["--ppo.lora.r=4"]).config.ppo.lora
    assert lora is not None
    assert (lora.r, lora.alpha) == (4, 32.0)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["--ppo.kl_c=1"],
            f"ppo.kl_c {UNKNOWN}; did you mean ppo.kl_coef?",
        ),
        (
            ["--ppo.kl_c", "1"],
            f"ppo.kl_c {UNKNOWN}; did you mean ppo.kl_coef?",
        ),
        (["--ppo.kl_c"], f"ppo.kl_c {UNKNOWN}; did you mean ppo.kl_coef?"),
        (["--gamma=1"], "gamma is not a field of the configuration; did you mean ppo.gamma?"),
        (["--rl_gama=1"], "did you mean rl_gamma?"),
        (["--rl-learning-rate=1"], "did you mean ppo.learning_rate?"),
        (["--xyzzy=1"], "xyzzy is not a field of the configuration; see `rlhf config show`"),
        (["--ppo"], "ppo has no value; write overrides as --section.field=value"),
        (["--ppo", "--seed=1"], "ppo has no value"),
        (["--ppo.optimize_device_cache", "maybe"], "= 'maybe': must be true or false"),
        (["--no-optimize-device-cache=true"], "no_optimize_device_cache takes no value; write "),
        (["--no-optimize-device-cache", "true"], "'true' is not an override"),
        (["--no-ppo.gamma"], "no_ppo.gamma is not a field"),
        (["--no-rl-gamma"], "no_rl_gamma is not a field"),
        (["--ppo.no-gamma"], "ppo.no_gamma is not a field"),
        (["--no-store"], "no_store is not a field"),
        (["--no-enabled"], "did you mean sft.enabled?"),
        (["--rl-gamma"], "rl_gamma has no value"),
        (["--no-optimize-device-cache", "--rl-optimize-device-cache"], "two values for one field"),
        (["--ppo={rl_gamma: 0.5, gamma: 0.4}"], "ppo.gamma is given twice, as gamma and as rl_g"),
        (["--ppo={rl_gamma: 0.5}", "--rl-gamma=0.4"], "two values for one field"),
        (["--name.first=x"], "name.first: name has no fields of its own; write --name=value"),
        (["--gates.policy.0.min=1"], "gates.policy has no fields of its own"),
        (["--gates.policy.metric=a"], "gates.policy has no fields of its own"),
        (["kl=1"], "'kl=1' is not an override; write overrides as --section.field=value"),
        (["-ppo.kl_coef=1"], "'-ppo.kl_coef=1' is not an override"),
        (["--"], "'--' is not an override"),
        (["--=1"], "'--=1' is not an override"),
        ([""], "'' is not an override"),
        (["--seed=1", "--seed=2"], "seed: two values for one field; keep one"),
        (
            ["--ppo.lora=none", "--ppo.lora.r=4"],
            "ppo.lora and ppo.lora.r: two values",
        ),
        (["--ppo.lora.r=4", "--ppo={}"], "ppo.lora.r and ppo: two values for one field"),
    ],
)
def test_mistake_in_the_form_names_the_field_and_the_cure(overrides, expected):
    text = message(*overrides)
    assert text.startswith("command line: ") or text.endswith("(from command line)")
    assert expected in text


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("ppo.kl_coef=-1", "ppo.kl_coef = -1: must be at least 0"),
        ("ppo.gamma=1.5", "ppo.gamma = 1.5: must be at most 1"),
        ("ppo.clip_range=0", "ppo.clip_range = 0: must be more than 0"),
        ("data.eval_fraction=1", "data.eval_fraction = 1: must be less than 1"),
        ("data.max_pairs=9", "data.max_pairs = 9: must be at least 10"),
        ("ppo.kl_coef=abc", "ppo.kl_coef = 'abc': must be a number"),
        ("ppo.kl_coef=", "ppo.kl_coef = '': must be a number"),
        ("ppo.kl_coef=nan", "ppo.kl_coef = 'nan': must be a finite number"),
        ("ppo.kl_coef=Infinity", "ppo.kl_coef = inf: must be a finite number"),
        ("ppo.kl_coef=true", "ppo.kl_coef: must not be true; write a number or text"),
        ("ppo.kl_coef=[1]", "ppo.kl_coef = [1]: must be a number"),
        ("ppo.kl_coef=[1", "ppo.kl_coef = '[1': must be a number"),
        ("seed=1.5", "seed = 1.5: must be a whole number"),
        ("seed=x", "seed = 'x': must be a whole number"),
        ("seed=none", "seed = 'none': must be a whole number"),
        ("seed=2147483648", "seed = 2147483648: must be less than 2147483648"),
        ("sft.enabled=2", "sft.enabled = 2: must be true or false"),
        ("sft.lr_scheduler=x", "sft.lr_scheduler = 'x': must be 'cosine', 'linear' or 'constant'"),
        ("name=A b", "name = 'A b': must match ^[a-z0-9]"),
        ("name=a\nb", r"name = 'a\nb': must match"),
        ("data.source=", "data.source = '': must not be empty"),
        ("base.path=", "base.path = '': must not be empty"),
        ("ppo=x", "ppo = 'x': is a section; set the fields in it"),
        ("ppo=null", "ppo = 'null': is a section"),
        ("ppo=none", "ppo = 'none': is a section"),
        ("ppo.lora=x", "ppo.lora = 'x': is a section"),
        ("gates.policy=x", "gates.policy = 'x': must be a list"),
        ("gates.policy=[{min: 1}]", "gates.policy.0.metric: is missing; add it"),
        ("gates.policy=[{metric: ''}]", "gates.policy.0.metric = '': must not be empty"),
        ("gates.policy=[{metric: a}]", "gates.policy.0: a rule needs min, max or both"),
        ("gates.policy=[{metric: a, min: none}]", "gates.policy.0: a rule needs min, max or both"),
        ("gates.policy=[{metric: a, min: [1]}]", "gates.policy.0.min = [1]: must be a number"),
        (
            "gates.policy=[{metrik: a, min: 1}]",
            "gates.policy.0.metrik is not a field of the configuration; did you mean "
            "gates.policy.metric?",
        ),
        (
            "ppo={kl_koef: 1}",
            f"ppo.kl_koef {UNKNOWN}; did you mean ppo.kl_coef?",
        ),
        ("ppo={kl_coef: -1}", "ppo.kl_coef = -1: must be at least 0"),
        ("base.revision=v1", "base: revision is set but path is not; name the hub id in path"),
        ("base.architecture.heads=5", "base.architecture: heads = 5 must divide hidden_size = 96"),
        ("sft.micro_batch_size=7", "sft: micro_batch_size = 7 must divide batch_size = 64"),
        ("ppo.chunk_size=4", "ppo: mini_batch_size = 8 exceeds chunk_size = 4; lower it"),
        ("ppo.critic_warmup_updates=36", "ppo: critic_warmup_updates = 36 leaves the policy none"),
        ("ppo.lora={dropout: 0.1}", "ppo: lora.dropout = 0.1 is not for PPO, in which the policy"),
        ("ppo.top_k=1", "ppo: top_k = 1 leaves one token at each step"),
        ("ppo.lr_warmup_updates=37", "ppo: lr_warmup_updates = 37 ends after all 36 updates"),
        (
            "ppo={critic_warmup_updates: 20, lr_warmup_updates: 30}",
            "ppo: lr_warmup_updates = 30 ends after all 36 updates, for it begins after critic",
        ),
        (
            "sft={lora: {r: 2}, frozen_dtype: bfloat16}",
            "sft.frozen_dtype = 'bfloat16' is for a pretrained base",
        ),
        ("sft.enabled=false", "sft.enabled = false needs base.path"),
        ("store=gs://x", "store: scheme 'gs' is not supported; use file:// or s3://"),
        ("store=s3:///x", "store: names no bucket; write s3://bucket/prefix"),
        ("store=s3://[x", "store: names a bucket that can't be one; use letters, digits"),
        ("data.source=https://host/x", "data.source: scheme 'https' is not supported; download"),
        ("data.source=s3:///x", "data.source: is no full URI; write s3://bucket/key"),
        ("data.source=file://x", "data.source: is no full URI; write s3://bucket/key or file:///"),
    ],
)
def test_bad_value_names_field_value_cure_and_origin(override, expected):
    text = message(f"--{override}")
    assert text.startswith(expected)
    assert text.endswith("(from command line)")


def test_bounds_and_values_are_written_as_a_person_would():
    text = message("--ppo.kl_coef", "-1")
    assert text == "ppo.kl_coef = -1: must be at least 0 (from command line)"


def test_long_values_are_cut_short():
    for value in ("[" * 1200, "x" * 5000, "9" * 5000):
        assert len(message(f"--seed={value}")) < 200


def test_judge_of_the_world_needs_the_world():
    text = message("--evaluation.judge=world", "--data.source=x.jsonl")
    assert text == (
        "evaluation.judge = 'world' can't judge data.source = 'x.jsonl'; "
        "set evaluation.judge to none (from command line)"
    )


@pytest.mark.parametrize(
    "override",
    [
        "--store=s3://key:s3cret@bucket/x",
        "--store=https://key:s3cret@host",
        "--store_options.endpoint_url=https://key:s3cret@host:9000",
        "--data.source=s3://key:s3cret@bucket/x.jsonl",
        "--data.source=https://key:s3cret@host/x.jsonl",
        "--name=s3://key:p/s3cret@bucket",
        "--stor=s3://key:s3cret@bucket",
        "s3://key:s3cret@bucket",
        "--ppo.lora=s3://key:s3cret@bucket",
        "--ppo={kl_coef: 's3://key:s3cret@bucket'}",
        "--ppo={x: 's3://key:s3cret@bucket'}",
    ],
)
def test_user_info_of_a_uri_is_never_repeated(override):
    assert "s3cret" not in message(override)


def test_pydantics_own_message_does_not_repeat_values_either():
    with pytest.raises(ValueError, match="user info") as caught:
        PipelineConfig(store="s3://key:s3cret@bucket")
    assert "s3cret" not in str(caught.value)


FLAGS = [name for name in SEED_NAMES if PPOConfig.model_fields[name].annotation is bool]


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize(
    ("form", "value"),
    [
        (["--rl-{}"], True), (["--ppo.{}"], True), (["--{}"], True), (["--ppo.rl_{}"], True),
        (["--no-rl-{}"], False), (["--ppo.no-{}"], False), (["--no-{}"], False),
        (["--no-ppo.{}"], False), (["--ppo.no-rl-{}"], False), (["--no_rl_{}"], False),
        (["--rl-{}", "false"], False), (["--rl-{}", "true"], True), (["--rl-{}=false"], False),
        (["--no-rl-{}", "--seed", "3"], False), (["--rl-{}", "--seed=3"], True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dash", [True, False])
def test_flags(name, form, value, dash):
    written = name.replace("_", "-") if dash else name
    tokens = [part.format(written) for part in form]
    if name == "multi_objective" and value:
        tokens.append('--rl-reward-weights={"length": 1}')
    loaded = load_config(None, tokens)
    assert getattr(loaded.config.ppo, name) is value
    assert loaded.sources[f"ppo.{name}"] == "command line"


def test_flags_of_other_sections():
    config = load_config(None, ["--ppo.kl_audit", "--ppo.no-whiten-rewards"]).config
    assert (config.ppo.kl_audit, config.ppo.whiten_rewards) == (True, False)
    assert load_config(None, ["--no-sft.enabled", "--base.path=x/y"]).config.sft.enabled is False


@pytest.mark.parametrize("form", ["--rl_{}", "--ppo.rl_{}", "--rl-{}"])
def test_rl_names_of_rewards(form):
    def loaded(**values):
        tokens = [f"{form.format(name)}={value}" for name, value in values.items()]
        return load_config(None, tokens).config.ppo

    assert loaded(reward_fn="length_penalty").reward_fn == "length_penalty"
    many = loaded(multi_objective="true", reward_weights='{"length": 2}')
    assert (many.multi_objective, many.reward_weights) == (True, {"length": 2.0})
    stops = loaded(env_type="text_generation", env_config='{"stop_sequences": ["Q:"]}')
    assert stops.generation.stop_sequences == ("Q:",)
    compared = load_config(
        None, [f"{form.format('env_config')}.temperature=2", "--rl_env_type=preference_comparison"]
    )
    assert compared.config.ppo.comparison.temperature == 2


def test_both_names_for_one_value_are_an_error():
    text = message("--rl-kl-coef=0.05", "--ppo.kl_coef=0.1")
    assert text == "command line: ppo.kl_coef: two values for one field; keep one"


def test_only_listed_fields_have_rl_names():
    assert "rl_lora is not a field" in message("--rl_lora=none")


def test_a_placement_names_a_pool_or_a_deployment_in_full():
    def placed(value: str) -> str:
        return load_config(
            None, ["--store=s3://b/c", f"--placement.train-sft={value}"]
        ).config.placement["train-sft"]

    assert placed("gpu") == placed("train-sft-gpu") == "train-sft/train-sft-gpu"
    assert placed("train-sft/mine") == "train-sft/mine"
    assert placed("inline") == "inline"
    assert place_names("train-sft", placed("gpu")) == ["gpu", "train-sft-gpu"]
    assert place_names("train-sft", "train-sft/mine") == ["mine"]
    for wrong in ("promote/gpu", "train-sft/", "/gpu", ""):
        with pytest.raises(ConfigError, match="no deployment of train-sft; write the name of a"):
            placed(wrong)
