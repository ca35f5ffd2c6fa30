"""The remote component with a real local server: slow, failing, refusing."""

from __future__ import annotations

import json
import logging
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from rlhf.config import PPOConfig, RemoteComponent
from rlhf.environments import Reply, build_environment
from rlhf.environments.remote import ALLOWED, RemoteReward
from rlhf.errors import ConfigError, RewardServiceError, TrainingError, is_retriable

BATCH = [
    Reply("tea?", "good", 2, True, "yes", {"n": 1}),
    Reply("jar?", "é" * 3, 3, False),
    Reply("mug?", "", 0, False),
]


@pytest.fixture
def service():
    """A server whose answers come from a list of (status, body) or functions of the handler."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.answers, server.requests, server.over = [], [], threading.Event()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    thread.join()
    server.server_close()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, dict(self.headers), json.loads(body)))
        replies = json.loads(body)["replies"]
        answer = self.server.answers.pop(0) if self.server.answers else None
        if callable(answer):
            answer(self)
            return
        lengths = {"scores": [len(reply["response"]) for reply in replies]}
        status, text = answer or (200, json.dumps(lengths))
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        if status in (301, 307):
            self.send_header("Location", "/elsewhere")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


def reward(service, **options):
    url = f"http://127.0.0.1:{service.server_port}/score"
    quick = {"timeout_seconds": 60, "backoff_seconds": 0.01, "retries": 0}
    return RemoteReward(RemoteComponent(url=url, **(quick | options)), "helpful")


def fails(call, *args, kind=RewardServiceError) -> str:
    with pytest.raises(kind) as caught:
        call(*args)
    assert "component 'helpful'" in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_batch_is_posted_and_the_scores_come_back(service):
    assert reward(service)(BATCH) == [4, 3, 0]
    ((path, headers, body),) = service.requests
    assert path == "/score"
    assert headers["Content-Type"] == "application/json"
    assert "Authorization" not in headers
    assert body["replies"][0] == {
        "prompt": "tea?", "response": "good", "n_tokens": 2, "finished": True, "reference": "yes",
        "metadata": {"n": 1}, "group": 0, "reference_reply": None,
        "reference_finished": None,
    }  # fmt: skip


def test_in_parts(service):
    assert reward(service, batch_size=2)(BATCH) == [4, 3, 0]
    assert [len(body["replies"]) for _, _, body in service.requests] == [2, 1]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(service, status):
    service.answers = [(status, "")] * 2
    assert reward(service, retries=2)(BATCH) == [4, 3, 0]
    assert len(service.requests) == 3
    service.answers = [(status, "")] * 3
    text = fails(reward(service, retries=2), BATCH)
    assert f"it answered {status}, 3 times; see to the service, or set fallback" in text


@pytest.fixture
def clock(monkeypatch):
    """The component's own time, which passes when a test says so; its waits are noted."""
    clock = SimpleNamespace(now=100.0, waits=[])
    clock.monotonic, clock.sleep = lambda: clock.now, clock.waits.append
    monkeypatch.setattr(sys.modules[RemoteReward.__module__], "time", clock)
    return clock


def test_waiting_doubles(service, clock):
    service.answers = [(500, "")] * 3
    reward(service, retries=3, backoff_seconds=0.1)(BATCH)
    assert clock.waits == [0.1, 0.2, 0.4]


@pytest.mark.parametrize("status", [400, 401, 404, 307, 204])
def test_a_refusal_is_not_tried_again(service, status):
    service.answers = [(status, "")]
    text = fails(reward(service, retries=3, fallback=0), BATCH, kind=TrainingError)
    assert f"it answered {status}; correct the url, the token or the service" in text
    assert len(service.requests) == 1  # nor is a redirect followed


def slow(handler):
    handler.server.over.wait(60)


