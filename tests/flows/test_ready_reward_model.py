"""The pipeline with a ready reward model: gated, and with its own tokenizer."""

import pytest

from flows.pipeline import pipeline
from rlhf.files import read_json
from tasks.runner import store_of
from tests.library.test_ready_reward_model import save_foreign

pytestmark = pytest.mark.prefect


def run(config):
    state = pipeline(overrides=config, return_state=True)
    return state, state.result(raise_on_failure=False)


def states(result):
    return {row.name: row.state for row in result.rows}


def test_it_is_evaluated_gated_and_learnt_from(tiny, finished, tmp_path):
    folder = save_foreign(tmp_path / "foreign")
    given = {"ppo__reward_model_path": str(folder), "ppo__critic": "policy"}
    state, first = run(tiny(**given))
    assert state.is_completed(), state.message
    store = store_of(tiny())
    model = first.refs["train-reward-model"]
    for stage in ("evaluate-reward-model", "gate-reward-model", "train-policy"):
        assert model.digest in store.manifest(first.refs[stage]).parents.values()
    evaluation = read_json(store.fetch(first.refs["evaluate-reward-model"]) / "evaluation.json")
    # Its tokenizer writes these texts byte by byte: some do not fit.
    left_out = evaluation["prompts_too_long"] + evaluation["pairs_equal_when_cut"]
    assert left_out <= 4
    assert evaluation["n"] == 30 - left_out
    # Elsewhere the same content is the same work.
    moved = {**given, "ppo__reward_model_path": str(folder.rename(tmp_path / "moved"))}
    _, second = run(tiny(**moved))
    assert set(states(second).values()) == {"Cached"}


def test_an_ungated_one_is_never_trained_on(tiny, finished, tmp_path):
    folder = save_foreign(tmp_path / "foreign")
    rule = [{"metric": "accuracy", "min": "n"}]
    changes = {"rl_reward_model_path": str(folder), "gates__reward_model": rule}
    state, result = run(tiny(**changes, ppo__critic="policy"))
    assert state.name == "GateRejected"
    assert "accuracy" in state.message
    assert states(result)["train-reward-model"] == "Completed"
    assert states(result)["train-policy"] == "NotRun"
