"""Reward functions, components and the three environments, on constructed batches."""

from __future__ import annotations

import copy
import json
import math
import time

import pytest
import regex
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from rlhf.config import (
    ComponentSection,
    CorrectnessConfig,
    LengthPenaltyConfig,
    PPOConfig,
)
from rlhf.data.rendering import Renderer
from rlhf.data.rows import PromptRow
from rlhf.environments import Environment, Reply, build_environment
from rlhf.environments.env_types import ComponentScale, PreferenceComparison
from rlhf.environments.functions import (
    Correctness,
    last_number,
    length_penalty,
    matches,
    normalise_answer,
)
from rlhf.environments.model import PairModel
from rlhf.environments.stop import StopSequences
from rlhf.errors import ConfigError, TrainingError
from rlhf.modeling.reward import Scorer
from tests.examples import examples

CPU = torch.device("cpu")


def reply(text: str = "", tokens: int = 1, **more) -> Reply:
    return Reply("tea?", text, tokens, True, **more)


class Known(Scorer):
    """Scores that stand in the replies."""

    def __init__(self):
        self.seen = []

    def __call__(self, prompts, replies):
        self.seen += zip(prompts, replies, strict=True)
        return torch.tensor([float(r) for r in replies])


def sums(renderer, *batches, scorer=None, rows=(), **components):
    """What a multi-objective environment gives for batches one after another."""
    config = PPOConfig(multi_objective=True, env_config={"components": components})
    environment = build_environment(config, scorer, renderer, rows)
    return [environment(batch) for batch in batches]


def one(renderer, texts, kind, tokens=1, **options):
    """Raw values of one component."""
    (scored,) = sums(renderer, [reply(t, tokens) for t in texts], **{kind: options})
    return scored.components[kind].tolist()


# --- reward functions -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # tokens 0, 5, 8: over the target 5 by 0, 0, 3
        ({"target": 5, "slope": 0.5}, [0, 0, -1.5]),
        ({"target": 5, "slope": 2}, [0, 0, -6]),
        ({"target": 6, "slope": 0.5}, [0, 0, -1]),
        # off it by 5, 0, 3
        ({"target": 5, "slope": 0.5, "side": "both"}, [-2.5, 0, -1.5]),
    ],
)
def test_length_penalty(renderer, options, expected):
    batch = [reply(tokens=n) for n in (0, 5, 8)]
    assert length_penalty(LengthPenaltyConfig(**options))(batch) == expected
    config = PPOConfig(reward_fn="length_penalty", length_penalty=options)
    scored = build_environment(config, None, renderer)(batch)
    assert scored.totals.tolist() == expected
    assert list(scored.components) == ["length_penalty"]


def agrees(response, reference, mode, **options):
    correctness = Correctness(CorrectnessConfig(mode=mode, **options))
    (value,) = correctness([reply(response, reference=reference)])
    return value == 1


@pytest.mark.parametrize(
    ("mode", "response", "reference", "expected"),
    [
        ("exact", " four\n", "four", True),
        ("exact", "Four", "four", False),
        ("exact", "four.", "four", False),
        ("normalised", "The  FOUR!", "four", True),
        ("normalised", "four cups", "four", False),
        ("normalised", "don't", "dont", True),
        ("normalised", "-4", "4", False),
        ("normalised", "3.5", "35", False),
        ("normalised", ".5", "5", False),
        ("normalised", "1,234", "1234", True),
        ("normalised", "tea-cup", "tea cup", True),
        ("normalised", "４２", "42", True),
        ("numeric", "3 and then 4.", "4", True),
        ("numeric", "4 and then 3", "4", False),
        ("numeric", "no number", "4", False),
        ("numeric", "1,234.50", "1234.5", True),
        ("numeric", "1.1", "1.0", False),
        ("regex", "it is 42", r"\b4\d\b", True),
        ("regex", "it is 142", r"\b4\d\b", False),
        ("contains", "It is the Four.", "four", True),
        ("contains", "It is 14.", "4", False),
        ("contains", "It is 5.", "4", False),
    ],
)
def test_correctness(mode, response, reference, expected):
    assert agrees(response, reference, mode) is expected


