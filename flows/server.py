"""The `rlhf server` commands: Prefect's server on a Postgres of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from rlhf.files import expand_home
from tasks.console import PlainConsole, console, say
from tasks.prefect_server import check_settings
from tasks.server import Server, default_folder, exposure

app = App(name="server", help="Start and stop Prefect's server on a Postgres of its own.")

Folder = Annotated[
    Path | None,
    Parameter(help="Where data, leases and logs are; default: RLHF_SERVER_DIR."),
]


@app.command
def start(
    *,
    folder: Folder = None,
    host: str | None = None,
    port: int | None = None,
    install: bool = False,
) -> None:
    """Start the server in the background, wait until it answers, and print the line to export.

    A server that runs already is left alone; after a kill or a reboot, start it again.

    Parameters
    ----------
    host
        Address to listen on; default: PREFECT_SERVER_API_HOST, or 127.0.0.1.
    port
        Default: PREFECT_SERVER_API_PORT, or 4200.
    install
        As root on Debian or Ubuntu, install Postgres if it is missing.
    """
    check_settings()
    from prefect.settings import get_current_settings

    if install:
        from tasks.postgres import install as install_postgres

        install_postgres()
    server = _server(folder)
    settings = get_current_settings().server.api
    host = settings.host if host is None else host
    port = settings.port if port is None else port
    remarks = PlainConsole(stderr=True)  # stdout is for `eval`
    api = server.start(host, port)
    say(f"Prefect's server on Postgres in {server.folder}, log {server.log}", on=remarks)
    if advice := exposure(host):
        say(f"warning: {advice}", "yellow", on=remarks)
    say(f"export PREFECT_API_URL={api}", on=console)


@app.command
def stop(*, folder: Folder = None) -> None:
    """Stop the server and its Postgres; its data stay."""
    server = _server(folder)
    was_running = server.stop()
    say(f"{server.folder}: {'stopped' if was_running else 'no server runs here'}")


def _server(folder: Path | None) -> Server:
    """Return the server in a folder, or in the default one."""
    return Server((default_folder() if folder is None else expand_home(folder)).absolute())
