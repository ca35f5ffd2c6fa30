"""Prefect's server on a Postgres of its own, in the background: started, found and stopped.

Everything it needs is in one folder: data, socket, leases, logs. The server holds a lock on a file
there as long as it lives; so neither a kill nor an id that the system gave to another process
afterwards is mistaken for a server that runs.
"""

from __future__ import annotations

import fcntl
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from rlhf.errors import ConfigError, UnexpectedError
from rlhf.files import expand_home, is_file
from rlhf.plain_text import one_line
from tasks.postgres import Postgres, without_postgres
from tasks.prefect_server import IN_FILES, LEASE_SETTING

#: Environment variable with the server's folder.
FOLDER = "RLHF_SERVER_DIR"
#: Seconds to wait for the server's first answer. The first start makes the tables.
PATIENCE = 300.0
#: Seconds that the server has to end after SIGTERM, before it is killed.
GRACE = 15.0
#: The server's settings; under load, Prefect's 5 and 10 s for connections and statements end early.
SETTINGS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_DATABASE_CONNECTION_TIMEOUT": "60",
    "PREFECT_SERVER_DATABASE_TIMEOUT": "60",
}
#: Writes the process id before the program begins, so no server runs without one.
_WRITE_PID = 'echo $$ > "$0" && exec "$@"'


def default_folder() -> Path:
    """Return RLHF_SERVER_DIR, or the user's folder for data; Postgres can't enter root's home."""
    if chosen := os.environ.get(FOLDER):
        return expand_home(chosen)
    if os.geteuid() == 0:
        return Path("/var/lib/rlhf-pipeline/server")
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return expand_home(data) / "rlhf-pipeline" / "server"


