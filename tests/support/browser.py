"""A real browser that looks at our pages: headless Chromium, spoken to over a pipe.

The protocol is Chrome's DevTools protocol (chromedevtools.github.io/devtools-protocol): JSON messages, each ended by a
zero byte, on file descriptors 3 and 4 of the browser (`--remote-debugging-pipe`). The flags turn off what a test does
not want: the GPU, and everything the browser asks the network for by itself.
"""

import base64
import contextlib
import fcntl
import io
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-3d-apis", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--disable-dev-shm-usage", "--remote-debugging-pipe",
)  # fmt: skip
TIMEOUT_S = 60
TALLEST = 12_000
"""Pixels of a screenshot's height at most: the browser's own limit is 16,384."""


class Box(NamedTuple):
    """Where an element stands on the page, in CSS pixels."""

    x: float
    y: float
    width: float
    height: float


class BrowserPage:
    """A page that was opened and whose scripts have run."""

    def __init__(self, browser: "Browser", session: str, url: str) -> None:
        self._browser = browser
        self._session = session
        self._url = url
        self.errors: list[str] = []
        """What the console says of errors and warnings, and what no script caught."""
        self.requests: list[str] = []
        """Every address that was asked for beside the page itself and what is inside it (`data:`)."""

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol to this page; its result."""
        return self._browser.call(method, parameters, self._session, self._note)

    def load(self) -> None:
        """Open the page, and wait until everything in it is loaded."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        failure = self.call("Page.navigate", url=self._url).get("errorText")
        assert not failure, f"{self._url}: {failure}"
        self._browser.wait_for("Page.loadEventFired", self._session, self._note)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, which JSON must be able to hold."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    @property
    def dom(self) -> str:
        """The document as it stands after its scripts."""
        return self.evaluate("document.documentElement.outerHTML")

    def boxes(self, selector: str) -> list[Box]:
        """Places of all elements that a CSS selector finds, in the order of the document."""
        found = self.evaluate(
            f"[...document.querySelectorAll({json.dumps(selector)})].map(element => {{"
            "const box = element.getBoundingClientRect();"
            "return [box.x + scrollX, box.y + scrollY, box.width, box.height]})"
        )
        return [Box(*box) for box in found]

    def texts(self, selector: str) -> list[str]:
        """Texts of all elements that a CSS selector finds, in the order of the document."""
        return self.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent.trim())")

    def overflow(self) -> int:
        """CSS pixels by which the page is wider than the window: a reader would have to scroll sideways."""
        return self.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")

    def dark(self) -> None:
        """Show the page to a reader who prefers dark."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])

    def screenshot(self, box: Box | None = None) -> np.ndarray:
        """uint8 [H, W, 3]: `box`, or the whole page down to TALLEST."""
        if box is None:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            box = Box(0, 0, size["width"], min(size["height"], TALLEST))
        clip = {**box._asdict(), "scale": 1}
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)["data"]
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            return np.asarray(picture.convert("RGB"))

    def _note(self, event: str, facts: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            address = facts["request"]["url"]
            if address != self._url and not address.startswith("data:"):
                self.requests.append(address)
        elif event == "Runtime.exceptionThrown":
            details = facts["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif event == "Runtime.consoleAPICalled" and facts["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(part.get("value", part.get("description"))) for part in facts["args"]))
        elif event == "Log.entryAdded" and facts["entry"]["level"] in ("error", "warning"):
            self.errors.append(f"{facts['entry']['text']} {facts['entry'].get('url', '')}".strip())


class Browser:
    """One process of Chromium; pages are opened in it one after the other."""

    def __init__(self) -> None:
        """Skips the test where no Chromium is installed: under CI that is a failure."""
        program = next(filter(None, map(shutil.which, PROGRAMS)), None)
        if program is None:
            pytest.skip("no chromium: apt-get install -y --no-install-recommends chromium fonts-dejavu-core")
        self._folder = tempfile.mkdtemp(prefix="browser")
        self._log = Path(self._folder, "stderr.txt")
        self._number = 0
        self._received = b""
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # Away from 3 and 4, which dup2 is about to take.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (theirs_in, theirs_out)]
        with self._log.open("wb") as log:
            self._process = os.posix_spawn(
                program,
                [program, *FLAGS, f"--user-data-dir={self._folder}/profile", "about:blank"],
                dict(os.environ),
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, ends[0], 3), (os.POSIX_SPAWN_DUP2, ends[1], 4),
                    (os.POSIX_SPAWN_DUP2, log.fileno(), 1), (os.POSIX_SPAWN_DUP2, log.fileno(), 2),
                ],
                setpgroup=0,
            )  # fmt: skip
        for end in (theirs_in, theirs_out, *ends):
            os.close(end)

    @contextlib.contextmanager
    def page(self, path: str | Path, *, width: int = 1200, height: int = 900) -> Iterator[BrowserPage]:
        """The page in the file at `path`, in a window of `width` x `height` CSS pixels."""
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        page = BrowserPage(self, session, Path(path).resolve().as_uri())
        try:
            page.call(
                "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
            )
            page.load()
            yield page
        finally:
            self.call("Target.closeTarget", {"targetId": target})

    def call(self, method: str, parameters: dict[str, Any], session: str | None = None, note: Any = None) -> Any:
        """Send a command and wait for its result; `note` is told of the events of `session` that come before it."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        os.write(self._out, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while (answer := self._next(session, note)).get("id") != self._number:
            pass
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def wait_for(self, event: str, session: str, note: Any) -> None:
        """Wait for an event of `session`."""
        while (answer := self._next(session, note)).get("method") != event or answer.get("sessionId") != session:
            pass

    def _next(self, session: str | None, note: Any) -> dict[str, Any]:
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._in], [], [], TIMEOUT_S)
            part = os.read(self._in, 1 << 20) if ready else b""
            state = "ended" if ready else f"said nothing for {TIMEOUT_S} s"
            assert part, f"chromium {state}: {self._log.read_text(errors='replace')[-2000:]}"
            self._received += part
        message, _, self._received = self._received.partition(b"\0")
        answer = json.loads(message)
        if note is not None and "method" in answer and answer.get("sessionId") == session:
            note(answer["method"], answer["params"])
        return answer

    def close(self) -> None:
        """End the browser and remove what it wrote."""
        with contextlib.suppress(AssertionError, OSError):
            self.call("Browser.close", {})
        for end in (self._in, self._out):
            os.close(end)
        deadline = time.monotonic() + 5
        while not (ended := os.waitpid(self._process, os.WNOHANG)[0]) and time.monotonic() < deadline:
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):  # what it started is in its group
            os.killpg(self._process, signal.SIGKILL)
        if not ended:
            os.waitpid(self._process, 0)
        shutil.rmtree(self._folder, ignore_errors=True)
