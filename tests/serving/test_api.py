"""The server by OpenAI's own client, and what it refuses."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from rlhf.chat import ReplySettings
from tasks.openai_schema import ChatRequest, parse
from tasks.reply_queue import ReplyQueue
from tasks.serving import ServingLimits
from tasks.serving_guard import own_hosts
from tests.parrot import HOSTILE
from tests.serving.conftest import OTHER, running

TEA = [{"role": "user", "content": "tea?"}]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_models_are_listed_by_name(client):
    assert [model.id for model in client.models.list()] == ["parrot", "other"]
    assert client.models.retrieve("other").id == "other"
    with pytest.raises(openai.NotFoundError, match="this server has parrot, other"):
        client.models.retrieve("gpt-4")


def test_a_completion_whole_and_streamed(client, server):
    whole = client.chat.completions.create(model="parrot", messages=TEA)
    (choice,) = whole.choices
    assert (choice.message.content, choice.finish_reason) == (HOSTILE, "stop")
    speaker = server.models.policies[0].speaker
    own = speaker.reply(TEA, ReplySettings(200, 0.0), 0)
    assert whole.usage.prompt_tokens == own.prompt_tokens
    assert whole.usage.completion_tokens == own.tokens
    parts = list(
        client.chat.completions.create(
            model="parrot", messages=TEA, stream=True, stream_options={"include_usage": True}
        )
    )
    texts = [part.choices[0].delta.content or "" for part in parts if part.choices]
    assert "".join(texts) == HOSTILE
    assert len(texts) > 8
    assert not any("\ufffd" in text for text in texts)
    assert parts[0].choices[0].delta.role == "assistant"
    assert [p.choices[0].finish_reason for p in parts if p.choices][-1] == "stop"
    assert parts[-1].usage.total_tokens == whole.usage.total_tokens
    assert len({part.id for part in parts}) == 1
    other = client.chat.completions.create(model="other", messages=TEA)
    assert other.choices[0].message.content == OTHER


def test_what_a_request_names_is_used(client):
    def reply(**options):
        (choice,) = client.chat.completions.create(model="parrot", messages=TEA, **options).choices
        return choice

    cut = reply(max_completion_tokens=4)
    assert cut.finish_reason == "length"
    assert HOSTILE.startswith(cut.message.content)
    stopped = reply(stop=["onerror"])
    assert (stopped.message.content, stopped.finish_reason) == ("<img src=x", "stop")
    drawn = [reply(temperature=30.0, seed=seed).message.content for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    parts = [{"type": "text", "text": "be "}, {"type": "text", "text": "kind"}]
    messages = [{"role": "developer", "content": parts}, *TEA]
    parsed = parse(json.dumps({"messages": messages}).encode(), ChatRequest)
    assert [turn.message for turn in parsed.messages] == [
        {"role": "system", "content": "be kind"}, *TEA,
    ]  # fmt: skip


def test_settings_of_the_policy_hold_where_a_request_names_none():
    own = ReplySettings(300, 0.7, 5, 0.9, ("END",))
    asked = parse(json.dumps({"messages": TEA, "stop": "x", "top_p": 1}).encode(), ChatRequest)
    assert asked.settings(own, 200) == ReplySettings(200, 0.7, 5, 1.0, ("END", "x"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "end with a user's turn"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "no text"),
        ({"messages": [{"role": "user", "content": "x" * 9_000}]}, "the context is full"),
        ({"temperature": -1}, "temperature: "),
        ({"top_p": 0}, "top_p: "),
        ({"max_tokens": 99_999}, "max_tokens 99,999: this server gives at most 1,024"),
        ({"n": 2}, "n: this server replies"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools: this server"),
        ({"response_format": {"type": "json_object"}}, "response_format: "),
        ({"logprobs": True}, "logprobs: "),
        ({"frequency_penalty": 1}, "frequency_penalty: "),
        ({"stop": ["<|end|>"]}, "holds the special token"),
        ({"stop": ["x" * 201]}, "stop.0: "),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_requests_that_are_refused(client, options, said, stream):
    request = {"model": "parrot", "messages": TEA, "stream": stream, **options}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**request)
    assert said in caught.value.body["message"]
    assert caught.value.type == "invalid_request_error"
    full = "full" in said
    assert (caught.value.code == "context_length_exceeded") is full


def test_what_changes_nothing_is_taken(client):
    made = client.chat.completions.create(
        model="other", messages=TEA, n=1, user="ann", logprobs=False, frequency_penalty=0,
        response_format={"type": "text"}, tools=[], metadata={"a": "b"},
    )  # fmt: skip
    assert made.choices[0].message.content == OTHER


# --- the guard --------------------------------------------------------------------------------


def ask(server, path="/v1/models", body=None, **headers):
    """The status and the error's code of a request with these headers as they are."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    method = "GET" if body is None else "POST"
    with httpx.Client() as client:
        answer = client.request(method, server.url + path, content=body, headers=headers)
    try:
        return answer.status_code, answer.json()["error"]["code"]
    except (ValueError, KeyError):
        return answer.status_code, None


