"""Data sources on the Hugging Face hub: a stand-in on loopback, and no hub at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, hf_api

from rlhf.config import DataConfig, StoreConfig
from rlhf.data import sources
from rlhf.data.sources import open_source
from rlhf.errors import ConfigError, StoreError
from tests.ceph import free_ports
from tests.data.helpers import digest, message, read, rows
from tests.data.hub import COMMIT, DATASET, fake_hub

CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: a.jsonl}
  - {split: test, path: b.jsonl}
---
"""


def lines(data: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in data).encode()


FILES = {
    "README.md": CARD.encode(),
    "a.jsonl": lines(rows(4)),
    "b.jsonl": lines(rows(2)),
    "weights.bin": b"x" * 100,
}


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch):
    """Sends the hub's client to another address."""

    def to(url: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(hf_api.api, "endpoint", url)
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    return to


def test_split_is_read_quietly_at_its_commit_and_nothing_is_left_behind(tmp_path):
    script = (
        "import sys\n"
        "from rlhf.config import DataConfig, StoreConfig\n"
        "from rlhf.data.sources import open_source, source_digest\n"
        "import json\n"
        "for split in ('train', 'test'):\n"
        f"    config = DataConfig(source={DATASET!r}, hub_split=split)\n"
        "    with open_source(config, StoreConfig(), lambda _: None) as (part, *rest):\n"
        "        print(json.dumps([record.fields for record in part.records()]))\n"
        "print(source_digest(config, StoreConfig()))\n"
    )
    folders = {"HOME": tmp_path / "home", "TMPDIR": tmp_path / "tmp"}
    for folder in folders.values():
        folder.mkdir()
    with fake_hub(FILES) as hub:
        environment = {k: str(v) for k, v in folders.items()} | {"HF_ENDPOINT": hub.url}
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={"PATH": os.environ["PATH"], **environment},
            capture_output=True,
            text=True,
            check=True,
        )
    assert done.stderr == ""
    train, test, commit = done.stdout.splitlines()
    assert (json.loads(train), json.loads(test), commit) == (rows(4), rows(2), COMMIT)
    assert not any("weights.bin" in path for path in hub.asked)
    for folder in folders.values():
        assert [p for p in folder.rglob("*") if p.is_file()] == []


def test_the_own_test_split_is_held_out_and_a_revision_is_read(use):
    with fake_hub(FILES) as hub:
        use(hub.url)
        notes = []
        config = DataConfig(source=f"{DATASET}@v1")
        with open_source(config, StoreConfig(), notes.append) as parts:
            found = {part.held_out: [r.fields for r in part.records()] for part in parts}
        assert found == {False: rows(4), True: rows(2)}
        assert notes == [f"held out as the source's own test part: {DATASET}@v1[test]"]
        assert digest(f"{DATASET}@v1") == COMMIT
        assert any("/revision/v1" in path for path in hub.asked)
        assert read(DATASET, split="random") == rows(4)


def test_a_configuration_is_named_in_the_source(use):
    card = CARD.replace("default", "en") + "dummy"
    card = card.replace("---\ndummy", "- config_name: de\n  data_files: b.jsonl\n---\n")
    with fake_hub(FILES | {"README.md": card.encode()}) as hub:
        use(hub.url)
        assert read(f"{DATASET}:de") == rows(2)
        assert read(f"{DATASET}:en@v1", split="random") == rows(4)
        text = message(ConfigError, read, DATASET)
        assert f"name a configuration: {DATASET}:name" in text
        assert "BuilderConfig" in message(ConfigError, read, f"{DATASET}:fr")


def test_a_split_that_there_is_not(use):
    with fake_hub(FILES | {"a.jsonl": b'{"q": "x", "n": 1}\n', "b.jsonl": b'{"q": "x"}\n'}) as hub:
        use(hub.url)
        text = message(ConfigError, read, DATASET, hub_split="validation")
        assert text.startswith(
            f"data.source = {DATASET!r}, data.hub_split = 'validation': can't be read "
            "(ValueError: Unknown split"
        )


def test_transfer_that_breaks_can_be_tried_again(use, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    with fake_hub(FILES, broken="a.jsonl") as hub:
        use(hub.url)
        text = message(StoreError, read, DATASET)
    assert text.startswith(f"data.source = {DATASET!r}: the transfer from the hub broke (")


def test_no_such_dataset_and_one_without_a_commit(use):
    with fake_hub(FILES, commit=None) as hub:
        use(hub.url)
        text = message(ConfigError, digest, "acme/other")
        assert text.startswith("data.source = 'acme/other': no such path here, and the hub can't")
        assert "RepositoryNotFoundError" in text
        assert "it names no commit" in message(ConfigError, digest, DATASET)


def test_empty_dataset(use):
    with fake_hub({"a.csv": b"prompt,chosen,rejected\n"}) as hub:
        use(hub.url)
        assert "corresponds to no data" in message(ConfigError, read, DATASET)


@pytest.mark.parametrize("call", [read, digest])
def test_no_network_is_told_at_once(use, call, monkeypatch):
    waits = []

    def sleep(seconds):
        if threading.current_thread() is threading.main_thread():
            waits.append(seconds)

    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", sleep)
    (port,) = free_ports(1)
    use(f"http://127.0.0.1:{port}")
    text = message(ConfigError, call, "owner/name")
    assert waits == []  # it is not tried again
    assert text.startswith(
        "data.source = 'owner/name': no such path here, and the hub can't tell of a dataset by "
        "that name (ConnectError: "
    )
    assert text.endswith("or a hub dataset id, owner/name[:config][@revision]")


def test_hub_that_does_not_answer_is_given_up(use, monkeypatch):
    monkeypatch.setattr(sources, "TIMEOUT", 0.2)
    with fake_hub(FILES, delay=60) as hub:
        use(hub.url)
        started = time.monotonic()
        assert "ReadTimeout" in message(ConfigError, digest, DATASET)
        assert time.monotonic() - started < 50


def test_folder_of_that_name_is_read_instead(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    Path("owner/name/a.jsonl").write_bytes(lines(rows()))
    assert read("owner/name") == rows()
