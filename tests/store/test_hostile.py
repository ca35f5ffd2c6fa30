"""Paths and files that artifacts must not hold, when published or fetched.

The checks come before any backend, so they are tested over a folder alone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rlhf.errors import ArtifactCorrupt
from rlhf.store import Producer, PublishError, Store, manifest
from rlhf.store import publish as publish_module
from rlhf.store.manifest import check_collisions, check_path, sha256_bytes

HOSTILE = [
    ("/etc/passwd", "absolute"),
    ("C:/x", "absolute"),
    ("c:x", "absolute"),
    ("../x", "segment"),
    ("a/../x", "segment"),
    ("a/./x", "segment"),
    ("a//x", "segment"),
    ("a/", "segment"),
    ("a\\..\\x", "backslash"),
    ("a\0b", "control"),
    ("a\nb", "control"),
    ("a\ud800", "control"),
    ("weights.bin", "pickle"),
    ("a/optimizer.PT", "pickle"),
    ("x.pth", "pickle"),
    ("x.pkl", "pickle"),
    ("x.pickle", "pickle"),
    ("x.ckpt", "pickle"),
]


def publish(store: Store, folder: Path, producer: Producer) -> None:
    store.publish(folder, "data", parents={}, producer=producer, metrics={})


@pytest.mark.parametrize(("path", "reason"), HOSTILE)
def test_hostile_path(path, reason):
    with pytest.raises(ValueError, match=reason):
        check_path(path)


@pytest.mark.parametrize(
    "path", ["a", "a/b.json", "größe", "...", "a..b", "model-00001-of-2.bin.json"]
)
def test_harmless_path(path):
    check_path(path)


@pytest.mark.parametrize(
    "paths", [["a", "A"], ["straße", "STRASSE"], ["e\u0301", "é"], ["a", "A/b"]]
)
def test_collisions(paths):
    with pytest.raises(ValueError, match=r"only in case|a file and a folder"):
        check_collisions(paths)


def hostile_manifest(files: list[dict[str, object]]) -> bytes:
    producer = {"stage": "s", "code_version": "1", "config": {}, "seed": 0, "versions": {}}
    value = {"format": 1, "kind": "data", "files": files, "parents": {}, "metrics": {}}
    return json.dumps({**value, "producer": producer}).encode()


def entry(path: str) -> dict[str, object]:
    return {"path": path, "sha256": sha256_bytes(b"evil"), "size": 4}


@pytest.mark.parametrize(
    "files",
    [
        *([entry(path)] for path, _ in HOSTILE if "\ud800" not in path),
        [],
        [entry("a"), entry("A")],
        [entry("b"), entry("a")],
        [entry("a"), entry("a/b")],
        [{**entry("a"), "sha256": "../../../etc/passwd"}],
        [{**entry("a"), "size": -1}],
        [{**entry("a"), "mode": 511}],
    ],
)
def test_hostile_manifest_is_not_fetched(folder_place, files, tmp_path):
    """The digest is right: anybody who can write to the store can forge that."""
    place, store = folder_place, folder_place.open()
    data = hostile_manifest(files)
    evil = sha256_bytes(b"evil")
    place.write(f"blobs/sha256/{evil[:2]}/{evil}", b"evil")
    place.write(f"manifests/{sha256_bytes(data)}.json", data)
    before = {path for path in tmp_path.rglob("*") if "the store" not in path.parts}
    with pytest.raises(ArtifactCorrupt, match="not a manifest this version trusts") as caught:
        store.fetch(sha256_bytes(data))
    assert "\n" not in str(caught.value)
    assert {path for path in tmp_path.rglob("*") if "the store" not in path.parts} == before


@pytest.mark.parametrize(
    "name", ["a\\b.json", "weights.bin", "model.PT", "a\nb", "C:x", os.fsdecode(b"a\xffb")]
)
def test_publish_refuses_names(folder_place, folder, producer, name):
    place, store = folder_place, folder_place.open()
    (folder / name).write_text("x")
    with pytest.raises(PublishError, match="can't publish"):
        publish(store, folder, producer)
    assert place.objects() == {}


def test_publish_refuses_case_twins(place, store, folder, producer):
    (folder / "Config.json").write_text("x")
    with pytest.raises(PublishError, match="differ only in case"):
        publish(store, folder, producer)
    assert place.objects() == {}


@pytest.mark.parametrize("target", ["config.json", "model", "/etc/passwd", "nowhere"])
def test_publish_refuses_symbolic_links(folder_place, folder, producer, target):
    place, store = folder_place, folder_place.open()
    (folder / "model" / "link").symlink_to(target)
    with pytest.raises(PublishError, match="symbolic link"):
        publish(store, folder, producer)
    assert place.objects() == {}


def test_publish_refuses_a_pipe(place, store, folder, producer):
    os.mkfifo(folder / "pipe")
    with pytest.raises(PublishError, match="no regular file"):
        publish(store, folder, producer)
    assert place.objects() == {}


@pytest.mark.parametrize(
    ("kind", "metrics", "reason"),
    [
        ("data", {"loss": float("nan")}, "metrics.loss"),
        ("data", {"loss": float("inf")}, "metrics.loss"),
        ("../data", {}, "kind"),
        ("", {}, "kind"),
    ],
)
def test_publish_refuses_arguments(folder_place, folder, producer, kind, metrics, reason):
    place, store = folder_place, folder_place.open()
    with pytest.raises(PublishError, match=reason):
        store.publish(folder, kind, parents={}, producer=producer, metrics=metrics)
    assert place.objects() == {}


def test_publish_refuses_a_config_that_is_no_json(place, store, folder, producer):
    for bad in (float("nan"), "a\ud800"):
        broken = producer.model_copy(update={"config": {"x": bad}})
        with pytest.raises(PublishError, match="can't publish"):
            publish(store, folder, broken)
    assert place.objects() == {}


def test_publish_refuses_a_huge_manifest(place, store, folder, producer, monkeypatch):
    monkeypatch.setattr(manifest, "MAX_MANIFEST_BYTES", 500)
    with pytest.raises(PublishError, match="more than 500; publish fewer files"):
        publish(store, folder, producer)
    assert place.objects() == {}


def test_too_many_files(folder_place, folder, producer, tmp_path, monkeypatch):
    """100,001 files: too many for a manifest, which would also be too long to read."""
    data = hostile_manifest([entry(f"{number:06}") for number in range(manifest.MAX_FILES + 1)])
    with pytest.raises(ValueError, match="at most 100000 items"):
        manifest.Manifest.model_validate_json(data)
    place, store = folder_place, folder_place.open()
    place.write(f"manifests/{sha256_bytes(data)}.json", data)
    with pytest.raises(ArtifactCorrupt, match="is larger than"):
        store.fetch(sha256_bytes(data))
    assert not (tmp_path / "cache").exists()
    place.remove(f"manifests/{sha256_bytes(data)}.json")
    monkeypatch.setattr(publish_module, "MAX_FILES", 3)
    for name in "abcd":
        (folder / name).write_text(name)
    with pytest.raises(PublishError, match="1 to 3 are allowed"):
        publish(store, folder, producer)
    assert place.objects() == {}


def test_file_that_vanishes_while_published(place, store, folder, producer, monkeypatch):
    real = publish_module.scan
    monkeypatch.setattr(publish_module, "scan", lambda f: {**real(f), "vanished.txt": 3})
    with pytest.raises(PublishError, match=r"vanished\.txt changed"):
        publish(store, folder, producer)
    assert not [key for key in place.objects() if key.startswith("manifests/")]
