"""Effects of every PPO parameter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rlhf.config import LoraConfig, PPOConfig
from rlhf.config.ppo import COMPAT
from rlhf.data.rows import PromptRow
from rlhf.errors import ConfigError
from rlhf.files import read_json
from rlhf.modeling.device import empty_cache
from rlhf.modeling.packed import position_ids
from rlhf.ppo.models import Models, learning_rate_scale
from rlhf.ppo.optimisation import optimise
from rlhf.ppo.train import build_trainer
from tests.library import toys
from tests.library.ppo_runs import LORA
from tests.library.toys import DEVICE, within

pytestmark = pytest.mark.device


@pytest.mark.parametrize(
    "change",
    [
        {"kl_coef": 1.0},
        {"clip_range": 0.01},
        {"value_clip_range": 0.01},
        {"value_clip_range": None},
        {"gamma": 0.5},
        {"gae_lambda": 0.1},
        {"value_loss_coef": 0.0},
        {"max_new_tokens": 4},
        {"top_k": 2},
        {"top_p": 0.5},
        {"top_k": 30, "truncation": "none"},
        {"temperature": 0.5},
        {"missing_eos_penalty": 9.0},
        {"missing_eos_penalty": None},
        {"whiten_rewards": True},
        {"lr_final_fraction": 1.0},
        {"learning_rate": 1e-3},
        {"critic_learning_rate": 1e-5},
        {"critic": "policy"},
        {"num_ppo_epochs": 1},
        {"mini_batch_size": 4},
        {"chunk_size": 8},
        {"adam_beta2": 0.5},
        {"max_grad_norm": 1e-3},
        {"max_grad_norm": None},
        {"kl_estimator": "k2"},
        {"kl_estimator": "k3"},
        {"kl_clamp": 0.01, "kl_coef": 1.0},
        {"kl_controller": "adaptive", "kl_target": 0.01, "kl_horizon": 16, "kl_coef": 1.0},
        {"entropy_coef": 0.5},
        {"dual_clip": 1.0001},
        {"target_kl": 1e-9},
        {"critic_warmup_updates": 1},
        {"critic": "head"},
        {"critic": "head", "lora": LORA},
        {"critic": "adapter", "lora": LORA},
        {"missing_eos": "replace"},
        {"missing_eos": "none"},
        {"score_position": "past_end"},
        {"reward_normalization": "running"},
        {"reward_normalization": "reference"},
        {"reward_clip": 0.1},
        {"lr_scheduler": "constant"},
        {"lr_warmup_updates": 1},
        {"weight_decay": 1.0},
        {"precision": "bf16"},
        {"sampler": "multinomial"},
        {"lora": LORA},
        {"seed": 1},
    ],
    ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items())[:30],
)
def test_every_parameter_arrives(train, two_updates, change):
    assert toys.distance(train(total_episodes=32, **change), two_updates) > 1e-4


def trainer_with(sft, approved, **options):
    return build_trainer(toys.changed(toys.PPO, **options), sft, approved, 0, DEVICE)


def rollouts_of(trainer, rows=16):
    """One chunk, sampled and scored."""
    prompts = [PromptRow(f"{a} or {b}?") for a in toys.ASKED for b in toys.ASKED][:rows]
    rollouts = trainer.sample(prompts, seed=1)
    trainer.score(rollouts)
    return rollouts


def nudge(model):
    """Away from the reference, so that there is something to measure."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator).to(DEVICE))


@pytest.mark.parametrize(("variance", "correction"), [("biased", 0), ("unbiased", 1)])
def test_advantages_are_whitened_by_the_variance_asked_for(sft, approved, variance, correction):
    trainer = trainer_with(sft, approved, whiten_variance=variance)
    buffer = trainer.prepare_buffer(rollouts_of(trainer))[0]
    advantages = buffer.advantages[buffer.replies.mask]
    assert advantages.mean().item() == pytest.approx(0, abs=1e-6)
    assert advantages.var(correction=correction).item() == pytest.approx(1, abs=1e-5)


