"""Pinned digests of external inputs: another value would make every stage run again."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.modeling.source import ExternalModel
from rlhf.store import s3
from tests.data.helpers import digest

FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "notes.md": b"no part",
    "part.jsonl/b.jsonl": b"b",
    "part.jsonl/a/a.jsonl": b"a",
    "part.jsonl/.hidden/c.jsonl": b"c",
}


class Bucket:
    """Objects with fixed entity tags, in place of a server."""

    bucket = "b"

    def __init__(self, *_):
        pass

    def hurried(self, _):
        return self

    def objects(self, _):
        return {f"p/{name}": (f'"{len(data)}"', len(data)) for name, data in FILES.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path


def model_digest(uri: object) -> str:
    return ExternalModel("base.path", str(uri)).digest()


def test_of_folders_and_files(folder):
    assert (
        digest(folder / "part.jsonl")
        == "85c5bda32da1c6503993576fa4df1ec60571f76e768b38e39f3d4e96194430cd"
    )
    assert (
        digest(folder / "part.jsonl" / "b.jsonl")
        == "a06481b93d3c29cf371a6b6a789434c3989ab6d8c919bf2039e1dc2c8147991a"
    )
    assert (
        model_digest(folder) == "3f117ffbac15cf6ad26d4abf5cf81a2a20b911fc2d3d6490fb51be8a500719b7"
    )


def test_of_objects(monkeypatch):
    monkeypatch.setattr(s3, "S3Backend", Bucket)
    assert (
        digest("s3://b/p/part.jsonl")
        == "10ab8781ce94422373d1482ba74b16d45fa2d83f3d813fd45ca1b730bb425add"
    )
    assert (
        model_digest("s3://b/p/")
        == "1bcee7c61cff0027fa2e0aede416c8534848220f6c41a37fa3308878da7509dc"
    )
