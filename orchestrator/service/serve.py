"""The composition root of `potstill serve`: database, first key, cluster, routes and the server that listens.

Refuses a host beyond loopback while there is no key, a folder that another service uses, and to end a local Ray head
on which runs are unfinished.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import uvicorn

from orchestrator.service.app import create_app
from orchestrator.service.head import LocalHead, start_or_adopt
from orchestrator.service.jobs import Cluster, RayLauncher
from orchestrator.service.store import Store
from potstill.errors import ConfigError

HEAD_RECORD = ".ray-head.json"
LOCK = ".lock"
SHUTDOWN_S = 3  # for answers under way; a follower of events is cut off and resumes


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceOptions:
    """What `potstill serve` was asked for."""

    host: str
    port: int  # 0: any free one
    runs: Path
    database: str  # SQLAlchemy URL
    key_file: Path | None
    allowed_hosts: Sequence[str]
    report_url: str | None  # how runs reach this service; None: host and port


def serve(options: ServiceOptions, say: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM. `say` shows one line to the operator."""
    with claim(options.runs), contextlib.closing(Store(options.database)) as store:
        _first_key(store, options, say)
        listening = _listen(options)
        url = f"http://{_bracketed(options.host)}:{listening.getsockname()[1]}"
        cluster, head = _cluster(options, say)
        command = (sys.executable, "-m", "potstill", "run")
        launcher = RayLauncher(cluster, command=command, report_url=options.report_url or url)
        app = create_app(store, launcher, runs=options.runs, hosts=[*options.allowed_hosts, options.host])
        say(f"potstill serves at {url}")
        try:
            config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=SHUTDOWN_S, server_header=False)
            uvicorn.Server(config).run(sockets=[listening])
        finally:
            _end(store, head, options, say)


def claim(runs: Path) -> TextIO:
    """Make `runs` if need be, and hold it until the file that is returned is closed, or the process is gone.

    Raises ConfigError while another service holds it: two would launch the same run.
    """
    runs.mkdir(parents=True, exist_ok=True)
    file = (runs / LOCK).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(f"--runs {runs}: another `potstill serve` uses this folder") from None
    return file


def _first_key(store: Store, options: ServiceOptions, say: Callable[[str], None]) -> None:
    if store.has_keys():
        return
    if not _is_loopback(options.host):
        raise ConfigError(f"--host {options.host}: there is no API key yet; serve once on 127.0.0.1 to make one")
    file = _new_private_file(options.key_file) if options.key_file is not None else None
    key = store.create_key("first")
    if file is not None:
        with file:
            file.write(key + "\n")
    say(f"API key (shown once): {key}")


def _cluster(options: ServiceOptions, say: Callable[[str], None]) -> tuple[Cluster, LocalHead | None]:
    """The cluster that the environment names, or a head of our own."""
    named = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if named:
        return Cluster(address=named, token=None), None
    head = start_or_adopt(options.runs / HEAD_RECORD)
    say(f"a Ray head of our own, on loopback: process {head.pid}")
    return head.cluster, head


def _end(store: Store, head: LocalHead | None, options: ServiceOptions, say: Callable[[str], None]) -> None:
    if head is None:
        return
    if unfinished := store.unfinished_runs():
        say(f"{len(unfinished)} unfinished runs go on under the Ray head {head.pid}; serve again to follow them")
    else:
        head.stop(options.runs / HEAD_RECORD)


def _listen(options: ServiceOptions) -> socket.socket:
    """Bound before anything is started, so that a port in use is found out first and a free one is known."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family)
    except OSError as error:
        raise ConfigError(f"--host {options.host} --port {options.port}: {error.strerror}") from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _new_private_file(path: Path) -> TextIO:
    """A new file that only its owner can read; an existing one is not overwritten."""
    try:
        return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w")
    except OSError as error:
        raise ConfigError(f"--key-file {path}: {error.strerror}") from None
