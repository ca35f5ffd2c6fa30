"""Metrics of the stages, read back from the trackers that got them."""

from __future__ import annotations

import importlib.util
import json
import logging
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from prefect import flow
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flows.pipeline import pipeline
from rlhf.errors import ConfigError
from rlhf.files import read_json
from tasks.preflight import preflight
from tasks.stage import store_of
from tasks.stages import STAGES
from tasks.trackers import StageMetrics, changes

pytestmark = pytest.mark.prefect


def scalars(folder):
    """{tag: [(step, value), …]}, as TensorBoard shows them."""
    events = EventAccumulator(str(folder)).Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def tell(config, name, steps, *, final=None, stage="train-policy"):
    """A flow run of that name, whose stage tells the loss 10 × step; `final` if it gets done."""

    @flow(flow_run_name=name)
    def work():
        metrics = StageMetrics(STAGES[stage], config, {})
        for step in steps:
            metrics.log(step, {"loss": 10.0 * step, "note": "no number", "done": True})
        if final:
            metrics.summarise(final)
        metrics.close()

    work()


def test_tensorboard_has_every_metric_of_every_step(first_run):
    config, result = first_run.config, first_run.result
    folder = Path(config.tracking.log_dir)
    logs = folder / result.name
    trained = {"train-sft", "train-reward-model", "train-policy"}
    assert {p.name for p in logs.iterdir()} == {
        *trained,
        "train-judge",
        "evaluate-reward-model",
        "evaluate-policy",
    }
    store = store_of(config)
    for stage, clock in ((name, "update" if "policy" in name else "step") for name in trained):
        shown = scalars(logs / stage)
        curve = read_json(store.fetch(result.refs[stage]) / "curve.json")
        assert [row[clock] for row in curve] == (
            [1, 2, 3, 4] if clock == "update" else [*range(1, 9)]
        )
        for metric in set(curve[0]) - {clock}:
            assert shown[metric] == [(r[clock], pytest.approx(r[metric])) for r in curve], metric
        assert len(shown) > len(curve[0])
    final = store.manifest(result.refs["evaluate-policy"]).metrics
    shown = scalars(logs / "evaluate-policy")
    assert shown["final/sampled.kl"] == [(1, pytest.approx(final["sampled.kl"], abs=1e-6))]

    # A run that finds all done opens nothing, and so loads no torch for it.
    pipeline(overrides=config)
    assert [p.name for p in folder.iterdir()] == [result.name]


def test_tensorboards_folders_name_whole_changes_that_differ():
    tree = {"sft": {"epochs": 1.0, "lora": None}, "reward_model": {"epochs": 2.0}, "name": "x"}
    name = changes({"overrides": {**tree, "store": "elsewhere"}})
    assert name == ",sft.epochs=1.0,lora=none,reward_model.epochs=2.0"
    ppo = {"kl_coef": 0.05, "chunk_size": 32, "max_new_tokens": 64}
    assert changes({"overrides": {**tree, "ppo": ppo}}) == f"{name},+3"
    assert changes({"overrides": {"data": {"source": "a" * 80}}}) == ",+1"
    assert changes({}) == ""


def test_a_training_that_is_resumed_goes_on_where_it_was_shown(tiny, tmp_path):
    config = tiny()
    tell(config, "killed", [1, 2, 3, 4])
    tell(config, "resumed", [3, 4, 5], final={"kl": 0.5})
    tell(config, "again", [1])
    logs = tmp_path / "logs"
    assert sorted(p.name for p in logs.iterdir()) == ["again", "killed"]
    shown = scalars(logs / "killed" / "train-policy")
    assert shown == {"loss": [(n, 10 * n) for n in (1, 2, 3, 4, 5)], "final/kl": [(5, 0.5)]}


def test_a_training_from_the_start_has_a_folder_of_its_own(tiny, tmp_path):
    config = tiny()
    tell(config, "killed", [1, 2])
    tell(config, "other", [1, 2])
    assert scalars(tmp_path / "logs" / "other" / "train-policy")["loss"] == [(1, 10), (2, 20)]


def test_a_machine_has_its_own_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_LOG_DIR", str(tmp_path / "here"))
    tell(tiny(), "run", [1])
    assert scalars(tmp_path / "here" / "run" / "train-policy") == {"loss": [(1, 10)]}
    assert not (tmp_path / "logs").exists()


def test_a_tracker_that_fails_is_told_of_once(tiny, tmp_path, caplog):
    (tmp_path / "logs").write_text("in the way")
    with caplog.at_level(logging.WARNING, "rlhf.tasks"):
        tell(tiny(), "run", [1, 2, 3], final={"kl": 1.0})
    said = [r.getMessage() for r in caplog.records if r.name == "rlhf.tasks"]
    assert len(said) == 1
    assert "train-policy: tensorboard gets no more metrics" in said[0]
    assert str(tmp_path / "logs") in said[0]


def test_no_trackers(tiny, tmp_path):
    tell(tiny(tracking__trackers=[]), "run", [1], final={"kl": 1.0})
    assert not (tmp_path / "logs").exists()


def test_what_can_be_known_before_is_refused_before(tiny, tmp_path, monkeypatch):
    (tmp_path / "logs").write_text("in the way")
    with pytest.raises(ConfigError, match=r"tracking\.log_dir = '.*logs'"):
        preflight(tiny())
    if importlib.util.find_spec("wandb") is not None:
        pytest.skip("wandb is installed")
    # wandb leaves a folder of its name beside the runs.
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="'wandb': that package is not installed; run `pip"):
        preflight(tiny(tracking__trackers=["wandb"]))


def test_wandb(tiny, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "logs").mkdir()
    tell(tiny(tracking__trackers=["wandb"]), "run", [1, 2], final={"kl": 0.5})
    (kept,) = tmp_path.glob("logs/wandb/offline-run-*/*.wandb")
    written = kept.read_bytes()
    for part in (b"run/train-policy", b"final/kl", b"kl_coef"):
        assert part in written


def test_mlflow(tiny, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    tell(tiny(tracking__trackers=["mlflow"]), "run", [1, 2], final={"kl": 0.5})
    (run,) = mlflow.search_runs(experiment_names=["rlhf"], output_format="list")
    assert (run.info.run_name, run.info.status) == ("run/train-policy", "FINISHED")
    assert run.data.metrics == {"loss": 20.0, "final/kl": 0.5}
    assert run.data.params["kl_coef"] == "0.1"


def test_trackio(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    tell(tiny(tracking__trackers=["trackio"]), "run", [1, 2], final={"kl": 0.5})
    (run,) = trackio.Api().runs("rlhf")
    assert run.name == "run/train-policy"
    assert run.config["kl_coef"] == 0.1
    with closing(sqlite3.connect(tmp_path / "trackio" / "rlhf.db")) as kept:
        rows = kept.execute("SELECT step, metrics FROM metrics ORDER BY id").fetchall()
    told = [(1, {"loss": 10.0}), (2, {"loss": 20.0}), (2, {"final/kl": 0.5})]
    assert [(step, json.loads(metrics)) for step, metrics in rows] == told
