"""The command `rlhf export`, on the finished run: a user's view of it, and where it says no."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from rlhf import export as rlhf_export
from rlhf import export_check
from rlhf.champions import champion
from rlhf.errors import ConfigError
from rlhf.store import Producer, open_store
from tasks.export import push_to_hub, uploaded

pytestmark = pytest.mark.prefect


@pytest.fixture
def in_this_process(monkeypatch):
    """The check runs here: one process of its own is enough, in the first test."""
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.setattr(rlhf_export, "in_own_process", export_check.check)


def opened(folder: Path, tmp_path: Path):
    return open_store(str(folder), cache_dir=tmp_path / "cache")


@pytest.fixture
def rejected(finished, tmp_path) -> str:
    """The policy's digest, after a second gate has rejected it."""
    store = opened(finished, tmp_path)
    policy = champion(store, "default").policy
    verdict = next(
        ref for ref, m, _ in store.list() if ref.kind == "verdict" and policy in m.parents.values()
    )
    folder = Path(shutil.copytree(store.fetch(verdict), tmp_path / "verdict"))
    path = folder / "verdict.json"
    content = json.loads(path.read_text())
    checks = [{**c, "passed": False, "metric": "sampled.kl"} for c in content["checks"]]
    path.unlink()
    path.write_text(json.dumps({**content, "approved": False, "checks": checks}))
    manifest = store.manifest(verdict)
    parents = {role: store.resolve(digest) for role, digest in manifest.parents.items()}
    producer = Producer(**{**manifest.producer.model_dump(), "seed": 99})
    store.publish(folder, "verdict", parents=parents, metrics={}, producer=producer)
    return policy


def test_a_champion_is_exported_and_verified(rlhf, finished, tmp_path):
    out = tmp_path / "given" / "away"
    result = rlhf("export", "champion", out, "--store", finished, "--license", "apache-2.0")
    assert result.returncode == 0, result.stderr
    assert "verified: 12 of 12 greedy replies are the same in a fresh process" in result.stdout
    assert f"written: {out}" in result.stdout
    assert {path.name for path in out.parent.iterdir()} == {"away"}
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    policy = champion(opened(finished, tmp_path), "default").policy
    for text in (policy, "Approved by its gate", "12 of 12 greedy replies", "95 % interval",
                 "train-reward-model", "transformers 5.", "from scratch"):  # fmt: skip
        assert text in card.text
    # As a user would, with transformers alone, in another process than this.
    snippet = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    code = snippet.replace("path/to/this/folder", str(out)) + "print(model.device)\n"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("cpu\n")
    # Nothing is overwritten.
    again = rlhf("export", "champion", out, "--store", finished)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "is there already; name a new folder" in again.stderr


@pytest.mark.usefixtures("in_this_process")
def test_a_rejected_policy_says_so_loudly(rlhf, finished, rejected, tmp_path):
    result = rlhf("export", rejected[:10], tmp_path / "out", "--store", finished)
    assert result.returncode == 0, result.stderr
    assert "warning: REJECTED by its gate: sampled.kl" in result.stderr
    card = (tmp_path / "out/README.md").read_text()
    assert "**REJECTED by its gate: sampled.kl" in card
    assert "No gate has approved this policy" in card


def test_a_failed_check_leaves_nothing(rlhf, finished, tmp_path, monkeypatch):
    def damaging(request):
        weights = Path(request["folder"], "model.safetensors")
        data = bytearray(weights.read_bytes())
        for place in range(len(data) - 4000, len(data), 4):
            data[place + 3] ^= 0x80  # the sign of a weight
        weights.write_bytes(data)
        return export_check.check(request)

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.setattr(rlhf_export, "in_own_process", damaging)
    out = tmp_path / "new" / "out"
    result = rlhf("export", "champion", out, "--store", finished)
    assert result.returncode == 1
    assert "does not behave like the policy in the store: its reply is another" in result.stderr
    assert result.stderr.count("\n") == 1
    assert [*out.parent.iterdir()] == []


