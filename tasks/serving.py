"""A server of one policy or two: OpenAI's chat completions, and a page to chat and to vote.

For trying things on one's own machine. The requests that it refuses unread are in
`tasks.serving_guard`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from rlhf.chat import Candidate, Reply, ReplySettings, preference_rows
from rlhf.data.rendering import TOO_LONG
from rlhf.data.rows import Message
from rlhf.errors import PromptUnusable, RLHFError, explain
from rlhf.plain_text import shortened
from rlhf.preferences import PreferenceFile
from tasks.chat_models import ChatModels, ChatPolicy
from tasks.openai_schema import ChatRequest, Completion, Turns, parse
from tasks.reply_queue import Busy, ReplyQueue, TooSlow
from tasks.serving_guard import Guard, error_response

#: The page's files.
PAGE = Path(__file__).parent / "page"
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/chat.css": ("chat.css", "text/css; charset=utf-8"),
    "/chat.js": ("chat.js", "text/javascript; charset=utf-8"),
}
#: Replies that can be voted on: the newest.
KEPT = 200
#: Numbers that a page's JavaScript holds exactly.
_SEEDS = 2**31

log = logging.getLogger(__name__)
Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class ServingLimits:
    """Limits of one request, and on how many are served at a time."""

    tokens: int = 1024
    """Most tokens of a reply."""
    seconds: float = 300.0
    """Most that a caller waits for its reply."""
    requests: int = 8
    """Requests that are answered or wait."""
    bytes: int = 2**20
    """Of a request's body."""


@dataclass(frozen=True)
class _Known:
    """A reply that was given, to vote on."""

    messages: list[Message]
    candidate: Candidate


@dataclass
class _Service:
    """The server's state."""

    models: ChatModels
    queue: ReplyQueue
    limits: ServingLimits
    preferences: PreferenceFile
    known: OrderedDict[str, _Known] = field(default_factory=OrderedDict[str, _Known])
    voted: OrderedDict[str, None] = field(default_factory=OrderedDict[str, None])

    def remember(self, messages: list[Message], candidate: Candidate) -> str:
        """Keep a reply for a vote; return its id."""
        name = secrets.token_hex(8)
        self.known[name] = _Known(messages, candidate)
        while len(self.known) > KEPT:
            self.known.popitem(last=False)
        return name

    def policy(self, name: str | None) -> ChatPolicy | None:
        """Return the policy of a name that /v1/models lists, or of its digest."""
        for each in self.models.policies:
            if name in (None, model_id(each), each.identity):
                return each
        return None


def build_app(
    models: ChatModels, preferences: PreferenceFile, hosts: frozenset[str],
    limits: ServingLimits | None = None, key: str | None = None,
) -> Starlette:  # fmt: skip
    """Build the server's application.

    Args:
        models: The policies, and the models that score their replies.
        preferences: File to which votes are appended.
        hosts: Names by which the server may be called.
        limits: Of requests.
        key: That requests have to bear; None asks for none.
    """
    limits = limits or ServingLimits()
    service = _Service(models, ReplyQueue(limits.requests, limits.seconds), limits, preferences)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        service.queue.close()

    def route(path: str, handle: Callable[..., Awaitable[Response]], method: str) -> Route:
        async def endpoint(request: Request) -> Response:
            try:
                return await handle(service, request)
            except Exception as error:
                return _failed(error)

        return Route(path, endpoint, methods=[method])

    return Starlette(
        routes=[
            *(Route(path, _file(*file)) for path, file in _FILES.items()),
            route("/v1/models", _list_models, "GET"),
            route("/v1/models/{name:path}", _show_model, "GET"),
            route("/v1/chat/completions", _complete, "POST"),
            route("/chat/facts", _facts, "GET"),
            route("/chat/reply", _reply, "POST"),
            route("/chat/vote", _vote, "POST"),
        ],
        middleware=[Middleware(Guard, hosts=hosts, key=key, most_bytes=limits.bytes)],  # pyright: ignore[reportArgumentType]
        lifespan=lifespan,
    )


def model_id(policy: ChatPolicy) -> str:
    """Return the name of a policy in requests: what the user called it, but no path."""
    return policy.model.text if policy.model.ref else policy.identity


def _file(name: str, kind: str) -> Handler:
    async def endpoint(_: Request) -> Response:
        return FileResponse(PAGE / name, media_type=kind)

    return endpoint


async def _list_models(service: _Service, _: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_model(p) for p in service.models.policies]})


async def _show_model(service: _Service, request: Request) -> Response:
    policy = service.policy(request.path_params["name"])
    return JSONResponse(_model(policy)) if policy else _no_model(service)


def _model(policy: ChatPolicy) -> dict[str, Any]:
    return {"id": model_id(policy), "object": "model", "created": 0, "owned_by": "rlhf-pipeline"}


def _no_model(service: _Service) -> Response:
    known = ", ".join(map(model_id, service.models.policies))
    return error_response(404, "model_not_found", f"this server has {known}", "model")


