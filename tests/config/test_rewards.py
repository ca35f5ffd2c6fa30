"""Reward functions and environments in the configuration: valid and invalid values."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from rlhf.config import (
    ComponentSection,
    KeywordComponent,
    LengthComponent,
    PipelineConfig,
    PPOConfig,
    PreferenceConfig,
    load_config,
)
from rlhf.config.components import COMPONENTS
from rlhf.errors import ConfigError

POLITE = {"type": "keyword", "words": ["please"]}
MANY = {"components": {"polite": POLITE, "reward_model": None, "length": {"weight": 0.5}}}


def load(tmp_path: Path, tree, *overrides: str):
    path = tmp_path / "my.yaml"
    path.write_text(json.dumps(tree))
    return load_config(path, overrides)


def message(tmp_path: Path, tree, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, tree, *overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- what is read -----------------------------------------------------------------------------


def test_nothing_given_is_the_reward_model():
    config = PPOConfig()
    assert (config.reward_fn, config.env_type, config.env_config) == (None, None, None)
    assert config.needs_reward_model
    assert config.replies_per_prompt == 1
    assert config.components == {}
    assert config.comparison is None
    assert config.generation.stop_sequences == ()
    assert config.needs_reference_answers is None


@pytest.mark.parametrize("form", ["mapping", "json", "yaml file", "json file"])
def test_env_config_in_four_forms(tmp_path, form):
    file = tmp_path / ("env.yaml" if form == "yaml file" else "env.json")
    yaml = "components:\n  polite: {type: keyword, words: [please], clip: none}\n  reward_model:\n"
    yaml += "  length: {weight: 0.5}\n"
    file.write_text(yaml if form == "yaml file" else json.dumps(MANY))
    value = {"mapping": MANY, "json": json.dumps(MANY)}.get(form, str(file))
    config = load(tmp_path, {"rl_multi_objective": True, "rl_env_config": value}).config
    assert list(config.ppo.components) == ["polite", "reward_model", "length"]
    assert config.ppo.components["polite"] == KeywordComponent(words=("please",))
    assert config.ppo.components["length"].weight == 0.5
    # The content stands in the configuration, so that a fingerprint depends on it.
    again = PipelineConfig.model_validate_json(config.model_dump_json())
    assert again == config
    assert type(config)(**config.model_dump()) == config
    assert str(file) not in config.model_dump_json()


def test_another_content_of_the_file_is_another_configuration(tmp_path):
    file = tmp_path / "env.yaml"
    dumps = []
    for stop in ("A", "B"):
        file.write_text(f"stop_sequences: [{stop}]")
        tree = {"ppo": {"env_type": "text_generation", "env_config": str(file)}}
        dumps.append(load(tmp_path, tree).config.model_dump_json())
    assert dumps[0] != dumps[1]


def test_one_option_of_a_file_overridden(tmp_path):
    file = tmp_path / "env.yaml"
    file.write_text("{replies_per_prompt: 4, temperature: 3}")
    tree = {"ppo": {"env_type": "preference_comparison", "env_config": str(file)}}
    loaded = load(tmp_path, tree, "--rl_env_config.temperature=2")
    assert loaded.config.ppo.comparison.replies_per_prompt == 4
    assert loaded.config.ppo.comparison.temperature == 2
    file.write_text("{")
    text = message(tmp_path, tree, "--rl_env_config.temperature=2")
    assert "is not valid YAML or JSON (line 1" in text
    assert text.endswith("(from my.yaml)")


def test_values_from_a_file_have_the_origin_of_its_path(tmp_path):
    tree = {"ppo": {"env_type": "text_generation", "env_config": '{"stop_sequences": ["x"]}'}}
    origins = {key: source for key, _, source in load(tmp_path, tree).rows()}
    assert origins["ppo.env_config.stop_sequences"] == "my.yaml"
    assert origins["ppo.kl_coef"] == "default"


def test_the_two_ways_to_say_multi_objective():
    weights = {"length": 2.0}
    for options in ({"multi_objective": True}, {"env_type": "multi_objective"}):
        config = PPOConfig(**options, reward_weights=weights)
        assert (config.multi_objective, config.env_type) == (True, "multi_objective")
        assert config.components == {"length": LengthComponent(weight=2.0)}
        assert not config.needs_reward_model


def test_reward_weights_win_over_the_components_own(tmp_path):
    options = {"multi_objective": True, "env_config": MANY, "reward_weights": '{"length": -1}'}
    weights = {k: c.weight for k, c in PPOConfig(**options).components.items()}
    assert weights == {"polite": 1, "reward_model": 1, "length": -1}


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({"reward_fn": "default"}, True),
        ({"reward_fn": "length_penalty"}, False),
        ({"env_type": "text_generation"}, True),
        ({"multi_objective": True, "env_config": MANY}, True),
        ({"env_type": "preference_comparison"}, True),
        (
            {
                "env_type": "preference_comparison",
                "env_config": {"judge": "pair_model", "pair_model": "x"},
            },
            False,
        ),
    ],
)
def test_whether_a_reward_model_is_needed(options, needed):
    assert PPOConfig(**options).needs_reward_model is needed


def test_reference_answers_are_asked_for_at_load(tmp_path):
    own = {"source": "pairs.csv", "reference_column": "answer"}
    for ppo, name in [
        ({"reward_fn": "correctness"}, "reward_fn = 'correctness'"),
        ({"multi_objective": True, "reward_weights": {"correctness": 1}}, "'correctness'"),
    ]:
        assert load(tmp_path, {"ppo": ppo, "data": own, "evaluation": {"judge": "none"}})
        text = message(tmp_path, {"ppo": ppo})
        assert name in text
        assert "needs reference answers, and data.reference_column = none" in text


def test_the_world_has_no_columns_of_ones_own(tmp_path):
    for field, value in (("reference_column", "a"), ("metadata_columns", ["a"])):
        text = message(tmp_path, {"data": {field: value}})
        assert "source = 'world' has no such columns" in text
        assert text.startswith(f"data: {field} = ")


# --- what is refused --------------------------------------------------------------------------

CONFIGURED = "ppo.env_config"
COMPARED = {"env_type": "preference_comparison"}


@pytest.mark.parametrize(
    ("ppo", "expected"),
    [
        ({"reward_fn": "lenght"}, "ppo.reward_fn = 'lenght': must be 'default', 'length_penalty'"),
        ({"env_type": "x", "env_config": {"a": 1}}, "ppo.env_type = 'x': must be 'text_gen"),
        (
            {"env_config": {"stop_sequences": ["x"]}},
            f"{CONFIGURED}: there is no env_type that these options are for; set env_type to one "
            "of text_generation, multi_objective, preference_comparison",
        ),
        (
            {"env_type": "text_generation", "env_config": {"stop": ["x"]}},
            f"{CONFIGURED}.stop is not a field of the configuration; known are stop_sequences",
        ),
        (
            {"env_type": "text_generation", "env_config": {"stop_sequences": [""]}},
            f"{CONFIGURED}.stop_sequences.0 = '': must not be empty",
        ),
        (
            COMPARED | {"env_config": {"tau": 1}},
            f"{CONFIGURED}.tau is not a field of the configuration; known are custom, judge, "
            "pair_model, replies_per_prompt, rival, temperature",
        ),
        (COMPARED | {"env_config": [1]}, f"{CONFIGURED} = [1]: is a section; set the fields in it"),
        (COMPARED | {"env_config": "{"}, f"{CONFIGURED}: is no JSON (Expecting property name"),
        (COMPARED | {"env_config": '{"a": 1, "a": 2}'}, f"{CONFIGURED}: is no JSON (a stands"),
        (COMPARED | {"env_config": "x"}, f"{CONFIGURED}: 'x' is no mapping, JSON text or .json"),
        (COMPARED | {"env_config": "/no/x.json"}, f"{CONFIGURED}: '/no/x.json' can't be read (No"),
        (
            COMPARED | {"env_config": "~nosuchuser/x.json"},
            f"{CONFIGURED}: '~nosuchuser/x.json' can't be read (No such file or directory); corr",
        ),
        (
            COMPARED | {"env_config": {"custom": {"fun": 1}}},
            f"{CONFIGURED}.custom.fun is not a field of the configuration; known are function, tim",
        ),
        (
            COMPARED | {"env_config": {"replies_per_prompt": 1}},
            f"{CONFIGURED}: replies_per_prompt = 1 leaves no other reply to compare with; set it",
        ),
        (
            COMPARED | {"env_config": {"temperature": 0}},
            f"{CONFIGURED}.temperature = 0: must be mo",
        ),
        (
            COMPARED | {"env_config": {"judge": "pair_model"}},
            f"{CONFIGURED}: judge = 'pair_model' needs pair_model; give it",
        ),
        (
            COMPARED | {"env_config": {"pair_model": "x"}},
            f"{CONFIGURED}: pair_model is given, but judge = 'reward_model' does not use it",
        ),
        (
            COMPARED | {"chunk_size": 9, "env_config": {"replies_per_prompt": 2}},
            "ppo: chunk_size = 9 counts replies, and is no multiple of "
            "env_config.replies_per_prompt = 2; make it one",
        ),
        (
            COMPARED | {"chunk_size": 8, "total_episodes": 17},
            "ppo: total_episodes = 17 counts replies, and is no multiple",
        ),
        (
            COMPARED | {"reward_fn": "length_penalty"},
            "ppo: reward_fn = 'length_penalty' contradicts env_type = 'preference_comparison'; "
            "remove one of them, or set env_config.judge",
        ),
        (
            {"multi_objective": True, "env_type": "text_generation"},
            "ppo: multi_objective = true contradicts env_type = 'text_generation'; remove one",
        ),
        (
            {"multi_objective": False, "env_type": "multi_objective"},
            "ppo: multi_objective = false contradicts env_type = 'multi_objective'; remove one",
        ),
        ({"multi_objective": True}, "ppo: multi_objective has no components; name them in env_co"),
        (
            {"reward_weights": {"length": 1}},
            "ppo: reward_weights = {'length': 1.0} need multi_objective; set it to true",
        ),
        (
            {"multi_objective": True, "reward_weights": {"lenght": 1}},
            "ppo: reward_weights: 'lenght' is no component; known are reward_model, length, "
            "json_valid, correctness, repetition",
        ),
        (
            {"multi_objective": True, "reward_weights": {"lenght": 1}, "env_config": MANY},
            "ppo: reward_weights: 'lenght' is no component; known are polite, reward_model, length",
        ),
        (
            {"multi_objective": True, "reward_weights": {"length": float("inf")}},
            "ppo.reward_weights.length = 'Infinity': must be a finite number",
        ),
        (
            {"multi_objective": True, "reward_weights": '{"length": NaN}'},
            "ppo.reward_weights: is no JSON (NaN is no number)",
        ),
        (
            {"multi_objective": True, "env_config": {"components": ["length"]}},
            f"{CONFIGURED}.components: must be a mapping from names to components",
        ),
        ({"length_penalty": {"target": 3}}, "ppo: length_penalty is given, but reward_fn = none"),
        ({"reward_fn": "custom"}, "ppo: reward_fn = 'custom' needs custom.function; give it"),
        (
            {"reward_fn": "custom", "custom": {"function": "rewards.py"}},
            "ppo.custom.function: 'rewards.py' is no function; write module:function or file.py",
        ),
        (
            {"reward_fn": "length_penalty", "length_penalty": {"slope": 0}},
            "ppo.length_penalty.slope = 0: must be more than 0",
        ),
    ],
)
def test_mistakes(tmp_path, ppo, expected):
    text = message(tmp_path, {"ppo": ppo})
    assert text.startswith(expected)
    assert text.endswith("(from my.yaml)")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"type": "keywords"}, ": type = 'keywords' is no kind of component; known are reward_mod"),
        ({}, ": type = 'mine' is no kind of component; known are reward_model, length, keyword"),
        ({**POLITE, "wight": 2}, ".wight is not a field of the configuration; known are case_sens"),
        ({**POLITE, "words": []}, ".words = []: must hold at least 1"),
        ({**POLITE, "words": [" "]}, r".words.0 = ' ': must match \S"),
        ({**POLITE, "weight": "x"}, ".weight = 'x': must be a number"),
        ({**POLITE, "clip": 0}, ".clip = 0: must be more than 0"),
        ({**POLITE, "normalize": "z"}, ".normalize = 'z': must be 'none', 'zscore' or 'minmax'"),
        ({"type": "regex", "pattern": "("}, ".pattern: '(' is no pattern (missing ) at position 1"),
        (
            {"type": "regex", "pattern": "(" * 9999},
            f".pattern: '{'(' * 78}… is no pattern (it has 9,999 characters",
        ),
        (
            {"type": "length", "points": [[2, 1], [2, 0]]},
            ".points: tokens must rise from point to point, and 2 follows 2; put the points in",
        ),
        ({"type": "json_valid", "keys": ["a"]}, ": keys = ['a'] need require = 'object', not 'any"),
        ({"type": "remote", "url": "ftp://x"}, ".url: must be http://host/path or https://"),
        (
            {"type": "remote", "url": "http://score/", "token_env": "TOKEN"},
            ": token_env would go over the network unencrypted; use https in url",
        ),
        (5, " = 5: is a section; set the fields in it"),
    ],
)
def test_mistakes_in_a_component(tmp_path, options, expected):
    name = "mine" if isinstance(options, dict) else "length"
    text = message(
        tmp_path, {"ppo": {"multi_objective": True, "env_config": {"components": {name: options}}}}
    )
    assert text.startswith(f"{CONFIGURED}.components.{name}{expected}")
    assert text.endswith("(from my.yaml)")


@pytest.mark.parametrize("name", ["a.b", "", "a b", "1"])
def test_names_of_components(tmp_path, name):
    tree = {"ppo": {"multi_objective": True, "env_config": {"components": {name: POLITE}}}}
    assert "is no name of a component" in message(tmp_path, tree)


def test_a_component_may_not_be_named_like_a_curve(tmp_path):
    tree = {"ppo": {"multi_objective": True, "env_config": {"components": {"missing_eos": POLITE}}}}
    assert "'missing_eos' is a curve of its own" in message(tmp_path, tree)


@pytest.mark.parametrize(
    "options",
    [
        {"url": "https://key:s3cret@host/"},
        {"url": "https://host/?key=s3cret"},
        {"url": "https://host/", "token_env": "s3cret-token"},
    ],
)
def test_secrets_are_refused_and_not_repeated(tmp_path, options):
    tree = {"ppo": {"multi_objective": True, "env_config": {"components": {"remote": options}}}}
    assert "s3cret" not in message(tmp_path, tree)


def test_a_token_may_go_to_this_machine_in_the_clear():
    options = {"url": "http://127.0.0.1:8000/", "token_env": "TOKEN"}
    config = PPOConfig(multi_objective=True, env_config={"components": {"remote": options}})
    assert config.components["remote"].token_env == "TOKEN"


def test_a_key_on_the_command_line_is_told_the_known_ones():
    with pytest.raises(ConfigError, match=r"env_config\.tau is not .*known are .*temperature"):
        load_config(None, ["--rl_env_type=preference_comparison", "--ppo.env_config.tau=1"])


def test_components_on_the_command_line():
    config = load_config(
        None,
        [
            *("--rl-multi-objective", "true", "--ppo.env_config.components.polite.type=keyword"),
            *("--ppo.env_config.components.polite.words=[please]",),
            *("--ppo.env_config.components.polite.clip=none",),
        ],
    ).config
    assert config.ppo.components == {"polite": KeywordComponent(words=("please",))}


DOCS = Path(__file__).parents[2] / "docs" / "rewards.md"


@pytest.mark.parametrize("example", re.findall(r"```yaml\n(.*?)```", DOCS.read_text(), re.DOTALL))
def test_examples_of_the_documentation(tmp_path, example):
    (tmp_path / "example.yaml").write_text(example)
    assert load_config(tmp_path / "example.yaml").config.ppo != PPOConfig()


def test_the_documentation_names_every_component_and_option():
    text = DOCS.read_text()
    for kind, section in COMPONENTS.items():
        own = section.model_fields.keys() - ComponentSection.model_fields.keys() - {"type"}
        row = next(line for line in text.splitlines() if line.startswith(f"| `{kind}` |"))
        assert set(re.findall(r"`(\w+)`", row.rpartition(" | ")[2])) == own


# --- what Python and Prefect are told ---------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            COMPARED | {"env_config": {"tau": 1}},
            "tau is no field; known are custom, judge, pair_model, replies_per_prompt, rival, temp",
        ),
        (COMPARED | {"env_config": {"temperature": 0, "x": 1}}, "temperature: Input should be gr"),
        (COMPARED | {"env_config": {"rival": "{errors}", "judge": "custom"}}, "rival: Input shoul"),
        (COMPARED | {"env_config": {"judge": "custom"}}, "judge = 'custom' needs custom; give it"),
        (
            {"multi_objective": True, "env_config": {"components": {"x": {**POLITE, "wight": 2}}}},
            "components.x.wight is no field; known are case_sensitive, clip",
        ),
        (
            {"multi_objective": True, "env_config": {"components": {"x": {}, "length": 5}}},
            "components.x: type = 'x' is no kind of component; known are reward_model, ",
        ),
    ],
)
def test_pydantics_own_message_names_what_is_wrong_within(options, expected):
    with pytest.raises(ValueError, match="env_config") as caught:
        PPOConfig(**options)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"env_type": "text_generation", "env_config": '{"stop_sequences": ["x"]}'},
        {"env_type": "text_generation", "env_config": "env.yaml"},
        {"multi_objective": True, "reward_weights": '{"length": 1}'},
        {"multi_objective": True, "reward_weights": {"length": 1}},
        {"multi_objective": True, "env_config": MANY},
        {"env_config": None, "reward_weights": None},
    ],
)
def test_the_schema_allows_what_is_read(options):
    # Prefect holds a deployment's parameters against it before a run starts.
    schema = Draft202012Validator(PipelineConfig.model_json_schema())
    assert [error.message for error in schema.iter_errors({"ppo": options})] == []


@pytest.mark.parametrize(
    "options", [{"env_config": 5}, {"env_config": {"components": {"length": 5}}}]
)
def test_the_schema_refuses_other_values(options):
    schema = PipelineConfig.model_json_schema()
    assert not Draft202012Validator(schema).is_valid({"ppo": options})


# --- overrides --------------------------------------------------------------------------------

TAUGHT = {"env_type": "preference_comparison", "env_config": {"temperature": 3, "judge": "custom",
          "custom": {"function": "a:b", "timeout_seconds": 5}}}  # fmt: skip
WEIGHED = {"multi_objective": True, "reward_weights": {"length": 1, "repetition": 2}}


@pytest.mark.parametrize("prefix", ["", "rl_"])
@pytest.mark.parametrize(
    "override", ["--ppo.{}={}", "--rl_{}={}", "--ppo.rl-{}={}", "--ppo={{{}: {}}}"]
)
def test_a_whole_value_replaces_the_presets(tmp_path, prefix, override):
    def loaded(tree, name, value):
        tree = {f"{prefix}{key}": given for key, given in tree.items()}
        return load(tmp_path, {"ppo": tree}, override.format(name, value))

    compared = loaded(TAUGHT, "env_config", '{"replies_per_prompt": 4}')
    assert compared.config.ppo.env_config == PreferenceConfig(replies_per_prompt=4)
    origins = {source for key, _, source in compared.rows() if ".env_config." in key}
    assert origins == {"command line", "default"}
    assert loaded(TAUGHT, "env_config", "{}").config.ppo.env_config == PreferenceConfig()
    weighed = loaded(WEIGHED, "reward_weights", '{"json_valid": 5}')
    assert weighed.config.ppo.reward_weights == {"json_valid": 5}


@pytest.mark.parametrize("prefix", ["", "rl_"])
def test_a_dotted_name_changes_one_value_of_the_presets(tmp_path, prefix):
    tree = {"ppo": {"multi_objective": True, f"{prefix}env_config": MANY}}
    found = load(tmp_path, tree, "--ppo.env_config.components.polite.weight=2").config.ppo
    assert found.components["polite"] == KeywordComponent(words=("please",), weight=2)
    assert list(found.components) == list(MANY["components"])
    # What it names is a whole value again.
    found = load(tmp_path, tree, '--ppo.env_config.components={"length": {}}').config.ppo
    assert found.components == {"length": LengthComponent()}


@pytest.mark.parametrize("start", ["ppo.env_config", "rl-env-config", "ppo.rl-env-config"])
def test_dashes_in_the_name_of_a_component_stay(tmp_path, start):
    tree = {"components": {"json-valid": {"type": "json_valid"}, "a-b": POLITE}}
    found = load(
        *(tmp_path, {"rl_multi_objective": True, "ppo": {"env_config": tree}}),
        *(f"--{start}.components.json-valid.weight=5", f"--{start}.components.a-b.no-whole-words"),
        f"--{start}.components.a-b.case-sensitive",
    ).config.ppo.components
    assert list(found) == ["json-valid", "a-b"]
    assert found["json-valid"].weight == 5
    assert found["a-b"] == KeywordComponent(
        words=("please",), whole_words=False, case_sensitive=True
    )


@pytest.mark.parametrize(
    "url",
    [
        *("https://300.1.1.1/x", "https://☃☃/x", "https://xn--/x", "https://a..b/"),
        *("https://host/\x01", "https://ho\nst/", " https://host/", "https://host /"),
        *("https://host/\ud800", f"https://host/{'x' * 70000}", f"https://{'x' * 64}.de/"),
    ],
)
def test_addresses_that_can_never_be_asked(tmp_path, url):
    tree = {
        "ppo": {"multi_objective": True, "env_config": {"components": {"remote": {"url": url}}}}
    }
    text = message(tmp_path, tree)
    assert text.startswith(f"{CONFIGURED}.components.remote.url: is no valid URL; mend its host, ")


@pytest.mark.parametrize(
    "url",
    ["https://bücher.de/x", "http://[::1]:80/", "http://127.0.0.1", "HTTPS://a_b.c:8443/d%20e?"],
)
def test_addresses_that_can_be_asked(url):
    config = PPOConfig(multi_objective=True, env_config={"components": {"remote": {"url": url}}})
    assert config.components["remote"].url == url


@pytest.mark.parametrize(
    ("value", "stops"),
    [
        (r'{"stop_sequences": ["\ud83d\ude00"]}', ("😀",)),
        ("{stop_sequences: [Q]}", ("Q",)),
        ("{stop_sequences: none}", None),
    ],
)
def test_json_and_yaml_on_the_command_line(value, stops):
    def load():
        return load_config(None, ["--rl-env-type=text_generation", f"--rl-env-config={value}"])

    if stops is None:
        with pytest.raises(ConfigError, match="must be a list"):
            load()
    else:
        assert load().config.ppo.generation.stop_sequences == stops


@pytest.mark.parametrize("value", ['{"x": 1, "x": 2}', "{x: 1, x: 2}", '{"y": {"x": 1, "x": 1}}'])
@pytest.mark.parametrize("field", ["ppo.env_config", "ppo", "ppo.lora"])
def test_a_key_that_stands_twice_on_the_command_line(value, field):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"--{field}={value}"])
    assert str(caught.value) == f"command line: {field}: x stands there twice; keep one"
