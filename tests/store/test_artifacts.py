"""Publish, fetch and find artifacts."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest
from pydantic import ValidationError

from rlhf.errors import ArtifactCorrupt, ArtifactMissing
from rlhf.store import ArtifactRef, Producer, PublishError, Store, open_store
from rlhf.store.manifest import FileEntry, manifest_key, sha256_bytes
from tests.store.conftest import Place


def put(store: Store, folder: Path, producer: Producer, **parents: ArtifactRef) -> ArtifactRef:
    return store.publish(
        folder, "policy", parents=parents, producer=producer, metrics={"loss": 1.5, "steps": 3}
    )


def blobs(place: Place) -> list[str]:
    return [key for key in place.objects() if key.startswith("blobs/")]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def refuse_message(store: Store, ref: ArtifactRef) -> str:
    with pytest.raises(ArtifactCorrupt) as caught:
        store.fetch(ref)
    message = str(caught.value)
    assert "\n" not in message
    assert store.uri in message
    assert "delete" in message
    return message


def test_round_trip(each_place, each_store, folder, producer):
    ref = put(each_store, folder, producer)
    assert each_store.exists(ref)
    assert contents(each_store.fetch(ref)) == contents(folder)
    # 10240 + 10240 + 32 ("größe" has two letters of two bytes) + 0.
    assert ref.size == 10240 * 2 + len((folder / "config.json").read_bytes())
    assert ref.uri == f"{each_store.uri}/manifests/{ref.digest}.json"
    assert ref.short == ref.digest[:12]
    # Four files, two of them equal: three blobs.
    assert len(blobs(each_place)) == 3
    manifest = each_store.manifest(ref)
    assert manifest.metrics == {"loss": 1.5, "steps": 3}
    assert manifest.producer == producer
    assert [entry.path for entry in manifest.files] == [
        "config.json",
        "empty.txt",
        "model/copy.safetensors",
        "model/weights.safetensors",
    ]


def test_reference_survives_json(store, folder, producer):
    ref = put(store, folder, producer)
    assert ArtifactRef.model_validate_json(ref.model_dump_json()) == ref
    assert len(ref.model_dump_json()) < 400


def test_same_bytes_same_digest_on_every_backend(
    each_place, each_store, folder, producer, tmp_path
):
    other = open_store(str(tmp_path / "elsewhere"), cache_dir=tmp_path / "cache2")
    first, second = put(each_store, folder, producer), put(other, folder, producer)
    assert first.model_copy(update={"uri": ""}) == second.model_copy(update={"uri": ""})
    assert first.uri != second.uri
    changed = producer.model_copy(update={"seed": 8})
    assert put(each_store, folder, changed).digest != first.digest


def test_digest_is_pinned(tmp_path):
    """The canonical bytes are a contract: a change orphans all stored references."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.json").write_text("{}")
    producer = Producer(stage="s", code_version="1", config={"x": 1.0}, seed=0, versions={})
    store = open_store(str(tmp_path / "store"), cache_dir=tmp_path / "cache")
    ref = store.publish(tmp_path / "in", "data", parents={}, producer=producer, metrics={"m": None})
    # printf '{}' | sha256sum = 44136fa3...
    expected = (
        '{"files":[{"path":"a.json","sha256":"44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310'
        'c060f61caaff8a","size":2}],"format":1,"kind":"data","metrics":{"m":null},"parents":{},'
        # printf '{"x":1.0}' | sha256sum
        '"producer":{"code_version":"1","config":{"x":1.0},"config_digest":'
        '"bf32f56236899e13ef54db875d136c6cbcc65244464829c54911aa9069b0ae25",'
        '"dirty":null,"lock_digest":null,"seed":0,"stage":"s","versions":{}}}'
    )
    stored = tmp_path / "store" / "manifests" / f"{ref.digest}.json"
    assert stored.read_text(encoding="utf-8") == expected


