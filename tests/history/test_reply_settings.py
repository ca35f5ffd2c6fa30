"""Settings of replies: an SFT policy replies as it is evaluated, by the settings of its PPO."""

from __future__ import annotations

from rlhf.config import PPOConfig
from rlhf.store import Producer
from tasks.chat_models import settings_of
from tasks.models import POLICY, NamedModel


def producer(**sections) -> Producer:
    return Producer(stage="x", code_version="1", config=sections, seed=0, versions={})


def published(made, kind, parents, **sections) -> NamedModel:
    folder = made.folder / f"{len(made.store.list())}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(f'"{folder.name}"')
    ref = made.store.publish(
        folder, kind, parents=parents, producer=producer(**sections), metrics={}
    )
    return NamedModel("named", POLICY, folder, ref)


def ppo(**values):
    return PPOConfig(**values).model_dump(mode="json")


def test_an_sft_policy_replies_as_it_is_evaluated(made):
    sft = published(made, "policy", {})
    sampled = ppo(temperature=0.7, top_p=0.9, max_new_tokens=33)
    by_ppo = published(made, "policy", {"sft": sft.ref}, ppo=sampled)
    settings = settings_of(sft, made.store)
    assert (settings.temperature, settings.top_p, settings.max_new_tokens) == (0.7, 0.9, 33)
    assert settings == settings_of(by_ppo, made.store)


def test_before_any_ppo_those_of_the_configuration_hold(made):
    sft = published(made, "policy", {})
    assert settings_of(sft, made.store).temperature == 1.0
    configured = PPOConfig(temperature=0.5, max_new_tokens=21)
    settings = settings_of(sft, made.store, configured)
    assert (settings.temperature, settings.max_new_tokens) == (0.5, 21)
    # What a policy was trained with comes first.
    own = published(made, "policy", {"sft": sft.ref}, ppo=ppo(temperature=0.9))
    assert settings_of(own, made.store, configured).temperature == 0.9