@dataclass(frozen=True)
class Server:
    """Prefect's server that lives in a folder."""

    folder: Path

    @property
    def postgres(self) -> Postgres:
        """Its database."""
        return Postgres(self.folder / "postgres")

    @property
    def log(self) -> Path:
        """File with what the server said."""
        return self.folder / "server.log"

    def start(self, host: str, port: int, patience: float = PATIENCE) -> str:
        """Start whatever of it does not run, wait until it answers, and return its API's address.

        Raises:
            ConfigError: An argument, the folder or a setting can't be used, or the port is taken.
            UnexpectedError: The server, or its database, failed or does not answer.
        """
        host = "127.0.0.1" if host == "localhost" else host
        api = _api(host, port)
        _check_settings()
        self._prepare_folder()
        with self._one_at_a_time():
            is_new = not self._runs()
            if is_new:
                _check_port(host, port)
            elif (running := self._recorded("api")) != api:
                raise ConfigError(
                    f"{self.folder}: this server runs already, at {running}; stop it first "
                    "(rlhf server stop), or choose another folder"
                )
            self.postgres.start(patience)
            offset = self.log.stat().st_size if self.log.exists() else 0
            if is_new:
                self._launch(host, port, api)
            self._wait(api, time.monotonic() + patience, offset, is_new)
        return api

    def stop(self) -> bool:
        """Stop the server and its database; return whether any of them ran.

        Raises:
            UnexpectedError: One of them does not stop.
        """
        if not is_file(self._lock):
            return False
        with self._one_at_a_time():
            was_running = self._runs()
            if was_running:
                pid = self._recorded_pid()
                for number in (signal.SIGTERM, signal.SIGKILL):
                    with suppress(ProcessLookupError):
                        os.kill(pid, number)
                    give_up = time.monotonic() + GRACE
                    while self._runs() and time.monotonic() < give_up:
                        time.sleep(0.1)
                    if not self._runs():
                        break
                else:
                    raise UnexpectedError(f"the server (process {pid}) does not end when killed")
            return self.postgres.stop(PATIENCE) or was_running

    def _prepare_folder(self) -> None:
        # Postgres, which root runs as another user, passes through.
        umask = os.umask(0o022 if os.geteuid() == 0 else 0o077)
        try:
            self.folder.mkdir(parents=True)
        except FileExistsError:
            pass
        except OSError as error:
            raise self._unusable(f"can't be made ({error.strerror})") from error
        finally:
            os.umask(umask)
        if not self.folder.is_dir():
            raise self._unusable("is a file")
        if not os.access(self.folder, os.R_OK | os.W_OK | os.X_OK):
            raise self._unusable("is not writable")

    def _unusable(self, reason: str) -> ConfigError:
        return ConfigError(f"{FOLDER} = {str(self.folder)!r}: {reason}; choose another folder")

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """Let one start or stop work at a time; the next waits, and sees what the first did."""
        with (self.folder / "command.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _runs(self) -> bool:
        """Return whether the server's process lives."""
        with self._lock.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    @property
    def _lock(self) -> Path:
        return self.folder / "server.lock"

    def _recorded(self, name: str) -> Any:
        try:
            return json.loads((self.folder / "server.json").read_text())[name]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._no_record("server.json") from error

    def _recorded_pid(self) -> int:
        try:
            return int((self.folder / "server.pid").read_text())
        except (OSError, ValueError) as error:
            raise self._no_record("server.pid") from error

    def _no_record(self, name: str) -> UnexpectedError:
        return UnexpectedError(
            f"{self.folder / name}: is missing or damaged, but a server runs in this folder; stop "
            f"the process that holds {self._lock} (fuser), then start it again"
        )

    def _launch(self, host: str, port: int, api: str) -> None:
        """Start the server's process, which inherits the lock."""
        home = self.folder / "prefect"
        home.mkdir(mode=0o700, exist_ok=True)
        (self.folder / "server.json").write_text(json.dumps({"api": api}) + "\n")
        server = [sys.executable, "-m", "prefect", "server", "start"]
        address = ["--host", host, "--port", str(port)]
        command = ["/bin/sh", "-c", _WRITE_PID, str(self.folder / "server.pid")]
        self.log.touch(mode=0o600)
        # An old number may be another process's by now.
        (self.folder / "server.pid").unlink(missing_ok=True)
        with self._lock.open("a") as lock, self.log.open("ab") as log:
            fcntl.flock(lock, fcntl.LOCK_EX)
            process = subprocess.Popen(
                [*command, *server, *address], env=self._environment(home, api),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[lock.fileno()],
                start_new_session=True,
            )  # fmt: skip
        process.returncode = 0  # no ResourceWarning about a process that is meant to live on

    def _environment(self, home: Path, api: str) -> dict[str, str]:
        """Return the environment of the server: the caller's, with this server's settings."""
        from prefect.settings import get_current_settings

        return {
            **SETTINGS,
            **without_postgres(os.environ),
            "PREFECT_HOME": str(home),
            # The user's profile may hold more settings, such as the API's password.
            "PREFECT_PROFILES_PATH": str(get_current_settings().profiles_path),
            "PREFECT_API_URL": api,
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": self.postgres.url,
            LEASE_SETTING: IN_FILES,
        }

    def _wait(self, api: str, give_up: float, offset: int, is_new: bool) -> None:
        """Wait until the server answers with its database; `offset` is where its log began."""
        while True:
            if not self._runs():
                raise UnexpectedError(
                    f"Prefect's server ended: {_last_line(self.log, offset)}; {self.log} has all "
                    "of it"
                )
            if _answers(f"{api}/ready") and (not is_new or self._listens(api)):
                return
            if time.monotonic() > give_up:
                raise UnexpectedError(
                    f"Prefect's server at {api} does not answer yet, and goes on starting; see "
                    f"{self.log}, and run the same again to wait for it"
                )
            time.sleep(0.2)

    def _listens(self, api: str) -> bool:
        """Return whether this server answers, and not one that took the port a moment before."""
        from prefect.settings import PREFECT_SERVER_API_AUTH_STRING

        secret = PREFECT_SERVER_API_AUTH_STRING.value()
        user, _, password = secret.partition(":") if secret else ("", "", "")
        try:
            settings = httpx.get(
                f"{api}/admin/settings", auth=(user, password) if secret else None,
                timeout=30, trust_env=False,
            ).json()  # fmt: skip
            return settings["home"] == str(self.folder / "prefect")
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return False


def exposure(host: str) -> str | None:
    """Return a warning if other machines reach the server without a password, else None."""
    from prefect.settings import PREFECT_SERVER_API_AUTH_STRING

    is_local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    if is_local or PREFECT_SERVER_API_AUTH_STRING.value():
        return None
    return (
        f"who reaches {host} can run code on every worker: set PREFECT_SERVER_API_AUTH_STRING, or "
        "stay on 127.0.0.1 (docs/security.md)"
    )


def _api(host: str, port: int) -> str:
    """Return the address of the API of a server that listens there.

    Raises:
        ConfigError: The host is no address, or the port no port.
    """
    if not 1 <= port <= 65535:
        raise ConfigError(f"--port {port}: give a number from 1 to 65535")
    from prefect.settings import PREFECT_SERVER_API_BASE_PATH

    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise ConfigError(
            f"--host {host!r}: give an address of this machine, such as 127.0.0.1, or 0.0.0.0 for "
            "all"
        ) from None
    reached = "127.0.0.1" if host == "0.0.0.0" else "::1" if host == "::" else str(address)
    name = f"[{reached}]" if ":" in reached else reached
    return f"http://{name}:{port}{PREFECT_SERVER_API_BASE_PATH.value() or '/api'}"


def _check_settings() -> None:
    """Check that the user has not chosen another database, which this server would not use."""
    from prefect.settings import get_current_settings

    database = get_current_settings().server.database
    chosen = database.model_fields_set & {"connection_url", "driver", "host", "name"}
    for field in sorted(chosen):
        setting = f"PREFECT_SERVER_DATABASE_{field.upper()}"
        raise ConfigError(
            f"{setting} (or PREFECT_API_DATABASE_{field.upper()}) is set, but this server has a "
            "database of its own; unset it, or start Prefect on yours by prefect server start"
        )


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            free.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"{host}:{port}: the server can't listen there ({error.strerror}); stop the "
                "program that does, or choose another with --port or PREFECT_SERVER_API_PORT"
            ) from None


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=30, trust_env=False).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def _last_line(log: Path, offset: int) -> str:
    """Return the last line of a log that tells something; Prefect ends with `Server stopped!`."""
    lines = log.read_bytes()[offset:].decode(errors="replace").splitlines()
    told = [line for line in lines if line.strip() and "Server stopped!" not in line]
    return one_line(told[-1]) if told else "no reason given"
