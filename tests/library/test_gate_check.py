"""The check of the gates before training, on a real dataset, with champions made by hand."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from rlhf import champions
from rlhf.config import PipelineConfig
from rlhf.data.gate_prompts import PromptSet
from rlhf.data.lineage import forget_rows
from rlhf.data.rows import PROMPTS_EVAL, PROMPTS_GATE, PromptRow, read_rows, write_rows
from rlhf.errors import ConfigError
from rlhf.store import ArtifactRef, Producer, Store
from tasks.gate_check import check_gates
from tasks.looks import take_look
from tasks.runner import run_stage, store_of
from tasks.stages import STAGES
from tests.flows.conftest import tiny_tree

#: As many held-out prompts as ten looks need, and more than are asked for.
HELD_OUT = 40


class Site:
    """A store with a dataset, and model lines whose champions are no real models."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def config(self, **gates: Any) -> PipelineConfig:
        tree = tiny_tree(self.folder)
        tree["data"]["world"]["eval_prompts"] = HELD_OUT
        tree["gates"]["champion"] = {"looks": 10, **gates}
        return PipelineConfig.model_validate(tree)

    @property
    def store(self) -> Store:
        return store_of(self.config())

    def data(self) -> ArtifactRef:
        return run_stage(STAGES["prepare-data"], self.config(), {}).ref

    def held_out(self) -> list[PromptRow]:
        return read_rows(self.store.fetch(self.data()) / PROMPTS_EVAL, PromptRow)

    def put(self, kind: str, rows: list[PromptRow] | None = None, **parents: Any) -> ArtifactRef:
        folder = self.folder / "new"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "x").write_text(kind)
        if rows is not None:
            write_rows(folder / PROMPTS_GATE, rows)
        producer = Producer(stage="x", code_version="1", config={}, seed=0, versions={})
        return self.store.publish(folder, kind, parents=parents, producer=producer, metrics={})

    def promote(self, rows: list[PromptRow] | None = None) -> ArtifactRef:
        """Make a champion, with an evaluation on some prompts."""
        policy = self.put("policy", rows)
        verdict = None
        if rows is not None:
            found = self.put("evaluation", rows, policy=policy)
            verdict = self.put("verdict", policy=policy, evaluation=found).digest
        champions.promote(
            self.store, "default", policy.digest, verdict=verdict,
            expected=champions.champion(self.store, "default"), why="x", by="ann",
        )  # fmt: skip
        return policy

    def look(self, rows: list[PromptRow], count: int) -> None:
        """Compare so many policies on some prompts."""
        prompts = PromptSet.of(rows)
        for number in range(count):
            policy = f"policy {prompts.digest} {number}"
            take_look(self.store, "default", prompts, policy, level=0.005)

    def check(self, **gates: Any) -> tuple[str, ...]:
        return check_gates(self.config(**gates), self.data(), self.store).notes


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    Site(folder).data()
    return folder


@pytest.fixture
def site(prepared, tmp_path) -> Site:
    shutil.copytree(prepared / "store", tmp_path / "store")
    return Site(tmp_path)


def test_looks_at_the_runs_own_prompts_count_too(site):
    """A champion that was promoted by hand has frozen no prompts."""
    site.look(site.held_out(), 3)
    assert site.check() == ()  # nothing to compare with
    site.promote()
    assert site.check() == (
        "the champion was promoted without an evaluation: this run's own held-out prompts are used",
        "3 of 10 looks at this run's gate prompts are taken",
    )
    # Each has spent 0.5 %. A look of two has 2.5 %, a look of one the whole 5 %.
    risk = "have spent 1.50% of the chance of error of 5.00%"
    assert f"3 looks at this run's gate prompts {risk}" in site.check(looks=2)
    said = rf"gates\.champion\.looks = 1: 3 comparisons on this run's gate prompts {risk}"
    with pytest.raises(ConfigError, match=said):
        site.check(looks=1)


def test_more_looks_are_no_more_chances(site):
    """Who raises the number after the last look has still spent what was planned."""
    site.promote()
    site.look(site.held_out(), 10)
    for looks in (10, 20, 1000):
        with pytest.raises(ConfigError, match=rf"looks = {looks}: 10 comparisons .* 5\.00% of"):
            site.check(looks=looks)


def test_looks_at_the_champions_prompts(site):
    rows = [PromptRow(f"question {i}?", row_ids=(f"{i:032x}",)) for i in range(30)]
    site.promote(rows)
    assert site.check() == ("the champion's 30 gate prompts are used until data.rotation changes",)
    site.look(site.held_out(), 8)
    site.look(rows, 2)
    assert "2 of 10 looks at the champion's gate prompts are taken" in site.check()
    # Rows that are forgotten change the prompts, and restart nothing.
    forget_rows(site.store, [f"{i:032x}" for i in range(4)])
    assert site.check() == (
        "the champion's 26 gate prompts are used until data.rotation changes",
        "2 of 10 looks at the champion's gate prompts are taken",
    )
    with pytest.raises(ConfigError, match=r"2 comparisons .* the champion's gate .* spent 1\.00%"):
        site.check(looks=1)
    # Nor does the loss of the champion's evaluation, where its prompts were held out here too.
    other = [*site.held_out()[:25], *rows[:5]]
    site.promote(other)
    site.look(other, 1)
    (verdict,) = {entry.verdict for entry in champions.history(site.store, "default")[1:]}
    assert verdict is not None
    site.store.delete(site.store.manifest(verdict).parents["evaluation"])
    assert site.check() == (
        "the champion's evaluation is not in the store: this run's own held-out prompts are used",
        "9 of 10 looks at this run's gate prompts are taken",
    )


def test_gate_prompts_that_are_forgotten_are_too_few_before_training(site):
    rows = [PromptRow(f"question {i}?", row_ids=(f"{i:032x}",)) for i in range(30)]
    site.promote(rows)
    forget_rows(site.store, [f"{i:032x}" for i in range(25)])
    with pytest.raises(ConfigError, match="can't be met with 5 gate prompts"):
        site.check()
