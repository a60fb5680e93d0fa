"""What a service on this machine has to work with: its port, database, keys, Ray, teachers. Changes nothing.

Asks no teacher a question and sends nobody a key: whoever answers is there.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import httpx2
import psutil

from orchestrator.service.principals import Scope
from orchestrator.service.store.glance import Glance, knows_revision, newest_revision, sqlite_file
from orchestrator.service.store.keys import Key
from orchestrator.service.store.teachers import Teacher
from potstill.doctor import Finding
from potstill.errors import ConfigError, ServiceError

PATIENCE_S = 3.0
SOON_S = 14 * 86400.0
HEAD_RECORD = ".ray-head.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the service is, as its operator tells `potstill serve`."""

    runs: Path
    database: str  # SQLAlchemy URL
    host: str
    port: int
    secrets: Path | None

    @property
    def url(self) -> str:
        """From this machine."""
        wide = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104 - compared with, not bound
        host = wide.get(self.host, f"[{self.host}]" if ":" in self.host else self.host)
        return f"http://{host}:{self.port}"


def examine(place: Place) -> list[Finding]:
    return [_port(place), _runs(place.runs), *_stored(place), *_ray(place.runs)]


def _port(place: Place) -> Finding:
    what = f"port {place.port}"
    try:
        answer = httpx2.get(f"{place.url}/version", trust_env=False, timeout=PATIENCE_S)
        running = answer.json()["version"]
    except httpx2.ConnectError:
        return Finding(what=what, found="free: no service runs", ok=True)
    except (httpx2.RequestError, ValueError, KeyError, TypeError):
        return Finding(what=what, found="another program's", ok=False, advice="serve with another --port")
    return Finding(what=what, found=f"potstill {running} serves", ok=True)


def _runs(runs: Path) -> Finding:
    there = runs.is_dir()
    writes = os.access(runs if there else runs.absolute().parent, os.W_OK)
    found = str(runs) if there else f"{runs}, not made yet"
    return Finding(what="runs", found=found, ok=writes, advice="name a folder with --runs that you may write to")


def _stored(place: Place) -> Iterator[Finding]:
    """Of the database, and of what is in it."""
    try:
        file = sqlite_file(place.database)
        if file is not None and not file.exists():
            yield Finding(what="database", found="none yet: serve makes it", ok=True)
            return
        with closing(Glance(place.database)) as glance:
            yield _schema(glance)
            if glance.is_current:
                yield _keys(glance.keys(), time.time())
                yield from (_teacher(teacher) for teacher in glance.teachers())
    except (ConfigError, ServiceError) as error:
        yield Finding(what="database", found="not to be opened", ok=False, advice=str(error))


def _schema(glance: Glance) -> Finding:
    kind, newest = glance.engine.dialect.name, newest_revision()
    if glance.is_current:
        return Finding(what="database", found=f"{kind}, revision {newest}", ok=True)
    if glance.revision is None:
        found = f"{kind}, without potstill's tables: serve makes them"
        return Finding(what="database", found=found, ok=True)
    if knows_revision(glance.revision):
        found = f"{kind}, revision {glance.revision}: serve upgrades it to {newest}"
        return Finding(what="database", found=found, ok=True)
    advice = "a newer potstill has opened it: install that one"
    return Finding(what="database", found=f"{kind}, revision {glance.revision}", ok=False, advice=advice)


def _keys(keys: list[Key], now: float) -> Finding:
    if not keys:
        return Finding(what="keys", found="none yet: serve shows the first", ok=True)
    living = [key for key in keys if key.revoked_at is None and (key.expires_at is None or key.expires_at > now)]
    ending = [key for key in living if key.expires_at is not None and key.expires_at < now + SOON_S]
    admins = [key for key in living if key.principal.may(Scope.ADMIN)]
    lasting = [key for key in admins if key not in ending]
    found = f"{len(living)} of {len(keys)} work, {len(admins)} administrators'"
    if ending:
        found += f", {len(ending)} end within two weeks: {', '.join(key.id for key in ending)}"
    advice = "make one that lasts, while one works: potstill keys create --scopes admin"
    return Finding(what="keys", found=found, ok=bool(lasting), advice=advice)


def _teacher(teacher: Teacher) -> Finding:
    what, url = f"teacher {teacher.id}", str(teacher.config.get("url", ""))
    try:
        httpx2.get(url, trust_env=False, follow_redirects=False, timeout=PATIENCE_S)
    except (httpx2.RequestError, httpx2.InvalidURL):
        return Finding(what=what, found=f"{url} does not answer", ok=False, advice="start it, or its runs wait")
    return Finding(what=what, found=f"{url} answers", ok=True)


def _ray(runs: Path) -> Iterator[Finding]:
    """The cluster that the environment names, or the head that a service here has started."""
    named = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if named:
        yield _cluster(named)
        return
    record = runs / HEAD_RECORD
    if not record.exists():
        yield Finding(what="ray", found="no RAY_ADDRESS: serve starts a head of its own", ok=True)
        return
    head = json.loads(record.read_bytes())
    lives = psutil.pid_exists(head["pid"])
    found = f"a head of the service's own, process {head['pid']}" if lives else "its head is gone: serve starts another"
    yield Finding(what="ray", found=found, ok=True)


def _cluster(address: str) -> Finding:
    host, _, port = address.rpartition("://")[2].rstrip("/").rpartition(":")
    try:
        socket.create_connection((host or port, int(port) if host else 80), timeout=PATIENCE_S).close()
    except (OSError, ValueError):
        return Finding(what="ray", found=f"{address} does not answer", ok=False, advice="mend RAY_ADDRESS, or start it")
    mode = os.environ.get("RAY_AUTH_MODE", "not set")
    return Finding(what="ray", found=f"{address} answers; RAY_AUTH_MODE is {mode}", ok=True)
