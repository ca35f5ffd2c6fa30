"""Rewards from environments with episodes: AITraining's, Tinker's, and an operator's own file."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from rlhf.config import CustomConfig
from rlhf.custom_code import ALLOWED
from rlhf.environments import Reply
from rlhf.environments.custom import CustomFunction
from rlhf.errors import TrainingError
from rlhf.step_environments import environment_reward

ROWS = [
    Reply("2 + 2?", "4", 2, True, "4").row(),
    Reply([{"role": "user", "content": "3 + 3?"}], "7!", 3, True, "6").row(),
]


def prompt_of(row):
    return row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]


class AsyncAnswer:
    """The interface of Tinker's cookbook: coroutines, `episode_done`."""

    def __init__(self, row):
        self.row, self.begun = row, False

    async def initial_observation(self):
        self.begun = True
        return prompt_of(self.row), ["\n"]

    async def step(self, action):
        assert self.begun
        right = float(action == self.row["reference"])
        return SimpleNamespace(
            reward=right, episode_done=True, next_observation=None, next_stop_condition=None,
            metrics={"right": right, "length": len(action)},
        )  # fmt: skip


class Tokenizer:
    def encode(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return [ord(c) for c in text]

    def decode(self, ids, skip_special_tokens=True):
        return "".join(map(chr, ids))


@dataclass
class Step:
    """AITraining's result."""

    reward: float
    done: bool
    metrics: dict = field(default_factory=dict)


class OfAITraining:
    """AITraining's interface: a list of prompts in turn, `reset`, `done`, actions of token ids."""

    def __init__(self, tokenizer, prompts):
        self.tokenizer, self.prompts, self.turn = tokenizer, prompts, 0

    def reset(self):
        self.prompt = self.prompts[self.turn % len(self.prompts)]
        self.turn += 1
        self.responses = []
        return SimpleNamespace(prompt=self.prompt)


class Comparison(OfAITraining):
    """Like PreferenceComparisonEnv: a preference once it has two responses."""

    def step(self, action):
        self.responses.append(self.tokenizer.decode(action))
        if len(self.responses) < 2:
            return Step(0.0, False)
        first, second = map(len, self.responses)
        return Step(float(first - second), True)


class ByText(OfAITraining):
    """Like TextGenerationEnv, which steps token by token and scores the text."""

    def reward_fn(self, prompt, generated, full_text):
        assert full_text == prompt + generated
        return len(generated) / 10

    def step(self, action):
        raise AssertionError("an action is a token here, not a reply")


class Objectives(ByText):
    """Like MultiObjectiveRewardEnv."""

    def compute_multi_objective_reward(self, prompt, generated, full_text):
        parts = {"short": 1.0 / len(generated), "right": float(generated == "4")}
        return 0.5 * parts["short"] + parts["right"], parts


def of_row(kind):
    return lambda row: kind(Tokenizer(), prompts=[prompt_of(row)])


def test_coroutines_get_the_text_and_give_reward_or_a_metric():
    assert environment_reward(AsyncAnswer)(ROWS) == [1.0, 0.0]
    assert environment_reward(AsyncAnswer, metric="length")(ROWS) == [1.0, 2.0]
    shouted = environment_reward(AsyncAnswer, action=lambda env, text: text.rstrip("!"))
    assert shouted([{**ROWS[1], "reference": "7"}]) == [1.0]


def test_environments_of_aitraining_score_the_reply_to_its_own_prompt():
    assert environment_reward(of_row(ByText))(ROWS) == [0.1, 0.2]
    assert environment_reward(of_row(Objectives))(ROWS) == [1.5, 0.25]
    assert environment_reward(of_row(Objectives), metric="reward_right")(ROWS) == [1.0, 0.0]


def test_a_comparison_gets_the_reference_policys_reply_as_the_second():
    rows = [{**ROWS[0], "reference_reply": "four"}, ROWS[0], {**ROWS[1], "reference_reply": "6"}]
    reward = environment_reward(of_row(Comparison), versus_reference=True)
    # The second is the reference's own reply, which has no rival.
    assert reward(rows) == [-3.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("make", "metric", "said"),
    [
        (of_row(Comparison), None, "Comparison expects another action after the reply"),
        (AsyncAnswer, "lenght", "has no metric 'lenght'; it has: right, length"),
        (lambda row: Comparison(Tokenizer(), ["one", "two"]), None, "poses 'one', and the reply"),
    ],
)
def test_what_can_not_be_a_reward_says_so(make, metric, said):
    with pytest.raises(ValueError, match=said):
        environment_reward(make, metric=metric)(ROWS)


SOURCE = """
from types import SimpleNamespace

import sys

from rlhf.step_environments import environment_reward

class Answer:
    def __init__(self, reference):
        self.reference = reference

    def reset(self):
        return "?"

    async def step(self, text):
        assert "torch" not in sys.modules
        return SimpleNamespace(reward=float(text == self.reference), done=True)

reward = environment_reward(lambda row: Answer(row["reference"]))
"""


def test_an_operators_file_is_a_custom_reward_function(tmp_path, monkeypatch):
    (tmp_path / "answer.py").write_text(SOURCE)
    monkeypatch.setenv(ALLOWED, os.fspath(tmp_path))
    config = CustomConfig(function=f"{tmp_path / 'answer.py'}:reward", timeout_seconds=300)
    function = CustomFunction(config, "ppo.custom")
    try:
        function.code.check()  # the name is assigned, not defined
        batch = [Reply("2 + 2?", text, 1, True, "4") for text in ("4", "5")]
        assert function(batch) == [1.0, 0.0]
        (tmp_path / "answer.py").write_text(SOURCE.replace("done=True", "done=False"))
        function.close()
        with pytest.raises(TrainingError, match="Answer expects another action"):
            function(batch)
    finally:
        function.close()