async def _complete(service: _Service, request: Request) -> Response:
    """Answer a chat completion, whole or as server-sent events."""
    asked: ChatRequest = parse(await request.body(), ChatRequest)
    policy = service.policy(asked.model)
    if policy is None:
        return _no_model(service)
    settings = asked.settings(policy.settings, service.limits.tokens)
    messages = [turn.message for turn in asked.messages]
    seed = secrets.randbelow(_SEEDS) if asked.seed is None else asked.seed
    parts = _parts(service, policy, messages, settings, seed)
    answer = Completion(f"chatcmpl-{secrets.token_hex(12)}", int(time.time()), model_id(policy))
    if not asked.stream:
        return JSONResponse(answer.whole(await _whole(parts, request)))
    first = await anext(parts)  # errors of the conversation come with their status

    async def events() -> AsyncIterator[str]:
        yield _event(answer.part(None))
        async with contextlib.aclosing(parts):
            try:
                item = first
                while not isinstance(item, Reply):
                    yield _event(answer.part(item))
                    item = await anext(parts)
            except Exception as error:
                yield _event(json.loads(bytes(_failed(error).body)))
                return
        yield _event(answer.end(item))
        if asked.stream_options.include_usage:
            yield _event(answer.usage(item))
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def _event(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _parts(
    service: _Service, policy: ChatPolicy, messages: list[Message], settings: ReplySettings,
    seed: int,
) -> AsyncGenerator[str | Reply]:  # fmt: skip
    speaker = policy.speaker
    return service.queue.parts(
        lambda on_text, cancelled: speaker.reply(messages, settings, seed, on_text, cancelled)
    )


async def _whole(parts: AsyncGenerator[str | Reply], request: Request) -> Reply:
    """Return a whole reply, which is given up if nobody waits for it any longer."""
    async with contextlib.aclosing(parts):
        async for item in parts:
            if isinstance(item, Reply):
                return item
            if await request.is_disconnected():
                raise TooSlow("the caller has gone")
    raise AssertionError("a reply ends with itself")


async def _facts(service: _Service, _: Request) -> Response:
    """Return what the page shows of the server."""
    return JSONResponse(
        {
            "policies": [each.label for each in service.models.policies],
            "scores": [name for name, _, _ in service.models.scorers],
            "notes": list(service.models.notes),
            "preferences": service.preferences.path.name,
        }
    )


class _ReplyRequest(BaseModel):
    """The page asks for a reply."""

    model_config = ConfigDict(extra="forbid")

    messages: Turns
    policy: Annotated[int, Field(ge=0)] = 0


async def _reply(service: _Service, request: Request) -> Response:
    """Answer the page by lines of JSON: parts of the text, then reply and scores."""
    asked: _ReplyRequest = parse(await request.body(), _ReplyRequest)
    if asked.policy >= len(service.models.policies):
        return _no_model(service)
    policy = service.models.policies[asked.policy]
    messages = [turn.message for turn in asked.messages]
    settings = policy.settings
    seed = secrets.randbelow(_SEEDS)
    parts = _parts(service, policy, messages, settings, seed)
    first = await anext(parts)

    async def lines() -> AsyncIterator[str]:
        async with contextlib.aclosing(parts):
            try:
                item = first
                while not isinstance(item, Reply):
                    yield _line({"text": item})
                    item = await anext(parts)
                made, text = item, item.text
                scores = await service.queue.scored(lambda: service.models.scores(messages, text))
            except Exception as error:
                yield _line(json.loads(bytes(_failed(error).body)))
                return
        candidate = Candidate(policy.label, policy.identity, made, scores)
        shown = [{"name": s.name, "value": s.value, "note": s.note} for s in scores]
        yield _line(
            {
                "reply": {
                    "id": service.remember(messages, candidate), "text": made.text,
                    "policy": policy.label, "tokens": made.tokens, "notes": list(made.notes),
                    "scores": shown,
                }
            }
        )  # fmt: skip

    return StreamingResponse(lines(), media_type="application/x-ndjson")


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


class _Vote(BaseModel):
    """The page says which reply is better."""

    model_config = ConfigDict(extra="forbid")

    chosen: str
    rejected: str


async def _vote(service: _Service, request: Request) -> Response:
    """Append a vote between two replies of this server to the preference file."""
    vote: _Vote = parse(await request.body(), _Vote)
    chosen, rejected = service.known.get(vote.chosen), service.known.get(vote.rejected)
    if chosen is None or rejected is None or chosen.messages != rejected.messages:
        return error_response(
            409, "unknown_reply", "these replies are not known (any longer); ask again"
        )
    pair = "".join(sorted((vote.chosen, vote.rejected)))
    if pair in service.voted:
        return error_response(409, "voted", "this vote is written already")
    service.preferences.append(
        preference_rows(chosen.messages, chosen.candidate, [rejected.candidate])
    )
    service.voted[pair] = None
    while len(service.voted) > KEPT:
        service.voted.popitem(last=False)
    return JSONResponse({"written": service.preferences.path.name})


def _failed(error: Exception) -> JSONResponse:
    """Return the answer to a request that can't be served."""
    if isinstance(error, Busy):
        return error_response(429, "busy", str(error))
    if isinstance(error, TooSlow):
        return error_response(504, "timeout", str(error))
    if isinstance(error, PromptUnusable):
        code = "context_length_exceeded" if error.reason == TOO_LONG else "prompt_unusable"
        return error_response(400, code, shortened(error), "messages")
    if isinstance(error, RLHFError):
        return error_response(400, "invalid_request", shortened(explain(error)))
    log.warning("a request failed: %s", shortened(explain(error)))
    return error_response(500, "internal_error", "the reply failed; the server's terminal says why")
