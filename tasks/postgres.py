"""A Postgres of one's own in a folder, for Prefect's server alone: made, started and stopped.

It listens on no network address, only on a socket in its folder, and asks the system who connects:
there is no password. Data are made under another name and renamed when whole, so they are never
found half made. Postgres refuses to run as root, which runs it as the user `postgres` instead.
"""

from __future__ import annotations

import os
import pwd
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import quote

from rlhf.errors import ConfigError, UnexpectedError
from rlhf.plain_text import one_line

#: Name of the database, and of the role that owns it.
NAME = "prefect"
#: As whom root runs Postgres; its packages make this user.
UNPRIVILEGED = "postgres"
#: Part of the socket's name. No port of the network is taken.
PORT = 5432
#: Longest path of a socket, in bytes.
LONGEST_SOCKET = 103
#: Oldest version that Prefect supports.
OLDEST = 14
PROGRAMS = ("initdb", "pg_ctl", "postgres")
#: Where packages put the programs, if not on PATH.
PLACES = (
    "/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/opt/homebrew/opt/postgresql@*/bin",
    "/usr/local/opt/postgresql@*/bin", "/usr/local/pgsql/bin",
)  # fmt: skip
CURE = (
    "install it (Debian, Ubuntu: apt-get install postgresql), or start server and Postgres in "
    "containers by deployments/compose.yaml"
)


