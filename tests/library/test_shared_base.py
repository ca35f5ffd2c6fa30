"""Policy, reference, critic and reward model as adapters on one base."""

from __future__ import annotations

import gc
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf.config import LoraConfig, PipelineConfig, PPOConfig
from rlhf.data.rows import PromptRow
from rlhf.errors import ConfigError
from rlhf.files import read_json, write_json
from rlhf.modeling.lora import CRITIC, POLICY, REWARD, active_adapter, merge_adapter, parameters_of
from rlhf.modeling.reward import BASE_WEIGHTS, Scorer, reward_meta
from rlhf.ppo.train import build_trainer
from rlhf.store.publish import scan
from tests.library import toys
from tests.library.ppo_runs import LORA, Stopped, assert_same_run
from tests.library.toys import DEVICE, within

pytestmark = pytest.mark.device
SHARED = {"shared_base": True, "lora": LORA}
PROMPTS = ["tea or cup?", "jar or mug?", "pot or cup?"]
REPLIES = ["good", "bad bad", "good bad good"]


@pytest.fixture(scope="module")
def scored(toy):
    """A reward model trained by LoRA from the SFT policy."""
    return toy("adapter-reward")


@pytest.fixture
def build(sft, scored):
    """A trainer on a shared base."""

    def make(reward=scored, **options):
        config = toys.changed(toys.PPO, **{**SHARED, **options})
        return build_trainer(config, sft, toys.approve(reward), 0, DEVICE)

    return make


def scores(trainer):
    """What the trainer's environment gives for the replies."""
    return trainer.environment.function.__self__.scorer(PROMPTS, REPLIES)


def nudge(policy, *adapters):
    """Away from where these adapters started."""
    with torch.no_grad():
        for adapter in adapters:
            for p in parameters_of(policy, adapter).values():
                p.add_(0.1)


def test_a_reward_model_is_published_with_its_adapter(scored, sft):
    names = [p for p in scan(scored) if p.startswith("adapter/")]
    assert names == ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
    config = read_json(scored / "adapter" / "adapter_config.json")
    assert config["base_model_name_or_path"] is None
    assert config["target_modules"] == sorted(config["target_modules"])
    assert str(sft) not in json.dumps(config)
    assert "base_model.model.score.weight" in load_file(scored / names[1])
    assert len(reward_meta(scored)[BASE_WEIGHTS]) == 64


def test_one_with_a_base_of_its_own_has_no_adapter(sft, tmp_path, data):
    pytest.importorskip("trl")
    from rlhf.reward import train_reward_model

    other = toys.changed(toys.REWARD, base=str(sft), lora=LoraConfig(r=2), epochs=0.1)
    train_reward_model(other, data, sft, tmp_path, runtime=toys.RUNTIME)
    assert not (tmp_path / "adapter").exists()
    assert BASE_WEIGHTS not in reward_meta(tmp_path)


def test_scores_are_those_of_the_merged_reward_model(build, scored):
    trainer = build()
    # adapters of the others do not leak into the reward model
    nudge(trainer.models.policy, POLICY, CRITIC)
    torch.testing.assert_close(
        scores(trainer), Scorer(scored, DEVICE, 64)(PROMPTS, REPLIES), atol=1e-4, rtol=1e-4
    )
    with active_adapter(trainer.models.policy, None):
        inside = scores(trainer)
    assert torch.equal(inside, scores(trainer))


@pytest.mark.parametrize("critic", ["reward_model", "adapter"])
def test_each_computes_by_its_own_adapter(build, critic):
    trainer = build(critic=critic)
    models = trainer.models
    replies = trainer.sample([PromptRow(p) for p in PROMPTS], 1).replies.to(DEVICE)
    torch.nn.init.normal_(models.critic.value_head.weight)

    @torch.no_grad()
    def seen():
        return {
            POLICY: models.log_probs(replies)[0],
            CRITIC: models.values(replies),
            REWARD: scores(trainer),
            None: models.reference_log_probs(replies),
        }

    trainable = {n for n, p in models.policy.named_parameters() if p.requires_grad}
    assert trainable == {
        *parameters_of(models.policy, POLICY), *parameters_of(models.policy, CRITIC)
    }  # fmt: skip
    close = {"atol": within(1e-5, 1e-4), "rtol": within(1.3e-6, 1e-4)}
    torch.testing.assert_close(seen()[POLICY], seen()[None], **close)
    for changed in (POLICY, CRITIC, REWARD):
        before = seen()
        nudge(models.policy, changed)
        after = seen()
        assert {k for k in before if not torch.equal(before[k], after[k])} == {changed}
    assert trainable == {n for n, p in models.policy.named_parameters() if p.requires_grad}


