"""Drive a headless Chromium by its DevTools protocol over two pipes, with nothing but the standard library."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

#: The names under which systems install Chromium.
NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
#: Seconds to wait for an answer: a loaded machine is slow to start a browser.
PATIENCE = 120.0


def executable() -> str | None:
    """Return the path of Chromium, or None if there is none."""
    return next((found for name in NAMES if (found := shutil.which(name)) is not None), None)


def axe() -> str | None:
    """Return the script of axe-core, which `make` takes from npm; None if it is not there."""
    path = Path(sys.prefix, "npm", "node_modules", "axe-core", "axe.min.js")
    return path.read_text(encoding="utf-8") if path.exists() else None


class BrowserError(Exception):
    """The page raised an error, or the browser refused a command."""


class Browser:
    """A headless Chromium with one page.

    Attributes:
        events: the events that the browser has reported, in order.
    """

    def __init__(self) -> None:
        program = executable()
        assert program is not None
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs_in, self._out = _pipe()
        self._in, theirs_out = _pipe()
        words = [
            *(program, "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu"),
            *(f"--user-data-dir={self._profile.name}", "--no-first-run", "--disable-dev-shm-usage"),
            *("--disable-background-networking", "--disable-extensions", "--hide-scrollbars"),
            *("--force-color-profile=srgb", "about:blank"),
        ]

        def give_pipes() -> None:
            """Chromium reads commands from file descriptor 3, and writes answers to 4."""
            os.dup2(theirs_in, 3)
            os.dup2(theirs_out, 4)

        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(
            words, pass_fds=(3, 4), preexec_fn=give_pipes, stdin=quiet, stdout=quiet, stderr=quiet
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        try:
            self._attach()
        except BaseException:
            self.__exit__()
            raise

    def _attach(self) -> None:
        """Attach to the browser's page."""
        targets = self.send("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.send("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "DOM", "Accessibility"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._session = None
            self.send("Browser.close")
            self._process.wait(20)
        except (BrowserError, OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        finally:
            os.close(self._in)
            os.close(self._out)
            self._profile.cleanup()

    # --- the protocol ------------------------------------------------------------------------------------------------

    def send(self, method: str, **params: Any) -> Any:
        """Send a command, and return its result. Raises BrowserError if the browser refuses it."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        limit = time.monotonic() + PATIENCE
        while True:
            answer = self._next(limit)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            if "method" in answer:
                self.events.append(answer)

    def _next(self, limit: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(limit - time.monotonic(), 0))
            data = os.read(self._in, 1 << 20) if ready else b""
            if not data:
                raise BrowserError("Chromium does not answer" if not ready else "Chromium has ended")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    # --- the page ----------------------------------------------------------------------------------------------------

    def open(
        self, page: Path, *, width: int = 1280, height: int = 900, dark: bool = False, script: bool = True
    ) -> float:
        """Load a page, and return the seconds until its script had run."""
        self.send("Emulation.setScriptExecutionDisabled", value=not script)
        self.send("Emulation.setEmulatedMedia", features=[_scheme(dark)], media="")
        self.resize(width, height)
        self.events.clear()
        started = time.monotonic()
        self.send("Page.navigate", url=page.resolve().as_uri())
        self.wait_for_event("Page.loadEventFired")
        return time.monotonic() - started

    def wait_for_event(self, method: str) -> dict[str, Any]:
        """Return the first event of this name since the page was opened; wait for it if need be."""
        limit = time.monotonic() + PATIENCE
        while True:
            for event in self.events:
                if event["method"] == method:
                    return event
            answer = self._next(limit)
            if "method" in answer:
                self.events.append(answer)

    def resize(self, width: int, height: int, *, scale: float = 1) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )

    def run(self, code: str) -> Any:
        """Return the value of a JavaScript expression, awaited. Raises BrowserError for an exception."""
        result = self.send("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise BrowserError(details.get("exception", {}).get("description") or details["text"])
        return result["result"].get("value")

    def settle(self) -> None:
        """Wait until the page has drawn itself."""
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def press(self, key: str, *, text: str = "", modifiers: int = 0) -> None:
        """Press and release a key."""
        codes = {"Enter": 13, "Tab": 9, "Escape": 27, " ": 32, "ArrowDown": 40, "ArrowUp": 38, "ArrowLeft": 37}
        codes |= {"ArrowRight": 39, "Home": 36, "End": 35}
        shared = {"key": key, "windowsVirtualKeyCode": codes.get(key, 0), "modifiers": modifiers}
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text or ("\r" if key == "Enter" else ""), **shared)
        self.send("Input.dispatchKeyEvent", type="keyUp", **shared)

    def type(self, text: str) -> None:
        """Type a text into the field that has the focus."""
        self.send("Input.insertText", text=text)

    def center_of(self, selector: str) -> tuple[float, float]:
        """Return the centre of the first element that a CSS selector picks."""
        code = f"(() => {{ const b = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
        x, y = self.run(f"{code} return [b.x + b.width / 2, b.y + b.height / 2]; }})()")
        return x, y

    def move_to(self, selector: str) -> None:
        x, y = self.center_of(selector)
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.settle()

    def click(self, selector: str) -> None:
        x, y = self.center_of(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.settle()

    def screenshot(self, *, whole: bool = False) -> bytes:
        """Return the page, or what of it is in view, as PNG."""
        self.settle()
        return base64.b64decode(self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"])

    def pdf(self) -> bytes:
        """Return the page as it prints."""
        return base64.b64decode(self.send("Page.printToPDF", printBackground=False)["data"])

    def complaints(self) -> list[str]:
        """Return what went wrong in the page: exceptions, errors in the log (violations of its policy), dialogs."""
        self.settle()
        found = []
        for event in self.events:
            details = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                details = details["exceptionDetails"]
                found.append(details.get("exception", {}).get("description") or details["text"])
            elif event["method"] == "Log.entryAdded" and details["entry"]["level"] in ("error", "warning"):
                found.append(details["entry"]["text"])
            elif event["method"] == "Page.javascriptDialogOpening":
                found.append(f"dialog: {details['message']}")
        return found

    def requests(self) -> list[str]:
        """Return the addresses that the page asked for, besides its own."""
        sent = [
            event["params"]["request"]["url"] for event in self.events if event["method"] == "Network.requestWillBeSent"
        ]
        return sent[1:]


def _pipe() -> tuple[int, int]:
    """Return both ends of a pipe, with numbers that no other use of a file descriptor needs."""
    ends = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 100) for end in ends]
    for end in ends:
        os.close(end)
    return high[0], high[1]


def _scheme(dark: bool) -> dict[str, str]:
    return {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