@pytest.mark.parametrize(
    ("response", "options", "expected"),
    [
        ("1.1", {"tolerance": 0.1}, True),  # which floats can't: 1.1 − 1.0 > 0.1
        ("1.11", {"tolerance": 0.1}, False),
        ("0.9", {"tolerance": 0.1}, True),
        ("1.05", {"relative_tolerance": 0.05}, True),
        ("1.06", {"relative_tolerance": 0.05}, False),
        ("1e999999999", {"tolerance": 1e12}, False),
        ("9" * 5000, {"tolerance": 0.1}, False),
    ],
)
def test_tolerance(response, options, expected):
    assert agrees(response, "1.0", "numeric", **options) is expected


def test_right_and_wrong():
    correctness = Correctness(CorrectnessConfig(mode="exact", right=2, wrong=-3))
    assert correctness([reply("a", reference="a"), reply("b", reference="a")]) == [2, -3]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5-3", "3"), ("x=-3", "-3"), ("−3", "-3"), ("(−4)", "-4"), ("2e5", "2e5"), (".5", "0.5"),
        ("$1,234.", "1234"), ("12,345,678 apples", "12345678"), ("1,2,3", "3"), ("10%", "10"),
    ],
)  # fmt: skip
def test_the_last_number(text, number):
    assert last_number(text) == last_number(number)
    assert str(float(last_number(text))) == str(float(number))


@given(st.text())
def test_normalising_twice_is_normalising_once(text):
    assert normalise_answer(normalise_answer(text)) == normalise_answer(text)


SLOW = r"^(?:a|a?b?a)+?(?:a|aa)+$"


def test_a_slow_pattern_is_stopped():
    text = "a" * 45 + "!"
    begun = time.monotonic()
    with pytest.raises(TrainingError, match=r"took more than timeout_seconds = 0\.1 on the reply"):
        matches(regex.compile(SLOW), text, 0.1)
    assert time.monotonic() - begun < 60  # unstopped, it would be years
    with pytest.raises(TrainingError, match="took more than"):
        agrees(text, SLOW, "regex", timeout_seconds=0.1)


@pytest.mark.parametrize(
    ("mode", "reference", "reason"),
    [
        ("exact", None, "none"),
        ("numeric", "four", "which holds no number"),
        ("normalised", "the !", "of which nothing is left"),
        ("contains", "the", "of which nothing is left"),
        ("regex", "(", r"which is no pattern \(missing \)"),
    ],
)
def test_a_reference_that_is_missing_or_useless_is_refused_before_training(
    renderer, mode, reference, reason
):
    config = PPOConfig(reward_fn="correctness", correctness={"mode": mode})
    rows = [PromptRow("2 + 2?", reference="4"), PromptRow("tea?", reference=reference)]
    with pytest.raises(ConfigError, match=rf"training prompt 2 \('tea\?'\) .*{reason}") as caught:
        build_environment(config, None, renderer, rows)
    assert "ppo: reward_fn = 'correctness' needs a reference answer" in str(caught.value)
    assert "data.reference_column" in str(caught.value)
    with pytest.raises(ConfigError, match=f"component 'correctness' .* prompt 1 .*{reason}"):
        sums(renderer, [], rows=rows[1:], correctness={"mode": mode})


def test_no_reward_model(renderer):
    with pytest.raises(ConfigError, match="reward_fn = 'default' needs a reward model, and there"):
        build_environment(PPOConfig(), None, renderer)


# --- components -------------------------------------------------------------------------------


def test_length_is_piecewise_linear(renderer):
    batch = [reply(tokens=n) for n in (0, 10, 15, 20, 25, 99)]
    points = [[10, 0], [20, 1], [30, -1]]
    (scored,) = sums(renderer, batch, length={"points": points})
    assert scored.totals.tolist() == [0, 0, 0.5, 1, 0, -1]
    (scored,) = sums(renderer, batch, length={"points": [[5, 2]]})
    assert scored.totals.tolist() == [2] * 6


