"""Clients of Prefect's server for commands, and its errors in one line."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from traceback import walk_tb
from typing import TYPE_CHECKING, Any

import httpx
from pydantic import ValidationError

from rlhf.errors import ConfigError, UnexpectedError
from tasks.console import say

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

#: The flows that run the whole pipeline.
PIPELINES = ("rlhf-pipeline", "retraining")
#: The server's setting for where it keeps concurrency leases, which running pipelines renew.
LEASE_SETTING = "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"
_STORAGE = "prefect.server.concurrency.lease_storage"
IN_MEMORY, IN_FILES = f"{_STORAGE}.memory", f"{_STORAGE}.filesystem"
#: Most characters of a server's answer that a message repeats.
LONGEST_ANSWER = 300


@contextmanager
def prefect_server(subject: str, instead: str = "") -> Iterator[SyncPrefectClient]:
    """Open a client of the configured server; `subject` begins the error messages.

    Args:
        subject: What asks the server, for errors.
        instead: What else than a server the command could use.

    Raises:
        ConfigError: No server is configured, or it does not answer, or it answers with an error, or
            what answers is none.
    """
    check_settings()
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    # Without the setting, the client would start a server of its own, without any runs.
    if not PREFECT_API_URL.value():
        raise ConfigError(
            f"{subject}: needs the Prefect server that the runs are on; set PREFECT_API_URL"
            f"{instead}"
        )
    place = ""
    try:
        with get_client(sync_client=True) as client:
            place = _place(client.api_url)
            try:
                yield client
            except httpx.HTTPError as error:
                raise ConfigError(f"{subject}: {server_error(error, client.api_url)}") from error
    except httpx.InvalidURL as error:
        raise ConfigError(
            f"PREFECT_API_URL = {PREFECT_API_URL.value()!r}: is no address ({error}); set it to "
            "the server's, which ends in /api"
        ) from None
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        if not _is_of_answer(error):
            raise
        raise _no_server(subject, place) from error


def set_defaults(verbose: bool) -> None:
    """Set the environment of Prefect and the libraries, before they are imported.

    Variables that the user has set stay.

    Args:
        verbose: Whether Prefect prints its own log.
    """
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    # Training takes all cores, so the ephemeral server may answer late.
    os.environ.setdefault("PREFECT_SERVER_DATABASE_TIMEOUT", "60")
    os.environ.setdefault("PREFECT_SERVER_DATABASE_CONNECTION_TIMEOUT", "60")
    os.environ.setdefault("PREFECT_CLIENT_RETRY_EXTRA_CODES", "500")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not verbose:
        # An error ends in one line; the full log is in Prefect's UI.
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
        os.environ.setdefault("TQDM_DISABLE", "1")


def meet_server(subject: str) -> None:
    """Check the configured server, or say that one is started for this process.

    Raises:
        ConfigError: A server is configured and does not answer.
    """
    check_settings()
    from prefect.settings import PREFECT_API_URL

    if PREFECT_API_URL.value():
        greet_server(subject)
    else:
        say("starting a Prefect server for this run, up to a minute the first time")


def greet_server(subject: str) -> None:
    """Check that the configured server answers, and is one; `subject` begins the error messages.

    Raises:
        ConfigError: It does not, or something else answers.
    """
    with prefect_server(subject) as client:
        from prefect.client.base import ServerType

        client.hello()
        if client.server_type != ServerType.CLOUD and not _is_true(client._client.get("/health")):
            raise _no_server(subject, _place(client.api_url))


def check_settings() -> None:
    """Check Prefect's settings, whose import would print at length what is wrong with them.

    Raises:
        ConfigError: One has a value that Prefect refuses.
    """
    with redirect_stderr(io.StringIO()):
        from prefect.settings import Settings, get_current_settings

        try:
            get_current_settings()
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
        else:
            return
        for name in sorted(name for name in os.environ if name.startswith("PREFECT_")):
            value = os.environ.pop(name)
            try:
                Settings()
            except ValidationError:
                continue
            finally:
                os.environ[name] = value
            raise ConfigError(f"{name} = {value!r}: {first['msg']}; correct it")
    where = ".".join(map(str, first["loc"]))
    raise ConfigError(
        f"Prefect's settings: {where}: {first['msg']}; correct its variable PREFECT_… or its "
        "profile (`prefect config view`)"
    )


def wait_for_server(subject: str, seconds: float) -> None:
    """Wait until the configured server is healthy; `subject` begins the messages.

    Raises:
        ConfigError: It is not within this time, or something else answers.
    """
    give_up = time.monotonic() + seconds
    said = False
    with prefect_server(subject) as client:
        url, asks = client.api_url, client._client
        place = _place(url)
        while True:
            try:
                # The client's own `send` retries for minutes.
                answer = httpx.Client.send(asks, asks.build_request("GET", "/health", timeout=10))
                answer.raise_for_status()
                if _is_true(answer):
                    return
                raise _no_server(subject, place)
            except httpx.HTTPError as error:
                broken = isinstance(error, httpx.HTTPStatusError)
                if broken and error.response.status_code < httpx.codes.INTERNAL_SERVER_ERROR:
                    raise
                if time.monotonic() >= give_up:
                    raise ConfigError(
                        f"{subject}: {server_error(error, url)} (waited {seconds:g} s)"
                    ) from error
            if not said:
                say(f"{subject}: waiting up to {seconds:g} s for Prefect's server at {place}")
                said = True
            time.sleep(min(0.5, max(0.0, give_up - time.monotonic())))


def _no_server(subject: str, place: str) -> ConfigError:
    return ConfigError(
        f"{subject}: what answers at {place} is not Prefect's server; set PREFECT_API_URL to its "
        "address, which ends in /api"
    )


def _is_of_answer(error: BaseException) -> bool:
    """Return whether an error comes from Prefect's client, which read an answer that is none."""
    frames = [frame.f_code.co_filename for frame, _ in walk_tb(error.__traceback__)]
    return any(f"{os.sep}prefect{os.sep}client{os.sep}" in name for name in frames)


