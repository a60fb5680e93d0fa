"""Whether a service on this machine is as closed as its operator thinks: a lint of ports, files and variables.

    asked of     bind address and keys · Host names · Ray's sockets and token mode · vLLM's development mode
                 files that others can read · remote code · python -O

Looks at sockets that listen, modes of files and its own environment, which should be the service's: run it where the
service is run. Changes nothing.
"""

from __future__ import annotations

import ipaddress
import os
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import httpx2
import psutil

from orchestrator.service.checkup import PATIENCE_S, Place
from orchestrator.service.store.glance import Glance, sqlite_file
from potstill.doctor import Finding
from potstill.errors import ConfigError, ServiceError

EVERYWHERE = frozenset({"0.0.0.0", "::"})  # noqa: S104 - compared with, not bound
STRANGER = "rebound.example"  # a name that no service is called by
OTHERS = stat.S_IRWXG | stat.S_IRWXO
SERVICE_SECRET = ".service-secret"  # noqa: S105 - the name of a file


def examine(place: Place) -> list[Finding]:
    return [
        _bind(place),
        _host_names(place),
        *of_ray(listeners()),
        *_variables(),
        *_files(place),
    ]


def _bind(place: Place) -> Finding:
    """What listens at the port, and whether there are keys for whoever reaches it."""
    open_to = [address for address in listeners().get(place.port, []) if not _is_loopback(address)]
    if not _is_loopback(place.host) and place.host not in open_to:
        open_to.append(place.host)
    if not open_to:
        return Finding(what="bind address", found="loopback", ok=True)
    found = f"{', '.join(open_to)}: plain HTTP, so a proxy with TLS belongs before it"
    return Finding(what="bind address", found=found, ok=_has_keys(place), advice="make a key first, on 127.0.0.1")


def _has_keys(place: Place) -> bool:
    try:
        file = sqlite_file(place.database)
        if file is not None and not file.exists():
            return False
        with closing(Glance(place.database)) as glance:
            return bool(glance.keys())
    except (ConfigError, ServiceError):
        return False


def _host_names(place: Place) -> Finding:
    """A running service is asked under a name that is not its own, as a page that rebinds its name would ask."""
    try:
        answer = httpx2.get(f"{place.url}/version", headers={"Host": STRANGER}, trust_env=False, timeout=PATIENCE_S)
    except httpx2.RequestError:
        return Finding(what="host names", found="no service runs that could be asked", ok=True)
    return Finding(
        what="host names",
        found=f"HTTP {answer.status_code} to a stranger's name",
        ok=not answer.is_success,
        advice="no potstill answers there, or a proxy rewrites Host: have it pass the name on, and --allow-host that",
    )


def of_ray(listening: Mapping[int, Sequence[str]]) -> Iterator[Finding]:
    """`listening`: addresses by port, as `listeners` finds them."""
    named = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    mode = os.environ.get("RAY_AUTH_MODE")
    yield Finding(
        what="ray token",
        found=f"RAY_AUTH_MODE={mode}" if mode else "RAY_AUTH_MODE is not set" if named else "of the service's own head",
        ok=mode == "token" if named or mode else True,
        advice="whoever reaches the cluster runs code on it: set RAY_AUTH_MODE=token, there and here",
    )
    yield from _rays_port("dashboard", 8265, listening, _is_loopback)
    for name, port in (("GCS", 6379), ("client server", 10001)):  # of the other machines of a cluster too
        yield from _rays_port(name, port, listening, lambda address: address not in EVERYWHERE)


def _rays_port(
    name: str, port: int, listening: Mapping[int, Sequence[str]], is_closed: Callable[[str], bool]
) -> Iterator[Finding]:
    addresses = listening.get(port, ())
    if addresses:
        yield Finding(
            what=f"ray {name}",
            found=f"port {port} on {', '.join(addresses)}",
            ok=all(map(is_closed, addresses)),
            advice="ray start --dashboard-host=127.0.0.1, and --node-ip-address of a private network",
        )


def _variables() -> Iterator[Finding]:
    development = os.environ.get("VLLM_SERVER_DEV_MODE", "")
    yield Finding(
        what="vllm dev mode",
        found=f"VLLM_SERVER_DEV_MODE={development}" if development else "off",
        ok=not _is_on(development),
        advice="its routes change weights and drop caches for anybody: unset it",
    )
    trusting = sorted(name for name, value in os.environ.items() if "TRUST_REMOTE_CODE" in name and _is_on(value))
    yield Finding(
        what="remote code",
        found=", ".join(trusting) or "not trusted",
        ok=not trusting,
        advice="a model's repository would run code here: unset it",
    )
    bare = sys.flags.optimize > 0 or os.environ.get("PYTHONOPTIMIZE", "") not in {"", "0"}
    yield Finding(
        what="python -O",
        found="on" if bare else "off",
        ok=not bare,
        advice="it takes checks out of libraries that some use for safety: unset PYTHONOPTIMIZE",
    )


def _files(place: Place) -> Iterator[Finding]:
    file = sqlite_file(place.database)
    if file is not None:
        yield from _private("database file", file)
    yield from _private("service secret", place.runs / SERVICE_SECRET)
    if place.runs.exists():
        yield _closed("runs", place.runs, stat.S_IRWXO)
    if place.secrets is not None:
        yield from _private("secrets", place.secrets)
        for secret in sorted(place.secrets.iterdir() if place.secrets.is_dir() else ()):
            yield from _private(f"secret {secret.name}", secret)


def _private(what: str, path: Path) -> Iterator[Finding]:
    if path.exists():
        yield _closed(what, path, OTHERS)


def _closed(what: str, path: Path, to: int) -> Finding:
    status = path.stat()
    mode, mine = stat.S_IMODE(status.st_mode), status.st_uid in {os.geteuid(), 0}
    advice = (
        f"chmod {'o' if to == stat.S_IRWXO else 'go'}-rwx {path}" if mine else f"chown {path}: it is another user's"
    )
    return Finding(what=what, found=f"mode {mode:04o}", ok=not mode & to and mine, advice=advice)


def listeners() -> dict[int, list[str]]:
    """Addresses that somebody on this machine listens at, by port."""
    found: dict[int, list[str]] = {}
    for connection in psutil.net_connections(kind="tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.ip not in found.setdefault(
            connection.laddr.port, []
        ):
            found[connection.laddr.port].append(connection.laddr.ip)
    return found


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def _is_on(value: str) -> bool:
    return value.strip().lower() not in {"", "0", "false", "no"}