@dataclass(frozen=True)
class Postgres:
    """A folder with the data of one Postgres, its socket and its log."""

    folder: Path

    @property
    def log(self) -> Path:
        """File with what the server said."""
        return self.folder / "postgres.log"

    @property
    def url(self) -> str:
        """Address of the database for Prefect's server."""
        return f"postgresql+asyncpg://{NAME}@/{NAME}?host={quote(str(self.folder))}&port={PORT}"

    @cached_property
    def owner(self) -> pwd.struct_passwd:
        """The user that Postgres runs as."""
        name, is_root = UNPRIVILEGED, os.geteuid() == 0
        try:
            return pwd.getpwnam(name) if is_root else pwd.getpwuid(os.geteuid())
        except KeyError:
            if is_root:
                cure = f"make a user {name!r}, which its packages do, or start it as another user"
                raise ConfigError(f"Postgres refuses to run as root: {cure}") from None
            raise ConfigError(
                f"the user id {os.geteuid()} has no name in /etc/passwd, which Postgres needs; "
                "run as a user with a name"
            ) from None

    def start(self, patience: float) -> None:
        """Start the server, and make its data first if there are none; wait until it answers.

        Raises:
            ConfigError: Postgres is missing or too old, or the folder or its data can't be used.
            UnexpectedError: Postgres failed; the message has its reason.
        """
        self._check_path()
        self.folder.mkdir(exist_ok=True)
        self.folder.chmod(0o700)
        if os.geteuid() == 0:
            os.chown(self.folder, self.owner.pw_uid, self.owner.pw_gid)
        if self._call(Path("/bin/sh"), "-c", 'cd "$0"', str(self.folder)).returncode:
            raise ConfigError(
                f"{str(self.folder)!r}: the user {self.owner.pw_name!r}, as whom Postgres runs, "
                "can't enter it; choose a folder by RLHF_SERVER_DIR that all users can enter"
            )
        if not self._data.exists():
            self._initialise()
        programs = self._programs_for_data()
        if self._runs(programs):
            return
        self._remove_leftovers()
        options = (
            f"-c listen_addresses= -c unix_socket_permissions=0700 -p {PORT} "
            f"-k {shlex.quote(str(self.folder))}"
        )
        arguments = ["-l", str(self.log), "-o", options, "-w", "-t", f"{patience:.0f}", "start"]
        give_up = time.monotonic() + patience
        while True:
            before = self.log.stat().st_size if self.log.exists() else 0
            done = self._call(programs / "pg_ctl", "-D", str(self._data), *arguments)
            if done.returncode == 0:
                return
            said = _read_from(self.log, before)
            # After kill -9 its children take a moment to end.
            if "still in use" not in said or time.monotonic() > give_up:
                raise UnexpectedError(
                    f"Postgres does not start: {_reason(said or done.stderr)}; see {self.log}"
                )
            time.sleep(0.5)

    def stop(self, patience: float) -> bool:
        """Stop the server, if it runs; return whether it did.

        Raises:
            UnexpectedError: It does not stop.
        """
        if not self._data.exists():
            return False
        programs = self._programs_for_data()
        if not self._runs(programs):
            return False
        stop = ["-m", "fast", "-w", "-t", f"{patience:.0f}", "stop"]
        done = self._call(programs / "pg_ctl", "-D", str(self._data), *stop)
        if done.returncode and self._runs(programs):
            raise UnexpectedError(f"Postgres does not stop: {_reason(done.stderr)}; see {self.log}")
        return True

    def _check_path(self) -> None:
        """Check that the folder's path can stand in the address of a socket."""
        if len(os.fsencode(self.folder / f".s.PGSQL.{PORT}")) > LONGEST_SOCKET:
            raise ConfigError(
                f"{str(self.folder)!r}: too long a path for a socket (at most {LONGEST_SOCKET} "
                "bytes with its name); choose a folder with a shorter one by RLHF_SERVER_DIR"
            )
        if strange := re.search(r"[^\w/.+@~ -]", str(self.folder)):
            raise ConfigError(
                f"{str(self.folder)!r}: {strange[0]!r} can't stand in the path of the database; "
                "choose a folder without it by RLHF_SERVER_DIR"
            )

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    def _initialise(self) -> None:
        """Make the data with an empty database, under another name until they are whole."""
        version, programs = max(_found(), default=(0, Path()))
        if version == 0:
            raise ConfigError(f"Postgres is not installed: {CURE}")
        if version < OLDEST:
            raise ConfigError(
                f"{programs}: Postgres {version} is too old, as Prefect needs {OLDEST}; {CURE}"
            )
        new = self.folder / "data.new"
        shutil.rmtree(new, ignore_errors=True)  # of an attempt that was killed
        options = ["-U", NAME, "-A", "peer", "--locale=C", "--encoding=UTF8"]
        done = self._call(programs / "initdb", "-D", str(new), *options)
        if done.returncode:
            raise UnexpectedError(f"Postgres can't make its data: {_reason(done.stderr)}")
        # Prefect's search needs the extension; a database is a copy of template1.
        commands = f"CREATE EXTENSION pg_trgm;\nCREATE DATABASE {NAME};\n"
        single = ["--single", "-D", str(new), "template1"]
        done = self._call(programs / "postgres", *single, stdin=commands)
        if done.returncode or "ERROR:" in done.stderr:
            raise UnexpectedError(
                f"Postgres can't make its database: {_reason(done.stderr)}; its package of "
                "extensions (postgresql-contrib) may be missing"
            )
        user = pwd.getpwuid(os.geteuid()).pw_name
        (new / "pg_hba.conf").write_text(f"local {NAME} {NAME} peer map=owner\n")
        (new / "pg_ident.conf").write_text(f'owner "{user}" {NAME}\n')
        new.rename(self._data)

    def _programs_for_data(self) -> Path:
        """Return the folder of the programs of the version that made the data."""
        try:
            made_by = int((self._data / "PG_VERSION").read_text())
            (self._data / "global" / "pg_control").stat()
        except (OSError, ValueError):
            raise ConfigError(
                f"{self._data}: these are no data of Postgres, or not all of them; restore the "
                "folder from a backup, or move it away to begin without any runs"
            ) from None
        if self._data.stat().st_uid != self.owner.pw_uid:
            raise ConfigError(
                f"{self._data}: belongs to another user than {self.owner.pw_name!r}, as whom "
                "Postgres runs; start it as its owner, or choose another RLHF_SERVER_DIR"
            )
        found = dict(_found())
        if made_by in found:
            return found[made_by]
        if not found:
            raise ConfigError(f"Postgres is not installed: {CURE}")
        others = ", ".join(str(version) for version in sorted(found))
        raise ConfigError(
            f"{self._data}: made by Postgres {made_by}, but only {others} is installed; install "
            f"postgresql-{made_by} beside it, or move the data by pg_upgrade"
        )

    def _runs(self, programs: Path) -> bool:
        status = self._call(programs / "pg_ctl", "-D", str(self._data), "status")
        return status.returncode == 0 and self._is_ours(self._pid())

    def _pid(self) -> int | None:
        try:
            return int((self._data / "postmaster.pid").read_text().split("\n")[0])
        except (OSError, ValueError):
            return None

    def _remove_leftovers(self) -> None:
        """Remove what a killed server left, if another program has its process id by now.

        Postgres takes any living process with that id for itself, and then never starts again.
        """
        pid = self._pid()
        if pid is not None and not self._is_ours(pid):
            (self._data / "postmaster.pid").unlink(missing_ok=True)
            (self.folder / f".s.PGSQL.{PORT}.lock").unlink(missing_ok=True)

    def _is_ours(self, pid: int | None) -> bool:
        """Return whether a process lives and works on these data; True if that can't be told."""
        if pid is None:
            return False
        process = Path(f"/proc/{pid}")
        if not Path("/proc/self").exists():  # not Linux
            asked = ["ps", "-o", "comm=", "-p", str(pid)]
            said = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
            return "postgres" in said
        try:
            is_postgres = "postgres" in (process / "comm").read_text()
            return is_postgres and (process / "cwd").readlink() == self._data.resolve()
        except OSError:
            return False

    def _call(
        self, program: Path, *arguments: str, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run one of Postgres' programs, as the user that owns the data."""
        is_root = os.geteuid() == 0
        demoted = {"user": self.owner.pw_uid, "group": self.owner.pw_gid, "extra_groups": []}
        return subprocess.run(
            [str(program), *arguments], env={**without_postgres(os.environ), "LC_ALL": "C"},
            input=stdin, capture_output=True, text=True, errors="replace", check=False,
            cwd=self.folder, umask=0o077, **(demoted if is_root else {}),
        )  # fmt: skip


def without_postgres(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without variables that would direct Postgres' programs elsewhere."""
    return {name: value for name, value in environment.items() if not name.startswith("PG")}


def install() -> None:
    """Install Postgres from the system's packages if it is missing, as root on Debian or Ubuntu.

    Raises:
        ConfigError: It is missing, and can't be installed.
    """
    if next(_found(), None):
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise ConfigError(f"Postgres is not installed: {CURE}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    get = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "postgresql"]
    for command in (["apt-get", "update", "-qq"], get):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigError(f"{' '.join(command)} failed: {_reason(done.stderr)}; {CURE}")


def _found() -> Iterator[tuple[int, Path]]:
    """Yield the installed versions, each with the folder of its programs."""
    folders = [path for place in PLACES for path in Path("/").glob(place.removeprefix("/"))]
    on_path = shutil.which("postgres")
    for folder in {Path(on_path).resolve().parent, *folders} if on_path else {*folders}:
        if all(os.access(folder / name, os.X_OK) for name in PROGRAMS):
            command = [str(folder / "postgres"), "--version"]
            said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
            if version := re.search(r"PostgreSQL\D+(\d+)", said):
                yield int(version[1]), folder


def _read_from(log: Path, offset: int) -> str:
    try:
        return log.read_bytes()[offset:].decode(errors="replace")
    except OSError:
        return ""


def _reason(said: str) -> str:
    """Return the line of a program's output that names the cause, without its time."""
    lines = [line for line in said.splitlines() if line.strip()]
    named = [line for line in lines if re.search(r"\b(FATAL|PANIC|ERROR|error|E):", line)]
    line = (named or lines[-1:] or ["no reason given"])[0]
    return one_line(re.sub(r"^.*?\b(?:FATAL|PANIC|ERROR|error|E):", "", line))