def _place(url: httpx.URL) -> str:
    """Return an address without the password that it may contain."""
    return str(url.copy_with(userinfo=b"", query=None)).rstrip("/")


def _is_true(answer: httpx.Response) -> bool:
    try:
        return answer.json() is True
    except (ValueError, RecursionError):
        return False


def lease_advice(client: SyncPrefectClient) -> str | None:
    """Return a warning if a restart of the server would end running pipelines, else None.

    A server that does not show its settings (Prefect Cloud) keeps its leases itself.

    Raises:
        httpx.HTTPError: The server does not answer, or refuses.
    """
    try:
        response = client._client.get("/admin/settings")  # Prefect's client has no method for it
    except httpx.HTTPStatusError as error:
        if error.response.status_code == httpx.codes.NOT_FOUND:
            return None
        raise
    try:
        storage = response.json()["server"]["concurrency"]["lease_storage"]
    except (ValueError, KeyError, TypeError):
        return None  # a version without leases
    if storage != IN_MEMORY:
        return None
    return (
        f"Prefect's server keeps concurrency leases in memory ({LEASE_SETTING} = {storage}): when "
        f"it is restarted, running pipelines crash at their next renewal; start it with "
        f"{LEASE_SETTING}={IN_FILES}, and its PREFECT_HOME on a disk that outlives it"
    )


def server_error(error: httpx.HTTPError, url: httpx.URL | None = None) -> str:
    """Return in one line what the server answered, or that it did not, and a cure."""
    address = url or _url(error)
    place = _place(address) if address else ""
    where = f" at {place}" if place else ""
    if not isinstance(error, httpx.HTTPStatusError):
        reason = " ".join(str(error).split()) or type(error).__name__
        return (
            f"Prefect's server does not answer{where} ({reason}); start it, or set PREFECT_API_URL"
        )
    response, request = error.response, error.request
    status = f"{response.status_code} {response.reason_phrase}".strip()
    answer = _answer(response)
    return (
        f"Prefect's server{where} answered {status} to {request.method} {request.url.path}"
        f"{f': {answer}' if answer else ''}; {_cure(response.status_code)}"
    )


def not_started(error: RuntimeError) -> UnexpectedError | None:
    """Return an error with a cure if Prefect's server for one run did not start in time."""
    if "ephemeral Prefect API server" not in str(error):
        return None
    return UnexpectedError(
        "Prefect's server for this run did not answer in time, as on a busy machine or disk; run "
        "the same again, or start a server that stays: rlhf server start"
    )


def _url(error: httpx.HTTPError) -> httpx.URL | None:
    try:
        return error.request.url
    except RuntimeError:  # no request belongs to it
        return None


def _answer(response: httpx.Response) -> str:
    """Return the reason in a response's body in one line, or the body."""
    try:
        body: Any = response.json()
    except (ValueError, RecursionError, httpx.HTTPError):
        body = response.text if response.is_closed else ""
    for name in ("detail", "exception_detail", "exception_message", "message"):
        if isinstance(body, dict) and body.get(name):
            body = body[name]
    text = " ".join(str(body).split())
    if "Traceback (most recent call last)" in text:  # for its log
        return ""
    return text if len(text) <= LONGEST_ANSWER else f"{text[: LONGEST_ANSWER - 1]}…"


def _cure(status: int) -> str:
    if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        return "set PREFECT_API_AUTH_STRING or PREFECT_API_KEY"
    if status in (httpx.codes.NOT_FOUND, httpx.codes.METHOD_NOT_ALLOWED):
        return "is PREFECT_API_URL the server's API? It ends in /api"
    if status >= httpx.codes.INTERNAL_SERVER_ERROR:
        return "its log names the cause; mend it there"
    return "correct what the answer names; or server and client are of different versions"