def test_publishing_again_writes_nothing(place, store, folder, producer):
    first = put(store, folder, producer)
    before = place.objects()
    assert put(place.open(), folder, producer) == first
    assert place.objects() == before


def test_manifest_holds_no_path_host_time_or_credential(each_place, each_store, folder, producer):
    ref = put(each_store, folder, producer)
    text = each_place.read(f"manifests/{ref.digest}.json").decode()
    assert json.loads(text).keys() == {
        "files", "format", "kind", "metrics", "parents", "producer"
    }  # fmt: skip
    assert str(folder) not in text
    assert "/work" not in text
    assert "/tmp" not in text
    assert socket.gethostname() not in text
    assert "ACCESSKEY" not in text
    assert not re.search(r"20\d\d-\d\d", text)


def test_layout(each_place, each_store, folder, producer):
    put(each_store, folder, producer)
    each_store.history.append("stages/abc", {"x": 1})
    shapes = (
        r"blobs/sha256/([0-9a-f]{2})/\1[0-9a-f]{62}",
        r"manifests/[0-9a-f]{64}\.json",
        r"refs/stages/abc/000001\.json",
    )
    keys = each_place.objects()
    assert all(any(re.fullmatch(shape, key) for shape in shapes) for key in keys), keys
    assert len(keys) == 5


def test_flipped_blob(place, store, folder, producer):
    ref = put(store, folder, producer)
    entry = store.manifest(ref).files[-1]
    key = f"blobs/sha256/{entry.sha256[:2]}/{entry.sha256}"
    data = bytearray(place.read(key))
    data[5000] ^= 1
    place.write(key, bytes(data))
    assert key in refuse_message(store, ref)
    # Same size: only reading the bytes shows it.
    assert store.exists(ref)


def test_truncated_blob_and_its_cure(place, store, folder, producer):
    ref = put(store, folder, producer)
    entry = store.manifest(ref).files[-1]
    key = f"blobs/sha256/{entry.sha256[:2]}/{entry.sha256}"
    place.write(key, place.read(key)[:-1])
    assert "10239 bytes instead of 10240" in refuse_message(store, ref)
    assert not store.exists(ref)
    put(store, folder, producer)
    assert store.exists(ref)
    assert contents(store.fetch(ref)) == contents(folder)


def test_deleted_blob(place, store, folder, producer):
    ref = put(store, folder, producer)
    key = blobs(place)[0]
    place.remove(key)
    assert not store.exists(ref)
    with pytest.raises(ArtifactMissing, match=key):
        store.fetch(ref)


def test_deleted_manifest(place, store, folder, producer):
    ref = put(store, folder, producer)
    store.delete(ref)
    assert not store.exists(ref)
    with pytest.raises(ArtifactMissing, match=ref.digest):
        store.fetch(ref)
    assert len(blobs(place)) == 3
    store.delete(ref)


def test_forged_manifest(place, store, folder, producer):
    ref = put(store, folder, producer)
    key = f"manifests/{ref.digest}.json"
    place.write(key, place.read(key).replace(b'"seed":7', b'"seed":8'))
    assert key in refuse_message(store, ref)
    assert not store.exists(ref)
    with pytest.raises(ArtifactCorrupt, match="delete"):
        put(store, folder, producer)


def test_huge_manifest_is_not_read(place, store):
    digest = "a" * 64
    place.write(f"manifests/{digest}.json", b" " * (5 * 1024 * 1024 + 1))
    with pytest.raises(ArtifactCorrupt, match="larger than"):
        store.manifest(digest)


