"""Every refusal, redirect and strange answer: one line with cause and cure, quickly, no secret."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator

import pytest
from botocore.exceptions import ClientError
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.config.pipeline import StoreConfig
from rlhf.errors import StoreConfigError, StoreError
from rlhf.store.objects import Backend, Sink
from rlhf.store.s3 import S3Backend
from rlhf.store.s3_errors import refused
from tests.examples import examples
from tests.store.answers import SECRET, Answer, answering, error, is_one_line_with_a_cure

HTML = "<html><body>Sign in</body></html>"


@pytest.fixture(scope="module")
def server():
    with answering() as answer:
        yield answer


@pytest.fixture
def backend(server: Answer, monkeypatch) -> Iterator[S3Backend]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    backend = S3Backend("s3://bucket/p", StoreConfig(endpoint_url=server.endpoint), attempts=1)
    yield backend
    backend.close()


def give(server: Answer, status: int, body: str = "", **headers: str) -> None:
    server.status, server.body, server.requests = status, body, []
    server.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def works(backend: Backend, tmp_path) -> dict[str, Callable[[], object]]:
    """Return every kind of request."""

    def get() -> None:
        with (tmp_path / "got").open("wb") as file:
            backend.get_file("k", Sink(file, lambda _: None))

    return {
        "put": lambda: backend.put("k", b"x"),
        "put_new": lambda: backend.put_new("k", b"x"),
        "get_bytes": lambda: backend.get_bytes("k", 10_000),
        "get_file": get,
        "find": lambda: backend.find("k"),
        "list": lambda: backend.list(""),
        "delete": lambda: backend.delete(["k"]),
        "sweep": lambda: backend.sweep(0),
    }


def complaint(work: Callable[[], object], *parts: str) -> StoreError:
    with pytest.raises(StoreError) as caught:
        work()
    is_one_line_with_a_cure(str(caught.value), *parts)
    return caught.value


@pytest.mark.parametrize(
    ("status", "body", "parts"),
    [
        (403, error("QuotaExceeded"), ("is full", "QuotaExceeded", "rlhf artifacts gc")),
        (400, error("XMinioAdminBucketQuotaExceeded"), ("is full", "raise the quota")),
        (507, error("XMinioStorageFull"), ("is full", "make room")),
        (507, "", ("is full", "make room")),
        (403, error("AccessDenied", "Cannot upload files, storage cap exceeded."), ("is full",)),
        (403, error("AccessDenied"), ("access denied", "check the AWS credentials")),
        (403, error("InvalidObjectState"), ("archived", "restore-object")),
        (403, error("AccountProblem"), ("account", "provider")),
        (403, error("RequestTimeTooSkewed"), ("clock", "NTP")),
        (403, error("RequestExpired"), ("clock", "NTP")),
        (401, error("Unauthorized"), ("access denied", "check the AWS credentials")),
        (
            400,
            error("AuthorizationHeaderMalformed", Region="eu-west-1"),
            ("is in region eu-west-1",),
        ),
        (400, error("IllegalLocationConstraintException"), ("endpoint_url and region",)),
        (400, error("InvalidBucketName"), ("no such name", "correct bucket and prefix")),
        (400, error("KMS.DisabledException"), ("encryption key", "sse_kms_key_id")),
        (400, error("KMS.NotFoundException"), ("encryption key", "sse_kms_key_id")),
        (413, HTML, ("no body this large", "64 MB")),
        (400, error("EntityTooLarge"), ("no body this large", "64 MB")),
        (405, error("MethodNotAllowed"), ("no such request", "S3 API itself")),
        (405, HTML, ("no such request", "S3 API itself")),
        (404, HTML, ("no such address (404)", "S3 API itself")),
        (501, error("NotImplemented"), ("no such function", "another server")),
        (407, HTML, ("proxy", "HTTPS_PROXY")),
    ],
)
def test_refusals_name_their_cause(backend, server, status, body, parts):
    give(server, status, body)
    caught = complaint(lambda: backend.put("k", b"x"), "s3://bucket/p: can't write k: ", *parts)
    assert isinstance(caught, StoreConfigError) is ("is full" not in parts)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (503, "SlowDown"),
        (503, "ServiceUnavailable"),
        (429, "TooManyRequests"),
        (400, "RequestTimeout"),
        (400, "ThrottlingException"),
        (500, "InternalError"),
        (509, "BandwidthLimitExceeded"),
        (502, ""),
        (409, "OperationAborted"),
    ],
)
def test_what_may_pass_is_worth_a_retry(backend, server, status, code):
    give(server, status, error(code) if code else HTML)
    caught = complaint(lambda: backend.list(""), code or str(status), "again")
    assert caught.retriable


@pytest.mark.parametrize("status", [300, 301, 302, 307, 308])
@pytest.mark.parametrize("location", ["", "https://s3.example.org/x?token=" + SECRET, "/here"])
def test_redirects_end_at_once(backend, server, tmp_path, status, location):
    """boto3 asks for the bucket's region by a request that is redirected too, and again …"""
    give(server, status, HTML, **({"Location": location} if location else {}))
    to = "set endpoint_url to https://s3.example.org" if "://" in location else "check endpoint_url"
    for name, work in works(backend, tmp_path).items():
        server.requests.clear()
        assert isinstance(complaint(work, f"({status})", to), StoreConfigError), name
        assert len(server.requests) < 6, name


