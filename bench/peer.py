"""A peer to measure beside: TRL, from the package index, in an environment of its own, as a process that takes turns.

Nothing of it is imported here: its versions of torch and transformers are its own affair. See peer_driver.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PACKAGES = ("trl==1.16.0", "torch==2.13.0")
DRIVER = Path(__file__).with_name("peer_driver.py")


def install(folder: Path) -> Path:
    """Make an environment with TRL in `folder`. Returns its interpreter."""
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if uv is None:
        raise SystemExit("--peer needs uv: make setup")
    python = folder / "bin" / "python"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(folder)], check=True)
    subprocess.run([uv, "pip", "install", "--quiet", "--python", str(python), *_sources(), *PACKAGES], check=True)
    return python


def _sources() -> list[str]:
    """As the Makefile: wheel folders that pip is configured for, else uv's own index of torch for CPUs."""
    asked = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    links = os.environ.get("PIP_FIND_LINKS") or subprocess.run(asked, capture_output=True, text=True).stdout
    found = [part for link in links.split() for part in ("--find-links", link)]
    return found or ["--torch-backend", "cpu"]


class Peer:
    """TRL's trainer, waiting."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    def train(self, steps: int) -> list[tuple[float, float]]:
        """Train so many steps: (seconds, trained tokens) of each. Raises SystemExit when it died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"TRL ended with exit code {self._process.wait()}; see its log")
        return [(seconds, tokens) for seconds, tokens in json.loads(answer)["steps"]]


@contextmanager
def peer(python: Path, log: Path, *arguments: Any) -> Iterator[Peer]:
    """The driver's process, which ends with the block. `arguments`: as peer_driver.py takes them."""
    command = [str(python), "-P", str(DRIVER), *map(str, arguments)]
    pipe = subprocess.PIPE
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE"}
    with (
        log.open("w") as file,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=file, text=True, env=environment) as process,
    ):
        try:
            yield Peer(process)
        finally:
            process.kill()
