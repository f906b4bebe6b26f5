"""Headless Chromium, driven by selenium: a page as a phone or a large screen shows it, in light and dark."""

import base64
import json
import shutil
from pathlib import Path

import pytest

selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
PROGRAM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",  # root, as in a container, has none
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class Browser(selenium.Chrome):
    """One tab of a Chromium with an empty profile; a context manager."""

    def __init__(self) -> None:
        options = selenium.ChromeOptions()
        options.binary_location = PROGRAM
        for flag in FLAGS:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        super().__init__(options, selenium.ChromeService(DRIVER))  # a given driver: selenium downloads none

    def open(self, path: Path, width: int, scheme: str = "light") -> None:
        """Loads a file in a window of `width` pixels under prefers-color-scheme `scheme`, with an empty log."""
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        self.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        for kind in ("browser", "performance"):
            self.get_log(kind)
        self.get(path.as_uri())

    def value(self, expression: str) -> object:
        """The value of a JavaScript expression in the page."""
        return self.execute_script(f"return {expression}")

    def complaints(self) -> list[str]:
        """Messages on the page's console."""
        return [entry["message"] for entry in self.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses that the page has asked for; data: is none."""
        events = [json.loads(entry["message"])["message"] for entry in self.get_log("performance")]
        urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith("data:")]

    def screenshot(self, path: Path) -> None:
        """Writes a PNG of the whole page."""
        answer = self.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        path.write_bytes(base64.b64decode(answer["data"]))
