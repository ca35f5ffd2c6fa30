"""Disk: the sizes that `rlhf artifacts ls` shows, and when a clean-up is offered."""

from __future__ import annotations

import os

import pytest

from flows.artifacts import ls
from rlhf.config import PipelineConfig
from rlhf.report import RunOutcome
from tasks import disk
from tasks.disk import disk_use, folder_size, size


@pytest.fixture
def config(tmp_path):
    runtime = {"work_dir": str(tmp_path / "work")}
    return PipelineConfig.model_validate({"store": str(tmp_path / "store"), "runtime": runtime})


def test_hard_links_count_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/blob").write_bytes(b"x" * 5000)
    os.link(tmp_path / "a/blob", tmp_path / "link")
    (tmp_path / "other").write_bytes(b"x" * 100)
    assert folder_size(tmp_path) == 5100
    assert folder_size(tmp_path / "none") == 0
    assert [size(n) for n in (900, 2_500_000, 6_240_000_000)] == ["1 kB", "2.5 MB", "6.2 GB"]


def test_a_large_store_gets_an_offer_and_a_small_one_none(config, tmp_path, monkeypatch):
    (tmp_path / "store").mkdir()
    (tmp_path / "store/blob").write_bytes(b"x" * 3000)
    (tmp_path / "work/cache").mkdir(parents=True)
    (tmp_path / "work/cache/blob").write_bytes(b"x" * 500)
    use = disk_use(config)
    assert (use.store, use.work, use.cache, use.checkpoints) == (3000, 500, 500, 0)
    assert not use.is_large
    assert len(use.lines()) == 1
    monkeypatch.setattr(disk, "LARGE", 3000)
    assert use.is_large
    assert "rlhf artifacts gc --keep-runs 10 --store" in use.lines()[1]
    monkeypatch.setattr(disk, "LARGE", 400)
    assert "runtime.cache_gb" in use.lines()[2]
    assert disk_use(config.model_copy(update={"store": "s3://bucket/x"})).store is None


def test_ls_shows_sizes_and_has_json(made, shown, as_json):
    made.run("w", "2026-11-01", RunOutcome.NOT_BETTER, evaluation={"kl": 1.0})
    assert "disk: store" in shown(ls)
    rows = as_json(ls)
    assert {row["kind"] for row in rows} == {"dataset", "policy", "evaluation", "verdict", "report"}
    assert all(len(row["digest"]) == 64 and row["bytes"] > 0 for row in rows)
