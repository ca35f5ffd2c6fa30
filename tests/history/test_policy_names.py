"""A run's name names the policy that it has trained, in chat, serve and export."""

from __future__ import annotations

import pytest

from rlhf.config.pipeline import PromotionConfig
from rlhf.errors import ArtifactMissing, ConfigError
from rlhf.report import RunOutcome
from tasks.chat_models import find_policy
from tasks.export import find_stored


@pytest.mark.parametrize(
    "find",
    [lambda text, store: find_policy(text, PromotionConfig(), store),
     lambda text, store: find_stored(text, store, PromotionConfig())],
    ids=["chat", "export"],
)  # fmt: skip
def test_a_run_names_its_policy(made, find):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    policy = made.publish("policy", {"config.json": config}, {})
    made.run("weekly-1", "2026-11-01", RunOutcome.GATE_REJECTED, refs={"train-policy": policy})
    made.run("early-1", "2026-11-02", RunOutcome.FAILED, reason="no accuracy")
    for text in ("weekly-1", "week", policy.digest[:10]):
        found = find(text, made.store)
        assert found.ref is not None
        assert found.ref.digest == policy.digest
    with pytest.raises(ArtifactMissing, match=r"early-1 has trained no policy.*no accuracy"):
        find("early-1", made.store)
    with pytest.raises(ArtifactMissing):
        find("nothing", made.store)
    made.run("weekly-2", "2026-11-03", RunOutcome.GATE_REJECTED, refs={"train-policy": policy})
    with pytest.raises(ConfigError, match="'week': 2 runs are meant"):
        find("week", made.store)


def test_the_only_line_is_guessed_where_none_is_written(made):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    policy = made.publish("policy", {"config.json": config}, {})
    refs = {"train-policy": policy, "gate-policy": made.publish("verdict", {}, {"policy": policy})}
    made.promote(refs, line="weekly")
    found = find_policy("champion", PromotionConfig(), made.store)
    assert found.ref == policy
    with pytest.raises(ArtifactMissing, match=r"champion of the line default .*have: weekly"):
        find_policy("champion", PromotionConfig(name="default"), made.store)
