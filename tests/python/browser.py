"""A headless Chromium for the tests of pages, driven by selenium. Tests are skipped if it is not installed."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ARGUMENTS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip


class Browser:
    """One window. Its errors and warnings collect in the console until `console` is read."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path, *, width: int = 1200, height: int = 900, **media: str) -> None:
        """Load a page, at a size and with media features as below."""
        self.media(**media)
        self.resize(width, height)
        self.driver.get(page.as_uri())

    def media(self, **features: str) -> None:
        """Set media features by their names, with _ for -. Other features get their defaults."""
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": named})

    def resize(self, width: int, height: int = 900) -> None:
        """Set the window's size in CSS pixels."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def run(self, script: str, *arguments: object) -> Any:
        """Run the body of an async function with `arguments`, and return its result."""
        program = f"""const done = [...arguments].pop(), given = [...arguments].slice(0, -1);
            (async function () {{ {script} }})(...given).then((value) => done({{ value }}), (e) => done({{ e: `${{e}}` }}));"""
        answer = self.driver.execute_async_script(program, *arguments)
        assert "e" not in answer, answer["e"]
        return answer.get("value")

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript expression is true; fail after a minute."""
        self.run(f"while (!({condition})) await new Promise((next) => setTimeout(next, 10));")

    def console(self) -> list[str]:
        """Messages of the console since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def screenshot(self, height: int | None = None) -> bytes:
        """The page, or its upper part with the given height in pixels, as PNG."""
        width, whole = self.run("return [innerWidth, document.documentElement.scrollHeight];")
        clip = {"x": 0, "y": 0, "width": width, "height": height or whole, "scale": 1}
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
        return base64.b64decode(shot["data"])


@contextmanager
def start(profile: Path) -> Iterator[Browser]:
    """A browser with an empty profile in the folder `profile`."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not chromedriver:
        pytest.skip("needs Debian's packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (*ARGUMENTS, f"--user-data-dir={profile}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    try:
        driver.set_script_timeout(60)
        yield Browser(driver)
    finally:
        driver.quit()
