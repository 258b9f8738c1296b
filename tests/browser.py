"""A page in headless Chromium, over its own protocol.

Run as a program it makes pictures of a server's chat, on a desktop and on a phone:

recurrentgemma serve &
python tests/browser.py http://127.0.0.1:8000 pictures/
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)  # fmt: skip
_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
          "--disable-background-networking", "--disable-component-update", "--no-first-run",
          "--disable-dev-shm-usage", "--hide-scrollbars")  # fmt: skip

# So that the pictures come soon.
_SHORT = "(box => { box.value = 40; box.oninput() })(document.getElementById('tokens'))"


@contextlib.contextmanager
def browser(
    url: str, width: int = 1100, height: int = 720, dark: bool = False
) -> Iterator[Page]:  # fmt: skip
    """A page at a size, in the light or in the dark."""
    from websockets.sync.client import connect  # comes with the extra serve

    assert CHROMIUM is not None
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    command = [CHROMIUM, *_FLAGS, f"--user-data-dir={folder.name}", "about:blank"]
    null = subprocess.DEVNULL
    with folder, subprocess.Popen(command, stdout=null, stderr=null) as process:
        try:
            file = Path(folder.name) / "DevToolsActivePort"
            wait_for(lambda: file.exists() and file.read_text().count("\n"))
            port = file.read_text().split()[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as reply:
                target = next(one for one in json.load(reply) if one["type"] == "page")
            address = target["webSocketDebuggerUrl"]
            with connect(address, max_size=None, origin=None, proxy=None) as socket:
                page = Page(socket)
                size = {"width": width, "height": height, "mobile": width < 500}
                page.call("Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=1)
                scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
                page.call("Emulation.setEmulatedMedia", features=[scheme])
                page.open(url)
                yield page
        finally:
            process.terminate()


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    """Waits until something holds; the limit is only there to end what fails."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.05)


class Page:
    """A page that is open."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._numbers = socket, itertools.count(1)

    def call(self, method: str, **options: Any) -> Any:
        """What a method of the protocol returns."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": options}))
        while (answer := json.loads(self._socket.recv(timeout=60))).get("id") != number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def value(self, code: str) -> Any:
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, condition: str) -> None:
        """Waits until an expression in the page is true."""
        wait_for(lambda: self.value(f"Boolean({condition})"))

    def open(self, url: str) -> None:
        """Loads a page; it is ready when it knows its model."""
        self.call("Page.navigate", url=url)
        self.until("document.title && document.querySelector('#model') !== null")
        self.until("document.title !== 'RecurrentGemma'")

    def press(self, id: str) -> None:
        """Clicks an element that can be seen and reached."""
        box = f"document.getElementById({id!r}).getBoundingClientRect()"
        x, y = self.value(f"[{box}.x + {box}.width / 2, {box}.y + {box}.height / 2]")
        assert self.value(f"document.elementFromPoint({x}, {y}).id") == id
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str, enter: bool = True) -> None:
        """Types where the focus is, and sends with the Enter key."""
        self.call("Input.insertText", text=text)
        if enter:
            for kind in ("keyDown", "keyUp"):
                key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
                self.call("Input.dispatchKeyEvent", type=kind, **key)

    def picture(self, path: Path) -> None:
        """Writes what can be seen to a PNG file."""
        data = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))


def main(url: str, folder: str) -> None:
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    for name, width, dark in (("desktop", 1100, False), ("phone", 390, False), ("dark", 1100, True),
                              ("phone-dark", 390, True)):  # fmt: skip
        with browser(url, width, dark=dark) as page:
            page.picture(out / f"{name}-empty.png")
            page.value(_SHORT)
            page.type("Who is Emma?")
            page.until("document.querySelector('.turn.assistant:not(.busy)')")
            page.type("And what did she say about it, in as many words as you can find?")
            page.until("document.querySelectorAll('.turn').length === 4")
            page.picture(out / f"{name}-streaming.png")
            page.until("!document.querySelector('.busy')")
            page.picture(out / f"{name}-done.png")
            if width < 500:
                page.press("menu")
                page.picture(out / f"{name}-menu.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
