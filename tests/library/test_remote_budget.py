"""A placed stage under a new budget, while a run of an old one does the same work."""

from __future__ import annotations

import contextlib
import logging
from types import SimpleNamespace

import pytest

import tasks.remote
from rlhf.config import PipelineConfig
from rlhf.errors import StageFailed
from tasks.lost_runs import Limits
from tasks.stages import PREPARE_DATA


@pytest.fixture
def config(tmp_path):
    return PipelineConfig(store=str(tmp_path / "store"), budget={"hours": 3})


def require_completed(_, run, __):
    """The old run failed, which is no failure of this work."""
    if run.name == "old":
        raise StageFailed("old failed")


@pytest.fixture
def children(config, monkeypatch):
    """Runs that Prefect's server gives for the work, in order, and those that were waited for."""
    waited = []

    def child(name, budget):
        overrides = config.model_dump(mode="json") | {"budget": budget}
        return SimpleNamespace(name=name, parameters={"overrides": overrides})

    given = [
        child("old", {"hours": 1.0, "money": None}),
        child("own", {"hours": 3.0, "money": None}),
    ]
    queue = iter(given)
    monkeypatch.setattr(tasks.remote, "_child", lambda *_: (next(queue), 0))
    monkeypatch.setattr(tasks.remote, "_wait", lambda _, run, *__: waited.append(run.name) or run)
    monkeypatch.setattr(tasks.remote, "_require_completed", require_completed)
    monkeypatch.setattr(tasks.remote, "get_client", lambda **_: contextlib.nullcontext())
    monkeypatch.setattr(tasks.remote, "get_run_logger", lambda: logging.getLogger("x"))
    monkeypatch.setattr(Limits, "of", lambda *_: None)
    return waited


def test_another_run_goes_on_after_one_with_another_budget(config, children, monkeypatch):
    ref = SimpleNamespace(digest="ab" * 32)
    done = SimpleNamespace(ref=ref, metrics={})
    # The record of the old budget's result is none of this work's.
    answers = iter([None, None, done])
    monkeypatch.setattr(tasks.remote, "recorded_outcome", lambda *_: next(answers))
    outcome = tasks.remote.run_remotely(PREPARE_DATA, config, {}, "prepare-data/cpu")
    assert children == ["old", "own"]
    assert outcome.ref is ref


def test_one_with_this_budget_and_no_result_is_an_error(config, children, monkeypatch):
    monkeypatch.setattr(tasks.remote, "recorded_outcome", lambda *_: None)
    with pytest.raises(StageFailed, match="own on prepare-data/cpu completed, but its artifact is"):
        tasks.remote.run_remotely(PREPARE_DATA, config, {}, "prepare-data/cpu")
    assert children == ["old", "own"]