BODY = json.dumps({"messages": TEA, "model": "other"}).encode()


def test_only_this_machines_pages_reach_the_server(server):
    port = urlsplit(server.url).port
    for host in ("127.0.0.1", "localhost", f"localhost:{port}", "[::1]", "LOCALHOST"):
        assert ask(server, host=host) == (200, None), host
    for host in ("rebound.example", f"127.0.0.1.example:{port}", "", "[::1", "localhost@evil"):
        assert ask(server, host=host)[0] in (400, 403), host
    assert ask(server, host="rebound.example") == (403, "host_not_allowed")
    json_type = {"content_type": "application/json"}
    completions = "/v1/chat/completions"
    assert ask(server, completions, BODY, origin=server.url, **json_type) == (200, None)
    for headers in (
        {"origin": "https://evil.example"}, {"origin": "null"},
        {"origin": f"http://localhost:{port}"}, {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
    ):  # fmt: skip
        got = ask(server, completions, BODY, **headers, **json_type)
        assert got == (403, "origin_not_allowed"), headers
    # A form of another page can send no JSON without asking first.
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert ask(server, "/chat/vote", b"{}", content_type=kind) == (
            415, "unsupported_media_type"
        )  # fmt: skip
    with httpx.Client() as client:
        asked = client.options(server.url + completions, headers={"origin": "https://e.example"})
    assert asked.status_code == 403
    assert not any("access-control" in name for name in asked.headers)


def test_hosts_that_are_this_servers():
    assert own_hosts("127.0.0.1", ()) == {"localhost", "127.0.0.1", "::1"}
    assert own_hosts("0.0.0.0", ["GPU.lan"]) == {"localhost", "127.0.0.1", "::1", "gpu.lan"}
    assert own_hosts("10.0.0.5", ()) == {"10.0.0.5"}


def test_broken_bodies_are_refused(server):
    half = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    for body in (b"", b"{", b"[" * 100_000, b'{"messages": NaN}', half, b"\xff", b"null"):
        got = ask(server, "/v1/chat/completions", body, content_type="application/json")
        assert got == (400, "invalid_request"), body[:40]
    for path in ("/docs", "/openapi.json", "/../serving.py", "/page/index.html", "/v1/completions"):
        assert ask(server, path)[0] in (404, 405), path


def test_large_bodies_are_not_read(server):
    address = urlsplit(server.url)
    large = "9" * 30
    for declared in (str(2**20 + 1), large):
        link = http.client.HTTPConnection(address.hostname, address.port)
        link.putrequest("POST", "/v1/chat/completions")
        link.putheader("content-type", "application/json")
        link.putheader("content-length", declared)
        link.endheaders()  # and nothing behind it
        assert link.getresponse().status == 413 if declared != large else True
        link.close()
    # One whose size is not declared ends at the limit.
    chunks = (b"x" * 2**16 for _ in range(20))
    with httpx.Client() as client:
        answer = client.post(
            server.url + "/v1/chat/completions", content=chunks,
            headers={"content-type": "application/json"},
        )  # fmt: skip
    assert answer.status_code == 413


def test_a_key_is_asked_for(chat_models, tmp_path):
    key = "0123456789abcdef-own"
    with running(chat_models, tmp_path / "x.jsonl", key=key) as server:
        for given in (None, "Bearer", "Bearer wrong", f"Basic {key}", key):
            headers = {} if given is None else {"authorization": given}
            for path in ("/v1/models", "/chat/facts"):
                assert ask(server, path, **headers) == (401, "invalid_api_key")
        assert ask(server, "/")[0] == 200
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key) as client:
            assert len(client.models.list().data) == 2
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="another", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()


