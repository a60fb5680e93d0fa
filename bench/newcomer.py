"""How long a newcomer waits: `python -m bench.newcomer [--folder DIR]` prints one JSON object.

The commands of the README's service section, one after another, without a pause for reading: models, `serve`,
`submit --wait`, and the dashboard in a real headless Chromium. Seconds since the first command. In a new folder
everything is made; with --folder what an earlier start has left there is used again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selenium.webdriver.common.by import By

from potstill import recipes
from tests.browser import DESKTOP, browser

POTSTILL = (sys.executable, "-m", "potstill")
RECIPE = recipes.folder() / "served.toml"
LOOK_S = 1.0  # between two looks at the run's page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; default: nowhere that stays")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(path(folder or Path(scratch)), indent=2))


def path(folder: Path) -> dict[str, float]:
    """Seconds until each thing was there. Raises CalledProcessError or RuntimeError where one never was."""
    began, reached = time.monotonic(), dict[str, float]()

    def note(what: str) -> None:
        reached[what] = round(time.monotonic() - began, 1)

    subprocess.run([*POTSTILL, "quickstart", "--models-only"], cwd=folder, stdout=subprocess.DEVNULL, check=True)
    note("models")
    database = folder / "runs" / "potstill.db"
    new_key = ("--new-key",) if database.exists() else ()
    command = [*POTSTILL, "serve", "--port", "0", "--models", "runs/models", *new_key]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as service:
        try:
            key, url = said(service, r"(ps_\S+)"), said(service, r"serves at (\S+)")
            note("serve")
            watch(folder, url, key, note)
        finally:
            service.terminate()
    note("stopped")
    return reached


def said(service: subprocess.Popen[str], pattern: str) -> str:
    """What the service says first that matches. Raises RuntimeError when it ends without."""
    assert service.stdout is not None
    for line in service.stdout:
        if found := re.search(pattern, line):
            return found[1]
    raise RuntimeError(f"the service ended without saying {pattern}")


def watch(folder: Path, url: str, key: str, note: Callable[[str], None]) -> None:
    """Submit the run, sign in, and look at its page until it trains, and then until it has ended."""
    environment = {**os.environ, "POTSTILL_API_KEY": key, "POTSTILL_URL": url}
    name = f"name=newcomer-{os.getpid()}"
    submit = [*POTSTILL, "submit", str(RECIPE), name, "--wait"]
    with browser() as driver, subprocess.Popen(submit, cwd=folder, env=environment, stdout=subprocess.DEVNULL) as run:
        driver.sized(DESKTOP)
        driver.get(url)
        sign_in(driver, key)
        note("signed in")
        while not re.search(r"step [1-9]\d* of", page(driver, f"{url}/runs/{name.removeprefix('name=')}")):
            if run.poll() is not None:
                raise RuntimeError(f"the run ended ({run.returncode}) before its page showed a step")
            time.sleep(LOOK_S)
        note("steps in the dashboard")
        if run.wait():
            raise subprocess.CalledProcessError(run.returncode, submit)
        note("run ended")


def sign_in(driver: Any, key: str) -> None:
    field = driver.find_element(By.CSS_SELECTOR, "input[type=password]")
    field.send_keys(key)
    field.submit()
    while driver.find_elements(By.CSS_SELECTOR, "input[type=password]"):
        time.sleep(0.1)


def page(driver: Any, address: str) -> str:
    driver.get(address)
    text: str = driver.find_element(By.TAG_NAME, "body").text
    return text


if __name__ == "__main__":
    main()