def test_adapters_may_be_switched_inside_one_another(build):
    policy = build().models.policy
    ids = torch.arange(12, device=DEVICE)[None]
    nudge(policy, POLICY, CRITIC)

    def logits():
        with torch.no_grad():
            return policy(input_ids=ids).logits

    alone = {POLICY: logits()}
    for name in (None, REWARD, CRITIC):
        with active_adapter(policy, name):
            alone[name] = logits()
    assert len({float(t.sum()) for t in alone.values()}) == 4
    with active_adapter(policy, None):
        with active_adapter(policy, REWARD):
            assert torch.equal(logits(), alone[REWARD])
            with active_adapter(policy, None):
                assert torch.equal(logits(), alone[None])
            assert torch.equal(logits(), alone[REWARD])
        assert torch.equal(logits(), alone[None])
    with pytest.raises(ValueError, match="inside"), active_adapter(policy, CRITIC):
        raise ValueError("inside")
    assert torch.equal(logits(), alone[POLICY])


def test_the_critic_starts_from_the_reward_model(build, scored):
    trainer = build()
    policy, critic = trainer.models.policy, trainer.models.critic
    theirs = parameters_of(policy, REWARD)
    ours = parameters_of(policy, CRITIC)
    assert policy.peft_config[CRITIC].r == 2  # the reward model's, not the policy's 4
    assert len(ours) == len(theirs) > 0
    assert all(torch.equal(p, ours[n.replace(REWARD, CRITIC)]) for n, p in theirs.items())
    assert any(bool(p.any()) for n, p in ours.items() if "lora_B" in n)
    assert not critic.value_head.weight.any()


def parameter_bytes():
    """Every parameter in memory once, by where it lies."""
    found = {}
    for thing in gc.get_objects():
        if type(thing) is torch.nn.Parameter:  # isinstance would wake lazy modules
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def test_one_base_is_in_memory(build, sft):
    base = sum(t.nbytes for t in toys.weights(sft).values())
    gc.collect()
    start = parameter_bytes()
    together = build(lora=LoraConfig(r=2))
    shared = parameter_bytes()
    alone = build(lora=LoraConfig(r=2), shared_base=False)
    apart = parameter_bytes()
    state = together.models.policy.state_dict()
    adapters = sum(v.nbytes for k, v in state.items() if "lora_" in k)
    heads = 4 * (16 + 16 + 1)
    assert sum(n for place, n in shared.items() if place not in start) == base + adapters + heads
    assert adapters < 0.25 * base
    assert sum(n for place, n in apart.items() if place not in shared) > 3 * base
    assert alone.models.reference is None


def test_sharing_changes_memory_and_nothing_else(train, scored):
    options = {"reward": toys.approve(scored), "lora": LORA, "critic": "head", "total_episodes": 32}
    alone = train("alone", **options)
    together = train("together", **options, shared_base=True)
    assert toys.distance(alone, together) < 1e-3
    rows = [read_json(folder / "curve.json")[1] for folder in (alone, together)]
    assert rows[0] == pytest.approx(rows[1], abs=1e-3, rel=1e-2)
    assert toys.distance(
        together, train("again", **options, shared_base=True, gradient_checkpointing=True)
    ) < 1e-5  # fmt: skip