def test_the_score_goes_where_it_is_asked_for(sft, approved):
    last = trainer_with(sft, approved, kl_coef=0.0, gamma=1.0, gae_lambda=1.0)
    buffer = last.prepare_buffer(rollouts_of(last))[0]
    lengths = buffer.replies.mask.sum(1)
    assert torch.equal(buffer.states.sum(1), lengths)
    past = trainer_with(sft, approved, kl_coef=0.0, score_position="past_end", gamma=0.5)
    rollouts = rollouts_of(past)
    buffer = past.prepare_buffer(rollouts)[0]
    assert torch.equal(buffer.states.sum(1), (lengths + 1).clamp(max=lengths.max()))
    rows = torch.arange(16, device=buffer.returns.device)
    # V is 0 at the start, so the return of the last state is its reward: the score
    final = buffer.returns[rows, buffer.states.sum(1) - 1]
    torch.testing.assert_close(final.cpu(), rollouts.scores.cpu())


def test_the_adaptive_controller_follows_its_formula(train):
    out = train(
        kl_controller="adaptive", kl_target=0.5, kl_horizon=100, kl_coef=0.05, total_episodes=48
    )
    rows = read_json(out / "curve.json")
    coef = 0.05
    for row in rows:
        assert row["kl_coef"] == pytest.approx(coef)
        coef *= 1 + min(max(row["kl"] / 0.5 - 1, -0.2), 0.2) * 16 / 100
    assert rows[1]["kl_coef"] < 0.05


def test_the_audit_is_the_kl_over_the_vocabulary(sft, approved):
    trainer = trainer_with(sft, approved, kl_audit=True)
    nudge(trainer.models.policy)
    rollouts = rollouts_of(trainer)
    metrics = trainer.prepare_buffer(rollouts)[1]
    assert "kl_exact" not in trainer_with(sft, approved).prepare_buffer(rollouts)[1]
    replies = rollouts.replies.to(DEVICE)
    attention = replies.attention.to(DEVICE)
    with torch.no_grad():
        logits = [
            model(
                input_ids=replies.ids,
                attention_mask=attention,
                position_ids=position_ids(attention),
            ).logits[:, -replies.mask.shape[1] - 1 : -1]
            for model in (trainer.models.policy, trainer.models.reference)
        ]
    p, q = (torch.log_softmax(t, -1) for t in logits)
    expected = ((p.exp() * (p - q)).sum(-1) * replies.mask).sum(1).mean()
    assert metrics["kl_exact"] == pytest.approx(float(expected), rel=1e-3)
    assert metrics["kl_exact"] > 0.01


def test_target_kl_ends_a_chunk(train):
    # The first step's policy is the sampling one, so its KL is 0; the second is too far already.
    rows = read_json(train(target_kl=1e-9, total_episodes=16) / "curve.json")
    assert rows[0]["optimiser_steps"] == 1
    rows = read_json(train(target_kl=1e6, total_episodes=16) / "curve.json")
    assert rows[0]["optimiser_steps"] == 4  # 2 passes over 2 minibatches


@pytest.mark.parametrize(
    "critic", [{}, {"critic": "head"}, {"critic": "head", "lora": LORA}], ids=str
)
def test_while_the_critic_warms_up_the_policy_stays(sft, approved, critic):
    trainer = trainer_with(sft, approved, critic_warmup_updates=1, weight_decay=0.1, **critic)
    weights = {
        name: [p.detach().clone() for p in parameters.values()]
        for name, parameters in trainer.models.parameters.items()
    }

    def moved(name):
        now = trainer.models.parameters[name].values()
        return any(not torch.equal(a, b) for a, b in zip(weights[name], now, strict=True))

    rows = rollouts_of(trainer).rows
    metrics = trainer.update(0, rows).metrics
    assert metrics["value_loss"] > 0
    assert "policy_loss" not in metrics
    assert moved("critic")
    assert not moved("policy")
    trainer.update(1, rows)
    assert moved("policy")


def test_replacing_by_no_penalty_replaces_nothing(train):
    none = train("none", total_episodes=16, missing_eos="none", max_new_tokens=1)
    nothing = train(
        "nothing", total_episodes=16, missing_eos="replace", missing_eos_penalty=None,
        max_new_tokens=1,
    )  # fmt: skip
    toys.assert_same_weights(none, nothing)


def test_the_value_loss_coefficient_scales_the_critics_gradient(train):
    norms = [
        read_json(train(f"c{c}", value_loss_coef=c, total_episodes=16, num_ppo_epochs=1,
                        mini_batch_size=16) / "curve.json")[0]["critic_grad_norm"]
        for c in (1.0, 2.0)
    ]  # fmt: skip
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-5)


