"""Preference data of four formats, each from its file to a reward model that agrees with it."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest
import torch

from rlhf.config import DataConfig, EvaluationConfig
from rlhf.data.prepare import prepare_data
from rlhf.evaluation import evaluate_reward_model
from rlhf.files import read_json
from rlhf.modeling.reward import Scorer
from rlhf.reward import train_reward_model
from tests.library import toys


def transcript(prompt: str, good: str, bad: str, _: bool) -> list[dict[str, Any]]:
    """A row of HH-RLHF."""
    start = f"\n\nHuman: {prompt}\n\nAssistant: "
    return [{"chosen": f"{start}{good}", "rejected": f"{start}{bad}"}]


def comparison(prompt: str, good: str, bad: str, is_first: bool) -> list[dict[str, Any]]:
    """A row of a comparison log."""
    a, b = (good, bad) if is_first else (bad, good)
    return [
        {"prompt": prompt, "response_a": a, "response_b": b, "winner": "a" if is_first else "b"}
    ]


def helpsteer(prompt: str, good: str, bad: str, is_first: bool) -> list[dict[str, Any]]:
    """Two rows of attribute scores."""
    rows = [
        {"prompt": prompt, "response": text, "helpfulness": score, "correctness": score,
         "coherence": 3, "complexity": 1, "verbosity": 1}
        for text, score in ((good, 4), (bad, 1))
    ]  # fmt: skip
    return rows if is_first else rows[::-1]


def label_studio(prompt: str, good: str, bad: str, is_first: bool) -> list[dict[str, Any]]:
    """A task of an export, with two annotations that agree."""
    a, b = (good, bad) if is_first else (bad, good)
    value = {"selected": "left" if is_first else "right"}
    result = [{"from_name": "better", "to_name": "text", "type": "pairwise", "value": value}]
    return [
        {"id": 1, "data": {"prompt": prompt, "answer1": a, "answer2": b},
         "annotations": [{"id": i, "completed_by": i, "result": result} for i in (1, 2)]}
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "name", "expected"),
    [
        (transcript, "hh.jsonl", "pairs"),
        (comparison, "log.jsonl", "comparison"),
        (helpsteer, "scores.jsonl", "rated"),
        (label_studio, "export.json", "label-studio"),
    ],
)
def test_from_a_file_to_a_reward_model(tmp_path, sft, make, name, expected):
    rng = random.Random(0)
    prompts = [f"{a} or {b}?" for a, b in itertools.permutations(toys.ASKED, 2)]
    # The better reply stands first in half of the rows: a format read the wrong way round, or by
    # position, ends below the bar.
    rows = [
        row
        for prompt in prompts
        for n in (1, 2)
        for row in make(prompt, " ".join(["good"] * n), " ".join(["bad"] * n), rng.random() < 0.5)
    ]
    whole = name.endswith(".json")
    text = json.dumps(rows) if whole else "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / name).write_text(text)
    folders = [tmp_path / part for part in ("data", "model", "evaluation")]
    for folder in folders:
        folder.mkdir()
    data, model, evaluation = folders
    config = DataConfig(source=str(tmp_path / name), eval_fraction=0.3, near_duplicates=None)
    prepare_data(config, data)
    summary = read_json(data / "summary.json")
    assert (summary["format"], summary["rows_used"], summary["left_out"]) == (
        expected, len(rows), {},
    )  # fmt: skip
    training = toys.changed(toys.REWARD, epochs=6)
    result = train_reward_model(training, data, sft, model, runtime=toys.RUNTIME)
    assert result.metrics["pairs"] == summary["pairs_train"]
    found = evaluate_reward_model(
        EvaluationConfig(), config, data, model, evaluation, limits=48, runtime=toys.RUNTIME
    )
    assert found.metrics["n"] == summary["pairs_eval"] >= 6
    assert found.metrics["accuracy"] > 0.9
    good, bad = Scorer(model, torch.device("cpu"), 48)(["tea or cup?"] * 2, ["good", "bad"])
    assert good > bad