TEXTS = ["Tea, please", "teapot", "tea cup", "none"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 0, 1, 0]),
        ({"match": "all"}, [0, 0, 1, 0]),
        ({"match": "fraction"}, [0.5, 0, 1, 0]),
        ({"case_sensitive": True}, [0, 0, 1, 0]),
        ({"whole_words": False}, [1, 1, 1, 0]),
        ({"words": ["tea cup"]}, [0, 0, 1, 0]),
        ({"words": ["C++", "tea,"]}, [1, 0, 0, 0]),
    ],
)
def test_keyword(renderer, options, expected):
    assert one(renderer, TEXTS, "keyword", **{"words": ["tea", "cup"], **options}) == expected


def test_regex_component(renderer):
    texts = ["a1", "1", "b"]
    assert one(renderer, texts, "regex", pattern=r"\d") == [1, 1, 0]
    assert one(renderer, texts, "regex", pattern=r"\d", full=True) == [0, 1, 0]
    with pytest.raises(TrainingError, match="took more than"):
        one(renderer, ["a" * 45 + "!"], "regex", pattern=SLOW, timeout_seconds=0.1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 1, 1, 0, 0, 0]),
        ({"require": "object"}, [1, 0, 0, 0, 0, 0]),
        ({"require": "array"}, [0, 1, 0, 0, 0, 0]),
        ({"require": "object", "keys": ["a"]}, [1, 0, 0, 0, 0, 0]),
        ({"require": "object", "keys": ["a", "b"]}, [0] * 6),
    ],
)
def test_json_valid(renderer, options, expected):
    texts = ['{"a": 1}', "[1]", "1", "NaN", '{"a"', "[" * 100_000]
    assert one(renderer, texts, "json_valid", **options) == expected


def test_repetition(renderer):
    # "a b a b a": 3-grams aba bab aba, one of three again; 1-grams: 3 of 5 again
    texts = ["a b A b a", "a b c", "a b", ""]
    assert one(renderer, texts, "repetition") == pytest.approx([-1 / 3, 0, 0, 0])
    assert one(renderer, texts, "repetition", ngram=1) == pytest.approx([-0.6, 0, 0, 0])


def test_correctness_component(renderer):
    batch = [reply("4", reference="4"), reply("5", reference="4")]
    (scored,) = sums(renderer, batch, correctness={"mode": "numeric"})
    assert scored.totals.tolist() == [1, 0]


def test_reward_model_component_sees_each_replys_own_prompt(renderer):
    scorer = Known()
    batch = [Reply("tea?", "3", 1, True), Reply("jar?", "1", 1, False)]
    (scored,) = sums(renderer, batch, scorer=scorer, reward_model={})
    assert scorer.seen == [("tea?", "3"), ("jar?", "1")]
    assert scored.totals.tolist() == [3, 1]


# --- the weighted sum -------------------------------------------------------------------------


def test_weights_and_what_is_logged(renderer):
    batch = [reply("2", tokens=4), reply("6", tokens=0)]
    components = {"reward_model": {"weight": 0.5}, "length": {"points": [[0, 0], [4, 8]]}}
    config = PPOConfig(
        multi_objective=True, env_config={"components": components}, reward_weights={"length": -1}
    )
    scored = build_environment(config, Known(), renderer)(batch)
    assert scored.totals.tolist() == [-7, 3]
    assert scored.metrics() == {
        "reward/reward_model": 4, "reward/length": 4,
        "reward_weighted/reward_model": 2, "reward_weighted/length": -4,
    }  # fmt: skip
    assert scored.rows()[0] == {
        "reward": -7,
        "components": {"reward_model": 2, "length": 8},
        "weighted": {"reward_model": 1, "length": -8},
    }
    assert json.dumps(scored.rows())


def scale(**options):
    return ComponentScale(ComponentSection(**options))


def test_zscore_of_all_so_far():
    z = scale(normalize="zscore")
    # mean 2, deviation 1
    assert z([1.0, 3.0]) == [-1, 1]
    # 1, 3, 5, 7: mean 4, variance (9 + 1 + 1 + 9) / 4 = 5
    assert z([5.0, 7.0]) == pytest.approx([1 / math.sqrt(5), 3 / math.sqrt(5)])