def test_gradients_are_clipped_to_the_norm(sft, approved):
    for limit in (1e-3, None):
        trainer = trainer_with(sft, approved, max_grad_norm=limit)
        norms = []
        optimizer = trainer.models.optimizers["policy"]
        step = optimizer.step
        parameters = trainer.models.parameters["policy"].values()

        def watched(step=step, norms=norms, parameters=parameters):
            grads = [p.grad for p in parameters if p.grad is not None]
            norms.append(float(torch.nn.utils.get_total_norm(grads)))
            step()

        optimizer.step = watched
        trainer.update(0, rollouts_of(trainer).rows)
        assert len(norms) == 4
        assert all(n == pytest.approx(1e-3, rel=1e-3) for n in norms) == (limit is not None)


def test_schedules():
    def rates(**options):
        config = toys.changed(toys.PPO, total_episodes=64, lr_final_fraction=0.2, **options)
        return [learning_rate_scale(config, u) for u in range(4)]

    assert rates(lr_scheduler="constant") == [1, 1, 1, 1]
    assert rates(lr_scheduler="linear") == pytest.approx([1, 0.8, 0.6, 0.4])
    # 0.2 + 0.8·(1 + cos(π·u/4))/2
    assert rates(lr_scheduler="cosine") == pytest.approx([1, 0.8828427, 0.6, 0.3171573])
    assert rates(lr_warmup_updates=2) == pytest.approx([1 / 3, 2 / 3, 1, 0.6])


def test_the_policys_warm_up_begins_after_the_critics_own_updates(sft, approved):
    trainer = trainer_with(
        sft, approved, critic_warmup_updates=2, lr_warmup_updates=1, total_episodes=96,
        learning_rate=1.0, critic_learning_rate=10.0, lr_final_fraction=0.0,
    )  # fmt: skip
    rates = [trainer.models.set_learning_rates(number) for number in range(6)]
    own = [rate["learning_rate"] for rate in rates]
    assert own[2:] == pytest.approx([1 / 2, 1, 2 / 3, 1 / 3])
    critic = [rate["critic_learning_rate"] for rate in rates]
    assert critic == pytest.approx([5, 10, 8, 6, 4, 2])


def test_the_kl_coefficient_stays_while_only_the_critic_learns(train):
    adaptive = {"kl_controller": "adaptive", "kl_target": 0.5, "kl_horizon": 100, "kl_coef": 0.05}
    rows = read_json(train(**adaptive, critic_warmup_updates=2, total_episodes=48) / "curve.json")
    assert [row["kl_coef"] for row in rows] == [0.05, 0.05, 0.05]


def test_there_must_be_layers_to_recompute():
    models = SimpleNamespace(
        config=SimpleNamespace(gradient_checkpointing=True),
        _trained_networks=lambda: [torch.nn.Linear(1, 1)],
    )
    with (
        pytest.raises(ConfigError, match=r"Linear has no layers that .* can recompute; set it to"),
        Models.recomputing(models),  # pyright: ignore[reportArgumentType]
    ):
        pass


def test_checkpointing_activations_computes_them_again_to_the_same_numbers(
    train, two_updates, sft, approved
):
    out = train(gradient_checkpointing=True, total_episodes=32)
    assert toys.distance(out, two_updates) < 1e-5
    calls = {}
    for on in (False, True):
        trainer = trainer_with(sft, approved, gradient_checkpointing=on)
        rows = rollouts_of(trainer).rows
        block = trainer.models.policy.model.layers[0]
        seen = []
        block.input_layernorm.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        trainer.update(0, rows)
        calls[on] = len(seen)
        with trainer.models.recomputing():  # some models drop out in their blocks when training
            assert not any(m.training for m in trainer.models.policy.modules())
    assert calls[True] == calls[False] + 4  # once more in each optimiser step's backward pass


