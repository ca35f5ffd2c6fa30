"""Environments in PPO: each raises its own reward, with each reply's own prompt."""

from __future__ import annotations

import shutil

import pytest
import torch

from rlhf.config import LoraConfig
from rlhf.custom_code import ALLOWED
from rlhf.data.rows import PROMPTS_TRAIN, PromptRow, read_rows, write_rows
from rlhf.environments import Scored
from rlhf.errors import ConfigError
from rlhf.files import read_json
from rlhf.modeling.generate import generate
from rlhf.modeling.sampling import Sampling
from rlhf.ppo.train import build_trainer, prompts_of_update, train_policy
from tests.library import toys

CPU = torch.device("cpu")


def right(prompt: str) -> str:
    """What a prompt asks for: a policy that ignores it is right in two of five cases at most."""
    return "good" if prompt.startswith(("tea", "cup")) else "bad"


@pytest.fixture(scope="module")
def answered(data, tmp_path_factory):
    """The toy task with a right answer that depends on the prompt."""
    folder = tmp_path_factory.mktemp("answered") / "data"
    shutil.copytree(data, folder)
    rows = read_rows(data / PROMPTS_TRAIN, PromptRow)
    rows = [PromptRow(r.prompt, reference=right(r.prompt), metadata={"n": 1}) for r in rows]
    write_rows(folder / PROMPTS_TRAIN, rows)
    return folder


@pytest.fixture
def train(answered, sft, approved, tmp_path):
    def run(name="out", checkpoints=None, progress=None, **options):
        out = tmp_path / name
        out.mkdir()
        config = toys.changed(toys.PPO, **options)
        listen = {"progress": progress} if progress else {}
        train_policy(
            config, answered, sft, approved, out, runtime=toys.RUNTIME, checkpoints=checkpoints,
            **listen,
        )  # fmt: skip
        return out

    return run


#: Enough to learn which answer belongs to which prompt, in large steps.
LEARNING = {
    "total_episodes": 1024, "chunk_size": 64, "mini_batch_size": 32, "learning_rate": 2e-2,
    "kl_coef": 0.01,
}  # fmt: skip


def rise(out, key):
    """Mean of the last three updates, and how much it is above the first."""
    values = [row[key] for row in read_json(out / "curve.json")]
    return sum(values[-3:]) / 3, sum(values[-3:]) / 3 - values[0]


def test_text_generation(train):
    out = train(
        **LEARNING,
        env_type="text_generation",
        reward_fn="correctness",
        correctness={"mode": "contains"},
    )
    end, more = rise(out, "reward/correctness")
    # Always the same answer would be right in 0.6 of all cases.
    assert end > 0.75
    assert more > 0.3


def test_text_generation_by_length(train):
    out = train(
        total_episodes=128,
        reward_fn="length_penalty",
        length_penalty={"target": 2, "slope": 1.0},
    )
    end, more = rise(out, "reward/length_penalty")
    assert end > -0.7
    assert more > 1


def test_multi_objective(train):
    out = train(
        **LEARNING,
        multi_objective=True,
        reward_weights={"right": 3.0},
        env_config={
            "components": {
                "right": {"type": "correctness", "mode": "contains", "normalize": "zscore"},
                "length": {"points": [[2, 0], [6, -1]], "clip": 2, "weight": 0.5},
                "reward_model": {"weight": 0, "normalize": "minmax"},
            }
        },
    )
    end, more = rise(out, "reward/right")
    assert end > 0.75
    assert more > 0.3
    for row in read_json(out / "curve.json"):
        parts = (row[f"reward_weighted/{name}"] for name in ("right", "length", "reward_model"))
        assert row["reward"] == pytest.approx(sum(parts) + row["reward/missing_eos"], abs=1e-5)
        assert row["reward_weighted/length"] == pytest.approx(row["reward/length"] / 2)
        assert row["reward_weighted/reward_model"] == 0 != row["reward/reward_model"]


JUDGE = """
def reward(batch):
    return [float(row["reference"] in row["response"]) for row in batch]
"""


@pytest.mark.parametrize(
    ("rival", "steps"),
    [
        ("others", {"num_ppo_epochs": 3}),
        # It compares with one reply alone: with larger steps there is too much noise.
        ("reference", {"mini_batch_size": toys.PPO.mini_batch_size, "learning_rate": 1e-2}),
    ],
)
def test_preference_comparison(train, tmp_path, monkeypatch, rival, steps):
    (tmp_path / "mine.py").write_text(JUDGE)
    monkeypatch.setenv(ALLOWED, str(tmp_path))
    options = {"judge": "custom", "custom": {"function": "mine:reward"}, "rival": rival}
    out = train(
        **{**LEARNING, **steps},
        env_type="preference_comparison",
        env_config={**options, "replies_per_prompt": 4, "temperature": 0.3},
    )
    end, more = rise(out, "reward/judge")
    assert end > 0.75
    assert more > 0.3
    won = [row["reward_weighted/judge"] for row in read_json(out / "curve.json")]
    if rival == "others":  # what one wins, another loses
        assert won == pytest.approx([0] * len(won), abs=1e-6)
    else:
        assert abs(won[0]) < 0.1 < sum(won[-4:]) / 4


# --- what the environment is handed -----------------------------------------------------------


