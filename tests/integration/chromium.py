"""A page in headless Chromium by its DevTools protocol: what it asked for, what it complained of, how it looks."""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from websockets.sync.client import ClientConnection, connect

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
)
TIMEOUT_S = 120


class Page:
    """One page of a browser: `events` are all that came since it was opened."""

    def __init__(self, socket: ClientConnection, session: str):
        self._socket, self._session, self._number = socket, session, 0
        self.events: list[dict[str, Any]] = []
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol and its result."""
        self._number += 1
        command = {"id": self._number, "sessionId": self._session, "method": method, "params": params}
        self._socket.send(json.dumps(command))
        while (message := self._receive()).get("id") != self._number:
            self.events.append(message)
        assert "error" not in message, (method, message)
        return message["result"]

    def open(self, path: Path, *, width: int, height: int, scheme: Literal["light", "dark"]) -> None:
        """Load a file anew in a window of this size and theme, and wait until all of it is there."""
        is_phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=is_phone
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url=path.absolute().as_uri())
        while not self.of("Page.loadEventFired"):
            self.events.append(self._receive())

    def of(self, method: str) -> list[dict[str, Any]]:
        """The events of a kind."""
        return [event["params"] for event in self.events if event.get("method") == method]

    def value(self, expression: str) -> Any:
        """What a JavaScript expression comes to in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self, *, whole: bool = False) -> bytes:
        """The window, or the page from top to bottom, as PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(shot["data"])

    def _receive(self) -> dict[str, Any]:
        return json.loads(self._socket.recv(timeout=TIMEOUT_S))


@contextmanager
def chromium_page() -> Iterator[Page]:
    """An empty page of a new browser, which is gone afterwards with all of its processes."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    assert chromium is not None, "no chromium or google-chrome; on Debian, make setup installs it"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [chromium, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            assert process.stderr is not None
            address = next(found[1] for line in process.stderr if (found := re.search(r"(ws://\S+)", line)))
            with connect(address, max_size=None, proxy=None) as socket:
                yield Page(socket, _new_page(socket))
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def _new_page(socket: ClientConnection) -> str:
    """Session of a new tab."""

    def call(number: int, method: str, **params: Any) -> dict[str, Any]:
        socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while (message := json.loads(socket.recv(timeout=TIMEOUT_S))).get("id") != number:
            pass
        return message["result"]

    target = call(1, "Target.createTarget", url="about:blank")["targetId"]
    return call(2, "Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