def test_resolve(store, folder, producer):
    ref = put(store, folder, producer)
    for text in (ref.digest, ref.digest[:6], ref.short, f"artifact:{ref.digest}", ref.uri):
        assert store.resolve(text) == ref
    for text, reason in (
        (ref.digest[:5], "6 to 64"),
        ("my-model", "names no artifact"),
        ("", "names no artifact"),
        ("f" * 64, "no manifests"),
        (ref.uri.replace(store.uri, "s3://elsewhere"), "not in"),
    ):
        with pytest.raises(ArtifactMissing, match=reason):
            store.resolve(text)
    missing = "000000" if ref.digest[:6] != "000000" else "111111"
    with pytest.raises(ArtifactMissing, match="there is no artifact"):
        store.resolve(missing)


def test_ambiguous_beginning(place, store):
    for digit in "bc":
        place.write(f"manifests/{'a' * 63}{digit}.json", b"{}")
    with pytest.raises(ArtifactMissing, match=r"ambiguous .*give more digits"):
        store.resolve("aaaaaa")


def test_list_and_lineage(place, store, folder, producer):
    base = put(store, folder, producer)
    sft = put(store, folder, producer, base=base)
    reward = put(store, folder, producer, base=sft, data=base)
    policy = put(store, folder, producer, reference=sft, reward=reward)
    listed = store.list()
    by_digest = sorted([base, sft, reward, policy], key=lambda ref: ref.digest)
    assert [artifact.ref for artifact in listed] == by_digest
    # policy -> reference = sft -> base; policy -> reward -> (base = sft, already walked; data).
    assert store.lineage(policy) == [
        (0, "self", policy),
        (1, "reference", sft),
        (2, "base", base),
        (1, "reward", reward),
        (2, "base", sft),
        (2, "data", base),
    ]


def test_a_chain_of_retrainings_may_be_longer_than_pythons_stack(place, store, folder, producer):
    (folder / "model" / "copy.safetensors").unlink()
    ref = put(store, folder, producer)
    manifest = store.manifest(ref)
    for _ in range(1100):
        data = manifest.model_copy(update={"parents": {"base": ref.digest}}).encode()
        digest = sha256_bytes(data)
        place.write(manifest_key(digest), data)
        ref = ArtifactRef(kind=ref.kind, digest=digest, size=ref.size, uri=ref.uri)
    assert [depth for depth, *_ in store.lineage(ref)] == list(range(1101))


@pytest.mark.parametrize("change", [{"seed": 10**30}, {"seed": -(2**63) - 1}])
def test_numbers_of_a_manifest_fit_64_bits(producer, change):
    with pytest.raises(ValidationError, match="seed"):
        Producer(**{**producer.model_dump(), **change})
    with pytest.raises(ValidationError, match="size"):
        FileEntry(path="a", sha256="0" * 64, size=10**30)


def test_list_while_another_deletes(place, store, folder, producer):
    ref = put(store, folder, producer)
    assert store._listed("0" * 64, 0.0) is None
    assert [artifact.ref for artifact in store.list()] == [ref]


def test_list_ignores_what_is_no_manifest(place, store):
    place.write("manifests/readme.txt", b"hello")
    assert store.list() == []


def test_include(place, store, folder, producer):
    ref = put(store, folder, producer)
    got = store.fetch(ref, include=["*.json", "model/w*"])
    assert set(contents(got)) == {"config.json", "model/weights.safetensors"}
    with pytest.raises(ArtifactMissing, match=r"matches \*\.onnx"):
        store.fetch(ref, include=["*.onnx"])
    whole = store.fetch(ref)
    assert whole != got
    assert contents(whole) == contents(folder)
    # What is here already is not stored twice.
    assert (whole / "config.json").samefile(got / "config.json")


def test_not_a_digest(store):
    with pytest.raises(ArtifactMissing, match="no digest"):
        store.manifest("../../etc/passwd")


def test_publish_refuses_what_is_no_folder(place, store, folder, producer):
    with pytest.raises(PublishError, match="not a folder"):
        put(store, folder / "config.json", producer)
    (folder / "none").mkdir()
    with pytest.raises(PublishError, match="0 files"):
        put(store, folder / "none", producer)
    assert place.objects() == {}
