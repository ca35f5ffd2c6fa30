"""The judge: its stage, its accuracy on held-out pairs, and when it is usable."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from rlhf.config import PipelineConfig
from rlhf.data.rows import PAIRS_EVAL, PAIRS_JUDGE, Pair, read_rows, write_rows
from rlhf.errors import ConfigError, DataError
from rlhf.files import read_json, write_json
from rlhf.judge import JUDGE, has_judge_pairs, measure_judge, read_judge, write_no_judge
from rlhf.reward import train_reward_model
from rlhf.store import Producer
from tasks.preflight import preflight
from tasks.runner import run_stage, store_of
from tasks.stages import TRAIN_JUDGE, TRAIN_REWARD_MODEL
from tests.library import toys

PROMPTS = [f"{name}?" for name in toys.ASKED]


def judge_pairs(count: int = 64) -> list[Pair]:
    rng = random.Random(7)
    return [Pair(f"{rng.choice(PROMPTS)} {i}", *toys.replies(rng)) for i in range(count)]


@pytest.fixture(scope="module")
def judged(data, tmp_path_factory) -> Path:
    """The toy dataset with pairs for a judge."""
    folder = tmp_path_factory.mktemp("judged") / "data"
    shutil.copytree(data, folder)
    write_rows(folder / PAIRS_JUDGE, judge_pairs())
    return folder


class Pipeline:
    """A store with a dataset and an SFT policy, in which stages run."""

    def __init__(self, folder: Path, data: Path, sft: Path) -> None:
        self.tree = {
            "store": str(folder / "store"),
            "runtime": {
                "work_dir": str(folder / "work"),
                "report_dir": str(folder / "reports"),
                "threads": 1,
            },
            "tracking": {"trackers": []},
            "reward_model": toys.REWARD.model_dump(),
            "sft": {"max_length": 48},
            "ppo": {"max_new_tokens": 8},
        }
        self.store = store_of(self.config())
        producer = Producer(stage="x", code_version="1", config={}, seed=0, versions={})
        self.inputs = {
            role: self.store.publish(path, kind, parents={}, producer=producer, metrics={})
            for role, path, kind in (("data", data, "dataset"), ("sft", sft, "policy"))
        }

    def config(self, **changes) -> PipelineConfig:
        return PipelineConfig.model_validate({**self.tree, **changes})

    def run(self, stage=TRAIN_JUDGE, **changes):
        outcome = run_stage(stage, self.config(**changes), self.inputs)
        return outcome, self.store.fetch(outcome.ref)


@pytest.fixture
def pipeline(tmp_path, judged, sft):
    return Pipeline(tmp_path, judged, sft)


def test_a_judge_is_a_reward_model_of_its_own_pairs_and_seed(pipeline, judged, sft, tmp_path):
    outcome, folder = pipeline.run(seed=3)
    # 24 held-out pairs on at most 20 prompts, and a toy task that a reward model learns whole.
    judge = read_json(folder / JUDGE)
    assert (judge["trained"], judge["usable"], judge["reason"]) == (True, True, None)
    assert judge["accuracy"] == 1
    assert judge["n"] == 24
    assert judge["prompts"] == len({p.prompt for p in read_rows(judged / PAIRS_EVAL, Pair)}) < 24
    assert judge["base"] == "the SFT policy"
    assert outcome.metrics["pairs"] == 64
    assert outcome.metrics["negatives"] > 32
    assert outcome.ref.kind == "judge"
    assert outcome.headline.startswith("accuracy 1.000 [0.")
    # What the library trains on the same pairs with the next seed, and nothing else.
    same, other = tmp_path / "same", tmp_path / "other"
    for path, seed in ((same, 4), (other, 3)):
        path.mkdir()
        train_reward_model(
            toys.changed(toys.REWARD, negatives=1.0), judged, sft, path, pairs=PAIRS_JUDGE,
            seed=seed, runtime=toys.RUNTIME,
            limits=pipeline.config().token_limits(),
        )  # fmt: skip
    toys.assert_same_weights(folder, same)
    assert toys.distance(folder, other) > 0
    reward_model = pipeline.run(TRAIN_REWARD_MODEL, seed=3)[0]
    assert reward_model.metrics["pairs"] == 96
    assert "negatives" not in reward_model.metrics


def test_the_negatives_of_the_judge_and_of_the_reward_model_are_two_settings(pipeline):
    whole = pipeline.run()[0]
    none = pipeline.run(judge={"negatives": 0})[0]
    assert "negatives" not in none.metrics
    assert none.ref != whole.ref
    # The reward model's own changes nothing of the judge, and is none of its inputs.
    section = {**pipeline.tree["reward_model"], "negatives": 0.5}
    assert pipeline.run(reward_model=section)[0].cached
    reward_model = pipeline.run(TRAIN_REWARD_MODEL, reward_model=section)[0]
    assert reward_model.metrics["negatives"] > 24
    assert pipeline.run(TRAIN_REWARD_MODEL, judge={"negatives": 0})[0].metrics["pairs"] == 96


def test_without_pairs_or_a_wish_there_is_no_judge(tmp_path, data, sft):
    pipeline = Pipeline(tmp_path, data, sft)
    outcome, folder = pipeline.run(data={"source": "x.jsonl"})
    assert [path.name for path in folder.iterdir() if path.suffix != ".lock"] == [JUDGE]
    known = read_judge(folder)
    assert (known.trained, known.usable) == (False, False)
    assert outcome.headline == (
        "no judge: the data have no pairs for one; set data.judge_fraction "
        "(of generated data, data.world.judge_pairs)"
    )
    disabled = pipeline.run(judge={"enabled": False})[0]
    assert disabled.headline == "no judge: judge.enabled = false"
    assert disabled.metrics == {"trained": False, "usable": False, "reason": disabled.headline[10:]}


def test_an_empty_part_for_the_judge(tmp_path, data):
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    assert not has_judge_pairs(folder)
    write_rows(folder / PAIRS_JUDGE, [])
    assert not has_judge_pairs(folder)
    write_rows(folder / PAIRS_JUDGE, judge_pairs(1))
    assert has_judge_pairs(folder)


def held_out(folder: Path, data: Path, pairs: list[Pair]) -> Path:
    copy = Path(shutil.copytree(data, folder))
    write_rows(copy / PAIRS_EVAL, pairs)
    return copy


def measured(data: Path, judge: Path, folder: Path, **options) -> dict:
    shutil.copytree(judge, folder)
    measure_judge(data, folder, {}, "a base", limits=48, runtime=toys.RUNTIME, **options)
    return read_json(folder / JUDGE)


def test_accuracy_by_hand(tmp_path, data, reward_model):
    # "good" beats "bad": right, right, wrong of one prompt; two replies of one text are left out.
    rows = [Pair("tea?", "good", "bad"), Pair("cup?", "good", "bad"), Pair("cup?", "bad", "good")]
    rows.append(Pair("jar?", "good", "good"))
    judge = measured(held_out(tmp_path / "data", data, rows), reward_model, tmp_path / "judge")
    assert judge["accuracy"] == pytest.approx(2 / 3)
    assert (judge["n"], judge["prompts"]) == (3, 2)
    # Sums of the prompts' deviations from 2/3: tea 1/3, cup 1/3 − 2/3 = −1/3.
    # Variance 2/1 · (1/9 + 1/9) / 3² = 4/81.
    assert judge["accuracy_error"] == pytest.approx(2 / 9)
    assert not judge["usable"]
    assert judge["reason"].startswith("its accuracy on 3 held-out pairs is 0.667 [0.")
    assert "(data.judge_fraction), or another judge.base" in judge["reason"]


def test_many_pairs_of_one_prompt_are_no_evidence(tmp_path, data, reward_model):
    one, many = (
        held_out(tmp_path / name, data, [Pair(f"{p} tea?", "good", "bad") for p in prompts])
        for name, prompts in (("one", "aaaaaaaaaaaa"), ("many", "abcdefghijkl"))
    )
    # One prompt has no interval. Of 12 right ones of 12 the lower bound is 12 / (12 + t²) with
    # t = 2.201 for 11 degrees of freedom: 0.712.
    assert not measured(one, reward_model, tmp_path / "a")["usable"]
    judge = measured(many, reward_model, tmp_path / "b")
    assert judge["usable"]
    assert judge["accuracy_low"] == pytest.approx(12 / (12 + 2.201**2), abs=1e-3)


def test_no_pair_to_measure_it_on(tmp_path, data, reward_model):
    folder = held_out(tmp_path / "data", data, [Pair("tea?", "good", "good")])
    judge = measured(folder, reward_model, tmp_path / "judge")
    assert (judge["trained"], judge["usable"], judge["n"]) == (True, False, 0)
    assert "no held-out pair" in judge["reason"]


def test_what_is_read_again(tmp_path):
    write_no_judge(tmp_path, "why")
    assert read_judge(tmp_path).reason == "why"
    assert not read_judge(None).usable
    for text in ({"trained": True}, {"trained": True, "usable": True, "accuracy": "high"}):
        write_json(tmp_path / JUDGE, text)
        with pytest.raises(DataError, match=r"judge\.json is damaged|judge\.json.* is damaged"):
            read_judge(tmp_path)
    with pytest.raises(DataError, match="is missing"):
        read_judge(tmp_path / "nowhere")


def test_another_base(pipeline, fresh):
    based = {"judge": {"base": str(fresh)}}
    outcome, folder = pipeline.run(**based)
    assert read_judge(folder).base == "LlamaForCausalLM"
    assert outcome.ref != pipeline.run()[0].ref
    assert pipeline.run(**based)[0].cached
    preflight(pipeline.config(**based))
    for value, text in ((str(fresh.parent / "none"), "judge.base = "), ("s3:x", "judge.base")):
        with pytest.raises((ConfigError, ValueError), match=text):
            preflight(pipeline.config(judge={"base": value}))
    with pytest.raises(ValueError, match="enabled = false trains no judge"):
        pipeline.config(judge={"base": "a/b", "enabled": False})
    long = {"ppo": {"max_new_tokens": 64}, "reward_model": {"max_length": 128}}
    with pytest.raises(ConfigError, match=r"judge\.base = .*reads at most 64 tokens"):
        preflight(pipeline.config(**based, **long, sft={"max_length": 128}))


def test_errors_of_its_training_name_its_base(pipeline, fresh):
    section = {**toys.REWARD.model_dump(), "lora": {"r": 2, "target_modules": "no_such_layer"}}
    with pytest.raises(ConfigError, match=r"judge\.base = .*no_such_layer"):
        pipeline.run(judge={"base": str(fresh)}, reward_model=section)
