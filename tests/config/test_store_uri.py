"""URIs of stores are taken literally: nothing of them is dropped in silence."""

from __future__ import annotations

import string
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rlhf.config import PipelineConfig
from rlhf.config.pipeline import StoreConfig
from rlhf.config.store_uri import parse_store_uri
from rlhf.errors import StoreConfigError
from rlhf.store.store import backend_of
from tests.examples import examples

MARKS = "?#%&=;:@/\\ .~\t\n\r\0[]é"


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("s3://bucket/p?region=eu", "holds '?'; options stand in store_options"),
        ("s3://bucket/p#x", "holds '#'; options stand in store_options"),
        ("s3://bucket?x", "holds '?'; options stand in store_options"),
        ("file:///a?b", "holds '?'; write %3F for it, or a plain path"),
        ("file:///a#b", "holds '#'; write %23 for it, or a plain path"),
        ("file:///a\nb", "holds a control character"),
        ("file:///a%00b", "holds a control character"),
        ("s3://buck\tet/x", "holds a control character"),
        ("s3://bucket/a/../b", "empty, . or .."),
        ("s3://bucket/a//b", "empty, . or .."),
        ("s3://bucket:9000/a", "names a bucket that can't be one"),
        (" s3://bucket/a", "scheme ' s3' is not supported"),
        ("S3://bucket/a", "scheme 'S3' is not supported"),
        ("s3://key:hunter2@bucket/a", "holds user info"),
        ("s3://key:hunter2@bucket?x", "holds user info"),
        ("a\0b", "names no folder"),
        ("s3:/bucket/a", "begins like a URI and has no ://"),
        ("file:/a", "begins like a URI and has no ://"),
    ],
)
def test_what_would_be_dropped_is_refused(uri, reason):
    with pytest.raises(ValidationError) as caught:
        PipelineConfig(store=uri)
    assert reason in str(caught.value)
    with pytest.raises(StoreConfigError) as said:
        backend_of(uri, StoreConfig())
    assert reason in str(said.value)
    assert "hunter2" not in str(said.value)


@given(st.text(string.ascii_letters + MARKS, max_size=30), st.sampled_from(["s3", "file", ""]))
@example("b/~x", "file")
@example("b//x", "s3")
@example("~x", "")
@settings(max_examples=examples(300), deadline=None)
def test_whatever_is_accepted_is_taken_whole(text, scheme):
    uri = {"s3": "s3://", "file": "file:///", "": ""}[scheme] + text
    try:
        place = parse_store_uri(uri)
    except ValueError:
        return
    if place.folder is None:
        assert f"s3://{place.bucket}/{place.prefix}".rstrip("/") == uri.rstrip("/")
    elif place.is_literal:
        assert place.folder == Path(f"/{text}") or "%" in text
    else:
        assert place.folder == Path(uri)


def test_folders_are_the_same_by_path_and_by_uri(tmp_path):
    for name in ("a?b", "a#b", "a%41", "a b", "é", "~x"):
        folder = tmp_path / name
        plain, uri = (backend_of(u, StoreConfig()).uri for u in (str(folder), folder.as_uri()))
        assert plain == uri == f"file://{quote(str(folder))}"


@pytest.mark.parametrize(
    "url",
    ["nonsense", "ftp://host", "http://", "https://host/x?y=1", "https://host#x", "http://h:99999",
     "http://[x", "http://a b", "http://h\\x", "http://key:hunter2@host", "host:9000"],
)  # fmt: skip
def test_endpoints(url):
    with pytest.raises(ValidationError) as caught:
        StoreConfig(endpoint_url=url)
    assert "endpoint_url" in str(caught.value)


@pytest.mark.parametrize("url", ["http://host:9000", "https://h.example.org/s3", "http://[::1]:1"])
def test_good_endpoints(url):
    assert StoreConfig(endpoint_url=url).endpoint_url == url
