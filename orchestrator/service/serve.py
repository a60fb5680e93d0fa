"""The composition root of `potstill serve`: folders, database, first key, cluster, routes and the server that listens.

    <runs>/.service-secret   of the tokens with which runs report      <runs>/.uploads    files of clients
    <runs>/.ray-head.json    the Ray head that this service started    <runs>/.published  checkpoints as models

Several services may share a PostgreSQL database and `runs`: one of them, by a lease, looks after the runs.
Refuses a host beyond loopback while there is no key, a second service over one SQLite file, and to end a local Ray head
on which runs are unfinished.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import ipaddress
import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from orchestrator.service import logs
from orchestrator.service.app import create_app
from orchestrator.service.catalog import Catalog
from orchestrator.service.following import Following
from orchestrator.service.head import LocalHead, start_or_adopt
from orchestrator.service.jobs import Cluster, Launcher, RayLauncher
from orchestrator.service.keys import Signer
from orchestrator.service.measures import Measures
from orchestrator.service.principals import Scope
from orchestrator.service.retention import expire
from orchestrator.service.server import Server
from orchestrator.service.state import ServiceState
from orchestrator.service.store import Store
from orchestrator.service.store.database import Database
from orchestrator.service.supervisor import LEASE_S, Supervisor
from potstill.errors import ConfigError

HEAD_RECORD = ".ray-head.json"
LOCK = ".lock"
SIGNING = ".service-secret"
TURN_S = 1e-3
UNCOLLECTED = 20_000  # objects that are made before the youngest are looked through; Python's own is 700
POLL_S = 1.0  # between two looks at the cluster
FOLLOW_S = 0.25  # between two looks for new events of a run that somebody follows


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceOptions:
    """What `potstill serve` was asked for."""

    host: str
    port: int  # 0: any free one
    runs: Path
    database: str  # SQLAlchemy URL
    key_file: Path | None  # where a key that is made goes; None: it is shown
    allowed_hosts: Sequence[str]
    report_url: str | None  # how runs reach this service; None: host and port
    models: Sequence[Path]  # folders below which a submitted run may name models
    data: Sequence[Path]  # and files
    secrets: Path | None  # folder with one secret a file, which registered teachers may name
    admin_host: str
    admin_port: int | None  # for Prometheus, which needs no key; None: nowhere
    new_key: bool  # make another administrator's key, for one that is lost
    slots: int | None  # runs at the same time; None: any number


def serve(options: ServiceOptions, say: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM. `say` shows one line to the operator."""
    logs.start()
    take_short_turns()
    alone = options.database.startswith("sqlite")
    with claim(options.runs, alone=alone) as lock, contextlib.closing(Store(Database(options.database))) as store:
        admin_key(store, options, say)
        listening = _listen(options)
        url = f"http://{_bracketed(options.host)}:{listening.getsockname()[1]}"
        signer = Signer(_secret(options.runs / SIGNING))
        cluster, head = _cluster(options, say)
        command = (sys.executable, "-m", "potstill", "run")
        launcher = RayLauncher(
            cluster, command=command, report_url=options.report_url or url, service=signer.fingerprint
        )
        state = compose(store, launcher, signer, options, holder=_holder(alone))
        measures = Measures(store, lambda: state.supervisor.healthy)
        app = create_app(state, hosts=[*options.allowed_hosts, options.host], measures=measures)
        try:
            with measures.served(options.admin_host, options.admin_port), _until_asked():
                say(f"potstill serves at {url}")
                collect_seldom()
                Server(app, state.following).run(sockets=[listening])
        finally:
            _end(store, head, lock, options, say)


def take_short_turns() -> None:
    """Have this process's threads change places sooner than Python's 5 ms.

    A thread that reads rows gives the interpreter away with every one of them, and waits for it behind the event loop.
    """
    sys.setswitchinterval(TURN_S)


