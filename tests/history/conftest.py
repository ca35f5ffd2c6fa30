"""A made store: three months of retrainings of a model line, without any training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rlhf import champions
from rlhf.files import write_json
from rlhf.report import ConfigRow, RunOutcome, RunReport, StageRow, StageState
from rlhf.report.stored import DATA, PAGE
from rlhf.store import ArtifactRef, Producer, Store, open_store
from tasks.console import console

PRODUCER = Producer(stage="x", code_version="1", config={}, seed=0, versions={})
HOSTILE = "\x1b[31m[/red]<script>alert(1)</script>\u202e"


def sample(prompt: Any, gain: float, judge: float | None = None, **more) -> dict[str, Any]:
    """A row of samples.json whose policy's reply gained so much over SFT's."""
    return {
        "prompt": prompt, "group": None, "before": f"before {prompt}", "after": f"after {prompt}",
        "champion": None, "reward_before": 1.0, "reward_after": 1.0 + gain,
        "reward_champion": None, "judge_before": None if judge is None else 0.0,
        "judge_after": judge, "judge_champion": None, "gold_before": None, "gold_after": None,
        "kinds": [], "more": [], **more,
    }  # fmt: skip


@dataclass
class Made:
    """A store, and functions that put into it what runs would."""

    store: Store
    folder: Path
    count: int = 0
    refs: dict[str, ArtifactRef] = field(default_factory=dict)

    def publish(self, kind: str, files: dict[str, Any], parents: dict[str, ArtifactRef], **metrics):
        self.count += 1
        folder = self.folder / f"{self.count}"
        folder.mkdir(parents=True)
        write_json(folder / "number.json", self.count)
        for name, value in files.items():
            if isinstance(value, str):
                (folder / name).write_text(value)
            else:
                write_json(folder / name, value)
        return self.store.publish(folder, kind, parents=parents, producer=PRODUCER, metrics=metrics)

    def run(
        self, name: str, started: str, outcome: RunOutcome, *, evaluation: dict | None = None,
        rows: Sequence[dict] = (), data: dict | None = None, refs: dict | None = None,
        reason: str = "as it is", seconds: float = 10.0, config: dict | None = None,
        drift: dict | None = None, line: str = "default",
    ) -> dict[str, ArtifactRef]:  # fmt: skip
        """Publish what a run does, and its report; `refs` are of an earlier run that it repeats."""
        if refs is None:
            refs = {"prepare-data": self.publish("dataset", {}, {})}
            if evaluation is not None:
                policy = self.publish("policy", {}, {"data": refs["prepare-data"]})
                refs["train-policy"] = policy
                flat = {f"sampled.{key}": value for key, value in evaluation.items()}
                files = {"evaluation.json": {"sampled": evaluation}, "samples.json": rows}
                refs["evaluate-policy"] = self.publish(
                    "evaluation", files,
                    {"policy": policy, "data": refs["prepare-data"], **self.refs}, **flat,
                )  # fmt: skip
                refs["gate-policy"] = self.publish(
                    "verdict", {}, {"policy": policy, "evaluation": refs["evaluate-policy"]}
                )
        values = {"promotion.name": line, "ppo.kl_coef": "0.1", **(config or {})}
        report = RunReport(
            title="t", run_name=name, started=started, outcome=outcome, reason=reason, seed=0,
            stages=(StageRow(name="train-policy", state=StageState.COMPLETED, seconds=seconds),),
            data=data or {"pairs_train": 100, "findings": ["The longer reply wins 60 %."]},
            policy={"sampled": evaluation} if evaluation else None, drift=drift,
            config_rows=tuple(ConfigRow(k, v, "preset") for k, v in values.items()),
        )  # fmt: skip
        files = {DATA: report.model_dump_json(), PAGE: "<html>"}
        self.publish("report", files, refs)
        return refs

    def promote(self, refs: dict[str, ArtifactRef], line: str = "default", **more):
        return champions.promote(
            self.store, line, refs["train-policy"].digest, verdict=refs["gate-policy"].digest,
            expected=champions.champion(self.store, line), **{"by": "ann", "why": "", **more},
        )  # fmt: skip


@pytest.fixture
def made(tmp_path, monkeypatch) -> Made:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLHF_WORK_DIR", str(tmp_path / "work"))
    monkeypatch.setenv("PREFECT_API_URL", "")
    monkeypatch.setattr(console, "_width", 80)
    store = open_store(str(tmp_path / "store"), cache_dir=tmp_path / "cache")
    return Made(store, tmp_path / "made")


@pytest.fixture
def shown(capsys, made):
    """Runs a command on the made store; what it prints."""

    def call(command, *words, **options) -> str:
        capsys.readouterr()
        command(*words, **{"store": made.store.uri, **options})
        return capsys.readouterr().out

    return call


@pytest.fixture
def as_json(shown):
    def call(command, *words, **options) -> Any:
        return json.loads(shown(command, *words, json=True, **options))

    return call
