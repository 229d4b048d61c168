"""Headless Chromium through its driver, without a network and without a package: what the page does is asked of it."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"]
NO_NETWORK = "--host-resolver-rules=MAP * ~NOTFOUND"


class Browser:
    """One window."""

    def __init__(self, address: str) -> None:
        self._address = address
        logs = {"browser": "ALL", "performance": "ALL"}
        options = {"args": [*ARGUMENTS, NO_NETWORK], "binary": CHROMIUM}
        wanted = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": logs}}
        self._session = "/session/" + self._send("POST", "/session", {"capabilities": wanted})["sessionId"]

    def _send(self, method: str, path: str, content: Any = None) -> Any:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(
            self._address + path, data, {"Content-Type": "application/json"}, method=method
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from None

    def tool(self, name: str, **arguments: Any) -> Any:
        """Ask the developer tools for something."""
        return self._send("POST", f"{self._session}/goog/cdp/execute", {"cmd": name, "params": arguments})

    def show(self, path: Path, width_px: int, *, dark: bool = False, script: bool = True) -> None:
        """Open a file in a window of a width."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.tool("Emulation.setEmulatedMedia", features=scheme)
        self.tool("Emulation.setScriptExecutionDisabled", value=not script)
        self.tool(
            "Emulation.setDeviceMetricsOverride", width=width_px, height=900, deviceScaleFactor=1, mobile=width_px < 600
        )
        self._send("POST", f"{self._session}/url", {"url": path.as_uri()})

    def run(self, script: str) -> Any:
        """Return what a script returns."""
        return self._send("POST", f"{self._session}/execute/sync", {"script": script, "args": []})

    def log(self, kind: str) -> list[dict[str, Any]]:
        """Return what was logged since the last time: `browser` for the console, `performance` for requests."""
        found: list[dict[str, Any]] = self._send("POST", f"{self._session}/se/log", {"type": kind})
        return found

    def requests(self) -> list[str]:
        """Return the addresses that were asked for since the last time."""
        messages = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        sent = [one["params"] for one in messages if one["method"] == "Network.requestWillBeSent"]
        return [one["request"]["url"] for one in sent]

    def picture(self, path: Path) -> None:
        """Write what the whole page looks like as a PNG."""
        data = self.tool("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        """Close the window."""
        self._send("DELETE", self._session)


@contextmanager
def browser() -> Iterator[Browser]:
    """Start the driver and a window, and end both."""
    assert DRIVER is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen([DRIVER, f"--port={port}"], stdout=quiet, stderr=quiet)
    try:
        deadline = time.monotonic() + 30
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert time.monotonic() < deadline, "chromedriver does not answer"
            time.sleep(0.05)
        window = Browser(f"http://127.0.0.1:{port}")
        try:
            yield window
        finally:
            window.close()
    finally:
        process.terminate()
        process.wait(timeout=30)
