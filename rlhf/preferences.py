"""A file of preferences that grows by use: JSON lines that `data.source` reads as they are."""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.errors import ConfigError
from rlhf.files import expand_home
from rlhf.limits import load_json

#: Default file, beside the default store.
PREFERENCES = Path(".rlhf/preferences.jsonl")
#: Columns that every line has.
_COLUMNS = {"prompt", "chosen", "rejected"}
#: Bytes of a file that are looked at to tell what it is.
_LOOKED_AT = 2**20
#: Forms of credentials that are certain: a false alarm would lose a preference.
_CREDENTIALS = {
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "an AWS access key": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a GitHub token": re.compile(r"\b(?:gh[pousr]_\w{36,}|github_pat_\w{22,})"),
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{30,}\b"),
    "an API key": re.compile(r"\bsk-(?:[a-z]+-)*[A-Za-z0-9_-]{20,}"),
    "a Slack token": re.compile(r"\bxox[abeoprs]-[0-9A-Za-z-]{10,}"),
    "a web token": re.compile(r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"),
    "an authorization header": re.compile(
        r"\bauthorization['\"]?\s*[:=]\s*['\"]?(?:bearer|basic)\s+[\w.~+/=-]{16,}", re.IGNORECASE
    ),
    "a password in a URL": re.compile(r"://[^/\s:@]+:[^/\s@]+@[\w.-]"),
}  # fmt: skip
#: Environment variables whose values are secrets, by name; and the shortest such value.
_SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|CREDENTIAL")
_SHORTEST_SECRET = 12


class PreferenceFile:
    """A JSON-lines file to which preferences are appended.

    Processes that append at the same time take turns. A line is there whole or not at all, also
    when the disk is full.

    Args:
        path: The file; it is made with the first line.

    Raises:
        ConfigError: It can't be such a file, or holds something else.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = expand_home(path or PREFERENCES).absolute()
        if self.path.suffix not in (".jsonl", ".ndjson"):
            raise self._error("holds JSON lines; give a name that ends in .jsonl")
        # Opening a pipe would wait for its other end.
        try:
            mode = self.path.stat().st_mode
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._error(f"can't be read ({error.strerror})") from None
        if not stat.S_ISREG(mode):
            raise self._error("is no regular file; name another")
        with self._opened(os.O_RDONLY) as number:
            self._check(os.pread(number, _LOOKED_AT, 0))
        if not os.access(self.path, os.W_OK):
            raise self._error("can't be written; change its permissions, or name another")

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows, all or none.

        Raises:
            ConfigError: One holds what looks like a credential, or the file can't be written.
        """
        for row in rows:
            if (what := credential_in(row)) is not None:
                raise ConfigError(
                    f"the conversation or a reply holds what looks like {what}: nothing was "
                    "written; begin a new conversation without it"
                )
        lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        data = lines.encode("utf-8")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._error(f"its folder can't be made ({error.strerror})") from None
        with self._opened(os.O_RDWR | os.O_APPEND | os.O_CREAT) as number:
            fcntl.flock(number, fcntl.LOCK_EX)  # until it is closed
            size = os.fstat(number).st_size
            self._check(os.pread(number, _LOOKED_AT, 0))
            if size and os.pread(number, 1, size - 1) != b"\n":
                data = b"\n" + data  # an editor left the last line without its end
            try:
                _write(number, data)
                os.fsync(number)
            except OSError:
                os.ftruncate(number, size)
                raise

    @contextmanager
    def _opened(self, flags: int) -> Iterator[int]:
        try:
            number = os.open(self.path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
        except OSError as error:
            raise self._error(f"can't be opened ({error.strerror}); name another") from None
        try:
            if not stat.S_ISREG(os.fstat(number).st_mode):
                raise self._error("is no regular file; name another")
            yield number
        except OSError as error:
            raise self._error(f"can't be written ({error.strerror}); nothing changed") from None
        finally:
            os.close(number)

    def _check(self, start: bytes) -> None:
        """Refuse a file whose first line is no preference."""
        line = start.lstrip().partition(b"\n")[0]
        if not line or (b"\n" not in start and len(start) == _LOOKED_AT):
            return
        try:
            value = load_json(line)
        except ValueError:
            value = None
        if not isinstance(value, dict) or not value.keys() >= _COLUMNS:
            raise self._error(
                "holds something else than lines with prompt, chosen and rejected; name another "
                "file, which data.source can list beside it"
            )

    def _error(self, what: str) -> ConfigError:
        return ConfigError(f"--preferences {str(self.path)!r}: {what}")


def credential_in(row: Mapping[str, Any]) -> str | None:
    """Return what kind of credential a row's texts seem to hold, or None.

    Those are known forms, and the values of this process's environment variables for secrets.
    """
    texts = [row[name] for name in row if isinstance(row[name], str)]
    texts += [str(message.get("content", "")) for message in row.get("prompt") or ()]
    text = "\n".join(texts)
    for what, pattern in _CREDENTIALS.items():
        if pattern.search(text):
            return what
    for name, value in os.environ.items():
        if _SECRET_NAMES.search(name.upper()) and len(value) >= _SHORTEST_SECRET and value in text:
            return f"the value of {name}"
    return None


def _write(number: int, data: bytes) -> None:
    while data:
        data = data[os.write(number, data) :]
