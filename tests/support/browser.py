"""Headless Chromium, driven over its DevTools protocol: a page's elements and colours as laid out, and its pixels."""

import base64
import io
import itertools
import json
import os
import subprocess
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import websocket
from PIL import Image

from tests.support.waiting import eventually

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
    *("--remote-debugging-port=0", "--remote-allow-origins=*", "--force-device-scale-factor=1"),
)

# What a reader needs of every picture: it is there, its words are big enough and tell apart from what is behind them,
# and none lies on another or outside.
INSPECT = """
(() => {
  const channel = v => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  const light = c => { const [r, g, b] = c.match(/[0-9.]+/g).map(Number);
    return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b); };
  const contrast = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
    return (x + 0.05) / (y + 0.05); };
  const page = getComputedStyle(document.body).backgroundColor;
  const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
  return [...document.querySelectorAll('svg')].map(svg => ({
    title: svg.getAttribute('aria-label'), kind: svg.getAttribute('class'), box: box(svg),
    texts: [...svg.querySelectorAll('text')].map(t => ({ text: t.textContent, box: box(t),
      size: parseFloat(getComputedStyle(t).fontSize), contrast: contrast(getComputedStyle(t).fill, page) })),
    colors: [...svg.querySelectorAll('polyline, rect.bar')].map(shape => {
      const style = getComputedStyle(shape);
      return shape.tagName === 'polyline' ? style.stroke : style.fill; }),
    contrasts: [...svg.querySelectorAll('polyline, rect.bar')].map(shape => {
      const style = getComputedStyle(shape);
      return contrast(shape.tagName === 'polyline' ? style.stroke : style.fill, page); }),
  }));
})()
"""


@dataclass(slots=True)
class Browser:
    """One tab."""

    process: subprocess.Popen[bytes]
    socket: websocket.WebSocket
    _ids: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))

    @classmethod
    def start(cls, directory: Path) -> "Browser":
        """Its profile is made in `directory`."""
        profile = directory / "profile"
        with (directory / "chromium.log").open("wb") as log:
            process = subprocess.Popen(
                ["chromium", *FLAGS, f"--user-data-dir={profile}", "about:blank"],
                stdout=log,
                stderr=log,
                env={**os.environ, "HOME": str(directory)},
            )
        told = profile / "DevToolsActivePort"
        eventually(lambda: told.exists() and told.read_text().count("\n"), "Chromium tells its port")
        port = told.read_text().split()[0]

        def tabs() -> list[dict[str, Any]]:
            """None for a moment after it has told its port."""
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=30) as answer:
                return [tab for tab in json.loads(answer.read()) if tab["type"] == "page"]

        [tab] = eventually(tabs, "Chromium has a tab")
        browser = cls(process, websocket.create_connection(tab["webSocketDebuggerUrl"], timeout=60))
        browser.say("Page.enable")
        return browser

    def say(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command, and what it answers; events meanwhile are passed over."""
        wanted = next(self._ids)
        self.socket.send(json.dumps({"id": wanted, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == wanted:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result

    def open(self, url: str, *, scheme: str, width: int = 1280, reloads: bool = False) -> None:
        """Show a page as someone who prefers the `scheme` "light" or "dark" sees it; returns when it is loaded. A page
        that reloads itself stays as it is unless it `reloads`: it would change while it is looked at."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.say("Emulation.setEmulatedMedia", features=[feature])
        self.say("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.say("Page.navigate", url=url)
        is_there = f"document.readyState == 'complete' && location.href == {json.dumps(url)}"
        hold = "" if reloads else " && (window.stop(), true)"
        eventually(lambda: self.evaluate(is_there + hold), url)

    def evaluate(self, expression: str) -> Any:
        found = self.say("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def pictures(self) -> list[dict[str, Any]]:
        """Every SVG of the page, by `INSPECT`."""
        found: list[dict[str, Any]] = self.evaluate(INSPECT)
        return found

    def screenshot(self) -> Image.Image:
        """The whole page."""
        taken = self.say("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        return Image.open(io.BytesIO(base64.b64decode(taken["data"]))).convert("RGB")

    def stop(self) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(timeout=60)


def check_pictures(browser: Browser) -> list[str]:
    """Each picture of the page can be seen and read; their titles. `browser` shows the page."""
    image = browser.screenshot()
    pictures = browser.pictures()
    for picture in pictures:
        left, top, right, bottom = picture["box"]
        assert right - left > 300, picture["title"]
        assert bottom - top > 50, picture["title"]
        assert right <= image.width, f"{picture['title']} is wider than the page"
        for text in picture["texts"]:
            assert text["size"] >= 11, text
            assert text["contrast"] >= 4.5, text
            assert inside(text["box"], picture["box"]), f"{picture['title']}: {text['text']!r} is cut off"
        for one, other in itertools.combinations(picture["texts"], 2):
            assert not overlap(one["box"], other["box"]), f"{picture['title']}: {one['text']!r} on {other['text']!r}"
        assert all(contrast >= 3 for contrast in picture["contrasts"]), picture["title"]
        shown = pixels(image, picture["box"])
        for color in picture["colors"]:
            red, green, blue = (int(channel) for channel in color.removeprefix("rgb(").rstrip(")").split(","))
            assert (red, green, blue) in shown, f"{picture['title']}: nothing of {color} is to be seen"
    return [picture["title"] for picture in pictures]


def pixels(image: Image.Image, box: list[float]) -> set[tuple[int, ...]]:
    """The colours in a part of a picture."""
    part = image.crop((int(box[0]), int(box[1]), int(box[2]), int(box[3])))
    return {color for _, color in part.getcolors(part.width * part.height) or ()}  # type: ignore[misc]


def inside(box: list[float], other: list[float]) -> bool:
    return all(a >= b - 1 for a, b in zip(box[:2], other[:2], strict=True)) and all(
        a <= b + 1 for a, b in zip(box[2:], other[2:], strict=True)
    )


def overlap(box: list[float], other: list[float]) -> bool:
    """By more than a pixel each way."""
    across = min(box[2], other[2]) - max(box[0], other[0])
    down = min(box[3], other[3]) - max(box[1], other[1])
    return across > 1 and down > 1
