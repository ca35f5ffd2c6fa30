"""The store over TLS; RLHF_TEST_TLS=1 runs all tests of the store over TLS."""

from __future__ import annotations

import pytest

from rlhf.config.pipeline import StoreConfig
from rlhf.store import open_store
from tests.store.conftest import use_tls
from tests.store.faulty import LARGE, complaint, make_folder
from tests.store.test_artifacts import contents, put

pytestmark = pytest.mark.s3


@pytest.fixture
def tls_place(s3_place, s3_server, monkeypatch):
    use_tls(s3_server, monkeypatch)
    return s3_place


def test_files_in_parts(tls_place, tmp_path, folder, producer):
    large = make_folder(tmp_path / "new", LARGE)
    store = tls_place.open()
    assert store._backend._client.meta.endpoint_url.startswith("https://")
    for each in (folder, large):
        assert contents(store.fetch(put(store, each, producer))) == contents(each)


def test_check_and_deletion(tls_place, folder, producer):
    """Deleting several keys needs a checksum, which Ceph must accept over TLS."""
    store = tls_place.open()
    store.check()
    put(store, folder, producer)
    store.retain([])
    assert tls_place.objects() == {}


def test_history_and_pins(tls_place, folder, producer):
    store = tls_place.open()
    ref = put(store, folder, producer)
    assert [store.history.append("a", {"n": n}) for n in range(2)] == [1, 2]
    assert store.history.entries("a") == [{"n": 0}, {"n": 1}]
    store.pins.add("best", ref)
    assert store.pins.by_name() == {"best": ref.digest}
    assert [artifact.ref for artifact in store.list()] == [ref]


def test_unknown_certificate_in_the_middle_of_a_run(tls_place, s3_server, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_CA_BUNDLE")
    store = tls_place.open()
    error = complaint(
        store.history.names, store.uri, "(TLS)", "set ca_bundle", s3_server.tls_endpoint
    )
    assert not error.retriable
    options = StoreConfig(ca_bundle=s3_server.ca_bundle)
    trusting = open_store(tls_place.uri, options=options, cache_dir=tmp_path / "c")
    assert trusting.history.names() == []


def test_plain_speech_to_a_tls_port(tls_place, s3_server, tmp_path):
    plain = StoreConfig(endpoint_url=s3_server.tls_endpoint.replace("https", "http"))
    store = open_store(tls_place.uri, options=plain, cache_dir=tmp_path / "c")
    complaint(store.history.names, store.uri)
