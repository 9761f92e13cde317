"""A real browser without a window: chromium, by its DevTools protocol over two pipes. No driver is needed.

with Browser(folder) as browser:
    page = browser.page("http://127.0.0.1:8012/", 1200, 900)
    page.type("def add(")
    page.until("document.title == 'x'")
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import time
from pathlib import Path
from typing import Any, Self

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WITHOUT = "no chromium to open it with"
SECONDS = 60.0  # for anything to come to hold
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # It runs as root where tests do.
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-proxy-server",
    "--force-color-profile=srgb",
    "--remote-debugging-pipe",
)
# name of a key: its code, its Windows code, and the text that it types
KEYS = {
    "Tab": ("Tab", 9, ""),
    "Escape": ("Escape", 27, ""),
    "Enter": ("Enter", 13, "\r"),
    "Backspace": ("Backspace", 8, ""),
    "ArrowLeft": ("ArrowLeft", 37, ""),
    "ArrowUp": ("ArrowUp", 38, ""),
    "End": ("End", 35, ""),
    " ": ("Space", 32, " "),
}
ALT, CONTROL, SHIFT = 1, 2, 8


class Browser:
    """One chromium and its pages.

    Args:
        folder: For its profile, and for what it says.
    """

    def __init__(self, folder: Path):
        assert CHROMIUM is not None, WITHOUT
        (its_in, self.out), (self.into, its_out) = os.pipe(), os.pipe()
        # The browser's ends become 3 and 4 there, so that neither may have one of these numbers here.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (its_in, its_out)]
        said = str(folder / "chromium.log")
        actions = [
            (os.POSIX_SPAWN_DUP2, ends[0], 3),
            (os.POSIX_SPAWN_DUP2, ends[1], 4),
            (os.POSIX_SPAWN_OPEN, 1, said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ]
        words = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"]
        self.process = os.posix_spawn(CHROMIUM, words, os.environ, file_actions=actions, setpgroup=0)
        for end in (its_in, its_out, *ends):
            os.close(end)
        self.number, self.rest, self.events = 0, b"", list[dict[str, Any]]()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        os.close(self.out)
        os.close(self.into)

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol, and return its result; events that come before it are kept."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": session} if session else {}
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer}"
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            assert select.select([self.into], [], [], SECONDS)[0], "chromium says nothing"
            read = os.read(self.into, 2**20)
            assert read, "chromium has ended"
            self.rest += read
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def page(self, url: str, width: int, height: int, dark: bool = False) -> Page:
        """Open a page in a window of this size."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        page.call("Page.navigate", url=url)
        page.until(f"location.href == {json.dumps(url)} && document.readyState == 'complete'")
        return page


class Page:
    """A page, and what somebody does to it."""

    def __init__(self, browser: Browser, session: str):
        self.browser, self.session = browser, session

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **parameters)

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def value(self, expression: str) -> Any:
        """Return the value of an expression of JavaScript, a promise's once it is there."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until an expression holds."""
        end = time.monotonic() + SECONDS
        while not self.value(f"Boolean({expression})"):
            assert time.monotonic() < end, f"it does not come to hold: {expression}"
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        """Return the text of an element."""
        return self.value(f"document.querySelector({json.dumps(selector)}).textContent")

    def press(self, key: str, modifiers: int = 0) -> None:
        """Press a key and let it go."""
        code, number, typed = KEYS[key]
        about = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": modifiers}
        text = {} if modifiers & CONTROL else {"text": typed}
        self.call("Input.dispatchKeyEvent", type="keyDown" if typed else "rawKeyDown", **about, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def type(self, text: str) -> None:
        """Type a text, key by key."""
        for character in text:
            if character == "\n":
                self.press("Enter")
            else:
                self.call("Input.dispatchKeyEvent", type="keyDown", key=character, text=character)
                self.call("Input.dispatchKeyEvent", type="keyUp", key=character)

    def point(self, x: float, y: float) -> None:
        """Move the mouse."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, x: float, y: float) -> None:
        """Click there."""
        self.point(x, y)
        about = {"x": x, "y": y, "button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type="mousePressed", **about)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", **about)

    def middle(self, expression: str) -> tuple[float, float]:
        """Return the middle of the first box of an element or a range."""
        box = f"(() => {{ const box = ({expression}).getClientRects()[0];"
        x, y = self.value(f"{box} return [box.x + box.width / 2, box.y + box.height / 2]; }})()")
        return x, y

    def picture(self, path: Path) -> None:
        """Write what is to be seen as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def complaints(self) -> list[str]:
        """Return what the page said on its console, what it threw, and what was refused to it."""
        found = [event for event in self.browser.events if event.get("sessionId") == self.session]
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in found if event["method"] in kinds]
