"""What a server of replies refuses before it looks at a request: whose, from where, how large."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Seconds in which a request's body has to be there.
BODY_SECONDS = 30.0
#: Paths that need the key, if there is one; the page itself holds no secret.
PROTECTED = ("/v1/", "/chat/")
#: Sent with every response: the page loads what this server gives, and no other page embeds it.
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Refused(Exception):
    """A request that is not answered."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message


@dataclass
class Guard:
    """ASGI middleware that refuses requests by headers and size.

    Pages of other sites reach a server on this machine through its user's browser: by a name that
    their DNS gives the address 127.0.0.1 (hence `hosts`), or by a request whose answer they can't
    read, which could append preferences all the same (hence the origin and the type of the body).
    """

    app: ASGIApp
    hosts: frozenset[str]
    """Names by which the server may be called, in lower case; without ports."""
    key: str | None = None
    """That requests have to bear; none asks for none."""
    most_bytes: int = 2**20
    """Of a request's body."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        try:
            self._check(scope)
            body = await self._body(receive, Headers(scope=scope))
        except Refused as refused:
            response = error_response(refused.status, refused.code, refused.message)
            await response(scope, receive, send_with_headers)
            return
        await self.app(scope, _replay(body, receive), send_with_headers)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host = _hostname(f"//{headers.get('host', '')}")
        if host not in self.hosts:
            raise Refused(
                403, "host_not_allowed",
                f"the host {host[:100]!r} is none of this server's; --allow-host names more",
            )  # fmt: skip
        origin = headers.get("origin")
        is_own = origin is None or urlsplit(origin).netloc == headers.get("host")
        if not is_own or headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            raise Refused(403, "origin_not_allowed", "pages of other sites may not use this server")
        if self.key is not None and scope["path"].startswith(PROTECTED):
            given = headers.get("authorization", "").encode()
            if not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
                raise Refused(
                    401, "invalid_api_key", "the key is missing or wrong (Authorization: Bearer …)"
                )
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise Refused(415, "unsupported_media_type", "the body has to be application/json")

    async def _body(self, receive: Receive, headers: Headers) -> bytes:
        declared = headers.get("content-length", "0")
        if not declared.isdecimal() or int(declared[:20]) > self.most_bytes:
            raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(400, "disconnected", "the request ended before its body")
                    body += message.get("body", b"")
                    if len(body) > self.most_bytes:
                        raise self._too_large()
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError:
            raise Refused(408, "timeout", "the body took too long") from None

    def _too_large(self) -> Refused:
        return Refused(
            413, "too_large", f"the body has more than {self.most_bytes:,} bytes; send less"
        )


def error_response(
    status: int, code: str, message: str, param: str | None = None
) -> JSONResponse:  # fmt: skip
    """Return an error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": param, "code": code}
    extra = {"retry-after": "2"} if status == 429 else None
    return JSONResponse({"error": error}, status, headers=extra)


def own_hosts(host: str, more: Iterable[str]) -> frozenset[str]:
    """Return the names by which a server on an address may be called."""
    local = ("localhost", "127.0.0.1", "::1")
    own = local if host in (*local, "0.0.0.0", "::") else (host,)
    return frozenset(name.lower() for name in (*own, *more))


def _hostname(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").lower()
    except ValueError:
        return ""


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body, then what the server receives."""
    sent = False

    async def replayed() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
