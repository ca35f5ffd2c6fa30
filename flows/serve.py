"""The command `rlhf serve`: a policy behind OpenAI's chat completions, and a page to chat."""

from __future__ import annotations

import os
import re
import socket
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter, validators

from flows.artifacts import ConfigOption, StoreOption
from flows.chat import open_chat
from rlhf.errors import ConfigError
from rlhf.preferences import PreferenceFile
from tasks.chat_models import DEFAULT_CHAT, ChatOptions
from tasks.console import say

if TYPE_CHECKING:
    from starlette.applications import Starlette

#: Seconds that a reply which is being made is given when the server is told to end.
ENDING_SECONDS = 5
#: Fewest characters of a key: what is guessed is no key.
SHORTEST_KEY = 16
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
#: Addresses that only this machine reaches.
LOCAL = ("127.0.0.1", "::1", "localhost")

Port = Annotated[int, Parameter(validator=validators.Number(gte=0, lte=65_535))]
Count = Annotated[int, Parameter(validator=validators.Number(gte=1, lte=10_000_000))]
Seconds = Annotated[float, Parameter(validator=validators.Number(gt=0, lte=86_400))]


def serve(
    policy: str | None = None, *, host: str = "127.0.0.1", port: Port = 8000,
    api_key: str | None = None, allow_host: tuple[str, ...] = (), max_tokens: Count = 1024,
    max_requests: Count = 8, max_seconds: Seconds = 300.0,
    options: ChatOptions = DEFAULT_CHAT, store: StoreOption = None, config: ConfigOption = None,
) -> None:  # fmt: skip
    """Serve a policy: OpenAI's chat completions, and a page to chat and vote.

    Parameters
    ----------
    policy
        champion (the default), sft, a digest, its first 6 or more digits, a run's or a pin's name,
        URI, champion:<line>, or a local folder.
    host
        Address to listen on; one that other machines reach needs --api-key.
    port
        0 takes a free one.
    api_key
        Name of the environment variable that holds the key which requests have to bear.
    allow_host
        Further host names by which the server may be called; repeatable.
    max_tokens
        Most tokens of a reply.
    max_requests
        Requests that are answered or wait; one is answered at a time.
    max_seconds
        Most that a request may take, waiting included.
    """
    key = _key(api_key)
    if key is None and host not in LOCAL:
        raise ConfigError(
            f"--host {host}: other machines could use the policy and write preferences; set a key "
            "in an environment variable, and name that by --api-key"
        )
    preferences = PreferenceFile(options.preferences)
    listening = _listen(host, port)  # before the models are loaded
    with listening:
        say("loading …", "dim")
        models = open_chat(policy, options, store, config)
        from tasks.serving import ServingLimits, build_app, model_id
        from tasks.serving_guard import own_hosts

        limits = ServingLimits(tokens=max_tokens, seconds=max_seconds, requests=max_requests)
        app = build_app(models, preferences, own_hosts(host, allow_host), limits, key)
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{listening.getsockname()[1]}"
        for each in models.policies:
            say(f"policy {model_id(each)}: {each.label}", "bold")
        for note in models.notes:
            say(f"note: {note}", "yellow")
        say(f"page: {url}   OpenAI's API: {url}/v1   preferences: {preferences.path}")
        say("Ctrl-C ends the server", "dim")
        _run(app, listening)


def _key(variable: str | None) -> str | None:
    """Return the key that an environment variable holds.

    Raises:
        ConfigError: It is no name of a variable, not set, or too short. Its value is not repeated,
            and neither is what may be a key in place of the name.
    """
    if variable is None:
        return None
    if not _VARIABLE.fullmatch(variable) or variable not in os.environ:
        raise ConfigError(
            "--api-key: names no environment variable that is set; give the variable's name, not "
            "the key: export RLHF_KEY=…, then --api-key RLHF_KEY"
        )
    key = os.environ[variable]
    if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"--api-key {variable}: holds a key of fewer than {SHORTEST_KEY} characters, or others "
            "than ASCII letters, digits and signs; make one by: openssl rand -hex 24"
        )
    return key


def _listen(host: str, port: int) -> socket.socket:
    """Open the socket of the server.

    Raises:
        ConfigError: The address is unknown, not this machine's, or in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host}: {_reason(error)}; give an address") from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"--host {host} --port {port}: {_reason(error)}; another port, or 0 for a free one"
        ) from None
    return listening


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()


def _run(app: Starlette, listening: socket.socket) -> None:
    import uvicorn

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, date_header=False,
        proxy_headers=False, ws="none", timeout_keep_alive=15, limit_concurrency=100,
        timeout_graceful_shutdown=ENDING_SECONDS, http="h11",
    )  # fmt: skip
    uvicorn.Server(config).run(sockets=[listening])
