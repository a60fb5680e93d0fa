"""A headless Chromium for tests: a new profile each, nothing but loopback asked for, and all that it complains of.

Refuses to begin without the browser, and says how to install it: a dashboard that no browser has seen is not tested.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)
DESKTOP, PHONE = (1280, 860), (360, 780)


class Browser(webdriver.Chrome):
    """Chromium, with what a test asks of it."""

    def complaints(self) -> list[str]:
        """What the console holds since the last look: refusals of the policy, errors of scripts and of requests."""
        return [entry["message"] for entry in self.get_log("browser") if entry["level"] == "SEVERE"]

    def requested(self) -> list[str]:
        """Every address that was asked for since the last look."""
        sent = (json.loads(entry["message"])["message"] for entry in self.get_log("performance"))
        return [event["params"]["request"]["url"] for event in sent if event["method"] == "Network.requestWillBeSent"]

    def sized(self, size: tuple[int, int]) -> None:
        """The viewport, exactly; phones are narrower than a window may be."""
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def prefers(self, colours: str) -> None:
        """light or dark, as the system would say."""
        features = [{"name": "prefers-color-scheme", "value": colours}]
        self.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def answer(self, script: str) -> Any:
        """What an expression, or the promise that it is, comes to."""
        body = f"const done = arguments[0]; Promise.resolve({script}).then(done, (error) => done(String(error)))"
        return self.execute_async_script(body)


@contextmanager
def browser(hosts: Mapping[str, str] | None = None) -> Iterator[Browser]:
    """`hosts` are names that this browser finds at an address, as a name server would tell it."""
    options = webdriver.ChromeOptions()
    options.binary_location = _found("chromium")
    for flag in FLAGS:
        options.add_argument(flag)
    if hosts:
        rules = ",".join(f"MAP {name} {address}" for name, address in hosts.items())
        options.add_argument(f"--host-resolver-rules={rules}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory(prefix="potstill-browser-", ignore_cleanup_errors=True) as profile:
        options.add_argument(f"--user-data-dir={profile}")
        driver = Browser(options=options, service=Service(_found("chromedriver")))
        try:
            driver.set_script_timeout(15)
            yield driver
        finally:
            driver.quit()


def _found(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        raise RuntimeError(f"{program} is missing: `apt-get install chromium chromium-driver` brings it")
    return path