def test_minmax_of_all_so_far():
    scaled = scale(normalize="minmax")
    assert scaled([1.0, 3.0]) == [0, 1]
    assert scaled([2.0, 5.0]) == [0.25, 1]


@pytest.mark.parametrize("normalize", ["zscore", "minmax"])
def test_equal_values_are_worth_nothing(normalize):
    assert scale(normalize=normalize)([0.1, 0.1, 0.1]) == [0, 0, 0]


def test_clip_comes_after_normalising_and_before_the_weight(renderer):
    assert scale(clip=2)([-5.0, 1.0, 5.0]) == [-2, 1, 2]
    assert scale(clip=0.5, normalize="zscore")([1.0, 3.0]) == [-0.5, 0.5]
    points = [[0, 0], [10, 10]]
    batch = [reply(tokens=9)]
    (scored,) = sums(renderer, batch, length={"points": points, "clip": 2, "weight": 3})
    assert scored.totals.tolist() == [6]
    assert scored.components["length"].tolist() == [9]


@settings(deadline=None, max_examples=examples(50))
@given(
    st.lists(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5), min_size=2, max_size=4),
    st.sampled_from(["zscore", "minmax"]),
)
def test_a_scale_that_was_saved_goes_on_to_the_bit(batches, normalize):
    straight, first, second = (scale(normalize=normalize) for _ in range(3))
    for batch in batches[:-1]:
        straight(batch)
        first(batch)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second(batches[-1]) == straight(batches[-1])


def test_state_of_an_environment(renderer):
    def made(*names):
        components = {n: {"type": "length", "normalize": "zscore"} for n in names}
        config = PPOConfig(multi_objective=True, env_config={"components": components})
        return build_environment(config, None, renderer)

    one, two = made("a"), made("a")
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))  # before the first batch
    one([reply(tokens=n) for n in (3, 50)])
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    batch = [reply(tokens=n) for n in (7, 9)]
    assert torch.equal(one(batch).totals, two(batch).totals)
    assert not torch.equal(one(batch).totals, made("a")(batch).totals)
    with pytest.raises(ConfigError, match="the checkpoint's rewards are a, this run's are b; put"):
        made("b").load_state_dict(one.state_dict())


def test_a_value_that_is_not_finite_names_component_and_reply(renderer):
    with pytest.raises(TrainingError, match=r"reward 'model' is nan for the reply 'nan'"):
        sums(renderer, [reply("1"), reply("nan")], scorer=Known(), model={"type": "reward_model"})


# --- stop sequences ---------------------------------------------------------------------------


def ids(renderer, text):
    return renderer.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_stop_sequence_over_several_tokens_and_inside_of_one(renderer):
    # the tokens are "good", " ", "bad" and the like: "d b" ends inside of one, "tea" is letters
    row = ids(renderer, "tea good bad cup")
    pieces = [renderer.tokenizer.decode(i) for i in row]
    assert not any("d b" in piece for piece in pieces)
    ending = StopSequences(renderer, ["d b"])
    found = [ending([row[:n]])[0] for n in range(len(row) + 1)]
    first = found.index(True)
    assert found == [False] * first + [True] * (len(row) + 1 - first)
    assert renderer.tokenizer.decode(row[:first]).rstrip() != "tea good b"[:-1]
    assert ending.text(row[:first]) == "tea goo"
    assert ending.text(row) == "tea goo"


def test_rows_on_their_own_and_the_earliest_sequence(renderer):
    ending = StopSequences(renderer, ["bad", "cup"])
    rows = [ids(renderer, text) for text in ("good", "cup bad", "good bad", "")]
    assert ending(rows) == [False, True, True, False]
    assert [ending.text(row) for row in rows] == ["good", "", "good", ""]


def test_a_sequence_of_space_is_found_before_the_text_is_stripped(renderer):
    ending = StopSequences(renderer, ["\n\n"])
    row = ids(renderer, "good \n\n")
    assert ending([row, row[:-1]]) == [True, False]
    assert ending.text(row) == "good"