def test_bf16_is_close_and_weights_stay_float32(train, two_updates, sft, approved):
    out = train(precision="bf16", total_episodes=32)
    rows = [read_json(folder / "curve.json") for folder in (out, two_updates)]
    assert rows[0][0]["kl"] == pytest.approx(0, abs=1e-5)
    fractions = [r[0]["clip_fraction"] for r in rows]
    assert fractions[0] == pytest.approx(fractions[1], abs=0.1)
    assert {t.dtype for t in toys.weights(out).values()} == {torch.float32}
    assert toys.distance(out, two_updates) > 1e-4
    trainer = trainer_with(sft, approved, precision="bf16")
    exact = trainer_with(sft, approved)
    sampler = trainer.models.sampling_copy(trainer.models.policy)
    assert {p.dtype for p in sampler.parameters()} == {torch.bfloat16}
    rotary = trainer.models.policy.model.rotary_emb.inv_freq
    assert torch.equal(sampler.model.rotary_emb.inv_freq, rotary)
    replies = rollouts_of(exact).replies.to(DEVICE)
    with torch.no_grad():
        assert trainer.models.audit(replies)["kl_exact"].dtype == torch.float32
    with torch.no_grad():
        difference = trainer.models.log_probs(replies)[0] - exact.models.log_probs(replies)[0]
    assert 1e-6 < difference.abs().max() < 0.1


@pytest.mark.parametrize("on", [True, False])
def test_caches_are_freed_between_the_phases(train, two_updates, monkeypatch, on):
    freed = []

    def counted(device):
        freed.append(device)
        empty_cache(device)

    monkeypatch.setattr("rlhf.ppo.trainer.empty_cache", counted)
    out = train(optimize_device_cache=on, total_episodes=32)
    # With it, advantages are computed on the CPU.
    assert toys.distance(out, two_updates) <= within(0.0, 1e-4)
    assert len(freed) == (6 if on else 0)  # after each of three phases of two updates


@pytest.mark.parametrize("critic", ["reward_model", "policy", "head", "adapter"])
def test_every_kind_of_critic_learns(sft, approved, critic):
    trainer = trainer_with(sft, approved, critic=critic, lora=LoraConfig(r=4, alpha=4.0),
                           num_ppo_epochs=60, gamma=1.0, critic_learning_rate=1e-2,
                           value_clip_range=None, max_grad_norm=None)  # fmt: skip
    trainer.models.set_learning_rates(0)
    rollouts = rollouts_of(trainer)
    buffer = trainer.prepare_buffer(rollouts)[0]
    # A head alone is a linear function: there is more to learn for what is below it.
    optimise(buffer, trainer.models, seed=0, learn_policy=critic == "head")
    with torch.no_grad():
        values = trainer.models.values(rollouts.replies.to(DEVICE)).to(buffer.returns.device)
    before, after = (((v - buffer.returns)[buffer.states] ** 2).mean() for v in (0.0, values))
    assert after < 0.7 * before


def test_an_adapter_of_the_critic_leaves_the_policy_alone(sft, approved):
    trainer = trainer_with(sft, approved, critic="adapter", lora=LORA)
    replies = rollouts_of(trainer).replies.to(DEVICE)
    with torch.no_grad():
        before = trainer.models.log_probs(replies)[0]
        values = trainer.models.values(replies)
        for name, p in trainer.models.parameters["critic"].items():
            assert "critic" in name or "value_head" in name
            p.add_(0.1)
        assert torch.equal(trainer.models.log_probs(replies)[0], before)
        assert not torch.equal(trainer.models.values(replies), values)
    names = set(trainer.models.parameters["policy"])
    assert names
    assert all(".default." in n for n in names)


@pytest.mark.parametrize("peer", ["trl", "openrlhf", "verl", "oai"])
def test_compat_sets_what_is_not_given(peer):
    config = PPOConfig(compat=peer)
    for name, value in COMPAT[peer].items():
        assert getattr(config, name) == value
    assert PPOConfig(compat=peer, whiten_variance="biased").whiten_variance == "biased"
    assert PPOConfig(compat=peer, whiten_variance="unbiased").whiten_variance == "unbiased"


@pytest.mark.parametrize("micro", [3, 1])
def test_micro_batches_change_nothing(train, two_updates, micro):
    assert toys.distance(train(total_episodes=32, micro_batch_size=micro), two_updates) < 1e-4


def test_whitening_leaves_a_single_score_alone(train):
    # 17 episodes: the last chunk holds one, whose deviation is not a number
    out = train(total_episodes=17, whiten_rewards=True)
    assert len(read_json(out / "curve.json")) == 2