class Watched:
    """Notes what it is asked; replies end at "d"."""

    needs_reward_model = False

    def __init__(self, renderer, replies_per_prompt=1, needs_reference_reply=False):
        self.renderer, self.replies_per_prompt = renderer, replies_per_prompt
        self.needs_reference_reply = needs_reference_reply
        self.stop = None

    def text(self, ids):
        return f"<{self.renderer.decode(list(ids))}>"

    def __call__(self, batch):
        self.batch = batch
        return Scored(torch.arange(float(len(batch))), {}, {})

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize("lora", [None, LoraConfig(r=2)])
def test_every_reply_with_its_own_row(sft, approved, lora):
    config = toys.changed(toys.PPO, chunk_size=6, mini_batch_size=6, lora=lora)
    trainer = build_trainer(config, sft, approved, 0, CPU)
    watched = Watched(trainer.renderer, 3, needs_reference_reply=True)
    trainer.environment = watched
    rows = [PromptRow("tea or cup?", None, "a", {"n": 1}), PromptRow("jar?", None, None, {})]
    rollouts = trainer.sample(rows, seed=1)
    trainer.score(rollouts)
    own = [f"<{trainer.renderer.decode(r)}>" for r in rollouts.replies.rows()]
    assert [r.prompt for r in watched.batch] == ["tea or cup?"] * 3 + ["jar?"] * 3
    assert [r.reference for r in watched.batch] == ["a"] * 3 + [None] * 3
    assert [r.metadata for r in watched.batch] == [{"n": 1}] * 3 + [{}] * 3
    assert [r.group for r in watched.batch] == [0, 0, 0, 1, 1, 1]
    assert [r.response for r in watched.batch] == own
    assert [r.reference_reply for r in watched.batch] == rollouts.reference_texts
    assert own != rollouts.reference_texts
    assert [r.n_tokens for r in watched.batch] == [len(r) for r in rollouts.replies.rows()]


def test_the_reference_reply_is_the_references(sft, approved):
    for lora in (None, LoraConfig(r=2)):
        trainer = build_trainer(toys.changed(toys.PPO, lora=lora), sft, approved, 0, CPU)
        trainer.environment = Watched(trainer.renderer, 1, needs_reference_reply=True)
        rows = [PromptRow("tea or cup?"), PromptRow("jar or mug?")] * 4
        before = trainer.sample(rows, seed=1)
        with torch.no_grad():
            for p in trainer.models.policy.parameters():
                if p.requires_grad:
                    p.normal_()
        after = trainer.sample(rows, seed=1)
        assert after.reference_texts == before.reference_texts
        assert after.texts != before.texts


def test_chunks_count_replies():
    rows = [PromptRow(f"p{i}") for i in range(7)]
    config = toys.changed(
        toys.PPO, total_episodes=28, chunk_size=12, env_type="preference_comparison",
        env_config={"replies_per_prompt": 4},
    )  # fmt: skip
    chunks = [prompts_of_update(rows, u, config, 0) for u in range(config.updates)]
    assert [len(c) for c in chunks] == [3, 3, 1]
    assert len({row.prompt for c in chunks for row in c}) == 7


# --- stop sequences ---------------------------------------------------------------------------


def test_a_stop_sequence_ends_its_own_row(policy, renderer):
    rows = [renderer.encode_prompt(p, 40) for p in ("tea?", "jar?", "pot or mug?", "cup?")]
    sampling = Sampling(12)
    free = generate(policy, rows, renderer.tokenizer, sampling, 3)
    target = free.rows()[1][4]

    def stop(batch):
        return [target in row for row in batch]

    ended = generate(policy, rows, renderer.tokenizer, sampling, 3, stop)
    for plain, cut, finished in zip(free.rows(), ended.rows(), ended.finished, strict=True):
        expected = plain[: plain.index(target) + 1] if target in plain else plain
        assert cut == expected
        assert bool(finished) is (target in plain or plain[-1] == renderer.tokenizer.eos_token_id)
    assert len(ended.rows()[1]) <= 5
    assert ended.attention[:, -ended.mask.shape[1] :].bool().equal(ended.mask)


def test_stop_sequences_in_training(train):
    out = train(
        total_episodes=16, env_type="text_generation", env_config={"stop_sequences": ["oo", "a"]}
    )
    (row,) = read_json(out / "curve.json")
    (free,) = read_json(train("free", total_episodes=16) / "curve.json")
    assert row["eos_rate"] > free["eos_rate"]  # a reply that was stopped is a finished one
    assert row["tokens"] < free["tokens"]
    assert row["reward/reward_model"] != free["reward/reward_model"]


# --- before training, and after a crash -------------------------------------------------------


def test_a_missing_reference_stops_before_training(data, sft, approved, tmp_path):
    config = toys.changed(toys.PPO, reward_fn="correctness")
    with pytest.raises(ConfigError, match=r"training prompt 1 \('.*'\) has none"):
        train_policy(config, data, sft, approved, tmp_path, runtime=toys.RUNTIME)


class Stopped(Exception):
    """The machine goes away."""


def test_a_resumed_run_has_the_scales_of_an_uninterrupted_one(train, tmp_path):
    options = {
        "total_episodes": 64,
        "num_ppo_epochs": 1,
        "multi_objective": True,
        "env_config": {
            "components": {
                "reward_model": {"normalize": "zscore"},
                "length": {"normalize": "minmax"},
            }
        },
    }

    def stop(step, total, metrics):
        if step == 3:
            raise Stopped

    straight = train("straight", **options)
    with pytest.raises(Stopped):
        train("stopped", checkpoints=tmp_path / "c", progress=stop, **options)
    resumed = train("resumed", checkpoints=tmp_path / "c", **options)
    toys.assert_same_weights(straight, resumed)
    assert (straight / "curve.json").read_bytes() == (resumed / "curve.json").read_bytes()
