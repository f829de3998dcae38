"""A headless Chromium, driven through the DevTools protocol on a pipe."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from cluster_tools import require

COMMANDS = ("chromium", "chromium-browser", "google-chrome")

TIMEOUT = 60.0

PAPER = 718
"""Width of an A4 page without its margins, in CSS pixels."""

LANDSCAPE = 1047
"""The same of one that lies on its side."""

CHECKS = (Path(__file__).parent / "page_checks.js").read_text()
"""JavaScript that returns what overlaps, is cut or is empty in a page."""


class Browser:
    """One page of a headless Chromium. Console messages and errors are collected in ``errors``.

    Installs Chromium as root on Debian, and skips the test where there is none.

    Args:
        folder: of the browser's profile.
    """

    def __init__(self, folder: Path) -> None:
        if not any(map(shutil.which, COMMANDS)):
            require("chromium", packages="chromium fonts-dejavu-core")
        command = next(filter(None, map(shutil.which, COMMANDS)))
        theirs, ends = [], []
        for end in (0, 1):
            pipe = os.pipe()
            theirs.append(fcntl.fcntl(pipe[end], fcntl.F_DUPFD, 10))
            os.close(pipe[end])
            ends.append(pipe[1 - end])
        self._out, self._in = ends

        def connect() -> None:
            """The protocol is spoken on the descriptors 3 and 4."""
            os.dup2(theirs[0], 3)
            os.dup2(theirs[1], 4)

        words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        words += ["--remote-debugging-pipe", f"--user-data-dir={folder}", "--no-first-run", "about:blank"]
        self._process = subprocess.Popen(
            [command, *words],
            pass_fds=(3, 4),
            preexec_fn=connect,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for each in theirs:
            os.close(each)
        self._number, self._session, self._buffer = 0, None, b""
        self.errors: list[str] = []
        self._events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        data = memoryview(json.dumps(message).encode() + b"\0")
        while data:
            data = data[os.write(self._out, data) :]
        return self._read_until(lambda answer: answer.get("id") == self._number, method)["result"]

    def _read_until(self, wanted: Any, what: str) -> dict[str, Any]:
        end = time.monotonic() + TIMEOUT
        while True:
            message, found, rest = self._buffer.partition(b"\0")
            if not found:
                ready, _, _ = select.select([self._in], [], [], max(end - time.monotonic(), 0))
                assert ready, f"no answer to {what} in {TIMEOUT} s"
                received = os.read(self._in, 1 << 20)
                assert received, f"the browser ended during {what}"
                self._buffer += received
                continue
            self._buffer = rest
            answer = json.loads(message)
            self._note(answer)
            if wanted(answer):
                assert "error" not in answer, f"{what}: {answer['error']}"
                return answer

    def _note(self, answer: dict[str, Any]) -> None:
        method, params = answer.get("method"), answer.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"].get("exception", params)))
        elif method == "Runtime.consoleAPICalled":
            self.errors.append(str(params["args"]))
        elif method == "Log.entryAdded":
            self.errors.append(str(params["entry"]))
        elif method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(("file:", "about:")):
            self.errors.append(f"asks for {params['request']['url'][:200]}")

    def show(self, page: Path, width: int, *, height: int = 900, dark: bool = False) -> None:
        """Open a file in a window of a width, in light or dark colours, and wait until it is drawn."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.resolve().as_uri())
        self._read_until(lambda answer: answer.get("method") == "Page.loadEventFired", f"loading {page}")
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def mouse(self, kind: str, x: float, y: float) -> None:
        """A mouse event (``mouseMoved``, ``mousePressed``, ``mouseReleased``) at a place of the window."""
        button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def click(self, x: float, y: float) -> None:
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.mouse(kind, x, y)

    def screenshot(self, file: Path) -> None:
        """Save the whole page as a PNG."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(data))

    def pdf(self, file: Path) -> None:
        """Print the page."""
        file.write_bytes(base64.b64decode(self.call("Page.printToPDF", printBackground=True)["data"]))

    def close(self) -> None:
        """End the browser."""
        os.close(self._out)  # it exits when its pipe ends
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, 9)
            self._process.wait()
        os.close(self._in)