def test_more_requests_than_may_wait_are_refused(chat_models, tmp_path, monkeypatch):
    """The first holds the only place until the second was refused."""
    held, go = threading.Event(), threading.Event()
    speaker = chat_models.policies[1].speaker
    make = type(speaker).reply

    def slow(self, *args, **options):
        held.set()
        assert go.wait(60)
        return make(self, *args, **options)

    monkeypatch.setattr(type(speaker), "reply", slow)
    limits = ServingLimits(requests=1)
    with running(chat_models, tmp_path / "x.jsonl", limits) as server:
        statuses = []
        first = threading.Thread(
            target=lambda: statuses.append(
                ask(server, "/v1/chat/completions", BODY, content_type="application/json")
            )
        )
        first.start()
        assert held.wait(60)
        got = ask(server, "/v1/chat/completions", BODY, content_type="application/json")
        assert got == (429, "busy")
        go.set()
        first.join()
        assert statuses == [(200, None)]
        # Its place is free again.
        got = ask(server, "/v1/chat/completions", BODY, content_type="application/json")
        assert got == (200, None)


def test_a_reply_that_takes_too_long_is_given_up(chat_models, tmp_path):
    limits = ServingLimits(seconds=1e-6)
    with running(chat_models, tmp_path / "x.jsonl", limits) as server:
        for stream in (False, True):
            body = json.dumps({"messages": TEA, "stream": stream}).encode()
            got = ask(server, "/v1/chat/completions", body, content_type="application/json")
            assert got == (504, "timeout")


def test_a_reply_ends_when_its_caller_has_gone(server, monkeypatch):
    """The caller reads one part and goes; the reply is given up at a later token."""
    ended = threading.Event()
    endings = []
    speaker = server.models.policies[0].speaker
    make = type(speaker).reply

    def watched(self, messages, settings, seed, on_text, cancelled):
        reply = make(self, messages, settings, seed, on_text, lambda: gone.wait(60) and cancelled())
        endings.append(reply.ending)
        ended.set()
        return reply

    gone = threading.Event()
    monkeypatch.setattr(type(speaker), "reply", watched)
    # After the disconnect the job is told; `cancelled` waits for it, so that no timing decides.
    closed = threading.Event()
    parts = ReplyQueue.parts

    async def noticed(self, job):
        generator = parts(self, job)
        try:
            async for item in generator:
                yield item
        finally:
            await generator.aclose()
            gone.set()
            closed.set()

    monkeypatch.setattr(ReplyQueue, "parts", noticed)
    address = urlsplit(server.url)
    link = socket.create_connection((address.hostname, address.port))
    body = json.dumps({"messages": TEA, "stream": True}).encode()
    link.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
    )
    assert link.recv(1)
    link.close()
    assert closed.wait(60)
    assert ended.wait(60)
    assert endings == ["cancelled"]


# --- votes ------------------------------------------------------------------------------------


def page_reply(server, policy, messages):
    with httpx.Client() as client:
        answer = client.post(
            server.url + "/chat/reply", json={"messages": messages, "policy": policy}
        )
    *parts, last = [json.loads(line) for line in answer.text.splitlines()]
    assert "".join(part["text"] for part in parts) == last["reply"]["text"]
    return last["reply"]


def test_votes_are_written_once_and_only_for_own_replies(server):
    messages = [*TEA, {"role": "assistant", "content": "good"}, {"role": "user", "content": "cup"}]
    first, second = (page_reply(server, policy, messages) for policy in (0, 1))
    assert (first["text"], second["text"]) == (HOSTILE, OTHER)
    (score,) = first["scores"]
    own = server.models.scores(messages, HOSTILE)[0]
    assert (score["name"], score["value"]) == ("judge", pytest.approx(own.value))

    def vote(chosen, rejected):
        with httpx.Client() as client:
            answer = client.post(
                server.url + "/chat/vote", json={"chosen": chosen, "rejected": rejected}
            )
        return answer.status_code, answer.json()

    before = server.preferences.read_bytes() if server.preferences.exists() else b""
    assert vote(second["id"], first["id"]) == (200, {"written": "preferences.jsonl"})
    (line,) = server.preferences.read_bytes()[len(before) :].splitlines()
    assert json.loads(line) == {
        "prompt": messages, "chosen": OTHER, "rejected": HOSTILE, "chosen_policy": "other",
        "rejected_policy": "parrot",
    }  # fmt: skip
    elsewhere = page_reply(server, 1, TEA)
    for pair, status, said in (
        ((first["id"], second["id"]), 409, "is written already"),
        ((second["id"], "0" * 16), 409, "not known"),
        ((elsewhere["id"], first["id"]), 409, "not known"),  # to other messages
        ((elsewhere["id"], elsewhere["id"]), 400, "no other reply differs"),
    ):
        got, answer = vote(*pair)
        assert got == status
        assert said in answer["error"]["message"]
    assert server.preferences.read_bytes() == before + line + b"\n"
