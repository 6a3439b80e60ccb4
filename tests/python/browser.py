"""A headless Chromium, driven through ChromeDriver: opens pages from files, in the size and the colour scheme asked for."""

from __future__ import annotations

import base64
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--disable-quic",
    "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip

PATIENCE = 600  # seconds until a browser counts as hung, far above what a busy machine needs


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser with an empty profile, as selenium's driver; it ends with the block."""
    from selenium import webdriver

    assert CHROMIUM and DRIVER
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for option in (*OPTIONS, f"--user-data-dir={profile}"):
            options.add_argument(option)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        driver.command_executor.client_config.timeout = PATIENCE
        try:
            yield driver
        finally:
            driver.quit()


def open_page(driver: Any, page: Path, width: int, height: int = 900, dark: bool = False) -> None:
    """Show a file as on a screen of that size, and wait until its charts are drawn."""
    from selenium.webdriver.support.ui import WebDriverWait

    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get(page.resolve().as_uri())
    marks = ".scatterlayer .point, .barlayer .point, .heatmaplayer image"
    drawn = f"return [...document.querySelectorAll('.chart')].every(one => one.querySelector('{marks}'))"
    WebDriverWait(driver, PATIENCE).until(lambda driver: driver.execute_script(drawn))


def screenshot(driver: Any, height: int | None = None) -> bytes:
    """The page from its top, whole or so many pixels of it, as PNG."""
    width, whole = driver.execute_script("return [innerWidth, document.documentElement.scrollHeight]")
    clip = {"x": 0, "y": 0, "width": width, "height": height or whole, "scale": 1}
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    return base64.b64decode(shot["data"])
