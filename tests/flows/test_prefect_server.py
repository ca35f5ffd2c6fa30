"""Errors of Prefect's server reach the user in one line that says what the server answered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flows.champions import approve
from flows.preflight import preflight
from flows.runs import runs, status
from rlhf.errors import ConfigError
from tasks.prefect_server import (
    IN_FILES,
    LEASE_SETTING,
    greet_server,
    lease_advice,
    server_error,
)


@pytest.fixture
def failing():
    """A server that answers every question but that for its version with one status and body."""
    answer: list[tuple[int, str]] = [(500, "")]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            version, no_token = (200, '"3.0.0"'), (404, "{}")
            usual = version if "version" in self.path else no_token
            self._send(*(answer[0] if answer[0][0] == 200 else usual))

        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._send(*answer[0])

        def _send(self, status, body):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/api"
    with temporary_settings({PREFECT_API_URL: url, PREFECT_CLIENT_MAX_RETRIES: 0}):
        yield answer
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("code", "body", "told"),
    [
        (500, {"exception_message": "Internal Server Error"}, ": Internal Server Error; its log"),
        (500, {"exception_message": "Integer exceeds\n 64-bit"}, ": Integer exceeds 64-bit; its"),
        (502, "<html>a proxy's page</html>", ": <html>a proxy's page</html>; its log"),
        (401, {"detail": "Unauthorized"}, ": Unauthorized; set PREFECT_API_AUTH_STRING"),
        (404, "", "; is PREFECT_API_URL the server's API?"),
        (422, {"detail": "x" * 5000}, "x…; correct what the answer names"),
        (500, "[" * 5000, "[…; its log"),
    ],
    ids=range(7),
)
def test_the_answer_is_told_in_one_line(code, body, told):
    request = httpx.Request("POST", "http://me:secret@host/api/flow_runs/filter")
    text = body if isinstance(body, str) else json.dumps(body)
    response = httpx.Response(code, text=text, request=request)
    line = server_error(httpx.HTTPStatusError("", request=request, response=response))
    assert f" answered {code} " in line
    assert " to POST /api/flow_runs/filter" in line
    assert told in line
    assert "secret" not in line
    assert "\n" not in line
    assert len(line) < 600


@pytest.mark.parametrize("command", ["runs", "status", "approve"])
def test_every_command_says_what_the_server_answered(failing, command):
    failing[0] = 500, json.dumps({"exception_message": "Integer exceeds 64-bit range"})
    commands = {"runs": runs, "status": lambda: status("x"), "approve": lambda: approve("x")}
    with pytest.raises(ConfigError, match=r"answered 500 .*: Integer exceeds 64-bit") as caught:
        commands[command]()
    assert "does not answer" not in str(caught.value)


@pytest.mark.parametrize(
    "body", ["", "<html>", "{}", "null", "[1, 2, 3]", '{"token": 1}', "[" * 50_000], ids=range(7)
)
def test_what_is_no_server_is_told_by_every_command(failing, body):
    """Its answers are read by Prefect's client, each in another way."""
    failing[0] = 200, body
    commands = (
        runs, preflight, lambda: status("x"), lambda: approve("x"), lambda: greet_server("x")
    )  # fmt: skip
    for command in commands:
        with pytest.raises(ConfigError, match=r"^[^\n]* is not Prefect's server; set PREFECT_API"):
            command()


def test_a_traceback_of_the_server_is_left_to_its_log(failing):
    failing[0] = 500, 'Traceback (most recent call last):\n File "x"\nBoom'
    with pytest.raises(ConfigError, match=r"answered 500 .* to POST \S+filter; its log names the"):
        runs()


@pytest.mark.parametrize(
    ("name", "value", "command"),
    [("PREFECT_LOGGING_LEVEL", "loud", "runs"), ("PREFECT_API_URL", "http://[::1", "champion"),
     ("PREFECT_API_URL", "http://\u202e/api", "runs")],
    ids=range(3),
)  # fmt: skip
def test_a_setting_that_prefect_refuses_is_named_in_one_line(name, value, command):
    """Prefect prints nine lines when it is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", command], env={**os.environ, name: value},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {name} = {value!a}: ")
    assert done.stderr.count("\n") == 1
    assert not done.stdout


def test_a_server_with_leases_in_memory_is_told_with_the_cure(rlhf):
    done = rlhf("preflight")  # the tests' own server has Prefect's defaults
    said = " ".join(done.stdout.split())
    assert done.returncode == 0, done.stderr
    assert f"warning: Prefect's server keeps concurrency leases in memory ({LEASE_SETTING}" in said
    assert f"start it with {LEASE_SETTING}={IN_FILES}" in said
    with get_client(sync_client=True) as client:
        assert lease_advice(client)


def test_a_server_that_hides_its_settings_is_not_blamed(failing):
    with get_client(sync_client=True) as client:
        assert lease_advice(client) is None  # answered 404, as Prefect Cloud does


def test_a_preflight_of_the_server_needs_one():
    with (
        temporary_settings(restore_defaults={PREFECT_API_URL}),
        pytest.raises(ConfigError, match="set PREFECT_API_URL"),
    ):
        preflight()
