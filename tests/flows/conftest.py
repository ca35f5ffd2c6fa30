"""Fixtures of the flows' tests: a tiny pipeline, a finished run, the command, Prefect's API."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path

import pytest
from prefect.client.schemas.objects import State
from prefect.testing.utilities import prefect_test_harness

from flows import cli, signals
from flows.pipeline import PipelineRun, pipeline
from rlhf.config import PipelineConfig
from tasks.board import board
from tasks.console import console


@pytest.fixture(scope="session", autouse=True)
def prefect_api():
    with prefect_test_harness(server_startup_timeout=600):
        yield


def tiny_tree(folder) -> dict:
    """Return a tiny configuration: a few rows, and a model of a few thousand weights."""
    return {
        "name": "tiny",
        "store": str(folder / "store"),
        "data": {
            "world": {
                "pairs": 64, "demonstrations": 64, "prompts": 32, "eval_pairs": 30,
                "eval_prompts": 12,
            }
        },
        "base": {
            "architecture": {
                "hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 32,
                "vocab_size": 320, "context": 160,
            }
        },
        # 64 rows in batches of 8 are 8 steps, each of which is logged: there are fewer than 50.
        "sft": {"batch_size": 8, "max_length": 128},
        "reward_model": {"batch_size": 8, "max_length": 128, "pooling": "sum"},
        "ppo": {
            "total_episodes": 32, "chunk_size": 8, "mini_batch_size": 8, "num_ppo_epochs": 1,
            "max_new_tokens": 8, "checkpoint_every": 1,
        },
        "gates": {
            "reward_model": [{"metric": "accuracy", "min": 0.0}],
            "policy": [{"metric": "sampled.kl", "max": 1000.0}],
            # Twelve gate prompts can show no champion to be worse.
            "champion": None,
        },
        "evaluation": {"judge": "world", "samples": 2},
        "retries": {"attempts": 2, "delay_seconds": 0.0},
        # Two take several times the CPU time beside another test: they wait for each other.
        "runtime": {
            "work_dir": str(folder / "work"), "report_dir": str(folder / "reports"), "threads": 1,
        },
        "tracking": {"log_dir": str(folder / "logs")},
    }  # fmt: skip


@dataclass(frozen=True)
class FirstRun:
    """The session's only tiny run with an empty store, and a copy of its final store."""

    config: PipelineConfig
    state: State
    result: PipelineRun
    store: Path


@pytest.fixture(scope="session")
def first_run(prefect_api, tmp_path_factory) -> FirstRun:
    folder = tmp_path_factory.mktemp("first-run")
    config = PipelineConfig.model_validate(tiny_tree(folder))
    state = pipeline(overrides=config, return_state=True)
    assert state.is_completed(), state.message
    store = Path(shutil.copytree(folder / "store", folder / "finished"))
    return FirstRun(config, state, state.result(), store)


@pytest.fixture
def finished(first_run, tmp_path) -> Path:
    """The store of `tiny` after the first run; only stages that a test changes run.

    Fingerprints and digests hold no path, so records are valid in any copy of the store.
    """
    return Path(shutil.copytree(first_run.store, tmp_path / "store"))


@pytest.fixture
def tiny(tmp_path):
    """Function that returns the tiny configuration with changes, `__` for a dot."""

    def make(**changes) -> PipelineConfig:
        tree = tiny_tree(tmp_path)
        for key, value in changes.items():
            *path, last = key.split("__")
            node = tree
            for part in path:
                node = node.setdefault(part, {})
            node[last] = value
        return PipelineConfig.model_validate(tree)

    return make


@pytest.fixture
def rlhf(monkeypatch, capsys):
    """Function that runs the `rlhf` command in this process, which has loaded torch and Prefect.

    Each process of its own would load them again, 3 to 10 s of CPU time.
    """
    monkeypatch.setattr(console, "_width", 160)

    def call(*arguments) -> subprocess.CompletedProcess[str]:
        command = ["rlhf", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        capsys.readouterr()
        with _restored_process(), pytest.raises(SystemExit) as end:
            copy_context().run(cli.main)
        shown = capsys.readouterr()
        return subprocess.CompletedProcess(command, end.value.code or 0, shown.out, shown.err)

    return call


@contextmanager
def _restored_process() -> Iterator[None]:
    """Restore what a command sets in its process and does not reset, since it ends with it."""
    handlers = {number: signal.getsignal(number) for number in signals.MESSAGES}
    logger = logging.getLogger("rlhf")
    level, log_handlers = logger.level, [*logger.handlers]
    variables = dict(os.environ)
    try:
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            # The command reads sys.argv, which is meant here.
            warnings.filterwarnings("ignore", "Cyclopts application invoked without tokens")
            patch.setattr(signals, "_own_server", signals._own_server)
            yield
    finally:
        board.show_on(None)
        logger.setLevel(level)
        logger.handlers[:] = log_handlers
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.environ.clear()
        os.environ.update(variables)