def collect_seldom() -> None:
    """Have Python look for cycles seldom, and not among what this process has made so far: a service keeps all of it.

    To look through it held up every answer for 130 ms, some times a minute, and found nothing.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(UNCOLLECTED, 10, 10)


@contextlib.contextmanager
def _until_asked() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does: uvicorn sends itself again, once it has stopped, what it was sent."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)


def compose(
    store: Store,
    launcher: Launcher,
    signer: Signer,
    options: ServiceOptions,
    *,
    holder: str,
    poll_s: float = POLL_S,
    lease_s: float = LEASE_S,
) -> ServiceState:
    """Everything that the routes share."""
    runs = options.runs
    catalog = Catalog(
        models=options.models,
        data=options.data,
        uploads=_folder(runs / ".uploads"),
        published=_folder(runs / ".published"),
        runs=runs,
        secrets=options.secrets,
        store=store,
    )
    supervisor = Supervisor(
        store,
        launcher,
        signer,
        runs=runs,
        holder=holder,
        poll_s=poll_s,
        lease_s=lease_s,
        slots=options.slots,
        chores=[lambda held: expire(held, runs), lambda _held: catalog.uploads.sweep()],
    )
    following = Following(store, poll_s=min(FOLLOW_S, poll_s))
    return ServiceState(
        store=store, supervisor=supervisor, signer=signer, catalog=catalog, runs=runs, following=following
    )


def claim(runs: Path, *, alone: bool) -> TextIO:
    """Make `runs` if need be, and hold it until the file that is returned is closed, or the process is gone.

    `alone`: raises ConfigError while another service holds it, because a SQLite file is one service's.
    """
    runs.mkdir(mode=0o750, parents=True, exist_ok=True)
    file = (runs / LOCK).open("a")
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(f"--runs {runs}: another `potstill serve` uses this folder") from None
    return file


def _secret(path: Path) -> bytes:
    """The service's own secret, made once. Whoever is first of several services makes it for all."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secrets.token_bytes(32))
        file.flush()
        os.fsync(file.fileno())
    try:
        with contextlib.suppress(FileExistsError):
            os.link(fresh, path)
    finally:
        fresh.unlink()
    return path.read_bytes()


def _holder(alone: bool) -> str:
    """How this process is called in the lease. One that is alone takes over from its dead predecessor at once."""
    return "the only service" if alone else f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


def _folder(path: Path) -> Path:
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def admin_key(store: Store, options: ServiceOptions, say: Callable[[str], None]) -> None:
    """Make an administrator's key while there is none that opens anything, and where one is asked for.

    Raises ConfigError where a service that others reach would show its first key, and for a file that cannot be made.
    """
    with _first_of_several(options.runs / ".key.lock"):
        _make_key(store, options, say)


def _make_key(store: Store, options: ServiceOptions, say: Callable[[str], None]) -> None:
    keys = store.keys.list()
    if not options.new_key and any(key.principal.sees_all and key.lives for key in keys):
        return
    if not keys and not _is_loopback(options.host) and options.key_file is None:
        raise ConfigError(f"--host {options.host}: there is no API key yet; name a --key-file for one that is made now")
    file = _new_private_file(options.key_file) if options.key_file is not None else None
    _, key = store.keys.create(owner="operator", label="made by potstill serve", scopes=[Scope.ADMIN])
    assert key is not None, "no request has made it before"
    if file is None:
        say(f"API key (shown once): {key}")
        return
    with file:
        file.write(key + "\n")
    say(f"an administrator's API key is in {options.key_file}")


def _cluster(options: ServiceOptions, say: Callable[[str], None]) -> tuple[Cluster, LocalHead | None]:
    """The cluster that the environment names, or a head of our own."""
    named = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if named:
        return Cluster(address=named, token=None), None
    with _first_of_several(options.runs / f"{HEAD_RECORD}.lock"):
        head = start_or_adopt(options.runs / HEAD_RECORD)
    say(f"a Ray head of our own, on loopback: process {head.pid}")
    return head.cluster, head


@contextlib.contextmanager
def _first_of_several(lock: Path) -> Iterator[None]:
    """Services that start together over the same runs come in one after the other: what the first has made is there."""
    with lock.open("a") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        yield


def _end(
    store: Store, head: LocalHead | None, lock: TextIO, options: ServiceOptions, say: Callable[[str], None]
) -> None:
    if head is None:
        return
    unfinished = sum(count for state, count in store.runs.counts().items() if state.active)
    if unfinished:
        say(f"{unfinished} unfinished runs go on under the Ray head {head.pid}; serve again to follow them")
    elif _is_last(lock):
        head.stop(options.runs / HEAD_RECORD)


def _is_last(lock: TextIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _listen(options: ServiceOptions) -> socket.socket:
    """Bound before anything is started, so that a port in use is found out first and a free one is known."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family, backlog=1024)
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