@pytest.mark.parametrize("sequence", ["<|end|>", "bye<|user|>", "<|extra|>"])
def test_a_stop_sequence_with_a_special_token_is_refused(renderer, sequence):
    # Special tokens are left out of a reply's text, so that it could never be found.
    tokenizer = copy.deepcopy(renderer.tokenizer)
    tokenizer.add_tokens([AddedToken("<|extra|>", special=True)])
    assert "<|extra|>" not in tokenizer.all_special_tokens
    with pytest.raises(ConfigError) as caught:
        StopSequences(Renderer(tokenizer), ["bad", sequence])
    token = sequence.removeprefix("bye")
    assert str(caught.value) == (
        f"ppo.env_config.stop_sequences: {sequence!r} holds the special token {token!r}, and "
        "the text of a reply holds none; remove it"
    )


def test_without_sequences_replies_are_only_decoded(renderer):
    environment = build_environment(PPOConfig(), Known(), renderer)
    assert environment.stop is None
    row = [*ids(renderer, " good bad "), renderer.tokenizer.eos_token_id]
    assert environment.text(row) == renderer.decode(row) == "good bad"


def test_stop_sequences_reach_the_environment(renderer):
    config = PPOConfig(env_type="text_generation", env_config={"stop_sequences": ["bad"]})
    environment = build_environment(config, Known(), renderer)
    assert isinstance(environment, Environment)
    assert environment.stop([ids(renderer, "good bad")]) == [True]
    assert environment.text(ids(renderer, "good bad")) == "good"


# --- comparisons ------------------------------------------------------------------------------


def compared(renderer, batch, scorer=None, **options):
    config = PPOConfig(
        env_type="preference_comparison", env_config=options, chunk_size=12, total_episodes=12
    )
    environment = build_environment(config, scorer or Known(), renderer)
    assert environment.replies_per_prompt == options.get("replies_per_prompt", 2)
    assert environment.needs_reference_reply is (options.get("rival") == "reference")
    return environment(batch)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_two_replies(renderer):
    batch = [reply("3", group=0), reply("7", group=1), reply("1", group=0), reply("7", group=1)]
    scored = compared(renderer, batch)
    win = sigmoid(2) - 0.5
    assert scored.totals.tolist() == pytest.approx([win, 0, -win, 0])
    assert scored.components["judge"].tolist() == [3, 7, 1, 7]
    assert torch.equal(scored.weighted["judge"], scored.totals)
    win = sigmoid(2 / 5) - 0.5
    assert compared(renderer, batch, temperature=5).totals[0] == pytest.approx(win)


def test_three_replies(renderer):
    batch = [reply(text) for text in ("0", "1", "3")]
    scored = compared(renderer, batch, replies_per_prompt=3)
    # mean over both rivals
    first = (sigmoid(-1) + sigmoid(-3)) / 2 - 0.5
    last = (sigmoid(3) + sigmoid(2)) / 2 - 0.5
    assert scored.totals.tolist() == pytest.approx([first, -first - last, last])


@settings(deadline=None, max_examples=examples(50))
@given(st.lists(st.floats(-1e4, 1e4), min_size=2, max_size=6), st.floats(0.01, 100))
def test_rewards_of_a_prompts_replies_add_up_to_nothing(renderer, scores, tau):
    batch = [reply(str(score)) for score in scores]
    scored = compared(renderer, batch, temperature=tau)
    assert float(scored.totals.sum()) == pytest.approx(0, abs=1e-5)
    assert scored.totals.abs().max() <= 0.5
    # Renaming the replies renames the rewards.
    back = compared(renderer, batch[::-1], temperature=tau)
    torch.testing.assert_close(back.totals, scored.totals.flip(0))
    if len(scores) == 2:
        assert float(scored.totals[0]) == -float(scored.totals[1])