def test_a_damaged_policy_is_one_line(rlhf, finished, tmp_path):
    store = opened(finished, tmp_path)
    policy = champion(store, "default").policy
    (entry,) = [f for f in store.manifest(policy).files if f.path == "model.safetensors"]
    blob = finished / "blobs" / "sha256" / entry.sha256[:2] / entry.sha256
    blob.chmod(0o644)
    blob.write_bytes(b"x" * entry.size)
    # The fetched copies of the run that made it are elsewhere: this reads the store.
    config = tmp_path / "c.yaml"
    config.write_text(f"store: {finished}\nruntime: {{work_dir: {tmp_path / 'w'}}}\n")
    result = rlhf("export", policy, tmp_path / "out", "--config", config)
    assert result.returncode == 1
    assert "sha256" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["champion", "{out}", "--license", "Apache License"], "write the hub's identifier"),
        (["champion", "{out}", "--public"], "--public is for --push"),
        (["champion", "{out}", "--push", "a//b"], "write owner/name"),
        (["champion", "{out}", "--push", "alone"], "has no owner"),
        (["champion", "{out}", "--push", "acme/x"], "there is no token; set HF_TOKEN"),
        (["champion", "{out}", "--converter", "x"], "--converter is for --format gguf"),
        (["champion", "{out}", "--format", "gguf"], "pip install 'rlhf-pipeline[gguf]'"),
        (["champion:nobody", "{out}"], "has no champion of that line"),
        (["configs", "{out}"], "names no artifact"),
        (["./configs", "{out}"], "configs"),
        (["champion", "s3://"], "s3://"),
    ],
)
def test_refusals_come_before_any_work(rlhf, finished, tmp_path, words, said, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    out = tmp_path / "out"
    result = rlhf("export", *(w.format(out=out) for w in words), "--store", finished)
    assert result.returncode in (1, 2)
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert not out.exists()


def test_a_reward_model_is_no_policy(rlhf, finished, tmp_path):
    store = opened(finished, tmp_path)
    ref = next(ref for ref, _, _ in store.list() if ref.kind == "reward-model")
    result = rlhf("export", ref.digest, tmp_path / "out", "--store", finished)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "needs a policy" in result.stderr


@pytest.fixture
def folder(tmp_path) -> Path:
    made = tmp_path / "made"
    (made / "adapter").mkdir(parents=True)
    for name in ("config.json", "README.md", "adapter/a.json"):
        (made / name).write_text(f"{{}} of {name}")
    return made


@contextlib.contextmanager
def hub(present: tuple[str, ...] = (), status: int = 200) -> Iterator[Any]:
    """A hub on loopback: creating a repository, listing it, committing small files.

    Large files (LFS, Xet) are not spoken.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            path = self.path.partition("?")[0]
            server.asked.append((path, self.headers["authorization"]))
            if status != 200:
                self.answer({"error": "Forbidden: you are not of acme"}, status)
            elif path == "/api/repos/create":
                server.made = json.loads(body)
                self.answer(
                    {"url": "https://huggingface.co/acme/x", "id": "acme/x", "name": "acme/x"}
                )
            elif path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif "/paths-info/" in path:
                self.answer([])
            elif "/preupload/" in path:
                files = json.loads(body)["files"]
                modes = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in files
                ]
                self.answer({"files": modes})
            elif "/commit/" in path:
                for line in map(json.loads, body.decode().splitlines()):
                    if line["key"] == "file":
                        value = line["value"]
                        server.files[value["path"]] = base64.b64decode(value["content"])
                url = f"{server.url}/acme/x/commit/c0ffee"
                self.answer({"commitOid": "c0ffee", "commitUrl": url, "success": True})
            else:
                self.answer({"path": path}, 404)

        def do_GET(self) -> None:
            if status != 200:
                return self.answer({"error": "Repository not found"}, 404)
            tree = [{"type": "file", "path": p, "size": 1, "oid": "0"} for p in present]
            info = {
                "id": "acme/x",
                "sha": "c0ffee",
                "siblings": [{"rfilename": p} for p in present],
            }
            return self.answer(tree if "/tree/" in self.path else info)

        def answer(self, content: Any, code: int = 200) -> None:
            data = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.files, server.made = [], {}, None
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


SECRET = "hf_" + "s3cret" * 5


@pytest.fixture
def token(monkeypatch) -> str:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    return SECRET


def test_a_push_makes_a_private_repository_of_all_files(folder, token):
    with hub(present=(".gitattributes",)) as server:
        url = push_to_hub(folder, "acme/x", private=True, endpoint=server.url)
    assert "private" in (
        server.made.get("visibility"),
        *(k for k, v in server.made.items() if v is True),
    )
    assert server.files == {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }
    assert {auth for _, auth in server.asked} == {f"Bearer {token}"}
    assert url.endswith("acme/x")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"status": 403}, "the hub refuses (403: Forbidden: you are not of acme)"),
        ({"present": ("config.json",)}, "holds files already (config.json)"),
    ],
)
def test_a_push_that_is_refused_is_one_line_without_the_token(folder, token, options, said):
    with hub(**options) as server, pytest.raises(ConfigError) as caught:
        push_to_hub(folder, "acme/x", private=True, endpoint=server.url)
    assert said in str(caught.value)
    assert token not in str(caught.value)
    assert server.files == {}


@pytest.mark.s3
def test_an_export_to_s3(s3_server, folder, tmp_path, monkeypatch):
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    import boto3

    from rlhf.config.pipeline import StoreConfig

    client = boto3.client("s3")
    client.create_bucket(Bucket="exports")
    uri = "s3://exports/models/ours"

    def keys() -> list[str]:
        found = client.list_objects_v2(Bucket="exports").get("Contents", [])
        return [each["Key"] for each in found]

    def fill() -> None:
        with uploaded(uri, StoreConfig(), tmp_path / "made") as out:
            assert out == folder

    # A file that can't be read ends it, and nothing stays.
    (folder / "zz").symlink_to(folder)  # sorted last but for config.json; a folder is left out
    (folder / "unread.json").write_text("x")
    monkeypatch.setattr("rlhf.store.objects.Source.check", broken_at("unread.json"))
    with pytest.raises(OSError, match="broken"):
        fill()
    assert keys() == []
    monkeypatch.undo()
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    (folder / "unread.json").unlink()
    fill()
    assert keys() == [
        f"models/ours/{name}" for name in ("README.md", "adapter/a.json", "config.json")
    ]
    with pytest.raises(ConfigError, match="stored there already; name a new prefix"):
        fill()
    client.close()


def broken_at(name: str):
    """`Source.check` that fails for a file, as for one that changes."""
    from rlhf.store.objects import Source

    whole = Source.check

    def check(self):
        if self._name == name:
            raise OSError("broken")
        return whole(self)

    return check