def test_it_learns_its_reward_and_publishes_a_plain_policy(train, scored, sft, tmp_path):
    out = train(
        reward=toys.approve(scored), total_episodes=128, checkpoints=tmp_path / "c", **SHARED
    )
    curve = read_json(out / "curve.json")
    assert curve[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert sum(r["reward"] for r in curve[-3:]) > sum(r["reward"] for r in curve[:3]) + 1
    assert min(r["critic_grad_norm"] for r in curve) > 0
    # The policy's alone, beside the weights: at the top transformers would take it for an adapter.
    assert [path.name for path in out.glob("adapter*")] == ["adapter"]
    names = {path.name for path in (out / "adapter").rglob("*")}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    assert adapter
    assert all(k.endswith((".lora_A.weight", ".lora_B.weight")) for k in adapter)
    before, after = toys.weights(sft), toys.weights(out)
    assert before.keys() == after.keys()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved
    assert all(k.endswith("_proj.weight") for k in moved)
    checkpoint = tmp_path / "c" / "update-000008"
    saved = {n: load_file(checkpoint / f"{n}.safetensors") for n in ("policy", "critic")}
    assert all("lora_" in k and ".default." in k for k in saved["policy"])
    heads = {"value_head.weight", "value_head.bias"}
    assert all(".critic." in k for k in saved["critic"].keys() - heads)
    assert heads < saved["critic"].keys()


def test_only_the_policys_adapter_is_merged(build, sft):
    trainer = build()
    policy = trainer.models.policy
    nudge(policy, CRITIC)
    plain = merge_adapter(policy).state_dict()
    assert all(torch.equal(v, plain[k].cpu()) for k, v in toys.weights(sft).items())


@pytest.mark.parametrize(
    "options",
    [
        {"critic": "reward_model"},
        {"critic": "adapter", "precision": "bf16", "gradient_checkpointing": True},
    ],
    ids=["reward_model", "adapter-bf16"],
)
def test_a_resumed_run_is_the_same_run(train, scored, tmp_path, options):
    options = {"reward": toys.approve(scored), **SHARED, **options,
               "total_episodes": 32}  # fmt: skip
    straight = train("straight", **options)
    with pytest.raises(Stopped):
        train("stopped", checkpoints=tmp_path / "c", stop_at=2, **options)
    assert_same_run(train("resumed", checkpoints=tmp_path / "c", **options), straight)


def test_another_adapter_is_another_reward_model(train, scored, copy_of, tmp_path):
    options = {"checkpoints": tmp_path / "c", "total_episodes": 16, **SHARED}
    train("a", reward=toys.approve(scored), **options)
    other = copy_of(scored)
    path = other / "adapter" / "adapter_model.safetensors"
    save_file({k: v + 1e-6 for k, v in load_file(path).items()}, path)
    with pytest.raises(ConfigError, match="its reward model is"):
        train("b", reward=toys.approve(other), **options)


def test_a_reward_model_that_is_no_adapter_on_this_policy_is_refused(
    build, sft, scored, reward_model, copy_of
):
    with pytest.raises(ConfigError, match=r"ppo\.shared_base = true.*has no adapter/.*lora"):
        build(reward=reward_model)
    other = copy_of(scored)
    write_json(other / "rlhf.json", {**reward_meta(other), BASE_WEIGHTS: "f" * 64})
    with pytest.raises(ConfigError, match=r"weights ffffffffffff, and this SFT policy's are"):
        build(reward=other)
    shutil.copy(scored / "rlhf.json", other)
    path = other / "adapter" / "adapter_model.safetensors"
    few = {k: v for k, v in load_file(path).items() if "q_proj" not in k}
    save_file(few, path)
    with pytest.raises(ConfigError, match=r"ppo\.shared_base = true.*does not fit"):
        build(reward=other)
    with pytest.raises(ConfigError, match=r"there is none; set ppo\.critic to adapter"):
        build_trainer(toys.changed(toys.PPO, reward_fn="length_penalty", **SHARED),
                      sft, None, 0, DEVICE)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shared_base": True}, r"shared_base = true needs lora: .*set lora"),
        ({**SHARED, "critic": "policy"}, r"critic = 'policy'.*set critic to reward_model"),
    ],
)
def test_what_can_not_share_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**options)


@pytest.mark.parametrize(
    ("reward", "ppo", "message"),
    [
        ({}, {}, r"reward_model\.lora = none"),
        ({"lora": LORA, "base": "x/y"}, {}, r"reward_model\.base = 'x/y'"),
        ({"lora": LORA}, {"reward_model_path": "x/y"}, r"ppo\.reward_model_path = 'x/y'"),
    ],
)
def test_a_pipeline_that_trains_no_adapter_is_refused_at_once(reward, ppo, message):
    shared = {**SHARED, **ppo}
    with pytest.raises(ValueError, match=rf"ppo\.shared_base = true.*{message}.*set"):
        PipelineConfig(reward_model=reward, ppo=shared)
    assert PipelineConfig(reward_model={"lora": LORA}, ppo=SHARED).ppo.shared_base