def test_the_reference_policys_reply_as_rival(renderer):
    scorer = Known()
    batch = [
        Reply("tea?", "3", 1, True, reference_reply="1", reference_finished=False),
        Reply("jar?", "2", 1, False, reference_reply="2", reference_finished=True),
    ]
    scored = compared(renderer, batch, scorer, rival="reference")
    assert scored.totals.tolist() == pytest.approx([sigmoid(2) - 0.5, 0])
    assert scorer.seen == [("tea?", "3"), ("jar?", "2"), ("tea?", "1"), ("jar?", "2")]
    config = PPOConfig(
        env_type="preference_comparison", env_config={"rival": "reference"}, total_episodes=128
    )
    environment = build_environment(config, scorer, renderer)
    rivals = [environment._reference(r) for r in batch]
    assert [(r.response, r.finished) for r in rivals] == [("1", False), ("2", True)]
    assert rivals[1].n_tokens == rivals[0].n_tokens + 1  # its end
    with pytest.raises(TrainingError, match="there is no reference reply to 'tea"):
        compared(renderer, [reply("1")], rival="reference")


def test_a_reply_without_rival(renderer):
    with pytest.raises(TrainingError, match="the reply '1' has no rival"):
        compared(renderer, [reply("1", group=1), reply("2", group=0), reply("3", group=0)])


def test_a_pair_model_is_asked_in_both_orders(renderer, reward_model):
    model = PairModel(reward_model, CPU, 64)
    asked = [("tea?", "good good", "bad"), ("jar or mug?", "bad", "good")]
    there = model.advantages(asked)
    back = model.advantages([(p, b, a) for p, a, b in asked])
    assert there == pytest.approx([-x for x in back])
    assert model.advantages([("tea?", "good", "good")]) == [0]
    rows = [model._ids(p, a, b) for p, a, b in asked]
    swapped = [model._ids(p, b, a) for p, a, b in asked]
    f, g = (model.scorer.score_ids(r).double() for r in (rows, swapped))
    assert there == pytest.approx(((f - g) / 2).tolist())
    assert abs(there[0]) > 1e-6


def test_what_a_pair_model_reads(reward_model):
    model = PairModel(reward_model, CPU, 40)
    tokenizer = model.scorer.renderer.tokenizer
    read = tokenizer.decode(model._ids("tea?", "good", "bad"))
    assert read == "<|user|>tea?<|assistant|>good<|end|>bad<|end|>"
    long = model._ids("tea? " * 100, "good " * 100, "bad " * 100)
    assert len(long) <= 40
    assert len(PairModel(reward_model, CPU, 5000)._ids("tea? " * 999, "good" * 999, "bad")) <= 64


def test_what_is_no_pair_model(renderer, tmp_path):
    def build(folder):
        options = {"judge": "pair_model", "pair_model": str(folder)}
        config = PPOConfig(env_type="preference_comparison", env_config=options)
        build_environment(config, None, renderer)

    for folder in (tmp_path / "none", "~nosuchuser/model"):
        with pytest.raises(ConfigError, match=r"ppo\.env_config\.pair_model = '.*': can't be") as e:
            build(folder)
        assert "\n" not in str(e.value)


def test_a_pair_model_compares(renderer, reward_model):
    asked_of = []

    def longer(asked):
        asked_of.extend(asked)
        return [float(len(a) - len(b)) for _, a, b in asked]

    config = PPOConfig(
        env_type="preference_comparison",
        env_config={"judge": "pair_model", "pair_model": str(reward_model)},
    )
    environment = build_environment(config, None, renderer, context=64)
    assert environment.pairs.__self__.scorer.limits.max_length == 64
    batch = [
        Reply("tea?", "aaa", 1, True, group=0, reference_reply="a"),
        Reply("tea?", "a", 1, True, group=0, reference_reply="a"),
    ]
    assert float(environment(batch).totals.sum()) == 0
    environment = PreferenceComparison(
        config.comparison, None, longer, ending=StopSequences(renderer), needs_reward_model=False,
        functions=[],
    )  # fmt: skip
    scored = environment(batch)
    assert asked_of == [("tea?", "aaa", "a"), ("tea?", "a", "aaa")]
    assert scored.totals[0] == pytest.approx(sigmoid(2) - 0.5)
    assert scored.components["judge"].tolist() == [2, -2]
