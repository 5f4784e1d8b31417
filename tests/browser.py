"""Headless Chromium for tests of pages: what a reader sees, what the console says, pictures of it.

Selenium and not Playwright: its driver is the distribution's `chromium-driver`, so browser and driver are always of one
version and nothing is downloaded; Playwright brings a driver of its own, made for the browsers that it downloads.
"""

from __future__ import annotations

import base64
import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "headless=new",
    "no-sandbox",  # in containers the tests run as root
    "disable-gpu",
    "disable-quic",
    "disable-dev-shm-usage",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "window-size=1280,900",
)


class Browser:
    """A page in a window, and what can be asked about it."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, path: Path) -> None:
        self.driver.get_log("browser")  # what the page before said
        self.driver.get(path.resolve().as_uri())

    def script(self, text: str, *values):
        return self.driver.execute_script(f"return {text}", *values)

    def texts(self, selector: str) -> list[str]:
        return self.script("[...document.querySelectorAll(arguments[0])].map(e => e.textContent.trim())", selector)

    def complaints(self) -> list[str]:
        """Errors and warnings of the console: scripts that fail, addresses that are refused."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def look(self, width: int = 1280, *, dark: bool = False, javascript: bool = True) -> None:
        """The window's width in CSS px, colours, and whether scripts run (from the next `open` on)."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not javascript})

    def overflow(self) -> int:
        """CSS px by which the page is wider than its window."""
        return self.script("document.documentElement.scrollWidth - document.documentElement.clientWidth")

    def screenshot(self, path: Path, height: int | None = None) -> Path:
        """The whole page, or its first `height` px, as a PNG."""
        size = self.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], height or 16_000), "scale": 1}
        given = {"captureBeyondViewport": True, "clip": clip}
        found = self.driver.execute_cdp_cmd("Page.captureScreenshot", given)
        path.write_bytes(base64.b64decode(found["data"]))
        return path


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser; skips the test where there is none.

    Args:
        profile: an empty folder of its own.
    """
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (pip install '.[test]')")
    binary = next(filter(None, map(shutil.which, NAMES)), None)
    driver = shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("no Chromium and chromedriver on PATH (Debian: apt-get install chromium chromium-driver)")
    options = selenium.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    try:
        yield Browser(window)
    finally:
        window.quit()
