"""A server of two policies that always say the same, and a judge; in a thread of the test."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import uvicorn

from rlhf.config.pipeline import PromotionConfig
from rlhf.modeling.members import open_scorer
from rlhf.preferences import PreferenceFile
from rlhf.store import open_store
from tasks.chat_models import ChatModels, ChatOptions, load_chat
from tasks.serving import ServingLimits, build_app
from tasks.serving_guard import own_hosts
from tests.library.toy_models import toy_model
from tests.parrot import write_parrot
from tests.report.browser import browser

__all__ = ["browser"]
#: What the second policy always says.
OTHER = "good tea"


@dataclass
class Server:
    """A server that runs, and its preference file."""

    url: str
    preferences: Path
    models: ChatModels


@pytest.fixture(scope="session")
def chat_models(tmp_path_factory: pytest.TempPathFactory) -> ChatModels:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("serving")
    write_parrot(root / "parrot")
    write_parrot(root / "other", [OTHER])
    judge = toy_model(root, "reward")
    options = ChatOptions(
        versus=str(root / "other"), judge=str(judge), temperature=0.0, max_new_tokens=200
    )
    store = open_store(str(root / "store"), cache_dir=root / "cache")
    return load_chat(
        str(root / "parrot"), options, PromotionConfig(), lambda: torch.device("cpu"), store,
        lambda model, device: open_scorer(model.folder, device, 64),
    )  # fmt: skip


@contextmanager
def running(
    models: ChatModels, preferences: Path, limits: ServingLimits | None = None,
    key: str | None = None,
) -> Iterator[Server]:  # fmt: skip
    """Run a server on a free port until the block ends."""
    app = build_app(models, PreferenceFile(preferences), own_hosts("127.0.0.1", ()), limits, key)
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield Server(f"http://127.0.0.1:{listening.getsockname()[1]}", preferences, models)
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


@pytest.fixture(scope="module")
def server(chat_models: ChatModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    path = tmp_path_factory.mktemp("votes") / "preferences.jsonl"
    with running(chat_models, path) as started:
        yield started