def dripping(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    try:
        for _ in range(600):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            handler.server.over.wait(0.1)
    except OSError:
        pass


@pytest.mark.parametrize("answer", [slow, dripping])
def test_the_time_limit_holds_for_the_whole_answer(service, answer):
    service.answers = [answer]
    begun = time.monotonic()
    text = fails(reward(service, timeout_seconds=0.3), BATCH)
    assert time.monotonic() - begun < 50  # the answer would take 60 s
    assert "it can't be reached (ReadTimeout)" in text or "it took more than 0.3 seconds" in text


def cut_off(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"scores"')


def test_an_answer_that_breaks_off_is_tried_again(service):
    service.answers = [cut_off]
    assert reward(service, retries=1)(BATCH) == [4, 3, 0]


def refused():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return f"http://127.0.0.1:{port}/"


def test_nobody_there():
    config = RemoteComponent(url=refused(), retries=1, backoff_seconds=0)
    with pytest.raises(
        RewardServiceError, match=r"can't be reached \(ConnectError\), 2 t"
    ) as error:
        RemoteReward(config, "helpful")(BATCH)
    assert is_retriable(error.value)
    assert isinstance(error.value, ConnectionError)


def test_the_fallback_takes_the_place_of_scores():
    config = RemoteComponent(url=refused(), retries=0, fallback=-0.5)
    assert RemoteReward(config, "helpful")(BATCH) == [-0.5] * 3


def test_the_breaker(service, clock):
    remote = reward(
        service, fallback=-1, breaker_failures=2, breaker_seconds=0.3, batch_size=1, retries=1
    )
    service.answers = [(500, "")] * 5
    # Two replies fail, each asked twice; for the third no request is sent.
    assert remote(BATCH) == [-1, -1, -1]
    assert len(service.requests) == 4
    assert remote(BATCH) == [-1, -1, -1]
    assert len(service.requests) == 4
    clock.now += 0.35
    # Then one try, which fails, and closes the service off again.
    assert remote(BATCH) == [-1, -1, -1]
    assert len(service.requests) == 5
    clock.now += 0.35
    assert remote(BATCH) == [4, 3, 0]
    # A success starts the count again.
    service.answers = [(500, "")] * 2
    assert remote(BATCH) == [-1, 3, 0]


@pytest.mark.parametrize(
    "body",
    [
        "no json", "[1, 2, 3]", '{"score": [1, 2, 3]}', '{"scores": "123"}',
        '{"scores": [1, "2", 3]}',
        '{"scores": [true, 1, 2]}', '{"scores": null}', "[" * 100_000,
    ],
)  # fmt: skip
def test_answers_that_make_no_sense(service, body):
    service.answers = [(200, body)]
    text = fails(reward(service, retries=2, fallback=0), BATCH, kind=TrainingError)
    assert 'its answer is no {"scores": [numbers]}; mend the service' in text
    assert len(service.requests) == 1


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('{"scores": [1, 2]}', "gave 2 values for 3 replies"),
        ('{"scores": [1, NaN, 2]}', "is nan for the reply 'ééé'"),
        ('{"scores": [1, 1e999, 2]}', "is inf for the reply"),
    ],
)
def test_scores_that_are_no_scores(service, body, expected):
    service.answers = [(200, body)]
    assert expected in fails(reward(service), BATCH, kind=TrainingError)


def test_an_endless_answer(service):
    def endless(handler):
        handler.send_response(200)
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(b" " * 2**20)
        except OSError:
            pass

    service.answers = [endless]
    text = fails(reward(service, fallback=0), BATCH, kind=TrainingError)
    assert "is no list of scores, but longer" in text


def test_the_token_comes_from_the_environment_and_stands_nowhere_else(service, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("SCORE_TOKEN", " s3cret\n")
    monkeypatch.setenv(ALLOWED, "OTHER@127.0.0.1, SCORE_TOKEN@127.0.0.1")
    remote = reward(service, token_env="SCORE_TOKEN")
    service.answers = [None, (500, ""), (401, "")]
    remote(BATCH)
    texts = [fails(remote, BATCH), fails(remote, BATCH, kind=TrainingError)]
    assert service.requests[0][1]["Authorization"] == "Bearer s3cret"
    assert "s3cret" not in "".join([*texts, caplog.text, repr(remote.config)])


@pytest.mark.parametrize(
    "allowed", [None, "", "SCORE_TOKEN", "SCORE_TOKEN@127.0.0.10", "127.0.0.1", "X@127.0.0.1"]
)
def test_a_run_may_not_choose_which_secret_goes_where(service, monkeypatch, allowed):
    monkeypatch.setenv("SCORE_TOKEN", "s3cret")
    monkeypatch.delenv(ALLOWED, raising=False)
    if allowed is not None:
        monkeypatch.setenv(ALLOWED, allowed)
    cure = "allows it by RLHF_ALLOWED_TOKENS=SCORE_TOKEN@127.0.0.1 in the environment"
    with pytest.raises(ConfigError, match=cure):
        reward(service, token_env="SCORE_TOKEN")


def test_a_proxy_never_sees_what_stays_on_this_machine(service, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9/")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9/")
    assert reward(service)(BATCH) == [4, 3, 0]


def test_the_fallback_is_told_once_until_the_service_answers_again(service, caplog):
    remote = reward(service, fallback=0, breaker_failures=9)
    for answers in ([(500, "")] * 2, [None], [(500, "")]):
        service.answers = answers
        for _ in answers:
            remote(BATCH)
    told = [r.getMessage() for r in caplog.records if r.name == "rlhf.environments.remote"]
    assert len(told) == 2
    assert "it answered 500, 1 times" not in told[0]
    assert "it answered 500; until it answers, every score is the fallback 0" in told[0]


@pytest.mark.parametrize("value", [None, "", " ", "naïve"])
def test_a_token_that_is_not_there(service, monkeypatch, value):
    monkeypatch.setenv(ALLOWED, "SCORE_TOKEN@127.0.0.1")
    monkeypatch.delenv("SCORE_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("SCORE_TOKEN", value)
    with pytest.raises(ConfigError, match="token_env = 'SCORE_TOKEN' is not set"):
        reward(service, token_env="SCORE_TOKEN")


def test_as_a_component(service, renderer):
    url = f"http://127.0.0.1:{service.server_port}/"
    config = PPOConfig(
        multi_objective=True,
        env_config={"components": {"helpful": {"type": "remote", "url": url, "weight": 2}}},
    )
    scored = build_environment(config, None, renderer)(BATCH)
    assert scored.totals.tolist() == [8, 6, 0]
    assert scored.components["helpful"].tolist() == [4, 3, 0]