def test_a_bucket_in_another_region_is_named(backend, server, tmp_path):
    give(server, 301, error("PermanentRedirect"), **{"x-amz-bucket-region": "eu-central-1"})
    for work in works(backend, tmp_path).values():
        complaint(work, "is in region eu-central-1", "store_options.region")


@pytest.mark.parametrize("body", [HTML, "", "{}", "<Error/>", "text", "<a>" * 500], ids=range(6))
def test_what_is_no_s3_server_is_no_empty_store(backend, server, tmp_path, body):
    """An empty listing would be a store without artifacts: a wrong answer, and no error."""
    give(server, 200, body)
    for name, work in works(backend, tmp_path).items():
        if name in ("put", "put_new", "get_file", "find", "list"):
            complaint(work, server.endpoint if body == HTML else "")


@pytest.mark.parametrize("status", [304, 412])
def test_a_condition_that_failed(backend, server, status):
    """Some servers say 304, as to a GET; the object is not this writer's."""
    give(server, status)
    complaint(lambda: backend.put("k", b"x"))
    assert complaint(lambda: backend.put_new("k", b"x"), f"{status}")


def deleted(*codes: str) -> str:
    """Return S3's answer to the removal of several objects, with an error for each of these."""
    failed = "".join(f"<Error><Key>p/k</Key><Code>{code}</Code></Error>" for code in codes)
    return f"<DeleteResult>{failed}</DeleteResult>"


@pytest.mark.parametrize("code", ["NoSuchKey", "404", "NotFound"])
def test_absent_objects_are_removed_whoever_lists_them_as_errors(backend, server, code):
    """Two collectors remove the same objects; S3 answers that it did, some servers list them."""
    give(server, 200, deleted(code, code))
    backend.delete(["k", "l"])
    assert server.requests == ["POST"]
    give(server, 404, error(code))
    backend._delete_one("k")


@pytest.mark.parametrize("code", ["AccessDenied", "InternalError", "ObjectLocked"])
def test_an_object_that_stays_is_an_error_among_absent_ones(backend, server, code):
    give(server, 200, deleted("NoSuchKey", code))
    complaint(lambda: backend.delete(["k", "l"]), code)


CODES = st.one_of(
    st.sampled_from(["AccessDenied", "InvalidRequest", "NoSuchUpload", "NotImplemented"]),
    st.sampled_from(["MissingContentMD5", "QuotaExceeded", "SlowDown", "KMS.Disabled", SECRET]),
    st.text(max_size=80),
    st.text(string.ascii_letters, min_size=1, max_size=80),
    st.none(),
)


@given(
    status=st.one_of(st.integers(300, 599), st.sampled_from([400, 401, 403, 404, 501, 503])),
    code=CODES,
    text=st.text(max_size=200) | st.just(f"Authorization: {SECRET}"),
    headers=st.dictionaries(
        st.sampled_from(["location", "x-amz-bucket-region"]),
        st.text(max_size=300) | st.just(f"https://x:{SECRET}@h/"),
    ),
    reading=st.booleans(),
)
@settings(max_examples=examples(200), deadline=None)
def test_any_refusal_is_one_line(status, code, text, headers, reading):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        answer = {
            "Error": {"Code": code, "Message": text} if code is not None else {},
            "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": headers},
        }
        caught = refused(
            "s3://b: can't read k", "s3://b", "k", "b", ClientError(answer, "x"), reading=reading
        )
    if code not in ("NoSuchKey",) and "there is no k" not in str(caught):
        is_one_line_with_a_cure(str(caught))
    assert SECRET not in str(caught)
    assert caught.retriable is (not isinstance(caught, StoreConfigError)) or "no k" in str(caught)
