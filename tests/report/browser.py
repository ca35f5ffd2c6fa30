"""Headless Chromium for tests, driven by the DevTools protocol over a pipe.

Standard library only: no driver, no port, no web socket. Use it so:

    from tests.report.browser import browser  # in a conftest.py; a session fixture

    @pytest.mark.browser
    def test_page(browser, tmp_path):
        page = browser.open(html_file, width=390)
        assert not page.problems
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--force-color-profile=srgb",
    "--remote-debugging-pipe", "about:blank",
)  # fmt: skip
PROTOCOL_IN, PROTOCOL_OUT = 3, 4
TIMEOUT = 300.0


def chromium_path() -> str:
    """Return Chromium's path, installed by apt as root; else skip, or fail in CI."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300"]
        for step in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
            subprocess.run([*apt, *step], check=False, capture_output=True, timeout=900)
        found = shutil.which("chromium")
    if found is None:
        why = "chromium is missing and could not be installed (apt-get install chromium)"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(why)
    return str(found)


class Browser:
    """One Chromium with one tab; `open` loads a file and returns it as a `Page`."""

    def __init__(self, executable: str, profile: Path) -> None:
        child_in, self._write = os.pipe()
        self._read, child_out = os.pipe()
        log = profile / "chromium.log"
        # To high numbers first: one of the ends may itself have the number 3 or 4.
        parked = [
            os.dup2(end, 200 + i, inheritable=True) for i, end in enumerate((child_in, child_out))
        ]
        try:
            self.pid = os.posix_spawn(
                executable,
                [executable, *FLAGS[:-1], f"--user-data-dir={profile}", FLAGS[-1]],
                {**os.environ, "HOME": str(profile)},
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, parked[0], PROTOCOL_IN),
                    (os.POSIX_SPAWN_DUP2, parked[1], PROTOCOL_OUT),
                    (
                        os.POSIX_SPAWN_OPEN,
                        2,
                        str(log),
                        os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
                        0o600,
                    ),
                    (os.POSIX_SPAWN_DUP2, 2, 1),
                    *((os.POSIX_SPAWN_CLOSE, end) for end in parked),
                ],
                setpgroup=0,
            )
        finally:
            for end in (child_in, child_out, *parked):
                os.close(end)
        self._buffer, self._count, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its answer; events that arrive meanwhile are stored."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        while True:
            answer = self._receive()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def wait_for(self, method: str) -> None:
        """Wait until the event has happened."""
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._receive())

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + TIMEOUT
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(self._read, 1 << 20) if ready else b""
            if not chunk:
                raise TimeoutError("chromium ended" if ready else f"no answer in {TIMEOUT} s")
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(
        self, file: Path, width: int = 1280, height: int = 900, dark: bool = False, media: str = ""
    ) -> Page:
        """Load a local file at this size and colour scheme."""
        return self.visit(file.resolve().as_uri(), width, height, dark, media)

    def visit(
        self, url: str, width: int = 1280, height: int = 900, dark: bool = False, media: str = ""
    ) -> Page:
        """Load a page at this size and colour scheme; it may ask its own server for more."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.call("Page.navigate", url="about:blank")
        self.events.clear()
        self.call("Page.navigate", url=url)
        self.wait_for("Page.loadEventFired")
        page = Page(self, url)
        # That event may be the blank page's, late.
        end = time.monotonic() + TIMEOUT
        loaded = "location.href !== 'about:blank' && document.readyState === 'complete'"
        while not page.evaluate(loaded) and time.monotonic() < end:
            time.sleep(0.05)
        page.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")
        return page

    def close(self) -> None:
        """End this Chromium and the processes it started."""
        os.close(self._write)
        os.close(self._read)
        for sent in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.pid, sent)
            except ProcessLookupError:
                break
            for _ in range(50):
                if os.waitpid(self.pid, os.WNOHANG)[0]:
                    return
                time.sleep(0.1)


class Page:
    """The loaded page."""

    def __init__(self, browser: Browser, url: str) -> None:
        self._browser = browser
        self._own = ("file:",) if url.startswith("file:") else (url.rstrip("/") + "/",)

    @property
    def problems(self) -> list[str]:
        """Console errors and warnings, uncaught exceptions, and requests elsewhere.

        A file may ask for local files, another page for what its own server has.
        """
        found = []
        for event in self._browser.events:
            method, given = event.get("method"), event.get("params", {})
            if method == "Runtime.consoleAPICalled" and given["type"] in (
                "error",
                "warning",
                "assert",
            ):
                found.append(f"console: {given['args']}")
            elif method == "Runtime.exceptionThrown":
                found.append(f"exception: {given['exceptionDetails']}")
            elif method == "Log.entryAdded" and given["entry"]["level"] in ("error", "warning"):
                found.append(f"log: {given['entry']['text']}")
            elif method == "Network.requestWillBeSent":
                url = given["request"]["url"]
                if not url.startswith((*self._own, "about:", "data:")):
                    found.append(f"request: {url}")
        return found

    def evaluate(self, script: str) -> Any:
        """Return the value of a JavaScript expression; promises are awaited."""
        answer = self._browser.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def screenshot(self, file: Path) -> Path:
        """Save the whole page as a PNG."""
        answer = self._browser.call(
            "Page.captureScreenshot", format="png", captureBeyondViewport=True
        )
        file.write_bytes(base64.b64decode(answer["data"]))
        return file


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A Chromium for the session, with a new, empty profile."""
    started = Browser(chromium_path(), tmp_path_factory.mktemp("chromium"))
    yield started
    started.close()
