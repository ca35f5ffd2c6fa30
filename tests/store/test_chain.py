"""Failures of every provider of the AWS chain: one line that names it, and no secret."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from rlhf.config.pipeline import StoreConfig
from rlhf.errors import StoreConfigError, StoreError
from rlhf.store import open_store
from tests.store.answers import SECRET, Answer, answering, error, is_one_line_with_a_cure

ROLE = "arn:aws:iam::123456789012:role/training"


@pytest.fixture
def chain(tmp_path, monkeypatch) -> Path:
    """Begin without any credentials; returns the AWS configuration file."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    config = tmp_path / "config"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return config


@pytest.fixture
def server():
    with answering() as answer:
        yield answer


def problem(tmp_path: Path, *parts: str, profile: str | None = None) -> StoreError:
    options = StoreConfig(endpoint_url="http://127.0.0.1:9", profile=profile)
    with pytest.raises(StoreError) as caught:
        open_store("s3://bucket/p", options=options, cache_dir=tmp_path).history.names()
    message = str(caught.value)
    assert message.startswith("s3://bucket/p: can't ")
    is_one_line_with_a_cure(message, *parts)
    return caught.value


SSO = """
[profile work]
sso_start_url = https://example.awsapps.com/start
sso_region = us-east-1
sso_account_id = 123456789012
sso_role_name = training
"""
SESSION = """
[profile work]
sso_session = ours
sso_account_id = 123456789012
sso_role_name = training
[sso-session ours]
sso_start_url = https://example.awsapps.com/start
sso_region = us-east-1
sso_registration_scopes = sso:account:access
"""
LOOP = """
[profile work]
role_arn = {role}
source_profile = other
[profile other]
role_arn = {role}
source_profile = work
"""


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (SSO, ("SSO session has expired", "run `aws sso login --profile work`")),
        (SESSION, ("SSO session has expired", "run `aws sso login --profile work`")),
        (LOOP.format(role=ROLE), ("Infinite loop", "check the AWS configuration")),
        (f"[profile work]\nrole_arn = {ROLE}\nsource_profile = none", ("none", "check the AWS")),
        (f"[profile work]\nrole_arn = {ROLE}\ncredential_source = X", ("X", "check the AWS")),
        (
            f"[profile work]\nrole_arn = {ROLE}\nweb_identity_token_file = /nowhere/token",
            ("'/nowhere/token': No such file", "web_identity_token_file"),
        ),
        ("[profile work]\naws_access_key_id = key", ("lack aws_secret_access_key",)),
        (
            "[profile work]\ncredential_process = /nowhere/program",
            ("'/nowhere/program': No such file", "credential_process"),
        ),
        ("[profile other]\nregion = eu", ("no AWS profile 'work'", "store_options.profile")),
        ("[[[nonsense", ("Unable to parse", "check the AWS configuration")),
    ],
    ids=range(10),
)
def test_profiles(chain, tmp_path, text, parts):
    chain.write_text(text)
    assert isinstance(problem(tmp_path, *parts, profile="work"), StoreConfigError)


@pytest.mark.parametrize(
    "code",
    [
        f"import sys; sys.exit('{SECRET}')",
        f"print('{SECRET}')",
        f"print('[\"{SECRET}\"]')",
        "print('{\"Version\": 2}')",
        f'print(\'{{"Version": 1, "SecretAccessKey": "{SECRET}"}}\')',
        "import os; os.write(1, bytes([255]))",
    ],
    ids=range(6),
)
def test_programs(chain, tmp_path, code):
    """What a program prints may be a key: it is not repeated."""
    program = tmp_path / "program.py"
    program.write_text(code)
    chain.write_text(f"[default]\ncredential_process = {sys.executable} {program}")
    assert isinstance(problem(tmp_path, "AWS"), StoreConfigError)


def test_token_of_a_service_account_that_is_not_mounted(chain, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ROLE_ARN", ROLE)
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/none/token")
    parts = ("AWS_WEB_IDENTITY_TOKEN_FILE = '/var/run/none/token': No such file", "IRSA")
    assert isinstance(problem(tmp_path, *parts), StoreConfigError)


@pytest.mark.parametrize(
    ("status", "code", "part"),
    [
        (403, "AccessDenied", "trust policy"),
        (400, "ExpiredTokenException", "the token has expired"),
        (400, "InvalidIdentityToken", "trust policy"),
        (503, "ServiceUnavailable", "try again later"),
    ],
)
def test_role_that_is_refused(chain, tmp_path, monkeypatch, server: Answer, status, code, part):
    (tmp_path / "token").write_text(SECRET)
    monkeypatch.setenv("AWS_ROLE_ARN", ROLE)
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", server.endpoint)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    server.status, server.body = status, f"<ErrorResponse>{error(code, SECRET)}</ErrorResponse>"
    caught = problem(
        tmp_path, f"refused AssumeRoleWithWebIdentity for the credentials ({code})", part
    )
    assert caught.retriable is (status == 503)


def test_service_of_tokens_that_does_not_answer(chain, tmp_path, monkeypatch):
    (tmp_path / "token").write_text(SECRET)
    monkeypatch.setenv("AWS_ROLE_ARN", ROLE)
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    assert problem(tmp_path, "no answer from 127.0.0.1", "check the network").retriable


@pytest.mark.parametrize("body", ["<html>", "{}", '{"AccessKeyId": 1}'], ids=range(3))
@pytest.mark.parametrize("status", [200, 404])
def test_container_without_credentials(chain, tmp_path, monkeypatch, server, status, body):
    monkeypatch.setattr("botocore.utils.ContainerMetadataFetcher.SLEEP_TIME", 0)
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{server.endpoint}/role")
    server.status, server.body = status, body
    assert isinstance(problem(tmp_path, "credentials"), StoreConfigError)


def test_token_of_a_pod_that_is_not_mounted(chain, tmp_path, monkeypatch, server):
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{server.endpoint}/role")
    monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", "/nowhere/token")
    problem(tmp_path, "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE = '/nowhere/token': No such file")


def test_half_of_a_pair_of_keys(chain, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    problem(tmp_path, "AWS credentials (env) lack AWS_SECRET_ACCESS_KEY")


@pytest.mark.parametrize("endpoint", ["nonsense", "http://127.0.0.1:9"])
def test_machine_without_metadata(chain, tmp_path, monkeypatch, endpoint):
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", endpoint)
    assert isinstance(problem(tmp_path, "AWS"), StoreConfigError)


def test_renewal_that_fails_in_the_middle(chain, tmp_path, monkeypatch, server):
    """Credentials whose program fails once they have expired."""
    program = tmp_path / "program.py"
    program.write_text(
        "import json, datetime\n"
        "now = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=-5)\n"
        f"print(json.dumps({{'Version': 1, 'AccessKeyId': 'k', 'SecretAccessKey': '{SECRET}',"
        " 'SessionToken': 't', 'Expiration': now.isoformat()}))\n"
    )
    chain.write_text(f"[default]\ncredential_process = {sys.executable} {program}")
    assert isinstance(problem(tmp_path, "AWS credentials"), StoreConfigError)
